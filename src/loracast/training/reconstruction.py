"""Text-to-LoRA by reconstruction (arXiv 2506.06105, section 3.1): a description becomes its task's trained LoRA.

The base is not run: a step is a few matmuls. Many pairs of factors have the same product, so a loss compares either the
products, through small Gram matrices, or the factors as trained, each number z-scored over the library (as published).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from loracast.base.fingerprint import Fingerprint
from loracast.data.tasks import Task
from loracast.errors import ConfigError
from loracast.files import file_sha256
from loracast.hypernets.attention_delta import AttentionDeltaToLoRAConfig
from loracast.hypernets.text_to_lora import TextToLoRAConfig
from loracast.lora.algebra import LoRABatch, stack
from loracast.training.oracle import oracles_in, read_oracle

Match = Literal["product", "factors"]  # what must match between a generated LoRA and the oracle


def tasks_with_oracles(tasks: Sequence[Task], library: Path) -> list[Task]:
    """The training tasks whose oracles are in a library. Raises ConfigError if there are none."""
    finished = set(oracles_in(library))
    found = [task for task in tasks if task.name in finished and not task.is_heldout]
    if not found:
        raise ConfigError(f"{library} has no oracle of a training task; `loracast train oracle` makes them")
    return found


def read_library(
    tasks: Sequence[Task],
    library: Path,
    base: Fingerprint,
    config: TextToLoRAConfig | AttentionDeltaToLoRAConfig,
    match: Match,
) -> LoRABatch:
    """Read the oracles of some tasks: A [tasks, r, in] and B [tasks, out, r] of every module.

    Raises ConfigError if they have other modules than the hypernetwork, or a rank that it cannot reach.
    """
    loras = [read_oracle(library / task.name, base) for task in tasks]
    for task, lora in zip(tasks, loras, strict=True):
        if set(lora.names) != set(config.target.names):
            raise ConfigError(f"the oracle of {task.name} has other modules than the hypernetwork: make both equal")
        if lora.rank > config.lora_rank or (match == "factors" and lora.rank != config.lora_rank):
            raise ConfigError(
                f"the oracle of {task.name} has rank {lora.rank}, the hypernetwork {config.lora_rank}: make both equal"
            )
    if match == "factors" and len(loras) < 2:
        raise ConfigError("factors are compared in units of how they differ between tasks; give at least two oracles")
    batch = stack([lora.to(dtype=torch.float32) for lora in loras])
    return LoRABatch(len(loras), {name: batch.factors[name] for name in config.target.names}, {})


def library_sha256(tasks: Sequence[Task], library: Path) -> str:
    """Hash of the oracles of some tasks; a resumed run must have the same."""
    parts = [file_sha256(library / task.name / "adapter_model.safetensors") for task in tasks]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def relative_square_error(made: LoRABatch, wanted: LoRABatch) -> Tensor:
    """|made - wanted|^2 / |wanted|^2 of each row's products, over all modules [n]."""
    energy = wanted.squared_norms()
    return (made.squared_norms() - 2 * made.inner(wanted) + energy) / energy.clamp_min(1e-12)


def matching(library: LoRABatch, match: Match) -> Callable[[LoRABatch, Sequence[int]], Tensor]:
    """The loss of generated LoRAs against rows of a library: (made, rows) -> scalar."""
    if match == "product":
        return lambda made, rows: relative_square_error(made, library.take(rows)).mean()
    deviations = {name: (_deviation(a), _deviation(b)) for name, (a, b) in library.factors.items()}

    def loss(made: LoRABatch, rows: Sequence[int]) -> Tensor:
        wanted = library.take(rows).factors
        # Mean absolute difference of the z-scored numbers; their means over the library cancel.
        apart = [
            ((one - other) / deviation).abs().mean()
            for name, pair in made.factors.items()
            for deviation, one, other in zip(deviations[name], pair, wanted[name], strict=True)
        ]
        return torch.stack(apart).mean()

    return loss


def _deviation(factor: Tensor) -> Tensor:
    """Deviation of each number of a factor [tasks, ...] over the tasks, with a floor for numbers that hardly differ."""
    deviation = factor.std(0, correction=0)
    return deviation + 0.1 * deviation.mean() + 1e-8
