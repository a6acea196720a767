"""Confidence intervals of shares and means: Wilson's interval, bootstrap over clusters, paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np


def wilson(n_hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % by default: honest for few samples and for shares near 0 and 1."""
    if n == 0:
        return 0.0, 1.0
    share = n_hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def cluster_bootstrap(
    clusters: Sequence[Sequence[float]], *, n_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of a mean over clusters, such as documents whose questions stand or fall together.

    Args:
        clusters: for each document the scores of its questions, 1 for a right answer.
    """
    hits = np.array([sum(cluster) for cluster in clusters], dtype=float)  # [clusters]
    sizes = np.array([len(cluster) for cluster in clusters], dtype=float)
    drawn = np.random.default_rng(seed).integers(len(hits), size=(n_resamples, len(hits)))
    shares = hits[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)  # [n_resamples]
    low, high = np.percentile(shares, [2.5, 97.5])
    return float(low), float(high)


def mean_with_interval(clusters: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """The mean over the values of all clusters, and the 95 % interval of `cluster_bootstrap`."""
    return mean([value for cluster in clusters for value in cluster]), *cluster_bootstrap(clusters)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def mean_if_any(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def paired_bootstrap(
    one: Sequence[Sequence[float]], other: Sequence[Sequence[float]], *, n_resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """The mean over tasks of how much more often `one` is right than `other` on the same rows, and its 95 % interval.

    The bootstrap draws tasks, and rows within each drawn task, since tasks and rows both might have been others.

    Args:
        one, other: for each task, the share of seeds with which each of its rows was answered right.
    """
    gains = [np.subtract(a, b, dtype=float) for a, b in zip(one, other, strict=True)]
    sizes = np.array([len(gain) for gain in gains])
    padded = np.zeros((len(gains), sizes.max()))  # [tasks, rows], behind the end of a task's rows 0
    for row, gain in zip(padded, gains, strict=True):
        row[: len(gain)] = gain
    rng = np.random.default_rng(seed)
    means = np.zeros(n_resamples)
    for _ in gains:  # one drawn task of each resample at a time, so that little memory is needed
        task = rng.integers(len(gains), size=n_resamples)
        size = sizes[task][:, None]
        row = rng.integers(size, size=(n_resamples, padded.shape[1]))  # [resamples, rows]
        is_drawn = np.arange(padded.shape[1]) < size
        means += (padded[task[:, None], row] * is_drawn).sum(axis=1) / size[:, 0] / len(gains)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(np.mean([gain.mean() for gain in gains])), float(low), float(high)
