"""Text-to-LoRA by reconstruction (arXiv 2506.06105, section 3.1): a task's description becomes the LoRA that was trained on the task.

The base is not run at all: a step is a few matmuls. Many pairs of factors have the same product, so what is compared matters: the products
themselves, through small Gram matrices; or the factors, each number z-scored over the library as published, as trained or in their
svd_canonical form.
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
from loracast.lora.algebra import Factors, LoRA, LoRABatch, compress, stack
from loracast.training.oracle import oracles_in, read_oracle

Match = Literal["product", "factors", "canonical_factors"]
"""What of a generated LoRA must match the oracle."""


def tasks_with_oracles(tasks: Sequence[Task], library: Path) -> list[Task]:
    """The tasks, not held out, whose oracles are in a library.

    Raises:
        ConfigError: there are none.
    """
    there = set(oracles_in(library))
    found = [task for task in tasks if task.name in there and not task.is_heldout]
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
    """The oracles of some tasks, row by row: A [tasks, r, in] and B [tasks, out, r] of every module.

    Raises:
        ConfigError: the oracles have other modules than the hypernetwork, or a rank that it cannot reach.
    """
    loras = [read_oracle(library / task.name, base) for task in tasks]
    for task, lora in zip(tasks, loras, strict=True):
        if set(lora.names) != set(config.target.names):
            raise ConfigError(
                f"the oracle of {task.name} is on other modules than the hypernetwork; give both the same kinds and layers"
            )
        if lora.rank > config.lora_rank or (match != "product" and lora.rank != config.lora_rank):
            raise ConfigError(
                f"the oracle of {task.name} has rank {lora.rank}, the hypernetwork {config.lora_rank}: give both the same"
            )
    if match != "product" and len(loras) < 2:
        raise ConfigError("factors are compared in units of how they differ between tasks; give at least two oracles")
    if match == "canonical_factors":
        loras = [svd_canonical(lora) for lora in loras]
    batch = stack([lora.to(dtype=torch.float32) for lora in loras])
    return LoRABatch(len(loras), {name: batch.factors[name] for name in config.target.names}, {})


def library_sha256(tasks: Sequence[Task], library: Path) -> str:
    """Of what the oracles of some tasks are: training goes on with the same ones only."""
    parts = [file_sha256(library / task.name / "adapter_model.safetensors") for task in tasks]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def svd_canonical(lora: LoRA) -> LoRA:
    """The same LoRA with the factors that its SVD gives: by falling singular values, halves of them on both sides, signs fixed."""
    balanced, _ = compress(lora, lora.rank)
    factors = {}
    for name, (a, b) in balanced.factors.items():
        signs = torch.where(a.sum(1) < 0, -1.0, 1.0).to(a.dtype)  # [r]
        factors[name] = Factors(a * signs[:, None], b * signs)
    return LoRA(factors)


def relative_square_error(made: LoRABatch, wanted: LoRABatch) -> Tensor:
    """|made - wanted|^2 / |wanted|^2 of each row's products, over all modules [n]."""
    energy = wanted.squared_norms()
    return (made.squared_norms() - 2 * made.inner(wanted) + energy) / energy.clamp_min(1e-12)


def matching(library: LoRABatch, match: Match) -> Callable[[LoRABatch, Sequence[int]], Tensor]:
    """The loss of LoRAs that were made for some rows of a library: (made, rows) -> scalar."""
    if match == "product":
        return lambda made, rows: relative_square_error(made, library.take(rows)).mean()
    units = {name: (_Units(a), _Units(b)) for name, (a, b) in library.factors.items()}

    def loss(made: LoRABatch, rows: Sequence[int]) -> Tensor:
        wanted = library.take(rows).factors
        return torch.stack(
            [
                unit.distance(mine, theirs)
                for name, pair in made.factors.items()
                for unit, mine, theirs in zip(units[name], pair, wanted[name], strict=True)
            ]
        ).mean()

    return loss


class _Units:
    """How much each number of a factor differs between the tasks of a library."""

    def __init__(self, factor: Tensor):  # [tasks, ...]
        self.deviation = factor.std(0, correction=0)
        self.deviation = self.deviation + 0.1 * self.deviation.mean() + 1e-8  # of few tasks, some numbers hardly differ

    def distance(self, one: Tensor, other: Tensor) -> Tensor:
        """Mean absolute difference of the z-scored numbers; their mean over the library falls out."""
        return ((one - other) / self.deviation).abs().mean()
