"""Set what training for tasks starts from: which parameters are trained, shared factors, units, the task bank's keys.

Conditions that describe nothing stand here too, with which a hypernetwork learns to cast nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from loracast.errors import ConfigError
from loracast.hypernets.attention_delta import AttentionDeltaToLoRA, new_task_bank
from loracast.hypernets.descriptions import DescriptionHypernetwork, TaskBank
from loracast.hypernets.perceiver import StaticLoRAs
from loracast.hypernets.text_to_lora import Head, TextToLoRA
from loracast.lora.algebra import LoRA, LoRABatch
from loracast.lora.factors import Factors
from loracast.lora.target import TargetModule

_CHANGEABLE = {"depth", "dummy_input", "dummy_answer", "examples_at_once", "task_bank_rank", "task_bank_width"}
_SAME = 0.999
"""Cosine from which a description in training counts as the one that the key was made from."""
_HIDE_KEY, _HIDE_TASK = 0.4, 0.15
"""Shares of the training's descriptions that are compared without their own key, or without all keys of their task."""
_SHRINKAGE = 10.0
"""Added to the variances within tasks, in units of their mean: there are far fewer descriptions than directions."""
_LENGTH = 3.0
"""Length of each row of A and column of B, with which cores learn about as fast as the B of a usual LoRA."""


def changeable(hypernet: DescriptionHypernetwork) -> set[str]:
    """The config keys that training may change when it starts from a checkpoint."""
    return _CHANGEABLE if isinstance(hypernet, AttentionDeltaToLoRA) else set()


def select_trained(hypernet: DescriptionHypernetwork, *, encoder_lora: bool, task_bank_only: bool) -> None:
    """Freeze the parameters that training leaves alone: an encoder LoRA, or all but a task bank.

    Raises ConfigError where one of the two is to be trained that this hypernetwork does not have.
    """
    if not isinstance(hypernet, AttentionDeltaToLoRA):
        if encoder_lora or task_bank_only:
            raise ConfigError(
                "only the variant 'attention_delta' has encoder_lora_is_trained and task_bank_only: leave them out"
            )
        return
    has_bank = hypernet.config.task_bank_rank > 0
    if task_bank_only and not has_bank:
        raise ConfigError("task_bank_only: give the variant 'attention_delta' a hypernetwork.task_bank_rank")
    if encoder_lora and has_bank:
        raise ConfigError("a task bank needs a fixed encoder LoRA: leave objective.encoder_lora_is_trained out")
    if task_bank_only:
        hypernet.requires_grad_(False)
        if hypernet.task_bank is not None:  # a new one has gradients from its start
            hypernet.task_bank.requires_grad_(True)
    hypernet.encoder_lora.requires_grad_(encoder_lora)


def start_shared_from(hypernet: DescriptionHypernetwork, lora: LoRA) -> None:
    """Start the shared factors, and an encoder LoRA, from a multi-task LoRA. Raises ConfigError if it does not fit."""
    config = hypernet.config
    for kind in config.target.kinds:
        modules = config.target.of_kind(kind)
        if isinstance(hypernet, AttentionDeltaToLoRA):
            a, b = _factors_in(lora, modules, config.shared_rank)
            for part in (hypernet.shared[kind], hypernet.encoder_lora[kind]):
                part.a.data.copy_(a)
                part.b.data.copy_(b)
        elif isinstance(hypernet, TextToLoRA):
            head = cast(Head, hypernet.heads[kind])
            a, b = _factors_in(lora, modules, config.rank)
            head.shared_a.data.copy_(a)
            head.shared_b.data.copy_(b / config.scale)


def _factors_in(lora: LoRA, modules: Sequence[TargetModule], rank: int) -> tuple[Tensor, Tensor]:
    """Factors of a multi-task LoRA in modules of one kind: A [modules, r, in], B rows [modules, r, out].

    Raises:
        ConfigError: it lacks one of the modules, or has another rank.
    """
    for module in modules:
        pair = lora.factors.get(module.name)
        if pair is None or pair.a.shape != (rank, module.d_in) or pair.b.shape != (module.d_out, rank):
            raise ConfigError(f"the LoRA to start from has no rank {rank} in {module.name}: train it with that rank")
    pairs = [lora.factors[module.name] for module in modules]
    return torch.stack([pair.a.float() for pair in pairs]), torch.stack([pair.b.float().T for pair in pairs])


def start_training(
    hypernet: DescriptionHypernetwork, conditions: Tensor, n_descriptions: Sequence[int], *, is_fresh: bool
) -> None:
    """Set what depends on the training's descriptions, ordered by task.

    Args:
        conditions: of all descriptions [m, d_text].
        n_descriptions: number of descriptions of each task.
        is_fresh: whether training starts from no checkpoint.
    """
    if is_fresh and isinstance(hypernet, AttentionDeltaToLoRA):
        set_units(hypernet, conditions)
    remember_seen(hypernet, conditions)
    if isinstance(hypernet, AttentionDeltaToLoRA) and hypernet.config.task_bank_rank:
        bank = hypernet.task_bank
        if bank is None:
            bank = start_task_bank(hypernet, conditions, n_descriptions)
        else:
            set_keys(bank, hypernet.task_bank_input(conditions))
        bank.hide = hide_keys


def remember_seen(hypernet: DescriptionHypernetwork, conditions: Tensor) -> None:
    """Keep the pooled descriptions seen in training, from their conditions [m, d_text]."""
    hypernet.config = replace(hypernet.config, n_seen=len(conditions))
    hypernet.seen = hypernet.pooled(conditions).detach().clone()


