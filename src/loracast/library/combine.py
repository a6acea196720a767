"""Adds adapters up into one LoRA, each with its weight (negative ones subtract), compressed to a rank if wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loracast.base.fingerprint import check
from loracast.errors import AdapterError
from loracast.library.adapter import Adapter, first_with_static
from loracast.lora.algebra import LoRA, compress, concat


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
