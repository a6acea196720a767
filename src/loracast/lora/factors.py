"""The two factors of a module, and the rows of which a LoRA's factors are made.

A LoRA adds `delta = B @ A` to a module's weight [out, in], with A [r, in] and B [out, r]; the scale is folded into B
the moment a LoRA is born, so that nothing after this needs to know it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Rows = dict[str, tuple[Tensor, Tensor]]
"""By module kind, A [n, modules, r, in] and B rows [n, modules, r, out]; B's rows are the columns of the factor B."""


class Factors(NamedTuple):
    """The two factors of one module."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    def delta(self) -> Tensor:
        return self.b @ self.a  # [out, in]

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """The thin SVD of the delta in fp32: U [out, k], the singular values [k], falling, and V^T [k, in].

        By QR of both sides and an SVD of the small r x r core, so that the dense product is never formed.
        """
        q_b, r_b = torch.linalg.qr(self.b.float())  # [out, m] [m, r]
        q_a, r_a = torch.linalg.qr(self.a.float().T)  # [in, n] [n, r]
        u_core, s, vh_core = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        return q_b @ u_core, s, vh_core @ q_a.T


def joined_ranks(rows: Rows, more: Rows) -> Rows:
    """Rows with further ones of their kinds behind them, along the rank; a B that all modules share is repeated."""
    joined = dict(rows)
    for kind, (more_a, more_b) in more.items():
        a, b = rows[kind]
        b = b.expand(-1, a.shape[1], -1, -1)
        joined[kind] = (torch.cat([a, more_a.to(a)], dim=2), torch.cat([b, more_b.to(b)], dim=2))
    return joined


def is_past_break_even(rank: int, d_in: int, d_out: int) -> bool:
    """Whether the factors of a module outweigh the dense delta that they stand for."""
    return rank > d_in * d_out // (d_in + d_out)


def effective_rank(singular_values: Tensor) -> float:
    """Directions that a delta really uses: exp of the entropy of its normalised singular values; 0 for none.

    Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    total = singular_values.double().sum()
    if total <= 0:
        return 0.0
    shares = singular_values.double() / total
    return torch.special.entr(shares).sum().exp().item()
