"""Captures what enters chosen modules of a base while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def capture_inputs(model: Any, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that each forward pass inside the block fills: module name -> first input of that module."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda module, given: inputs.update({name: given[0]})

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
