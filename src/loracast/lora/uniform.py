"""Brings a LoRA into the form that every runtime agrees on: one rank in all modules, the scale folded in, alpha = rank.

Runtimes compute the scale in different ways (alpha / r, alpha / sqrt(r), one for all modules, none), and several take
one rank for all modules. With alpha == r, no rank-stabilised scale and no patterns, all of them multiply by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from loracast.errors import AdapterError
from loracast.lora.algebra import Factors, LoRA, compress


@dataclass(frozen=True)
class Uniform:
    """A LoRA whose modules all have the same rank, as factors only, the scale folded into B."""

    lora: LoRA
    """In the adapter's own dtype where nothing was computed, in fp32 where it was compressed."""
    rank: int
    error: float
    """|delta - kept|_F / |delta|_F over all modules: 0 where nothing had to be given up."""


def uniform(lora: LoRA, max_rank: int | None = None, allowed: Sequence[int] | None = None) -> Uniform:
    """Give all modules of a LoRA one rank: smaller ones are padded with zeros, larger ones compressed by SVD.

    Args:
        max_rank: the largest rank to keep; None keeps all that a module's shape has room for.
        allowed: the rank becomes the smallest of these that is large enough; the largest is a limit like `max_rank`.

    Raises:
        AdapterError: the LoRA is empty.
    """
    if not lora.names:
        raise AdapterError("this LoRA touches no module; there is nothing to export")
    limit = max(min(shape) for shape in lora.shapes.values())  # many chunks together have more rows than they need
    limit = min([limit, *([] if max_rank is None else [max_rank]), *([] if allowed is None else [max(allowed)])])
    if max_rank is not None and allowed is not None:
        limit = max((size for size in allowed if size <= limit), default=limit)
    error = 0.0
    if lora.dense or lora.rank > limit:
        lora, error = compress(lora.to(dtype=torch.float32), limit)
    rank = lora.rank if allowed is None else min(size for size in allowed if size >= lora.rank)
    padded = {}
    for name, (a, b) in lora.factors.items():
        missing = rank - a.shape[0]
        padded[name] = Factors(functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing)))
    return Uniform(LoRA(padded), rank, error)
