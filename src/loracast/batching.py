"""Sequences of unequal length as one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids [n, longest] and a bool mask [n, longest] that is true where they are real."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), longest), pad_id)
    mask = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[i, : len(sequence)] = True
    return ids, mask


def length_groups(lengths: Sequence[int], n: int) -> list[list[int]]:
    """Split sequences into at most `n` groups with the least padding, each padded to its longest: indices by group."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    longest = np.array([lengths[i] for i in order])
    ends = np.arange(1, len(order) + 1)
    cost = ends * longest[0]  # of the first 1, 2, ... sequences as one group
    cuts = []
    for _ in range(n - 1):  # dynamic programming: the last group begins at the best place for each end
        before = np.concatenate([[0], cost[:-1]])
        of_start = before + np.where(
            ends[:, None] > np.arange(len(order)), (ends[:, None] - ends + 1) * longest, np.inf
        )
        cuts.append(of_start.argmin(1))
        cost = of_start.min(1)
    groups, end = [], len(order)
    for cut in reversed(cuts):
        start = int(cut[end - 1])
        groups.append(order[start:end])
        end = start
        if end == 0:
            return groups
    return [*groups, order[:end]]
