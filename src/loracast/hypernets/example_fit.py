"""What a task's examples add to its cast LoRA: a ridge fit, one gradient step, and a correction of favoured answers.

Fits a LoRA to a task's examples, by ridge regression on what the other examples add to attention at each one.

Each example is read behind the description and the other examples, with its answer: once as the text that the
hypernetwork reads, once as turns of a conversation. At every token t, a layer misses the attention delta y_t, the mean
of the two, once nothing of this is in the prompt. What it has then, under the LoRA cast so far, are the inputs of
attention's output projection and of the MLP's, which x_t joins, each scaled to a mean square of 1. In each layer, the
fitted LoRA is a share of the best linear map from one to the other,

    min over W of  sum over t of w_t |y_t - W x_t|^2 + ridge |W|^2

whose columns for each projection are cut to a small rank. The columns that a hypernetwork casts are means over tokens;
these differ from token to token. The MLP's inputs are features that no linear map of attention's outputs can make.

Moves what was cast for a task one step towards the answers of its examples, by one backward pass for each.

Each example is read alone, with its answer, under what was cast so far. At every token t, the negative gradient g_t of
the answer's loss with respect to a module's output says how that output should change. Ridge regression gives the
linear map from the module's inputs x_t that comes nearest to these changes,

    min over W of  sum over t of |g_t - W x_t|^2 + ridge |W|^2

and is cut to a small rank. It is the gradient of the loss with respect to the module's weights, times the inverse of
the inputs' second moments (one side of K-FAC: Martens and Grosse, arXiv 1503.05671, section 3). The maps of all modules
together are scaled to a fixed share of what was cast. There is one step: nothing is trained in a loop.

Corrects which of a few answers a cast LoRA favours, by the answers of a task's examples.

A LoRA that is cast from a few examples of a classification often gives one of the labels whatever is asked, as prompts
with examples do (Zhao et al., arXiv 2102.09690). A bias b on the logits z of the labels, at the token in which they
first differ, is fitted to the examples,

    min over b of  sum over examples of -log softmax(z + b) of the right label + ridge |b|^2

and becomes one rank of a LoRA in the last MLP. Its B is the smallest change of the MLP's output that adds b to the
logits, to first order; its A is a ridge regression that is 1 where the label is chosen and 0 at the answer's other
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from loracast.base.forward import capture_inputs
from loracast.base.load import Base
from loracast.documents.task_spec import Example, TaskSpec
from loracast.hypernets.attention_delta_encoder import AttentionDeltaEncoder, TokenDeltas
from loracast.lora.algebra import LoRA, LoRABatch, compress, inject, stack
from loracast.lora.factors import Factors

FEWEST_EXAMPLES = 2
MLP_KIND = "down_proj"
"""Kind of the output projections of MLPs."""
# Chosen on the tasks of benchmarks/unseen_tasks.py (docs/notebook/2026-11-28.md; the rank 2026-12-01.md).
RANK = 8
"""Rank of the fitted LoRA in each module."""
_RIDGE = 0.1
"""Of the mean of |x_t|^2."""
_SHARE = 0.7
"""Of the fitted map that is written: the hypernetwork's own columns write their part beside it."""
_BEFORE_ANSWER = 0.1
"""Weight of a token before the answer; the others have 1."""
_MOST_READ = 8
"""Examples that are read behind the others, of all groups together; each takes three forward passes."""


def fit_examples(
    encoder: AttentionDeltaEncoder, groups: Sequence[TaskSpec], projections: Sequence[Sequence[str]], lora: LoRABatch
) -> LoRA:
    """Fit a LoRA to examples of a task.

    Args:
        groups: the task in groups of examples that are read together.
        projections: modules that the LoRA is for, kind by kind one for each layer that the encoder reads: attention's
            output projections, the MLP's, or both.
        lora: what the hypernetwork has cast for the task, 1 row; the fitted LoRA joins it.

    Returns:
        the fitted LoRA; an empty one where nothing stands before any example.
    """
    pairs = behind_the_others(groups)
    if not pairs:
        return LoRA()
    names = [name for kind in projections for name in kind]
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    ys, weights = [], []
    for spec, example in pairs:
        read = two_views(encoder, spec, example)
        n = read.deltas.shape[1]
        for name, x in encoder.module_inputs(names, read.ids, lora).items():
            inputs[name].append(x[-n:])
        ys.append(read.deltas)
        weights.append(torch.where(torch.arange(n) < read.n_input, _BEFORE_ANSWER, 1.0))
    y, w = torch.cat(ys, dim=1), torch.cat(weights).to(ys[0])
    fitted: dict[str, Factors] = {}
    for i, of_layer in enumerate(zip(*projections, strict=True)):
        sides, rows = ridge([torch.cat(inputs[name]) for name in of_layer], y[i], w, _RIDGE)
        whole = {name: Factors(a, _SHARE * rows.T) for name, a in zip(of_layer, sides, strict=True)}
        fitted |= compress(LoRA(whole), RANK)[0].factors
    return LoRA(fitted)


