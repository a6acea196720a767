"""Brings a LoRA into the form that every runtime agrees on: one rank in all modules, the scale folded in, alpha = rank.

Runtimes compute the scale in different ways (alpha / r, alpha / sqrt(r), one for all modules, none), and several take
one rank for all modules. With alpha == r, no rank-stabilised scale and no patterns, all of them multiply by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.nn import functional

from loracast.errors import AdapterError
from loracast.lora.algebra import Factors, LoRA, compress


@dataclass(frozen=True)
class Uniform:
    """A LoRA whose factors all have one rank."""

    lora: LoRA
    rank: int
    error: float
    """|delta - kept|_F / |delta|_F over all modules: 0 where nothing had to be given up."""


def uniform(lora: LoRA, max_rank: int | None = None, allowed: Sequence[int] | None = None) -> Uniform:
    """Give a LoRA one rank in all modules, padded with zeros or compressed.

    Args:
        max_rank: what has more is compressed to it (SVD), with an error; None keeps all of it.
        allowed: the rank becomes the smallest of these that is not smaller; the largest is a limit like `max_rank`.

    Raises:
        AdapterError: the LoRA is empty.
    """
    if not lora.names:
        raise AdapterError("this LoRA touches no module; there is nothing to export")
    limit = min([rank for rank in (max_rank, max(allowed) if allowed else None) if rank is not None], default=None)
    error = 0.0
    if lora.dense or (limit is not None and lora.rank > limit):
        lora, error = compress(lora, lora.rank if limit is None else limit)
    rank = lora.rank if allowed is None else min(size for size in allowed if size >= lora.rank)
    padded = {}
    for name, (a, b) in lora.factors.items():
        missing = rank - a.shape[0]
        padded[name] = Factors(functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing)))
    return Uniform(LoRA(padded), rank, error)
