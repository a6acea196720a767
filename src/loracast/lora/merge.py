"""Merges the chunks of a document into one LoRA: their factors are joined along the rank, so that the deltas add up.

Training merges in the same way as adapters do, but for rows that these leave out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 64  # rows


@dataclass(frozen=True)
class Merging:
    """How the rows of several chunks are combined, by module kind."""

    max_unscaled_chunks: Mapping[str, int] = field(default_factory=dict)
    """How many chunks are merged unscaled at most; of K more, each is scaled by this / K."""
    ridges: Mapping[str, float] = field(default_factory=dict)
    """The ridge of the kinds whose keys are decorrelated between chunks (`decorrelate_keys`)."""
    most_keys: float = 0.5
    """How many rows of these kinds are merged at most, beside the inputs of a module (`strongest`)."""

    def join(self, kind: str, a: Tensor, b: Tensor, row_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Join A [..., chunks, r, in] and B rows [..., chunks, r, out] to [..., m, in and out].

        Args:
            row_weights: what a question multiplies each row [chunks, r] with; rows of weight 0 are left out, but for
                the few that fill a block. The keys of different chunks are not decorrelated then, which would take time
                and gain nothing (measured: docs/notebook, 2026-11-29).
        """
        n_chunks = a.shape[-3]
        if row_weights is not None:
            b = b * row_weights.to(b)[..., None]
        if (most := self.max_unscaled_chunks.get(kind, n_chunks)) < n_chunks:
            b = b * (most / n_chunks)
        a, b = a.flatten(-3, -2), b.flatten(-3, -2)
        if row_weights is None:
            if kind in self.ridges and n_chunks > 1:
                a, b, owners = strongest(a, b, n_chunks, self.most_keys * a.shape[-1])
                a = decorrelate_keys(a, b, owners, self.ridges[kind])
        elif not row_weights.all():
            counts = row_weights.flatten() != 0
            # Some others fill the last block, with rows of B that are 0: few ranks are few shapes, for each of which a
            # product in bf16 is compiled on a CPU, in half a millisecond.
            kept = counts | ((~counts).cumsum(0) <= -counts.sum() % _BLOCK)
            a, b = (side.index_select(-2, kept.nonzero()[:, 0].to(a.device)) for side in (a, b))
        return a, b


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

    An associative memory solves for the keys k of one chunk by least squares (hypernets/memory.py): (G + ridge)^-1 k,
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
            # The m x m map first, which is smaller than the keys; not by LU (hypernets/memory.py).
            change = torch.cholesky_solve(own, torch.linalg.cholesky(gram))
            found = (length * change / length.mT) @ keys
        else:  # the same (Woodbury), whose cost grows with the number of chunks and not with its cube
            units, flat = keys / length, keys * scale
            own, of_own = (side.unflatten(-2, (int(owners.max()) + 1, -1)) for side in (flat, units))
            alone = ((own @ own.mT) @ of_own).flatten(-3, -2) + ridge * units
            inner = torch.cholesky_solve(flat.mT @ alone, torch.linalg.cholesky(flat.mT @ flat + ridges))
            found = length * (alone - flat @ inner) / ridge
    return found.to(a.dtype)


def row_weights(owners: Tensor, sentences: Sequence[Sequence[float]]) -> Tensor:
    """The weight of each row of a memory [chunks, r], from its sentence [chunks, r] and the sentences' weights."""
    import torch

    found = torch.zeros(owners.shape)
    for i, (row, weights) in enumerate(zip(owners.tolist(), sentences, strict=True)):
        found[i] = torch.tensor([weights[s] if 0 <= s < len(weights) else 0.0 for s in row])
    return found
