"""A base's weights with a static LoRA added: copies, which take the weights' places while a question is answered.

Every question about a document has the static LoRA of its hypernetwork in the same modules. Added once, it costs
nothing afterwards: of the products that a LoRA adds to a pass, those are most. The copies of the last static LoRA are
kept with the model, 69 MB for the shipped hypernetwork in bf16. They are rounded to the type of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from loracast.lora.algebra import Factors, LoRA
from loracast.lora.fits import check_fits


@dataclass(frozen=True, eq=False)
class Copies:
    """Copies of some weights of a model, with a static LoRA added."""

    factors: Mapping[str, Factors]
    """Of the static LoRA, in the modules that have copies: not in those with quantized weights."""
    modules: Mapping[str, nn.Linear]
    """All of the static LoRA."""
    own: Mapping[str, nn.Parameter]
    """The model's own weights that there are copies of."""
    states: Mapping[str, tuple[object, ...]]
    """Of these, when the copies were made (`_state`)."""
    weights: Mapping[str, nn.Parameter]

    def are_of(self, lora: LoRA, modules: Mapping[str, nn.Linear]) -> bool:
        """Whether they are of this LoRA's static part, and of the modules and weights that the model has now."""
        return self.modules == modules and all(
            modules[name]._parameters["weight"] is weight
            and _state(weight) == self.states[name]
            and _equal(self.factors[name], lora.factors[name])
            for name, weight in self.own.items()
        )


_KEPT: WeakKeyDictionary[nn.Module, Copies] = WeakKeyDictionary()
"""By model, those of the last static LoRA."""
_MERGED_NOW: WeakSet[nn.Module] = WeakSet()


def copies_for(model: nn.Module, loras: Sequence[LoRA | None]) -> Copies | None:
    """The copies of a model's weights with the static LoRA that all rows of a batch have.

    None where they have none in common, where gradients are wanted, and where the model computes with copies right now:
    a second static LoRA cannot take their places.

    Raises AdapterError where the static LoRA does not fit the model. Whoever calls this holds the model's lock.
    """
    first = loras[0] if loras else None
    if first is None or not first.static or torch.is_grad_enabled() or model in _MERGED_NOW:
        return None
    for other in loras[1:]:
        if other is not first and not (other is not None and _has_static_of(other, first)):
            return None
    static = ((name, first.factors[name]) for name in first.static)
    modules = check_fits(model, ((name, (b.shape[0], a.shape[1])) for name, (a, b) in static))
    kept = _KEPT.get(model)
    if kept is None or not kept.are_of(first, modules):
        kept = _KEPT[model] = _copies(first, modules)
    return kept


def _has_static_of(other: LoRA, first: LoRA) -> bool:
    return first.static <= other.static and all(_equal(first.factors[n], other.factors[n]) for n in first.static)


def _copies(lora: LoRA, modules: Mapping[str, nn.Linear]) -> Copies:
    weights = {name: cast(nn.Parameter, module.weight) for name, module in modules.items()}
    own = {name: weight for name, weight in weights.items() if weight.is_floating_point()}
    factors = {name: lora.factors[name] for name in own}
    copies = {name: _sum(weight, factors[name]) for name, weight in own.items()}
    return Copies(factors, modules, own, {name: _state(weight) for name, weight in own.items()}, copies)


@contextmanager
def merged(model: nn.Module, copies: Copies) -> Iterator[None]:
    """Have a model compute with copies of its weights while the context lasts.

    Whoever calls this holds the model's lock.
    """
    _MERGED_NOW.add(model)
    try:
        for name, weight in copies.weights.items():
            copies.modules[name]._parameters["weight"] = weight
        yield
    finally:
        for name, weight in copies.own.items():
            copies.modules[name]._parameters["weight"] = weight
        _MERGED_NOW.discard(model)


def _state(weight: Tensor) -> tuple[object, ...]:
    """What changes when a weight is moved, converted or written to."""
    return weight.data_ptr(), weight._version, weight.dtype, weight.device


def _sum(weight: Tensor, factors: Factors) -> nn.Parameter:
    a, b = (side.to(weight.device, torch.float32) for side in factors)
    return nn.Parameter((weight.float() + b @ a).to(weight.dtype), requires_grad=False)


def _equal(one: Factors, other: Factors) -> bool:
    return one is other or all(
        (x.data_ptr() == y.data_ptr() and x.stride() == y.stride() and x.shape == y.shape and x.dtype == y.dtype)
        or torch.equal(x, y)
        for x, y in zip(one, other, strict=True)
    )
