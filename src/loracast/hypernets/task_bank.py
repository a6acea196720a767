"""What a training has learned of its own tasks, found again by their descriptions.

    described [n, d] -> coordinates in which descriptions of different tasks lie apart [n, width] (Fisher's discriminants, closed form)
    -> how likely each of the tasks is meant [n, tasks], softmax of cosines with all descriptions known -> mean of the tasks' cores [n, modules, r, r]
    coordinates, and how sure that is -> gate [n] -> B core A of each module, B and A shared by all tasks

A hypernetwork that understands descriptions by reading them is good at tasks that it has not seen and slow at learning by heart those that it has; here they are
kept, one small core each (cores between shared factors as in arXiv 2510.19733). In training, descriptions do without their own entry part of the time, so
that a task is found by its other descriptions; and without all of their task's, so that the gate learns to shut where nothing fits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.errors import ConfigError
from loracast.hypernets.descriptions import make_gate
from loracast.hypernets.heads import StaticLoRA
from loracast.lora.target import Target

_SHARPNESS = 30.0
"""Factor on cosines before the softmax."""
_SHRINKAGE = 10.0
"""What is added to the scatter within tasks, in units of its mean over directions: there are far fewer descriptions than directions."""
_ITSELF = 0.999
"""Cosine from which a description in training is its own entry."""
_WITHOUT_ITSELF, _WITHOUT_ITS_TASK = 0.4, 0.15
"""Shares of the descriptions in training that do without."""
_LENGTH = 3.0
"""Of each row of A and column of B: cores then learn about as fast as the B of a usual LoRA does."""


class TaskBank(nn.Module):
    """The tasks of a training, each as a small core, and how their descriptions are told apart. Silent at the start: every core is zero."""

    centre: Tensor
    axes: Tensor
    keys: Tensor

    def __init__(self, target: Target, d_described: int, rank: int, width: int, n_descriptions: Sequence[int]):
        """
        Args:
            d_described: width of what is compared.
            width: of the coordinates.
            n_descriptions: how many descriptions each task has.
        """
        super().__init__()
        n_tasks = len(n_descriptions)
        kinds = {kind: target.of_kind(kind) for kind in target.kinds}
        parts = {kind: StaticLoRA(len(some), rank, some[0].d_in, some[0].d_out) for kind, some in kinds.items()}
        for part in parts.values():
            part.b.data.normal_()
        self.factors = nn.ModuleDict(parts)
        self.cores = nn.Parameter(torch.zeros(n_tasks, len(target.names), rank, rank))
        self.gate = make_gate(width + 2, start=0.0)
        self.register_buffer("centre", torch.zeros(d_described))
        self.register_buffer("axes", torch.zeros(d_described, width))
        self.register_buffer("keys", torch.zeros(sum(n_descriptions), width))
        self._n_descriptions = tuple(n_descriptions)

    @torch.no_grad()
    def take_directions(self, other: nn.ModuleDict) -> None:
        """Let the factors span what those of other `StaticLoRA`s do, as far as their ranks go, all directions of one length."""
        for kind, part in self.factors.items():
            for mine, theirs in zip(part.parameters(), other[kind].parameters(), strict=True):
                n = min(mine.shape[1], theirs.shape[1])
                is_there = theirs[:, :n].norm(dim=-1, keepdim=True) > 0  # untrained ones are not
                mine[:, :n] = torch.where(is_there, theirs[:, :n], mine[:, :n])
                mine.copy_(_LENGTH * functional.normalize(mine, dim=-1))

    def _task_of_key(self) -> Tensor:
        counts = torch.tensor(self._n_descriptions, device=self.keys.device)
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)

    @torch.no_grad()
    def fit_keys(self, described: Tensor) -> None:
        """Find the directions in which the descriptions of different tasks lie apart, and keep all of them [m, d], ordered by task.

        Fisher's linear discriminants: the scatter within tasks, shrunk towards a sphere, is made a unit sphere; what remains of the tasks' means are the
        directions (Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, section 4.3.3).
        """
        task_of = self._task_of_key()
        self._check_number(described)
        x = described.float()
        self.centre.copy_(x.mean(0))
        counts = torch.bincount(task_of)[:, None]
        means = torch.zeros(len(counts), x.shape[1], device=x.device).index_add_(0, task_of, x) / counts
        _, deviations, directions = torch.linalg.svd(x - means[task_of], full_matrices=False)
        variances = deviations.square() / len(x)
        more = (_SHRINKAGE * variances.sum() / x.shape[1]).clamp_min(1e-12)

        def sphered(y: Tensor) -> Tensor:
            within = y @ directions.T
            return (y - within @ directions) * more.rsqrt() + (within * (variances + more).rsqrt()) @ directions

        _, _, axes = torch.linalg.svd(sphered(means - self.centre), full_matrices=False)
        kept = axes[: self.axes.shape[1]]
        self.axes.zero_()
        self.axes[:, : len(kept)] = sphered(kept).T  # what is sphered, then seen along the axes
        self.set_keys(x)

    @torch.no_grad()
    def set_keys(self, described: Tensor) -> None:
        """Keep all descriptions [m, d], ordered by task, along the directions that there are."""
        self._check_number(described)
        self.keys.copy_(self.coordinates(described))

    def _check_number(self, described: Tensor) -> None:
        if len(described) != len(self.keys):
            raise ConfigError(f"{len(described)} descriptions, where the tasks that are stored have {len(self.keys)}")

    def coordinates(self, described: Tensor) -> Tensor:
        """Unit vectors [n, width]: descriptions of one task point the same way."""
        return functional.normalize((described.float() - self.centre) @ self.axes, dim=-1)

    def forward(self, described: Tensor) -> Tensor:
        """What is compared of n descriptions [n, d] -> their cores [n, modules, r, r], small where no task fits."""
        with torch.autocast(described.device.type, enabled=False):  # descriptions of sister tasks are near each other
            likely, seen, is_new = self._compare(described)
        gate = self.gate(seen).sigmoid()
        # Other tasks' cores are not there to help where a task is taken for unseen.
        cores = likely @ self.cores.flatten(1)
        cores = torch.where(is_new[:, None], cores.detach(), cores)
        return (gate * cores).unflatten(1, self.cores.shape[1:])

    def _compare(self, described: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How likely each task is meant [n, tasks], what the gate sees [n, width + 2], and which descriptions are taken for those of unseen tasks [n]."""
        at = self.coordinates(described)
        cosines = at @ self.keys.T  # [n, m]
        task_of, is_new = self._task_of_key(), torch.zeros(len(at), dtype=torch.bool, device=at.device)
        if self.training:
            cosines, is_new = self._without(cosines, task_of)
        likely = torch.zeros(len(at), len(self.cores), device=at.device)
        likely = likely.index_add(1, task_of, (_SHARPNESS * cosines).softmax(1))
        best = likely.topk(min(2, likely.shape[1]), dim=1).values
        sure = torch.stack([cosines.amax(1), best[:, 0] - best[:, -1]], dim=1)
        return likely, torch.cat([at, sure], dim=1), is_new

    def _without(self, cosines: Tensor, task_of: Tensor) -> tuple[Tensor, Tensor]:
        """The cosines with some keys out of reach, and whether a description's whole task is."""
        nearest, own = cosines.max(1)
        is_known = nearest > _ITSELF
        dice = torch.rand(len(cosines), device=cosines.device)
        of_task = task_of[None] == task_of[own][:, None]  # [n, m]
        itself = functional.one_hot(own, len(task_of)).bool()
        has_others = of_task.sum(1) > 1
        without_itself = is_known & has_others & (dice < _WITHOUT_ITSELF)
        is_new = is_known & (dice > 1 - _WITHOUT_ITS_TASK)
        hidden = (itself & without_itself[:, None]) | (of_task & is_new[:, None])
        return cosines.masked_fill(hidden, -2.0), is_new
