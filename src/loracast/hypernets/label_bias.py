"""Corrects which of a few answers a cast LoRA favours, by the answers of a task's examples.

A LoRA that is cast from a few examples of a classification often gives one of the labels whatever is asked, as prompts
with examples do (Zhao et al., arXiv 2102.09690). A bias b on the logits z of the labels, at the token in which they
first differ, is fitted to the examples,

    min over b of  sum over examples of -log softmax(z + b) of the right label + ridge |b|^2

and becomes one rank of a LoRA in the last MLP. Its B is the smallest change of the MLP's output that adds b to the
logits, to first order; its A is a ridge regression that is 1 where the label is chosen and 0 at the answer's other
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loracast.base.capture import capture_inputs
from loracast.data.tasks import Example
from loracast.hypernets.example_fit import ridge
from loracast.lora.algebra import Factors, LoRA, LoRABatch
from loracast.lora.inject import inject

if TYPE_CHECKING:
    from loracast.base.load import Base

_RIDGE = 0.3  # of the bias, chosen on training tasks and the tasks of benchmarks/unseen_tasks.py
_RIDGE_OF_A = 0.1
_MOST_READ = 64
_STEPS = 300


def label_bias(base: Base, examples: Sequence[Example], module: str, lora: LoRABatch) -> LoRA:
    """Fit the bias of a task's labels under what was cast for it.

    Args:
        module: the output projection of the base's last MLP, which the bias is written to.
        lora: what was cast so far, 1 row.

    Returns:
        a LoRA of rank 1; an empty one where the answers are no labels: there must be two or more, and each must be
        given twice on average.
    """
    examples = examples[:_MOST_READ]
    replies = [tuple(base.chat.reply(example.outputs[0])) for example in examples]
    if not 2 <= len(set(replies)) <= len(replies) / 2:
        return LoRA()
    n_common = sum(1 for _ in takewhile(lambda at: len(set(at)) == 1, zip(*replies, strict=False)))
    tokens = sorted({reply[n_common] for reply in replies})
    inputs, is_chosen, logits = [], [], []
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        inject(base.model, lora.to(base.device).to(base.model.dtype)),
    ):
        change = torch.zeros(lora.factors[module].b.shape[1], device=base.device, requires_grad=True)  # of the output
        adds = base.model.get_submodule(module).register_forward_hook(
            lambda _, given, output: output + change.to(output.dtype)
        )
        try:
            for example, reply in zip(examples, replies, strict=True):
                prompt = base.chat.prompt(example.input, "")
                ids = torch.tensor([[*prompt, *reply[:-1]]], device=base.device)
                n_kept = len(reply) - n_common  # of the tokens, from the one behind which the labels differ
                with capture_inputs(base.model, [module]) as found:
                    given = base.model(input_ids=ids, use_cache=False, logits_to_keep=n_kept).logits
                logits.append(given[0, 0, tokens].float())
                inputs.append(found[module][0, len(prompt) - 1 :].float())
                is_chosen.append(torch.arange(len(reply), device=base.device) == n_common)
        finally:
            adds.remove()
        z = torch.stack(logits)  # [n, k]
        slopes = torch.stack([torch.autograd.grad(one, change, retain_graph=True)[0] for one in z.mean(0)])  # [k, out]
    labels = torch.tensor([tokens.index(reply[n_common]) for reply in replies], device=base.device)
    b = torch.linalg.pinv(slopes - slopes.mean(0)) @ fitted_bias(z.detach(), labels)  # [out]
    x = torch.cat(inputs)  # [t, in]
    (a,), rows = ridge([x], torch.cat(is_chosen)[:, None].float(), torch.ones(len(x), device=x.device), _RIDGE_OF_A)
    return LoRA({module: Factors(rows.T @ a, b[:, None])})


def fitted_bias(logits: Tensor, labels: Tensor) -> Tensor:
    """The bias [k] of logits [n, k] with which labels [n] are likeliest; its sum is 0."""
    n, k = logits.shape
    b = torch.zeros(k, device=logits.device)
    right = torch.nn.functional.one_hot(labels, k).sum(0)
    for _ in range(_STEPS):  # gradient descent on a convex function, whose slope changes by n / 2 + 2 ridge at most
        b = b - ((logits + b).softmax(1).sum(0) - right + 2 * _RIDGE * b) / (n / 2 + 2 * _RIDGE)
    return b
