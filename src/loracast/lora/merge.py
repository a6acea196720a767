"""Merges the chunks of a document into one LoRA, in training as in adapters: their factors are joined along the rank.

The deltas of the chunks then add up; `Merging` says where many chunks are scaled down and their keys decorrelated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Merging:
    """How chunks are merged, by module kind."""

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
    """Make the keys A [..., chunks, r, in] respond less to what the keys of other chunks stand for.

    Within a chunk an associative memory solves for its keys by least squares (hypernets/memory.py). Over all chunks
    together that would give (G + ridge)^-1 k for the keys k, where G holds their weighted cosines; each chunk by
    itself, G without what is between chunks. So the keys are multiplied by the quotient of the two, which leaves a
    single chunk as it is.
    """
    import torch

    with torch.autocast(a.device.type, enabled=False):
        keys = a.float()
        length = torch.linalg.vector_norm(keys, dim=-1, keepdim=True).clamp_min(1e-12)
        units = keys / length
        weight = torch.linalg.vector_norm(b.detach().float(), dim=-1, keepdim=True)  # [..., chunks, r, 1]
        weighted = units * (weight / weight.amax((-3, -2), keepdim=True).clamp_min(1e-12))
        alone = (weighted @ weighted.mT) @ units + ridge * units
        weighted, alone = weighted.flatten(-3, -2), alone.flatten(-3, -2)  # [..., m, in]
        m, d_in = weighted.shape[-2:]
        ridges = ridge * torch.eye(min(m, d_in), device=a.device)
        if m <= d_in:
            found = torch.linalg.solve(weighted @ weighted.mT + ridges, alone)
        else:  # the same (Woodbury), whose cost grows with the number of chunks and not with its cube
            inner = torch.linalg.solve(weighted.mT @ weighted + ridges, weighted.mT @ alone)
            found = (alone - weighted @ inner) / ridge
    return (length * found.view(a.shape)).to(a.dtype)
