"""Size and effective rank of a LoRA's delta in every module, how two LoRAs differ there, and plots of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loracast.errors import LoracastError
from loracast.library.save import target_of
from loracast.lora.algebra import LoRA, concat, effective_rank, svd


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
    """Directions that the delta really uses (`algebra.effective_rank`)."""


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


def total(values: Sequence[float]) -> float:
    """The norm of a whole from the norms of its parts."""
    return torch.tensor(values, dtype=torch.float64).norm().item() if values else 0.0


def plot(
    by_kind: Mapping[str, Mapping[int, tuple[float, float]]], out: Path, title: str, labels: tuple[str, str]
) -> None:
    """Draw two numbers of each layer, a line for each module kind, as PNG.

    Args:
        by_kind: module kind -> layer -> the two numbers.
        labels: what the numbers are.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LoracastError("plots need matplotlib: pip install 'loracast[eval]'") from error
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for i, (axis, label) in enumerate(zip(axes, labels, strict=True)):
        for kind, values in by_kind.items():
            layers = sorted(values)
            axis.plot(layers, [values[layer][i] for layer in layers], marker=".", label=kind)
        axis.set(xlabel="layer", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(out, dpi=130)
