"""Casts task descriptions into LoRAs and adapters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TypedDict, Unpack, cast

import torch

from loracast.encoders.features import Features
from loracast.errors import AdapterError
from loracast.hypernets.descriptions import DescriptionHypernetwork
from loracast.hypernets.protocol import Caster
from loracast.library.adapter import Adapter
from loracast.library.library import check_free
from loracast.library.manifest import check_name, name_from
from loracast.library.save import save_single, source_of
from loracast.library.writer import check_finite
from loracast.lora.algebra import LoRA, Rows
from loracast.paths import library_dir

_AT_ONCE = 50
"""Descriptions in one forward pass of the hypernetwork; with twice as many, each takes longer (docs/notebook)."""


class TaskOptions(TypedDict, total=False):
    """Options of `Model.task` and `tasks`."""

    strength: float
    """Factor on every delta; 0 does nothing, 1 (the default) is as in training."""
    replace: bool
    """Whether an adapter of the same name is replaced."""


class TaskCaster:
    """Casts descriptions of tasks into LoRAs and keeps them in a library."""

    def __init__(self, caster: Caster, library: Path | None = None):
        """
        Args:
            library: where adapters are kept; the user's own library if None.
        """
        self.caster, self.library = caster, library or library_dir()

    @property
    def hypernetwork(self) -> DescriptionHypernetwork:
        return cast(DescriptionHypernetwork, self.caster.hypernetwork)

    @cached_property
    def ood_threshold(self) -> float | None:
        """Distance to the seen descriptions beyond which one gets a warning; None if the hypernetwork holds none."""
        return self.hypernetwork.ood_threshold()

    def loras(self, descriptions: Sequence[str], strength: float = 1.0) -> list[LoRA]:
        """The LoRAs of n descriptions.

        Args:
            strength: factor on every delta; 0 gives no adapter, 1 is as in training.
        """
        loras = self._loras(self._encode(descriptions))
        return loras if strength == 1 else [lora.scale(strength) for lora in loras]

    def constant_lora(self) -> LoRA:
        """The LoRA of a constant condition that describes nothing: a baseline."""
        return self._loras(Features(self.hypernetwork.constant()[:, None]))[0]

    @torch.inference_mode()
    def embeddings(self, descriptions: Sequence[str]) -> torch.Tensor:
        """The vectors by which the hypernetwork compares descriptions, one each [n, d]."""
        return self.hypernetwork.pooled(self._encode(descriptions).states[:, 0])

    def distances(self, descriptions: Sequence[str]) -> list[float | None]:
        """Distance (1 - cosine) of each description to the nearest seen one; None if the hypernetwork holds none."""
        return self._distances(self._encode(descriptions))

    def task(self, description: str, name: str | None = None, **options: Unpack[TaskOptions]) -> Adapter:
        """Cast one description into an adapter and keep it; options and errors as in `tasks`."""
        return self.tasks([description], None if name is None else [name], **options)[0]

    def tasks(
        self,
        descriptions: Sequence[str],
        names: Sequence[str] | None = None,
        *,
        strength: float = 1.0,
        replace: bool = False,
    ) -> list[Adapter]:
        """Cast descriptions into adapters, all in one go, and keep them.

        A description beyond the OOD threshold is cast as well, and its adapter's manifest holds a warning.

        Args:
            names: of the adapters; made from the descriptions if None.
            strength: factor on every delta.
            replace: whether an adapter of the same name is replaced.

        Raises:
            AdapterError: a description is empty, or a name is taken or not allowed; nothing is kept then.
        """
        descriptions = [text.strip() for text in descriptions]
        names = [name_from(text) for text in descriptions] if names is None else list(names)
        if len(names) != len(descriptions) or len(set(names)) != len(names):
            raise AdapterError("give each description a name of its own")
        for name, description in zip(names, descriptions, strict=True):
            check_name(name)
            if not replace:
                check_free(self.library, name, unless_from=source_of(description))
        started = time.perf_counter()
        features = self._encode(descriptions)
        batches = (self.caster.cast(Features(some)).rows for some in features.states.split(_AT_ONCE))
        rows = [one for batch in batches for one in _each(batch, strength)]
        distances = self._distances(features)
        seconds = (time.perf_counter() - started) / max(1, len(rows))
        for one in rows:
            check_finite(one, "these descriptions")
        return [
            save_single(
                one,
                self.hypernetwork.config.target,
                self.library,
                name,
                kind="task",
                title=description,
                made_for=self.caster.made_for,
                hypernetwork=self.caster.id,
                seconds=seconds,
                strength=strength,
                warnings=self._warnings(description, distance),
                replace=replace,
            )
            for name, description, one, distance in zip(names, descriptions, rows, distances, strict=True)
        ]

    def _encode(self, descriptions: Sequence[str]) -> Features:
        if not all(text.strip() for text in descriptions):
            raise AdapterError("the description of a task is empty; say in a sentence what the model shall do")
        return self.caster.encode([text.strip() for text in descriptions])

    def _loras(self, features: Features) -> list[LoRA]:
        batches = [self.caster.loras_of(Features(some)) for some in features.states.split(_AT_ONCE)]
        return [batch.row(i) for batch in batches for i in range(batch.n)]

    @torch.inference_mode()
    def _distances(self, features: Features) -> list[float | None]:
        conditions = features.states[:, 0]
        if not self.hypernetwork.config.n_seen:
            return [None] * len(conditions)
        return list(self.hypernetwork.distances(conditions).tolist())

    def _warnings(self, description: str, distance: float | None) -> tuple[str, ...]:
        if distance is None or self.ood_threshold is None or distance <= self.ood_threshold:
            return ()
        return (
            f"{description!r} is far from every description seen in training (distance {distance:.2f}, usual are up to "
            f"{self.ood_threshold:.2f}): try the adapter before you rely on it, or say it in other words",
        )


def _each(rows: Rows, strength: float) -> list[Rows]:
    """Rows of n descriptions -> the rows of each one, scaled by `strength`."""
    n = next(iter(rows.values()))[0].shape[0]
    scaled = rows if strength == 1 else {kind: (a, b * strength) for kind, (a, b) in rows.items()}
    return [{kind: (a[i : i + 1], b[i : i + 1]) for kind, (a, b) in scaled.items()} for i in range(n)]
