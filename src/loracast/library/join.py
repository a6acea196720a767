"""Makes one LoRA of a document's chunks: their factors, weighed as a question wants them, and the static LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from loracast.library.layout import SENTENCE, STATIC
from loracast.lora.merge import Merging, row_lengths, row_weights
from loracast.lora.target import Target

if TYPE_CHECKING:
    from torch import Tensor

    from loracast.lora.algebra import Factors, LoRA

LENGTH = ".length"
"""Ends the name of what may be kept of a memory's rows beside them: how long each one is."""
ChunkRows = Mapping[str, "Tensor | Sequence[Tensor]"]
"""Factors of chunks, named as in the file: "down_proj.a" for each chunk [layers, r, in], "o_proj.sentence" [r]."""


def join_chunks(
    target: Target,
    rows: ChunkRows,
    common: Mapping[str, Tensor],
    merging: Merging,
    weights: Sequence[float] | None = None,
    sentences: Sequence[Sequence[float]] | None = None,
    dense: bool = True,
    ready: Mapping[str, Factors] = MappingProxyType({}),
) -> LoRA:
    """The LoRA of chunks: their factors merged, and the static ones once, if there are any.

    Args:
        common: what chunks have in common, named as in the file: "down_proj.shared.a" [layers, r, in].
        weights: what the LoRA of each chunk is multiplied with; 1 if None.
        sentences, dense: as in `Adapter.lora`; the sentences chunk by chunk.
        ready: the static factors by module, as they were made before, for the modules that chunks have none in.
    """
    import torch

    from loracast.lora.algebra import Factors, LoRA, is_past_break_even

    joined: dict[str, Factors] = {}
    products: dict[str, Tensor] = {}
    alone: set[str] = set()
    for kind in target.kinds:
        static = [common[name] for side in "ab" if (name := f"{kind}{STATIC}{side}") in common]  # each [layers, r, d]
        a, b = ([*rows[f"{kind}.{side}"]] for side in "ab")  # of each chunk [layers or 1, r, d]
        if ready and not a[0].shape[1]:
            found = [module.name for module in target.of_kind(kind) if module.name in ready]
            joined |= {name: ready[name] for name in found}
            alone.update(found)
            continue
        of_rows = None
        if sentences is not None and (owners := rows.get(f"{kind}{SENTENCE}")) is not None:
            lengths = rows.get(f"{kind}{LENGTH}") or [row_lengths(side) for side in b]
            of_rows = row_weights([*owners], [*lengths], sentences)
        elif weights is not None:
            b = [side * weight for side, weight in zip(b, weights, strict=True)]
        sides: Sequence[Tensor] = merging.join(kind, a, b, of_rows)  # each [layers or 1, m, d]
        if static and not sides[0].shape[1]:
            sides = static
            alone |= {module.name for module in target.of_kind(kind)}
        elif static:
            of_all = zip(sides, static, strict=True)
            sides = [torch.cat([side.expand(len(more), -1, -1), more], dim=1) for side, more in of_all]
        modules, (_, rank, d_in), d_out = target.of_kind(kind), sides[0].shape, sides[1].shape[-1]
        if dense and is_past_break_even(rank, d_in, d_out):
            deltas = sides[1].mT @ sides[0]  # [layers, out, in]
            products |= {module.name: delta for module, delta in zip(modules, deltas, strict=True)}
        else:
            of_modules = (side.expand(len(modules), -1, -1) for side in sides)
            joined |= {m.name: Factors(x, y.T) for m, x, y in zip(modules, *of_modules, strict=True)}
    return LoRA(joined, products, frozenset(alone & joined.keys()))
