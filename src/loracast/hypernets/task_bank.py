"""The task bank: small task-specific LoRA parts for the training's own tasks, found again by nearest descriptions.

    pooled attention deltas [n, d] -> coordinates [n, width], in which descriptions of different tasks lie apart
        (Fisher's linear discriminants, in closed form)
    coordinates -> softmax of cosines with the keys, one for each stored description
        -> probability of each task [n, tasks] -> mean of the tasks' cores [n, modules, r, r]
    coordinates and how clear the match is -> gate [n]
    delta = gate * B core A in each module; all tasks share B and A

A hypernetwork that reads descriptions generalises to unseen tasks but is slow to memorise its training tasks; the bank
stores those, one small core each (cores between shared factors as in arXiv 2510.19733). In training, some
descriptions are compared without their own key, so that a task is found by its other descriptions, and some without any
key of their task, so that the gate learns to switch the bank off where no stored task fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.errors import ConfigError
from loracast.hypernets.descriptions import make_gate
from loracast.hypernets.heads import StaticLoRA, static_loras
from loracast.lora.target import Target

_SHARPNESS = 30.0
"""Factor on cosines before the softmax."""
_SHRINKAGE = 10.0
"""Added to the variances within tasks, in units of their mean: there are far fewer descriptions than directions."""
_SAME = 0.999
"""Cosine from which a description in training counts as the one that the key was made from."""
_HIDE_KEY, _HIDE_TASK = 0.4, 0.15
"""Shares of the training's descriptions that are compared without their own key, or without all keys of their task."""
_LENGTH = 3.0
"""Length of each row of A and column of B, with which cores learn about as fast as the B of a usual LoRA."""


