"""A base's weights with a static LoRA added: copies, which take the weights' places while a question is answered.

Every question about a document has the static LoRA of its hypernetwork in the same modules. Added once, it costs
nothing afterwards: of the products that a LoRA adds to a pass, those are most. The copies of the last static LoRA are
kept with the model, 26 MB for the shipped hypernetwork in bf16. They are rounded to the type of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from loracast.lora.algebra import Factors, LoRA

_States = dict[str, tuple[object, ...]]
_KEPT: WeakKeyDictionary[nn.Module, tuple[_States, dict[str, Factors], dict[str, nn.Parameter]]] = WeakKeyDictionary()
"""By model, the states of its weights, the last static LoRA, and the weights with it."""
_MERGED_NOW: WeakSet[nn.Module] = WeakSet()


def same_static(loras: Sequence[LoRA | None], modules: Mapping[str, nn.Linear]) -> frozenset[str]:
    """The modules in which all of these LoRAs are the same static one; none where gradients are wanted."""
    first = loras[0] if loras else None
    if first is None or torch.is_grad_enabled():
        return frozenset()
    static = {name for name in first.static if modules[name].weight.is_floating_point()}
    for other in loras[1:]:
        if other is None or not static <= other.static:
            return frozenset()
        if other is not first and not all(_equal(first.factors[name], other.factors[name]) for name in static):
            return frozenset()
    return frozenset(static)


def is_merged(model: nn.Module) -> bool:
    """Whether a model computes with such copies right now; a second static LoRA cannot take their places."""
    return model in _MERGED_NOW


@contextmanager
def merged(model: nn.Module, lora: LoRA, modules: Mapping[str, nn.Linear]) -> Iterator[None]:
    """Have modules compute with the static part of a LoRA added to their weights while the context lasts.

    Whoever calls this holds the model's lock.
    """
    if not modules:
        yield
        return
    weights = _weights(model, lora, modules)
    own = {name: module._parameters["weight"] for name, module in modules.items()}
    _MERGED_NOW.add(model)
    try:
        for name, module in modules.items():
            module._parameters["weight"] = weights[name]
        yield
    finally:
        for name, module in modules.items():
            module._parameters["weight"] = own[name]
        _MERGED_NOW.discard(model)


def _weights(model: nn.Module, lora: LoRA, modules: Mapping[str, nn.Linear]) -> dict[str, nn.Parameter]:
    """The weights with the static part, from the last call if that had the same and the model was not changed since."""
    states: _States = {name: _state(module.weight) for name, module in modules.items()}
    before, kept, weights = _KEPT.get(model, ({}, {}, {}))
    if before != states or not all(_equal(kept[name], lora.factors[name]) for name in modules):
        kept = {name: lora.factors[name] for name in modules}
        weights = {name: _sum(module.weight, kept[name]) for name, module in modules.items()}
        _KEPT[model] = states, kept, weights
    return weights


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
