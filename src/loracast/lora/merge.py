"""Merges the chunks of a document into one LoRA: their factors are joined along the rank, so that the deltas add up.

Training merges in the same way as adapters do.
"""

from __future__ import annotations

from collections.abc import Mapping
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

    def join(self, kind: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Join A [..., chunks, r, in] and B rows [..., chunks, r, out] to [..., chunks * r, in and out]."""
        n_chunks = a.shape[-3]
        if (most := self.max_unscaled_chunks.get(kind, n_chunks)) < n_chunks:
            b = b * (most / n_chunks)
        if kind in self.ridges and n_chunks > 1:
            a = decorrelate_keys(a, b, self.ridges[kind])
        return a.flatten(-3, -2), b.flatten(-3, -2)


def decorrelate_keys(a: Tensor, b: Tensor, ridge: float) -> Tensor:
    """Change each chunk's keys so that they respond less to other chunks' keys: A [..., chunks, r, in] -> same shape.

    An associative memory solves for the keys k of one chunk by least squares (hypernets/memory.py): (G + ridge)^-1 k,
    where G holds their cosines, each key weighted by the norm of its row of B. Here G over all chunks takes the place
    of each chunk's own: the keys are multiplied by (G_all + ridge)^-1 (G_own + ridge), which leaves a single chunk as
    it is.
    """
    import torch

    with torch.autocast(a.device.type, enabled=False):
        n_chunks, r, d_in = a.shape[-3:]
        weight = torch.linalg.vector_norm(b.detach().float(), dim=-1, keepdim=True)  # [..., chunks, r, 1]
        weight = weight / weight.amax((-3, -2), keepdim=True).clamp_min(1e-12)
        keys = a.flatten(-3, -2).float()  # [..., m, in]
        length = torch.linalg.vector_norm(keys, dim=-1, keepdim=True).clamp_min(1e-12)
        scale = weight.flatten(-3, -2) / length  # [..., m, 1]
        # A row of B that is 0 changes no other row's key, and keeps its own.
        counts = weight.flatten(-2).view(-1, n_chunks * r).any(0).nonzero()[:, 0]
        ridges = ridge * torch.eye(min(len(counts), d_in), device=a.device)
        if len(counts) <= d_in:
            some, length, scale = (t.index_select(-2, counts) for t in (keys, length, scale))
            gram = scale * (some @ some.mT) * scale.mT
            of_chunk = counts // r
            within = gram * (of_chunk[:, None] == of_chunk)
            # Solved for the m x m map first, which is smaller than the keys.
            change = torch.cholesky_solve(within + ridges, torch.linalg.cholesky(gram + ridges))
            found = keys.index_copy(-2, counts, (length * change / length.mT) @ some)
        else:  # the same (Woodbury), whose cost grows with the number of chunks and not with its cube
            units, flat = keys / length, keys * scale
            weighted = flat.view(*flat.shape[:-2], n_chunks, r, d_in)
            alone = ((weighted @ weighted.mT) @ units.view(weighted.shape)).flatten(-3, -2) + ridge * units
            inner = torch.linalg.solve(flat.mT @ flat + ridges, flat.mT @ alone)
            found = length * (alone - flat @ inner) / ridge
    return found.view(a.shape).to(a.dtype)
