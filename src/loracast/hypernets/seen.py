"""What text-to-LoRA hypernetworks know of the descriptions that they were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.errors import ConfigError, HypernetworkError
from loracast.lora.algebra import LoRA
from loracast.lora.target import TargetModule

_GATE_WIDTH = 64
_GATE_START = 3.0  # logit: open


def make_gate(width: int, start: float = _GATE_START) -> nn.Sequential:
    """What shuts for descriptions that describe nothing: a vector of them -> a logit, at the start the same whatever it sees: open, unless told otherwise."""
    first, last = nn.Linear(width, _GATE_WIDTH), nn.Linear(_GATE_WIDTH, 1)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, start)
    return nn.Sequential(first, nn.SiLU(), last)


class SeenDescriptions:
    """Tells how far a description is from all that training has seen."""

    seen: Tensor
    """One vector for each description seen in training [m, d]."""
    config: Any

    def pooled(self, conditions: Tensor) -> Tensor:
        """What the text encoder gives for n descriptions -> one vector for each [n, d]."""
        raise NotImplementedError

    def distances(self, conditions: Tensor) -> Tensor:
        """How far each description is from the nearest that training has seen: 1 - cosine, [n]."""
        if not len(self.seen):
            raise HypernetworkError("this hypernetwork does not know which descriptions it was trained on")
        return 1 - _cosines(self.pooled(conditions), self.seen).amax(1)

    def ood_threshold(self) -> float | None:
        """The distance within which nearly all (95 %) of the descriptions seen in training have another one; None for fewer than two."""
        if len(self.seen) < 2:
            return None
        cosines = _cosines(self.seen, self.seen).fill_diagonal_(-1)
        return 1 - cosines.amax(1).quantile(0.05).item()


def shared_factors(lora: LoRA, modules: Sequence[TargetModule], rank: int) -> tuple[Tensor, Tensor]:
    """The factors of a LoRA that was trained on all tasks, for modules of one kind: A [modules, r, in], B rows [modules, r, out].

    Raises:
        ConfigError: it lacks one of the modules, or has another rank.
    """
    for module in modules:
        pair = lora.factors.get(module.name)
        if pair is None or pair.a.shape != (rank, module.d_in) or pair.b.shape != (module.d_out, rank):
            raise ConfigError(
                f"the LoRA to start from has no factors of rank {rank} for {module.name}: train it on the same modules, with that rank"
            )
    pairs = [lora.factors[module.name] for module in modules]
    return torch.stack([pair.a.float() for pair in pairs]), torch.stack([pair.b.float().T for pair in pairs])


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """[n, d], [m, d] -> [n, m]."""
    x, y = (functional.normalize(side.float(), dim=-1) for side in (x, y))
    return x @ y.T
