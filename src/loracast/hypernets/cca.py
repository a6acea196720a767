"""Canonical correlation analysis: the directions in which two views of the same samples agree, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor


def cca_map(x: Tensor, y: Tensor, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
    """A bilinear score of rank `rank` that is high when x and y belong together: score(x, y) = x @ from_x @ to_y @ y.

    Each pair of canonical directions with correlation c weighs c / (1 - c^2): for Gaussian views this makes the score
    the cross term of the log-likelihood ratio of "same sample" to "independent samples" (Hotelling, "Relations between
    two sets of variates", 1936).

    Args:
        x, y: two views of m samples [m, d], [m, e], each with mean zero.
        rank: directions kept; those beyond min(d, e) are zero.
        ridge: added to both covariances, in units of the mean variance of x and y.

    Returns:
        from_x [d, rank] and to_y [rank, e].
    """
    white_x, white_y = (_inverse_root(side, ridge) for side in (x, y))
    left, correlations, right = torch.linalg.svd(white_x @ (x.T @ y / len(x)) @ white_y)
    n_kept = min(rank, len(correlations))
    weights = correlations[:n_kept].clamp(max=0.97)
    weights = weights / (1 - weights.square())
    from_x, to_y = x.new_zeros(x.shape[1], rank), y.new_zeros(rank, y.shape[1])
    from_x[:, :n_kept] = white_x @ (left[:, :n_kept] * weights.sqrt())
    to_y[:n_kept] = (right[:n_kept] * weights.sqrt()[:, None]) @ white_y
    return from_x, to_y


def _inverse_root(x: Tensor, ridge: float) -> Tensor:
    """(x^T x / m + ridge)^(-1/2), [d, d]."""
    variances, axes = torch.linalg.eigh(x.T @ x / len(x))
    return (axes / (variances.clamp_min(0) + ridge * variances.mean()).sqrt()) @ axes.T