def two_views(encoder: AttentionDeltaEncoder, spec: TaskSpec, example: Example) -> TokenDeltas:
    """The attention deltas of a task at an example: the mean of those of a text and of turns of a conversation."""
    text, turns = encoder.at_example(spec.text(), example), encoder.after_turns(spec, example)
    n = min(text.deltas.shape[1], turns.deltas.shape[1])  # the input's first token may change after a text
    return replace(
        text, deltas=(text.deltas[:, -n:] + turns.deltas[:, -n:]) / 2, n_input=text.n_input - text.deltas.shape[1] + n
    )


def behind_the_others(groups: Sequence[TaskSpec], most: int = _MOST_READ) -> list[tuple[TaskSpec, Example]]:
    """At most so many examples, spread evenly over all, each with what stands before it.

    That is the rest of its group, those after it first.
    """
    pairs = []
    for group in groups:
        for i, example in enumerate(group.examples):
            others = (*group.examples[i + 1 :], *group.examples[:i])
            pairs.append((replace(group, examples=others), example))
    pairs = [(spec, example) for spec, example in pairs if spec.text()]
    n = min(len(pairs), most)
    return [pairs[i * len(pairs) // n] for i in range(n)]


def ridge(xs: Sequence[Tensor], y: Tensor, weights: Tensor, strength: float) -> tuple[list[Tensor], Tensor]:
    """Ridge regression of y on several inputs together: y_t is about the sum of the B^T A x_t.

    Each input is scaled so that the weighted mean of |x_t|^2 is 1, so that one strength suits them all.

    Args:
        xs: inputs, each [t, d_in] with a d_in of its own.
        y: [t, d_out].
        weights: of the t rows [t].
        strength: of the ridge, as a share of the mean of the weighted square of all inputs together.

    Returns:
        for each input A [t, d_in], and B rows [t, d_out], which all of them share.
    """
    tiny, root = torch.finfo(y.dtype).tiny, weights.sqrt()[:, None]
    xs, y = [x * root for x in xs], y * root
    scales = [(x.square().sum() / weights.sum()).clamp_min(tiny).rsqrt() for x in xs]
    scaled = torch.cat([x * scale for x, scale in zip(xs, scales, strict=True)], dim=1)
    # W = Y^T (X X^T + ridge)^-1 X, since few examples have fewer rows than a row has numbers.
    gram = scaled @ scaled.T  # [t, t]
    diagonal = gram.diagonal()
    diagonal += (strength * diagonal.mean()).clamp_min(tiny)
    solved = torch.linalg.solve(gram, scaled).split([x.shape[1] for x in xs], dim=1)
    return [a * scale for a, scale in zip(solved, scales, strict=True)], y


STEP_RANK = 8
"""Rank of the step in each module."""
# Chosen on the tasks of benchmarks/unseen_tasks.py (docs/notebook/2026-12-01.md).
_STEP_RIDGE = 0.003
"""Of the sum of |x_t|^2."""
_SIZE = 0.008
"""Frobenius norm of the step, of all modules together, as a share of that of what was cast for them."""
_MOST_STEPPED = 64
_MOST_TOKENS = 512
"""Tokens of all examples that a map is fitted to: those at which outputs should change the most."""


_Read = dict[str, tuple[Tensor, Tensor]]
"""By module, its inputs at t tokens of examples [t, in], and how its outputs should change there [t, out]."""


def gradient_step(base: Base, examples: Sequence[Example], modules: Sequence[str], lora: LoRABatch) -> LoRA:
    """The step that lowers the loss of examples' answers, as a LoRA.

    Args:
        modules: names of the modules that change.
        lora: what was cast so far for the task, 1 row; the step joins it.
    """
    examples = examples[:_MOST_STEPPED]
    lora = lora.to(base.device).to(base.model.dtype)
    read: _Read = {}
    with torch.inference_mode(False), torch.enable_grad():
        own = LoRABatch(lora.n, {name: Factors(a.clone(), b.clone()) for name, (a, b) in lora.factors.items()}, {})
        with inject(base.model, own):
            for example in examples:
                read = _largest(read, _read(base, example, modules))
    step: dict[str, Factors] = {}
    for name, (x, y) in read.items():
        (a,), rows = ridge([x], y, torch.ones(len(x), device=x.device), _STEP_RIDGE * len(x))
        step |= compress(LoRA({name: Factors(a, rows.T)}), STEP_RANK)[0].factors
    found = LoRA(step)
    norm, norm_cast = (batch.squared_norms().sqrt() for batch in (stack([found]), lora.only(modules)))
    return found.scale((_SIZE * norm_cast / norm).item()) if norm > 0 else LoRA()


def _read(base: Base, example: Example, modules: Sequence[str]) -> _Read:
    """Read one example forwards and backwards, under the LoRA that the base carries."""
    prompt, reply = base.chat.prompt(example.input, ""), base.chat.reply(example.outputs[0])
    added: dict[str, Tensor] = {}

    def add_zero(name: str) -> Callable[[Any, Any, Tensor], Tensor]:
        def hook(module: Any, given: Any, output: Tensor) -> Tensor:
            added[name] = torch.zeros_like(output, requires_grad=True)
            return output + added[name]

        return hook

    ids = torch.tensor([[*prompt, *reply[:-1]]], device=base.device)
    with ExitStack() as hooks, capture_inputs(base.model, modules) as inputs:
        for name in modules:
            hooks.enter_context(base.model.get_submodule(name).register_forward_hook(add_zero(name)))
        logits = base.model(input_ids=ids, use_cache=False, logits_to_keep=len(reply)).logits[0]
    loss = functional.cross_entropy(logits.float(), torch.tensor(reply, device=base.device))
    gradients = torch.autograd.grad(loss, [added[name] for name in modules])
    return {
        name: (inputs[name][0].detach().to(base.device).float(), -g[0].to(base.device).float())
        for name, g in zip(modules, gradients, strict=True)
    }


def _largest(before: _Read, read: _Read) -> _Read:
    """Of the tokens of two readings, those at which outputs should change the most."""
    if before:
        both = ((name, before[name], read[name]) for name in read)
        read = {name: (torch.cat([old_x, x]), torch.cat([old_y, y])) for name, (old_x, old_y), (x, y) in both}
    sizes = torch.stack([y.square().sum(1) for _, y in read.values()]).sum(0)  # [t]
    if len(sizes) <= _MOST_TOKENS:
        return read
    kept = sizes.topk(_MOST_TOKENS).indices
    return {name: (x[kept], y[kept]) for name, (x, y) in read.items()}


_BIAS_RIDGE = 0.3  # of the bias, chosen on training tasks and the tasks of benchmarks/unseen_tasks.py
_RIDGE_OF_A = 0.1
_MOST_BIASED = 64
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
    examples = examples[:_MOST_BIASED]
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
        with adds, capture_inputs(base.model, [module]) as found:
            for example, reply in zip(examples, replies, strict=True):
                prompt = base.chat.prompt(example.input, "")
                ids = torch.tensor([[*prompt, *reply[:-1]]], device=base.device)
                n_kept = len(reply) - n_common  # of the tokens, from the one behind which the labels differ
                given = base.model(input_ids=ids, use_cache=False, logits_to_keep=n_kept).logits
                logits.append(given[0, 0, tokens].float())
                inputs.append(found[module][0, len(prompt) - 1 :].float())
                is_chosen.append(torch.arange(len(reply), device=base.device) == n_common)
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
        b = b - ((logits + b).softmax(1).sum(0) - right + 2 * _BIAS_RIDGE * b) / (n / 2 + 2 * _BIAS_RIDGE)
    return b
