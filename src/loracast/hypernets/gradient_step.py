"""Moves what was cast for a task one step towards the answers of its examples, by one backward pass for each.

Each example is read alone, with its answer, under what was cast so far. At every token t, the negative gradient g_t of
the answer's loss with respect to a module's output says how that output should change. Ridge regression gives the
linear map from the module's inputs x_t that comes nearest to these changes,

    min over W of  sum over t of |g_t - W x_t|^2 + ridge |W|^2

and is cut to a small rank. It is the gradient of the loss with respect to the module's weights, times the inverse of
the inputs' second moments (one side of K-FAC: Martens and Grosse, arXiv 1503.05671, section 3). The maps of all modules
together are scaled to a fixed share of what was cast. There is one step: nothing is trained in a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from loracast.base.capture import capture_inputs
from loracast.data.tasks import Example
from loracast.hypernets.example_fit import ridge
from loracast.lora.algebra import Factors, LoRA, LoRABatch, compress, stack
from loracast.lora.inject import inject

if TYPE_CHECKING:
    from loracast.base.load import Base

RANK = 8
"""Rank of the step in each module."""
# Chosen on the tasks of benchmarks/unseen_tasks.py (docs/notebook/2026-12-01.md).
_RIDGE = 0.003
"""Of the sum of |x_t|^2."""
_SIZE = 0.008
"""Frobenius norm of the step, of all modules together, as a share of that of what was cast for them."""
_MOST_READ = 64
_MOST_TOKENS = 512
"""Tokens of all examples that a map is fitted to: those at which outputs should change the most."""


class _Read(NamedTuple):
    """What t tokens of examples say of each module, by name."""

    inputs: dict[str, Tensor]
    """[t, in]"""
    changes: dict[str, Tensor]
    """How the output should change [t, out]."""

    @property
    def sizes(self) -> Tensor:
        """How much all outputs should change at each token [t]."""
        return torch.stack([y.square().sum(1) for y in self.changes.values()]).sum(0)


def gradient_step(base: Base, examples: Sequence[Example], modules: Sequence[str], lora: LoRABatch) -> LoRA:
    """The step that lowers the loss of examples' answers, as a LoRA.

    Args:
        modules: names of the modules that change.
        lora: what was cast so far for the task, 1 row; the step joins it.
    """
    examples = examples[:_MOST_READ]
    lora = lora.to(base.device).to(base.model.dtype)
    read = _Read({}, {})
    with torch.inference_mode(False), torch.enable_grad():
        own = LoRABatch(lora.n, {name: Factors(a.clone(), b.clone()) for name, (a, b) in lora.factors.items()}, {})
        with inject(base.model, own):
            for example in examples:
                read = _largest(read, _read(base, example, modules))
    step: dict[str, Factors] = {}
    for name in modules:
        x, y = read.inputs[name], read.changes[name]
        (a,), rows = ridge([x], y, torch.ones(len(x), device=x.device), _RIDGE * len(x))
        step |= compress(LoRA({name: Factors(a, rows.T)}), RANK)[0].factors
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
    handles = [base.model.get_submodule(name).register_forward_hook(add_zero(name)) for name in modules]
    try:
        with capture_inputs(base.model, modules) as inputs:
            logits = base.model(input_ids=ids, use_cache=False, logits_to_keep=len(reply)).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    loss = functional.cross_entropy(logits.float(), torch.tensor(reply, device=base.device))
    found = torch.autograd.grad(loss, [added[name] for name in modules])
    return _Read(
        {name: inputs[name][0].detach().to(base.device).float() for name in modules},
        {name: -g[0].to(base.device).float() for name, g in zip(modules, found, strict=True)},
    )


def _largest(before: _Read, read: _Read) -> _Read:
    """Of the tokens of two readings, those at which outputs should change the most."""
    if before.inputs:
        read = _Read(
            *({name: torch.cat([old[name], new[name]]) for name in new} for old, new in zip(before, read, strict=True))
        )
    if len(sizes := read.sizes) <= _MOST_TOKENS:
        return read
    kept = sizes.topk(_MOST_TOKENS).indices
    return _Read(*({name: some[kept] for name, some in side.items()} for side in read))
