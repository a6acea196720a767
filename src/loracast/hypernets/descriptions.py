"""Common parts of hypernetworks for task descriptions: their encoder, the gate, and distances to seen descriptions.

The task bank: small task-specific LoRA parts for the training's own tasks, found again by nearest descriptions.

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

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.base.embedded import Say
from loracast.base.load import Base
from loracast.documents.task_spec import TaskSpec, as_spec
from loracast.errors import EncoderError, HypernetworkError
from loracast.hypernets.encoders import Features, TextEncoder
from loracast.hypernets.perceiver import StaticLoRAs
from loracast.hypernets.protocol import Cast, Hypernetwork
from loracast.hypernets.store import Modality
from loracast.lora.algebra import LoRABatch
from loracast.lora.factors import Rows
from loracast.lora.target import Target

EXAMPLES_AT_ONCE = 3
"""Examples in one text for hypernetworks that saw none in training; with 8 the one that ships did worse."""
_GATE_WIDTH = 64
_GATE_START = 3.0  # logit: open


def make_gate(width: int, start: float = _GATE_START) -> nn.Sequential:
    """Gate that switches a LoRA off when its description is meaningless: pooled description [n, width] -> logit [n, 1].

    At the start its logit is `start`, whatever the description.
    """
    first, last = nn.Linear(width, _GATE_WIDTH), nn.Linear(_GATE_WIDTH, 1)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, start)
    return nn.Sequential(first, nn.SiLU(), last)


class DescriptionHypernetwork(Hypernetwork):
    """A hypernetwork for task descriptions, which recognises a description that is unlike all seen in training."""

    seen: Tensor
    """One vector for each description seen in training [m, d]."""

    @property
    def modality(self) -> Modality:
        return "task"

    def text_encoder(self, base: Base | None, encoder: str | None = None, say: Say = lambda text: None) -> TextEncoder:
        """The encoder that turns descriptions into conditions [n, d_text]; arguments and errors as in `encoder_for`."""
        raise NotImplementedError

    def pooled(self, conditions: Tensor) -> Tensor:
        """Conditions [n, d_text] -> one vector for each description [n, d], by which descriptions are compared."""
        raise NotImplementedError

    def encoder_for(self, base: Base | None, encoder: str | None, say: Say) -> TaskReader:
        read = self.text_encoder(base, encoder, say)
        if read.d_text != self.config.d_text:
            raise HypernetworkError(
                f"the hypernetwork reads embeddings of {self.config.d_text} numbers, the text encoder {read.name!r} "
                f"gives {read.d_text}: give the encoder that it was trained with ({self.config.encoder!r})"
            )
        return TaskReader(read, getattr(self.config, "examples_at_once", EXAMPLES_AT_ONCE))

    def kept_rows(self, reader: TaskReader, task: TaskSpec, rows: Rows) -> Rows:
        """The rows that were cast for a task [1, modules, r, d], as its adapter keeps them.

        A hypernetwork may compress them, and add what is fitted to the task's examples.
        """
        return rows

    def cast(self, features: Features) -> Cast:
        """Features of n descriptions [n, 1, d_text] -> their rows."""
        return Cast(self.rows(features.states[:, 0]))

    def rows(self, conditions: Tensor) -> Rows:
        """Conditions of n descriptions [n, d_text] -> the rows of their n LoRAs, differentiable."""
        raise NotImplementedError

    def forward(self, conditions: Tensor) -> LoRABatch:
        """Conditions of n descriptions [n, d_text] -> their n LoRAs, differentiable."""
        return self.loras(self.rows(conditions))

    def distances(self, conditions: Tensor) -> Tensor:
        """Distance of each description to the nearest seen one: 1 - cosine, [n]."""
        if not len(self.seen):
            raise HypernetworkError("this hypernetwork holds no descriptions of its training to compare with")
        return 1 - _cosines(self.pooled(conditions), self.seen).amax(1)

    def ood_threshold(self) -> float | None:
        """Distance beyond which a description is out of distribution; None for fewer than two seen descriptions.

        95 % of the seen descriptions have another seen one within it.
        """
        if len(self.seen) < 2:
            return None
        cosines = _cosines(self.seen, self.seen).fill_diagonal_(-1)
        return 1 - cosines.amax(1).quantile(0.05).item()


class TaskReader:
    """Reads the specifications of tasks with the text encoder of a hypernetwork."""

    def __init__(self, encoder: TextEncoder, examples_at_once: int):
        """
        Args:
            examples_at_once: most examples in one text; more are read in groups, whose conditions are averaged.
        """
        self.encoder, self._at_once = encoder, examples_at_once

    def __call__(self, tasks: Sequence[str | TaskSpec]) -> Features:
        """n tasks -> their conditions [n, 1, d_text]: of several groups of a task's examples their mean."""
        groups = [self.groups(as_spec(task)) for task in tasks]
        conditions = self.encoder([group.text() for some in groups for group in some])
        means = [part.mean(0) for part in conditions.split([len(some) for some in groups])]
        return Features(torch.stack(means)[:, None])

    def groups(self, task: TaskSpec) -> list[TaskSpec]:
        """The task as it is read: in one text, or in one for each group of examples.

        Groups are of about one size; one that does not fit is halved until its parts do.

        Raises EncoderError for a description that does not fit, or an example that does not fit behind it even alone.
        """
        n = len(task.examples)
        if not n:
            return [task]
        if not self.encoder.fits(task.description):
            raise EncoderError("the description is too long to be read with examples: shorten it")
        n_groups = -(-n // self._at_once)
        ends = [i * n // n_groups for i in range(n_groups + 1)]
        return [group for i, j in pairwise(ends) for group in self._fitting(task, i, j)]

    def _fitting(self, task: TaskSpec, start: int, end: int) -> list[TaskSpec]:
        """Those of a task's examples in one group, or in halves of it that fit."""
        group = replace(task, examples=task.examples[start:end])
        if self.encoder.fits(group.text()):
            return [group]
        if end - start == 1:
            raise EncoderError(f"example {end} is too long behind the description: shorten it, or leave it out")
        middle = (start + end) // 2
        return self._fitting(task, start, middle) + self._fitting(task, middle, end)


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosines of all pairs: [n, d], [m, d] -> [n, m]."""
    x, y = (functional.normalize(side.float(), dim=-1) for side in (x, y))
    return x @ y.T


_SHARPNESS = 30.0
"""Factor on cosines before the softmax."""


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
        self.factors = StaticLoRAs(target.rows, rank)
        for kind in self.factors:
            self.factors[kind].b.data.normal_()
        self.cores = nn.Parameter(torch.zeros(n_tasks, len(target.names), rank, rank))
        self.gate = make_gate(width + 2, start=0.0)
        self.register_buffer("centre", torch.zeros(d_pooled))
        self.register_buffer("axes", torch.zeros(d_pooled, width))
        self.register_buffer("keys", torch.zeros(sum(n_descriptions), width))
        self._n_descriptions = tuple(n_descriptions)
        self.hide: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        """Of cosines [n, m] and the task of each key [m], the cosines without those of keys that training hides, and
        which descriptions lost all keys of their task [n]."""

    def task_of_key(self) -> Tensor:
        counts = torch.tensor(self._n_descriptions, device=self.keys.device)
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)

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
        task_of, is_unseen = self.task_of_key(), torch.zeros(len(at), dtype=torch.bool, device=at.device)
        if self.training and self.hide is not None:
            cosines, is_unseen = self.hide(cosines, task_of)
        probabilities = torch.zeros(len(at), len(self.cores), device=at.device)
        probabilities = probabilities.index_add(1, task_of, (_SHARPNESS * cosines).softmax(1))
        best = probabilities.topk(min(2, probabilities.shape[1]), dim=1).values
        clarity = torch.stack([cosines.amax(1), best[:, 0] - best[:, -1]], dim=1)
        return probabilities, torch.cat([at, clarity], dim=1), is_unseen
