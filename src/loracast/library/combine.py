"""Adapters added up into one: weights, subtraction, a rank budget with its error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loracast.base.fingerprint import check
from loracast.errors import AdapterError
from loracast.library.adapter import Adapter, loras_together
from loracast.lora.algebra import LoRA, compress, concat


@dataclass(frozen=True)
class Part:
    """An adapter and what it counts: 1 as it is, 0.5 half of it, -1 subtracted."""

    adapter: Adapter
    weight: float = 1.0

    def __str__(self) -> str:
        return self.adapter.name if self.weight == 1 else f"{self.adapter.name}:{self.weight:g}"


def combined(parts: Sequence[Part], rank: int | None = None) -> tuple[LoRA, float]:
    """The weighted sum of adapters, all chunks of a document merged.

    Args:
        rank: largest rank; what has more is compressed. None keeps all of it.

    Returns:
        the LoRA and what the compression lost, |delta - kept| / |delta|.

    Raises:
        AdapterError: fewer than one part. BaseModelError: the adapters are for different bases.
    """
    if not parts:
        raise AdapterError("give at least one adapter to combine")
    first = parts[0].adapter
    for part in parts:
        check(part.adapter.manifest.made_for, first.manifest.made_for, f"the adapter {part.adapter.name!r}")
    loras = loras_together([(part.adapter, None) for part in parts])
    total = concat([lora.scale(part.weight) for lora, part in zip(loras, parts, strict=True)])
    return (total, 0.0) if rank is None or total.rank <= rank else compress(total, rank)
