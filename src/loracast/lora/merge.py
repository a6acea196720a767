"""How the chunks of a document become one LoRA: their factors are joined along the rank, so that their deltas add up. What else is done about
chunks that get in each other's way is said here, once, for training and for adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Merging:
    """What is done, by module kind."""

    max_unscaled_chunks: Mapping[str, int] = field(default_factory=dict)
    """Chunks up to which factors add up; those of K more count this / K each."""
    ridges: Mapping[str, float] = field(default_factory=dict)
    """Kinds whose chunks are told apart (`decorrelate_keys`), and with which ridge."""

    def join(self, kind: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A [..., chunks, r, in] and B rows [..., chunks, r, out] -> [..., chunks * r, in] and [..., chunks * r, out]."""
        n_chunks = a.shape[-3]
        if (most := self.max_unscaled_chunks.get(kind, n_chunks)) < n_chunks:
            b = b * (most / n_chunks)
        if kind in self.ridges and n_chunks > 1:
            a = decorrelate_keys(a, b, self.ridges[kind])
        return a.flatten(-3, -2), b.flatten(-3, -2)


def decorrelate_keys(a: Tensor, b: Tensor, ridge: float) -> Tensor:
    """Keys A [..., chunks, r, in] that answer less to what another chunk's keys are there for; the more, the larger that one's B row is.

    Within a chunk an associative memory solves for its keys by least squares (hypernets/memory.py). Over all chunks together that would give
    (G + ridge)^-1 k for the keys k, where G holds their weighted cosines; each chunk by itself, G without what is between chunks. So the keys are
    multiplied by the quotient of the two, which leaves a single chunk as it is.
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