def set_units(hypernet: AttentionDeltaToLoRA, conditions: Tensor) -> None:
    """Set the mean and standard deviation that standardise conditions, from real descriptions [m, d_text]."""
    hypernet.mean.copy_(conditions.mean(0))
    hypernet.std.copy_(conditions.std(0).clamp_min(1e-6))


def start_task_bank(hypernet: AttentionDeltaToLoRA, conditions: Tensor, n_descriptions: Sequence[int]) -> TaskBank:
    """Add a task bank whose cores are zero; the arguments are those of `start_training`."""
    hypernet.config = replace(hypernet.config, bank_sizes=tuple(n_descriptions))
    hypernet.task_bank = bank = new_task_bank(hypernet.config).to(conditions.device)
    take_directions(bank, hypernet.shared)
    fit_keys(bank, hypernet.task_bank_input(conditions))
    return bank


def nothing_described(hypernet: DescriptionHypernetwork, n: int, generator: torch.Generator) -> Tensor:
    """Conditions that no text has, for which the gate learns to switch the LoRA off [1 + n, d_text].

    The first one is always the same; the others are random, with the mean and deviation of real ones, or their length.
    """
    free = torch.randn(n, hypernet.config.d_text, generator=generator)
    if isinstance(hypernet, AttentionDeltaToLoRA):
        constant = (hypernet.mean + hypernet.std)[None]
        return torch.cat([constant, free.to(hypernet.mean) * hypernet.std + hypernet.mean])
    return torch.cat([torch.ones(1, free.shape[1]), functional.normalize(free, dim=-1) * free.shape[1] ** 0.5])


def cast_described(hypernet: DescriptionHypernetwork, conditions: Tensor) -> LoRABatch:
    """Conditions of n descriptions [n, d_text] -> their n LoRAs, without the rows of zero beyond the config's depth.

    The order of the operations fixes how gradients are rounded: another one would train other weights.
    """
    c, n, factors = hypernet.config, len(conditions), dict[str, Factors]()
    is_delta = isinstance(hypernet, AttentionDeltaToLoRA)
    for kind, (a, b) in hypernet.rows(conditions).items():
        if is_delta:  # A is the same for all
            sides_a = [side.expand(n, -1, -1) for side in a[:1].unbind(1)]
            sides_b = [side.transpose(1, 2) for side in b.unbind(1)]
        else:
            sides_a, sides_b = [*a.unbind(1)], [*b.transpose(2, 3).unbind(1)]
        for i, module in enumerate(c.target.of_kind(kind)):
            rank = a.shape[2] - (c.rank if is_delta and kind == c.kind and i >= len(c.layers) else 0)
            factors[module.name] = Factors(sides_a[i][:, :rank], sides_b[i][..., :rank])
    return LoRABatch(n, {name: factors[name] for name in c.target.names}, {})


@torch.no_grad()
def take_directions(bank: TaskBank, other: StaticLoRAs) -> None:
    """Copy the directions of other static LoRAs' factors, as far as the ranks go, all scaled to one length."""
    for kind, part in bank.factors.items():
        for mine, theirs in zip(part.parameters(), other[kind].parameters(), strict=True):
            n = min(mine.shape[1], theirs.shape[1])
            is_trained = theirs[:, :n].norm(dim=-1, keepdim=True) > 0
            mine[:, :n] = torch.where(is_trained, theirs[:, :n], mine[:, :n])
            mine.copy_(_LENGTH * functional.normalize(mine, dim=-1))


@torch.no_grad()
def fit_keys(bank: TaskBank, pooled: Tensor) -> None:
    """Fit the coordinates to the descriptions of all tasks [m, d], ordered by task, and store their keys.

    Fisher's linear discriminants: descriptions are scaled so that the scatter within tasks, shrunk towards a
    sphere, becomes a unit sphere; the principal directions of the tasks' means are the coordinates (Hastie,
    Tibshirani and Friedman, The Elements of Statistical Learning, section 4.3.3).
    """
    task_of = bank.task_of_key()
    x = _checked(bank, pooled).float()
    bank.centre.copy_(x.mean(0))
    counts = torch.bincount(task_of)[:, None]
    means = torch.zeros(len(counts), x.shape[1], device=x.device).index_add_(0, task_of, x) / counts
    _, deviations, directions = torch.linalg.svd(x - means[task_of], full_matrices=False)
    variances = deviations.square() / len(x)
    shrinkage = (_SHRINKAGE * variances.sum() / x.shape[1]).clamp_min(1e-12)

    def sphered(y: Tensor) -> Tensor:
        within = y @ directions.T
        outside = (y - within @ directions) * shrinkage.rsqrt()
        return outside + (within * (variances + shrinkage).rsqrt()) @ directions

    _, _, axes = torch.linalg.svd(sphered(means - bank.centre), full_matrices=False)
    kept = axes[: bank.axes.shape[1]]
    bank.axes.zero_()
    bank.axes[:, : len(kept)] = sphered(kept).T  # sphering is symmetric: it can be applied to the axes instead
    set_keys(bank, x)


@torch.no_grad()
def set_keys(bank: TaskBank, pooled: Tensor) -> None:
    """Store the keys of all descriptions [m, d], ordered by task, in the coordinates of the last `fit_keys`."""
    bank.keys.copy_(bank.coordinates(_checked(bank, pooled)))


def _checked(bank: TaskBank, pooled: Tensor) -> Tensor:
    if len(pooled) != len(bank.keys):
        raise ConfigError(f"{len(pooled)} descriptions were given, and the stored tasks have {len(bank.keys)}")
    return pooled


def hide_keys(cosines: Tensor, task_of: Tensor) -> tuple[Tensor, Tensor]:
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
