"""Merges the chunks of a document into one LoRA: their factors are joined along the rank, so that the deltas add up.

Training merges in the same way as adapters do, but for rows that these leave out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MOST_KEYS = 0.5
"""Keys that a memory tells apart, in parts of a module's inputs (measured: docs/notebook, 2026-11-30)."""
MOST_ROUTED = 64
"""Rows of a memory that a question gets at most. The 64th is about .03 times as long as the first one."""


@dataclass(frozen=True)
class Merging:
    """How the rows of several chunks are combined, by module kind."""

    max_unscaled_chunks: Mapping[str, int] = field(default_factory=dict)
    """How many chunks are merged unscaled at most; of K more, each is scaled by this / K."""
    ridges: Mapping[str, float] = field(default_factory=dict)
    """The ridge of the kinds whose keys are decorrelated between chunks (`decorrelate_keys`)."""
    most_keys: float = MOST_KEYS
    """How many rows of these kinds are merged at most, beside the inputs of a module (`strongest`)."""

    def join(
        self, kind: str, a: Sequence[Tensor], b: Sequence[Tensor], picked: Sequence[tuple[Tensor, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Join the chunks' A [..., r, in] and B rows [..., r, out] to [..., m, in and out].

        Args:
            picked: the rows of each chunk that a question gets, and what it multiplies their B with (`row_weights`);
                all of them as they are if None. The keys of different chunks are not decorrelated then, which would
                take time and gain nothing (measured: docs/notebook, 2026-11-29).
        """
        import torch

        n_chunks = len(a)
        if picked is not None:
            a = [side.index_select(-2, rows.to(side.device)) for side, (rows, _) in zip(a, picked, strict=True)]
            b = [
                side.index_select(-2, rows.to(side.device)) * weights.to(side)[:, None]
                for side, (rows, weights) in zip(b, picked, strict=True)
            ]
        if (most := self.max_unscaled_chunks.get(kind, n_chunks)) < n_chunks:
            b = [side * (most / n_chunks) for side in b]
        joined_a, joined_b = (side[0] if len(side) == 1 else torch.cat([*side], dim=-2) for side in (a, b))
        if picked is None and kind in self.ridges and n_chunks > 1:
            joined_a, joined_b, owners = strongest(joined_a, joined_b, n_chunks, self.most_keys * joined_a.shape[-1])
            joined_a = decorrelate_keys(joined_a, joined_b, owners, self.ridges[kind])
        return joined_a, joined_b


def row_lengths(b: Tensor) -> Tensor:
    """The length of each row of one chunk's B [..., r, out] in all modules together: [r], on the CPU."""
    import torch

    return torch.linalg.vector_norm(b, dim=[*range(b.ndim - 2), -1], dtype=torch.float32).cpu()


def row_weights(
    owners: Sequence[Tensor], lengths: Sequence[Tensor], sentences: Sequence[Sequence[float]]
) -> list[tuple[Tensor, Tensor]]:
    """The rows of each chunk that a question gets, and what it multiplies their B with: the weights of their sentences.

    Those `MOST_ROUTED` of all rows that are the longest ones then. So many also where fewer have a weight at all: for
    each new number of rows a product in bf16 is compiled on a CPU, in half a millisecond.

    Args:
        owners: the number of each row's sentence [r], or -1.
        lengths: of the rows (`row_lengths`) [r].
        sentences: the weights of each chunk's sentences.

    Returns:
        for each chunk, the numbers of its rows [k], ascending, and their weights [k].
    """
    import torch

    weights = torch.cat(
        [
            torch.tensor([*of_chunk, 0.0])[rows.long().clamp(-1, len(of_chunk))]  # -1, too, names the 0
            for rows, of_chunk in zip(owners, sentences, strict=True)
        ]
    )
    longest = (weights.abs() * torch.cat([*lengths])).topk(min(MOST_ROUTED, len(weights))).indices
    sizes = [len(rows) for rows in owners]
    is_kept = torch.zeros_like(weights, dtype=torch.bool).index_fill(0, longest, True).split(sizes)
    kept = [of_chunk.nonzero()[:, 0] for of_chunk in is_kept]
    return [(rows, of_chunk[rows]) for rows, of_chunk in zip(kept, weights.split(sizes), strict=True)]


def strongest(a: Tensor, b: Tensor, n_chunks: int, most: float) -> tuple[Tensor, Tensor, Tensor]:
    """At most so many rows of a memory A [..., m, in] and B [..., m, out], and the chunk of each row [..., rows].

    More keys than about half of a module's inputs cannot be told apart; the rows with the longest values remain, since
    a memory writes short values for tokens that hardly answer a question (measured: docs/notebook, 2026-11-30).
    """
    import torch

    owners = torch.arange(n_chunks, device=a.device).repeat_interleave(a.shape[-2] // n_chunks)
    if most >= a.shape[-2]:
        return a, b, owners
    length = torch.linalg.vector_norm(b.detach().float(), dim=-1)  # [..., m]
    kept = length.topk(int(most), dim=-1).indices.sort(dim=-1).values  # [..., most]

    def rows(side: Tensor) -> Tensor:
        leading, d = side.shape[:-2], side.shape[-1]
        return side.gather(-2, kept.expand(*leading, -1)[..., None].expand(*leading, -1, d))

    return rows(a), rows(b), owners[kept]


def decorrelate_keys(a: Tensor, b: Tensor, owners: Tensor, ridge: float) -> Tensor:
    """Change each chunk's keys so that they respond less to other chunks' keys: A [..., m, in] -> same shape.

    An associative memory solves for the keys k of one chunk by least squares (associative_memory.py): (G + ridge)^-1 k,
    where G holds their cosines, each key weighted by the norm of its row of B. Here G over all chunks takes the place
    of each chunk's own: the keys are multiplied by (G_all + ridge)^-1 (G_own + ridge), which leaves a single chunk, and
    a key whose row of B is 0, as they are.

    Args:
        b: rows of B [..., m, out].
        owners: the chunk of each row [..., m]; of more rows than inputs, as many of each chunk.
    """
    import torch

    with torch.autocast(a.device.type, enabled=False):
        weight = torch.linalg.vector_norm(b.detach().float(), dim=-1, keepdim=True)  # [..., m, 1]
        weight = weight / weight.amax(-2, keepdim=True).clamp_min(1e-12)
        keys = a.float()
        length = torch.linalg.vector_norm(keys, dim=-1, keepdim=True).clamp_min(1e-12)
        scale = weight / length
        ridges = ridge * torch.eye(min(keys.shape[-2:]), device=a.device)
        if keys.shape[-2] <= keys.shape[-1]:
            gram = torch.addcmul(ridges, scale * (keys @ keys.mT), scale.mT)  # with the ridge
            own = gram * (owners[..., :, None] == owners[..., None, :])
            # The m x m map first, which is smaller than the keys; not by LU (associative_memory.py).
            change = torch.cholesky_solve(own, torch.linalg.cholesky(gram))
            found = (length * change / length.mT) @ keys
        else:  # the same (Woodbury), whose cost grows with the number of chunks and not with its cube
            units, flat = keys / length, keys * scale
            own, of_own = (side.unflatten(-2, (int(owners.max()) + 1, -1)) for side in (flat, units))
            alone = ((own @ own.mT) @ of_own).flatten(-3, -2) + ridge * units
            inner = torch.cholesky_solve(flat.mT @ alone, torch.linalg.cholesky(flat.mT @ flat + ridges))
            found = length * (alone - flat @ inner) / ridge
    return found.to(a.dtype)
