"""Adds adapters up into one LoRA, each with its weight (negative ones subtract), compressed to a rank if wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracast.base.fingerprint import check
from loracast.errors import AdapterError, LoracastError
from loracast.library.adapter import Adapter, first_with_static
from loracast.library.library import Library
from loracast.library.save import save_lora, target_of
from loracast.lora.algebra import LoRA, compress, concat, svd
from loracast.lora.factors import effective_rank


@dataclass(frozen=True)
class Part:
    """An adapter and the weight of its LoRA: 1 as it is, 0.5 half of it, -1 subtracted."""

    adapter: Adapter
    weight: float = 1.0

    def __str__(self) -> str:
        return self.adapter.name if self.weight == 1 else f"{self.adapter.name}:{self.weight:g}"


@dataclass(frozen=True)
class Combination:
    """The sum of adapters. Its static LoRA is apart, so that it comes in once beside another adapter that holds it."""

    lora: LoRA
    """The weighted sum without `static`."""
    static: LoRA
    """The static LoRA of the parts, with weight 1 whatever their weights; empty where no part has one."""
    error: float
    """What the rank budget took from `lora`, |delta - kept| / |delta|."""


def combined(parts: Sequence[Part], rank: int | None = None) -> Combination:
    """The weighted sum of adapters, all chunks of a document merged. The order of the parts does not matter.

    Args:
        rank: largest rank of the sum, which is compressed to it; the static LoRA comes on top. None keeps all of it.

    Raises:
        AdapterError: no part is given. BaseModelError: the adapters are for different bases.
    """
    if not parts:
        raise AdapterError("give at least one adapter to combine")
    if not all(math.isfinite(part.weight) for part in parts):
        raise AdapterError("the weight of an adapter must be a finite number")
    adapters = [part.adapter for part in parts]
    for adapter in adapters:
        check(adapter.manifest.made_for, adapters[0].manifest.made_for, f"the adapter {adapter.name!r}")
    weighted = [part.adapter.lora(static=False).scale(part.weight) for part in parts]
    is_first = zip(adapters, first_with_static(adapters), strict=True)
    statics = [adapter.static_lora for adapter, is_new in is_first if is_new and adapter.static_lora.names]
    total = concat(weighted + statics[1:])  # a file keeps one apart; that of another hypernetwork goes into the sum
    error = 0.0
    if rank is not None and total.rank > rank:
        total, error = compress(total, rank)
    return Combination(total, statics[0] if statics else LoRA(), error)


def save_combined(
    parts: Sequence[Part], library: Library, name: str, rank: int | None = None, *, replace: bool = False
) -> tuple[Adapter, float]:
    """Keep the weighted sum of adapters as one; the adapter, and what the rank budget took (`Combination.error`)."""
    made, made_for = combined(parts, rank), parts[0].adapter.manifest.made_for
    about: dict[str, Any] = {"kind": "combined", "title": " + ".join(map(str, parts)), "made_for": made_for}
    return save_lora(made.lora, library, name, static=made.static, replace=replace, **about), made.error


@dataclass(frozen=True)
class ModuleSize:
    """Size of the delta of one module."""

    layer: int
    kind: str
    norm: float
    """Frobenius norm."""
    rank: int
    """Directions that the factors have room for."""
    effective_rank: float
    """Directions that the delta really uses (`lora.factors.effective_rank`)."""


@dataclass(frozen=True)
class ModuleDifference:
    """How the deltas of two LoRAs differ in one module."""

    layer: int
    kind: str
    norm: float
    """Frobenius norm of the first."""
    other_norm: float
    """Frobenius norm of the second."""
    cosine: float
    """1: the same direction; 0: nothing in common. 0 where one of them is zero."""
    distance: float
    """Frobenius norm of their difference."""


def sizes(lora: LoRA) -> list[ModuleSize]:
    """Size of the delta in each module, in the target's order."""
    found = []
    for module in target_of(lora).modules:
        _, values, _ = svd(lora, module.name)
        found.append(ModuleSize(module.layer, module.kind, values.norm().item(), len(values), effective_rank(values)))
    return found


def differences(one: LoRA, other: LoRA) -> list[ModuleDifference]:
    """Differences in each module of either, in the target's order. Raises AdapterError for bases of other shapes."""
    both = concat([one, other.scale(-1.0)])
    norms = [lora.norms() for lora in (one, other, both)]
    found = []
    for module in target_of(both).modules:
        a, b, d = (n.get(module.name, 0.0) for n in norms)
        inner = (a * a + b * b - d * d) / 2
        cosine = max(-1.0, min(1.0, inner / (a * b))) if a and b else 0.0
        found.append(ModuleDifference(module.layer, module.kind, a, b, cosine, d))
    return found


def draw(
    modules: Sequence[ModuleSize | ModuleDifference],
    fields: tuple[str, str],
    out: Path,
    title: str,
    labels: tuple[str, str],
) -> None:
    """Draw two fields of every module over the layers, a line for each kind, as PNG; `labels` name the fields."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LoracastError("plots need matplotlib: pip install 'loracast[eval]'") from error
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, field, label in zip(axes, fields, labels, strict=True):
        for kind in dict.fromkeys(module.kind for module in modules):
            values = sorted((module.layer, getattr(module, field)) for module in modules if module.kind == kind)
            axis.plot(*zip(*values, strict=True), marker=".", label=kind)
        axis.set(xlabel="layer", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(out, dpi=130)