class TaskBank(nn.Module):
    """Stored tasks: a core for each task and a key for each of its descriptions. Every core starts at zero: a no-op."""

    centre: Tensor
    axes: Tensor
    keys: Tensor

    def __init__(self, target: Target, d_pooled: int, rank: int, width: int, n_descriptions: Sequence[int]):
        """
        Args:
            d_pooled: width of pooled attention deltas.
            width: of the coordinates in which descriptions are compared.
            n_descriptions: number of descriptions of each task.
        """
        super().__init__()
        n_tasks = len(n_descriptions)
        self.factors = static_loras(target.rows, rank)
        for part in self.factors.values():
            cast(StaticLoRA, part).b.data.normal_()
        self.cores = nn.Parameter(torch.zeros(n_tasks, len(target.names), rank, rank))
        self.gate = make_gate(width + 2, start=0.0)
        self.register_buffer("centre", torch.zeros(d_pooled))
        self.register_buffer("axes", torch.zeros(d_pooled, width))
        self.register_buffer("keys", torch.zeros(sum(n_descriptions), width))
        self._n_descriptions = tuple(n_descriptions)

    @torch.no_grad()
    def take_directions(self, other: nn.ModuleDict) -> None:
        """Copy the directions of other `StaticLoRA`s' factors, as far as the ranks go, all scaled to one length."""
        for kind, part in self.factors.items():
            for mine, theirs in zip(part.parameters(), other[kind].parameters(), strict=True):
                n = min(mine.shape[1], theirs.shape[1])
                is_trained = theirs[:, :n].norm(dim=-1, keepdim=True) > 0
                mine[:, :n] = torch.where(is_trained, theirs[:, :n], mine[:, :n])
                mine.copy_(_LENGTH * functional.normalize(mine, dim=-1))

    def _task_of_key(self) -> Tensor:
        counts = torch.tensor(self._n_descriptions, device=self.keys.device)
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)

    @torch.no_grad()
    def fit_keys(self, pooled: Tensor) -> None:
        """Fit the coordinates to the descriptions of all tasks [m, d], ordered by task, and store their keys.

        Fisher's linear discriminants: descriptions are scaled so that the scatter within tasks, shrunk towards a
        sphere, becomes a unit sphere; the principal directions of the tasks' means are the coordinates (Hastie,
        Tibshirani and Friedman, The Elements of Statistical Learning, section 4.3.3).
        """
        task_of = self._task_of_key()
        self._check_number(pooled)
        x = pooled.float()
        self.centre.copy_(x.mean(0))
        counts = torch.bincount(task_of)[:, None]
        means = torch.zeros(len(counts), x.shape[1], device=x.device).index_add_(0, task_of, x) / counts
        _, deviations, directions = torch.linalg.svd(x - means[task_of], full_matrices=False)
        variances = deviations.square() / len(x)
        shrinkage = (_SHRINKAGE * variances.sum() / x.shape[1]).clamp_min(1e-12)

        def sphered(y: Tensor) -> Tensor:
            within = y @ directions.T
            outside = (y - within @ directions) * shrinkage.rsqrt()
            return outside + (within * (variances + shrinkage).rsqrt()) @ directions

        _, _, axes = torch.linalg.svd(sphered(means - self.centre), full_matrices=False)
        kept = axes[: self.axes.shape[1]]
        self.axes.zero_()
        self.axes[:, : len(kept)] = sphered(kept).T  # sphering is symmetric: it can be applied to the axes instead
        self.set_keys(x)

    @torch.no_grad()
    def set_keys(self, pooled: Tensor) -> None:
        """Store the keys of all descriptions [m, d], ordered by task, in the coordinates of the last `fit_keys`."""
        self._check_number(pooled)
        self.keys.copy_(self.coordinates(pooled))

    def _check_number(self, pooled: Tensor) -> None:
        if len(pooled) != len(self.keys):
            raise ConfigError(f"{len(pooled)} descriptions were given, and the stored tasks have {len(self.keys)}")

    def coordinates(self, pooled: Tensor) -> Tensor:
        """Pooled attention deltas [n, d] -> unit vectors [n, width], near each other for descriptions of one task."""
        return functional.normalize((pooled.float() - self.centre) @ self.axes, dim=-1)

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled attention deltas [n, d] -> gated mean of cores [n, modules, r, r], near zero where no task fits."""
        with torch.autocast(pooled.device.type, enabled=False):  # descriptions of similar tasks need fp32 to differ
            probabilities, gate_input, is_unseen = self._match(pooled)
        gate = self.gate(gate_input).sigmoid()
        # A description whose task is hidden trains the gate, and leaves the other tasks' cores as they are.
        cores = probabilities @ self.cores.flatten(1)
        cores = torch.where(is_unseen[:, None], cores.detach(), cores)
        return (gate * cores).unflatten(1, self.cores.shape[1:])

    def _match(self, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probability of each task [n, tasks], the gate's input [n, width + 2], and whose task is hidden [n]."""
        at = self.coordinates(pooled)
        cosines = at @ self.keys.T  # [n, m]
        task_of, is_unseen = self._task_of_key(), torch.zeros(len(at), dtype=torch.bool, device=at.device)
        if self.training:
            cosines, is_unseen = self._hide(cosines, task_of)
        probabilities = torch.zeros(len(at), len(self.cores), device=at.device)
        probabilities = probabilities.index_add(1, task_of, (_SHARPNESS * cosines).softmax(1))
        best = probabilities.topk(min(2, probabilities.shape[1]), dim=1).values
        clarity = torch.stack([cosines.amax(1), best[:, 0] - best[:, -1]], dim=1)
        return probabilities, torch.cat([at, clarity], dim=1), is_unseen

    def _hide(self, cosines: Tensor, task_of: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines [n, m] with some keys hidden at random, and which descriptions lost all keys of their task [n]."""
        nearest, own = cosines.max(1)
        is_stored = nearest > _SAME
        dice = torch.rand(len(cosines), device=cosines.device)
        of_task = task_of[None] == task_of[own][:, None]  # [n, m]
        own_key = functional.one_hot(own, len(task_of)).bool()
        has_others = of_task.sum(1) > 1
        hides_key = is_stored & has_others & (dice < _HIDE_KEY)
        hides_task = is_stored & (dice > 1 - _HIDE_TASK)
        hidden = (own_key & hides_key[:, None]) | (of_task & hides_task[:, None])
        return cosines.masked_fill(hidden, -2.0), hides_task
