"""Merges the chunks of a document into one LoRA: their factors are joined along the rank, so that the deltas add up.

Training merges in the same way as adapters do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Merging:
    """How the rows of several chunks are combined, by module kind."""

    max_unscaled_chunks: Mapping[str, int] = field(default_factory=dict)
    """How many chunks are merged unscaled at most; of K more, each is scaled by this / K."""
    ridges: Mapping[str, float] = field(default_factory=dict)
    """The ridge of the kinds whose keys are decorrelated between chunks (`decorrelate_keys`)."""

    def join(self, kind: str, a: Tensor, b: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Join A [..., chunks, r, in] and B rows [..., chunks, r, out] to [..., m, in and out].

        Args:
            kept: numbers of the m = chunks * r rows that are wanted, ascending; all if None.
        """
        n_chunks, r = a.shape[-3:-1]
        if (most := self.max_unscaled_chunks.get(kind, n_chunks)) < n_chunks:
            b = b * (most / n_chunks)
        a, b = a.flatten(-3, -2), b.flatten(-3, -2)
        if kept is not None:
            a, b = (side.index_select(-2, kept.to(side.device)) for side in (a, b))
        if kind in self.ridges and n_chunks > 1:
            sizes = [r] * n_chunks if kept is None else (kept // r).bincount(minlength=n_chunks).tolist()
            a = decorrelate_keys(a, b, sizes, self.ridges[kind])
        return a, b


def decorrelate_keys(a: Tensor, b: Tensor, sizes: Sequence[int], ridge: float) -> Tensor:
    """Change each chunk's keys so that they respond less to other chunks' keys: A [..., m, in] -> same shape.

    An associative memory solves for the keys k of one chunk by least squares (hypernets/memory.py): (G + ridge)^-1 k,
    where G holds their cosines, each key weighted by the norm of its row of B. Here G over all chunks takes the place
    of each chunk's own: the keys are multiplied by (G_all + ridge)^-1 (G_own + ridge), which leaves a single chunk, and
    a key whose row of B is 0, as they are.

    Args:
        b: rows of B [..., m, out].
        sizes: the number of rows of each chunk; they are neighbours, and m in all.
    """
    import torch

    with torch.autocast(a.device.type, enabled=False):
        weight = torch.linalg.vector_norm(b.detach().float(), dim=-1, keepdim=True)  # [..., m, 1]
        weight = weight / weight.amax(-2, keepdim=True).clamp_min(1e-12)
        keys = a.float()
        length = torch.linalg.vector_norm(keys, dim=-1, keepdim=True).clamp_min(1e-12)
        scale = weight / length
        m, d_in = keys.shape[-2:]
        ridges = ridge * torch.eye(min(m, d_in), device=a.device)
        if m <= d_in:
            gram = torch.addcmul(ridges, scale * (keys @ keys.mT), scale.mT)  # with the ridge
            of_chunk = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(a.device)
            own = gram * (of_chunk[:, None] == of_chunk)
            # The m x m map first, which is smaller than the keys; LU of many small matrices is quicker than Cholesky.
            change = torch.linalg.solve(gram, own)
            found = (length * change / length.mT) @ keys
        else:  # the same (Woodbury), whose cost grows with the number of chunks and not with its cube
            units, flat = keys / length, keys * scale
            pairs = zip(flat.split(sizes, -2), units.split(sizes, -2), strict=True)
            alone = torch.cat([(own @ own.mT) @ unit for own, unit in pairs], -2) + ridge * units
            inner = torch.linalg.solve(flat.mT @ flat + ridges, flat.mT @ alone)
            found = length * (alone - flat @ inner) / ridge
    return found.to(a.dtype)
