"""Casts tasks, specified by descriptions and examples, into LoRAs and adapters."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypedDict, Unpack, cast

import torch

from loracast.documents.task_spec import Example, ExampleLike, TaskSpec, as_examples, as_spec
from loracast.errors import AdapterError
from loracast.hypernets.descriptions import DescriptionHypernetwork
from loracast.hypernets.encoders import Features
from loracast.hypernets.protocol import Caster
from loracast.library.adapter import Adapter
from loracast.library.library import Library
from loracast.library.manifest import check_name, name_for_task
from loracast.library.save import check_finite, save_single, tensors_of
from loracast.lora.algebra import LoRA, LoRABatch
from loracast.lora.factors import Rows
from loracast.lora.quantize import DEFAULT_STORAGE, Storage, check_storage

_AT_ONCE = 50
"""Tasks in one forward pass of the hypernetwork; with twice as many, each takes longer (docs/notebook)."""


Refine = Callable[[Rows, Callable[[Rows], LoRABatch], Sequence[Example]], Rows]
"""(rows of one LoRA, rows -> the LoRA that the base carries, examples) -> rows that do the examples better."""


class TaskOptions(TypedDict, total=False):
    """Options of `Model.task` and `tasks`."""

    strength: float
    """Factor on every delta; 0 does nothing, 1 (the default) is as in training."""
    storage: Storage
    """How the factors are kept (lora/quantize.py): "int4" (the default), "int8" or "bf16"."""
    replace: bool
    """Whether an adapter of the same name is replaced."""


class TaskCaster:
    """Casts tasks into LoRAs and keeps them in a library; a task is given as a description, examples, or both."""

    def __init__(self, caster: Caster, library: Library | None = None):
        """
        Args:
            library: where adapters are kept; the user's own library if None.
        """
        self.caster, self.library = caster, library or Library()

    @property
    def hypernetwork(self) -> DescriptionHypernetwork:
        return cast(DescriptionHypernetwork, self.caster.hypernetwork)

    @cached_property
    def ood_threshold(self) -> float | None:
        """Distance to the seen descriptions beyond which one gets a warning; None if the hypernetwork holds none."""
        return self.hypernetwork.ood_threshold()

    def loras(self, tasks: Sequence[str | TaskSpec], strength: float = 1.0) -> list[LoRA]:
        """The LoRAs of n tasks; a string is a description alone.

        Args:
            strength: factor on every delta; 0 gives no adapter, 1 is as in training.
        """
        given = _stripped(tasks)
        return [self.hypernetwork.loras(rows).row(0) for rows in self._rows(given, self._encode(given), strength)]

    def start_of_descent(self, task: TaskSpec, strength: float = 1.0) -> Rows:
        """The rows that descent on a task's examples starts from: as cast from the description alone, if there is one.

        Descent soon knows by heart the examples that the cast has seen, and those held back say so late if it saw them
        too. They are not compressed: from compressed ones descent did no better (docs/notebook/2026-12-01.md).
        """
        if not task.description:
            return self._rows([task], self._encode([task]), strength)[0]
        return _scaled(self._cast(self._encode([TaskSpec(task.description)]))[0], strength)

    def distances(self, tasks: Sequence[str | TaskSpec]) -> list[float | None]:
        """Distance (1 - cosine) of each description to the nearest seen one.

        None for a task with examples, which those descriptions were without, and if the hypernetwork holds none.
        """
        given = _stripped(tasks)
        return self._distances(given, self._encode(given))

    def task(
        self,
        description: str = "",
        name: str | None = None,
        *,
        examples: Sequence[ExampleLike] = (),
        refine: Refine | None = None,
        **options: Unpack[TaskOptions],
    ) -> Adapter:
        """Cast one task into an adapter and keep it; options and errors as in `tasks`.

        Args:
            description: what the model should do; "" if the examples alone show it.
            examples: pairs of an input and its output. More than the hypernetwork reads at once are read in groups.
            refine: as in `tasks`.

        Raises:
            ConfigError: an example is malformed.
            EncoderError: an example is too long.
        """
        task = TaskSpec(description, as_examples(examples))
        return self.tasks([task], None if name is None else [name], refine=refine, **options)[0]

    def tasks(
        self,
        tasks: Sequence[str | TaskSpec],
        names: Sequence[str] | None = None,
        *,
        strength: float = 1.0,
        refine: Refine | None = None,
        storage: Storage = DEFAULT_STORAGE,
        replace: bool = False,
    ) -> list[Adapter]:
        """Cast tasks into adapters, all in one go, and keep them; a string is a description alone.

        A description beyond the OOD threshold is cast as well, and its adapter's manifest holds a warning.

        Args:
            names: of the adapters; made from the descriptions if None.
            strength: factor on every delta.
            refine: makes better rows from those of the description (of the examples without one), or gives back the
                same (cast/refine.py); the examples are read into the adapter as without it then.
            storage: how the factors are kept (lora/quantize.py); not "text", since a task cannot be cast again.
            replace: whether an adapter of the same name is replaced.

        Raises:
            AdapterError: a task is empty, a name is taken or not allowed, or tasks have no such storage;
                nothing is kept then.
        """
        if check_storage(storage) == "text":
            raise AdapterError("a task cannot be cast again from what is stored: use int4, int8 or bf16")
        given = _stripped(tasks)
        names = [name_for_task(task.title) for task in given] if names is None else list(names)
        if len(names) != len(given) or len(set(names)) != len(names):
            raise AdapterError("give each description a name of its own")
        for name, task in zip(names, given, strict=True):
            check_name(name)
            if not replace:
                self.library.check_free(name, unless_from=task.sha256)
        started = time.perf_counter()
        features = self._encode(given)  # too long an example is refused before descent
        distances = self._distances(given, features)
        if refine is None:
            made = [(rows, False) for rows in self._rows(given, features, strength)]
        else:
            made = [self._refined(task, refine, strength) for task in given]
        seconds = (time.perf_counter() - started) / max(1, len(made))
        for rows, _ in made:
            check_finite(tensors_of(rows), "these descriptions")
        return [
            save_single(
                rows,
                self.hypernetwork.config.target,
                self.library,
                name,
                kind="task",
                title=task.title,
                source_sha256=task.sha256,
                n_examples=len(task.examples),
                is_refined=is_refined,
                made_for=self.caster.made_for,
                hypernetwork=self.caster.id,
                learn_s=seconds,
                strength=strength,
                warnings=self._warnings(task.description, distance),
                storage=storage,
                replace=replace,
            )
            for name, task, (rows, is_refined), distance in zip(names, given, made, distances, strict=True)
        ]

    def _encode(self, tasks: Sequence[TaskSpec]) -> Features:
        if not all(task.description or task.examples for task in tasks):
            raise AdapterError(
                "the description of a task is empty: say in a sentence what the model should do, or give examples"
            )
        return self.caster.encode(tasks)

    def _refined(self, task: TaskSpec, refine: Refine, strength: float) -> tuple[Rows, bool]:
        """The rows of a task after descent, and True; where descent made nothing better, as without it, and False."""
        start = self.start_of_descent(task, strength)
        rows = refine(start, self.hypernetwork.loras, task.examples)
        is_refined = rows is not start
        if is_refined or not task.description:  # without a description, the examples are in the start already
            return rows, is_refined
        return self._rows([task], self._encode([task]), strength)[0], False

    def _cast(self, features: Features) -> list[Rows]:
        """The rows of each task as the hypernetwork casts them. Raises AdapterError where they are not finite."""
        batches = [self.caster.cast(Features(some)).rows for some in features.states.split(_AT_ONCE)]
        for batch in batches:
            check_finite(tensors_of(batch), "these descriptions")
        return [one for batch in batches for one in _each(batch)]

    def _rows(self, tasks: Sequence[TaskSpec], features: Features, strength: float) -> list[Rows]:
        """The rows of each task as its adapter keeps them; `strength` multiplies their deltas."""
        rows = self._cast(features)
        with self.caster.lock, torch.inference_mode():
            kept = [
                self.hypernetwork.kept_rows(self.caster.encoder, task, one)
                for task, one in zip(tasks, rows, strict=True)
            ]
        return [_scaled(one, strength) for one in kept]

    @torch.inference_mode()
    def _distances(self, tasks: Sequence[TaskSpec], features: Features) -> list[float | None]:
        conditions = features.states[:, 0]
        if not self.hypernetwork.config.n_seen:
            return [None] * len(conditions)
        found = self.hypernetwork.distances(conditions).tolist()
        return [None if task.examples else distance for task, distance in zip(tasks, found, strict=True)]

    def _warnings(self, description: str, distance: float | None) -> tuple[str, ...]:
        if distance is None or self.ood_threshold is None or distance <= self.ood_threshold:
            return ()
        return (
            f"{description!r} is far from every description seen in training (distance {distance:.2f}, usual are up to "
            f"{self.ood_threshold:.2f}): try the adapter before you rely on it, or say it in other words",
        )


def _stripped(tasks: Sequence[str | TaskSpec]) -> list[TaskSpec]:
    """The specification of each task, without white space around its description."""
    return [dataclasses.replace(task, description=task.description.strip()) for task in map(as_spec, tasks)]


def _each(rows: Rows) -> list[Rows]:
    """Rows of n tasks -> the rows of each one."""
    n = next(iter(rows.values()))[0].shape[0]
    return [{kind: (a[i : i + 1], b[i : i + 1]) for kind, (a, b) in rows.items()} for i in range(n)]


def _scaled(rows: Rows, strength: float) -> Rows:
    return rows if strength == 1 else {kind: (a, b * strength) for kind, (a, b) in rows.items()}
