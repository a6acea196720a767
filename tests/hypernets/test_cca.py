"""Canonical correlation against another computation: the angles between two spaces (Bjorck and Golub, 1973)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loracast.lab.training.memory_start import cca_map

FREE = torch.Generator().manual_seed(0)


def test_the_canonical_directions_and_their_weights():
    shared = torch.randn(400, 3, generator=FREE, dtype=torch.float64)
    x = torch.cat([shared, torch.randn(400, 4, generator=FREE, dtype=torch.float64)], 1) @ torch.randn(
        7, 7, generator=FREE, dtype=torch.float64
    )
    y = shared @ torch.randn(3, 5, generator=FREE, dtype=torch.float64)
    y = y + 3 * torch.randn(400, 5, generator=FREE, dtype=torch.float64)
    x, y = x - x.mean(0), y - y.mean(0)
    from_x, to_y = cca_map(x, y, rank=5, ridge=0.0)
    correlations = np.linalg.svd(np.linalg.qr(x.numpy())[0].T @ np.linalg.qr(y.numpy())[0])[1]  # [5]
    u, v = x @ from_x, y @ to_y.T  # canonical variables, each with variance c / (1 - c^2)
    weights = torch.from_numpy(correlations / (1 - correlations**2))
    torch.testing.assert_close(u.T @ u / 400, torch.diag(weights), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(v.T @ v / 400, torch.diag(weights), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        u.T @ v / 400, torch.diag(weights * torch.from_numpy(correlations)), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("rank", [2, 9])
def test_a_rank_that_is_too_high_leaves_zeros(rank):
    x, y = torch.randn(50, 4, generator=FREE), torch.randn(50, 3, generator=FREE)
    from_x, to_y = cca_map(x - x.mean(0), y - y.mean(0), rank, ridge=0.1)
    assert from_x.shape == (4, rank) and to_y.shape == (rank, 3)
    assert not from_x[:, 3:].any() and not to_y[3:].any()
    assert from_x[:, : min(rank, 3)].any(0).all()
