"""Forward passes of a base: padded batches, captured inputs, a second tree of modules."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids [n, longest] and a bool mask [n, longest] that is true where they are real."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)
    return ids, pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)


@contextmanager
def capture_inputs(model: Any, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that each forward pass inside the block fills: module name -> first input of that module."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda module, given: inputs.update({name: given[0]})

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(keep(name)))
        yield inputs


@contextmanager
def attention_of(config: Any, implementation: str) -> Iterator[None]:
    """Have a base with this config use another implementation of attention, by its name in transformers."""
    usual = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = usual


Module = TypeVar("Module", bound=nn.Module)


def twin(module: Module) -> Module:
    """The same module with the same parameters and buffers, and without any hook.

    A module that accelerate spreads over devices is given back itself: its `forward` belongs to its own tree.
    """
    return module if any(hasattr(part, "_hf_hook") for part in module.modules()) else _twin(module)


def _twin(module: Module) -> Module:
    made = copy.copy(module)
    for name, value in vars(made).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, OrderedDict):
            setattr(made, name, OrderedDict())
    made._modules = {name: None if part is None else _twin(part) for name, part in module._modules.items()}
    return made
