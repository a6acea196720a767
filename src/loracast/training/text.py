"""Train Text-to-LoRA on tasks (arXiv 2506.06105, section 3.2): descriptions become LoRAs with which the base does the tasks' examples; or by
reconstruction (section 3.1, `reconstruction.py`).

Beside the answers' cross-entropy, three terms: generated weights stay small; what describes nothing (gibberish, random vectors) becomes
hardly any LoRA; and with another task's description the answers are to be less likely than with their own. The last two are what makes
a description matter: without them part of what is learned is one LoRA for all tasks.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import string
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.base.load import Base
from loracast.data.tasks import Task
from loracast.encoders.sentence import DEFAULT_ENCODER, TextEncoder, load_text_encoder
from loracast.errors import ConfigError
from loracast.files import file_sha256
from loracast.hypernets.attention_delta import AttentionDeltaToLoRA, AttentionDeltaToLoRAConfig
from loracast.hypernets.descriptions import DescriptionHypernetwork
from loracast.hypernets.store import with_config
from loracast.hypernets.text_to_lora import TextToLoRA, TextToLoRAConfig
from loracast.lora.algebra import LoRABatch
from loracast.lora.target import target_from_config
from loracast.scoring.episodes import Episode, pack
from loracast.scoring.likelihood import score_answers
from loracast.training.loop import TrainConfig
from loracast.training.oracle import read_oracle
from loracast.training.position_probes import set_places
from loracast.training.recipe import keys_of, read_recipe_as
from loracast.training.reconstruction import (
    Match,
    library_sha256,
    matching,
    read_library,
    relative_square_error,
    tasks_with_oracles,
)
from loracast.training.run import check_unasked, start_from, train_hypernet
from loracast.training.runtime import Workers
from loracast.training.task_source import DrawnTasks, TaskDataConfig, TaskSource

N_GIBBERISH = 256
"""Strings without meaning, drawn once."""


@dataclass(frozen=True)
class TextRecipe:
    """One training run, as a TOML file with the tables `[hypernetwork]`, `[objective]`, `[data]` and `[training]` says it."""

    kinds: tuple[str, ...] = ("q_proj", "v_proj")
    """Module kinds that receive a LoRA."""
    layers: tuple[int, ...] | None = None
    """Layers that receive a LoRA; all if None."""
    encoder: str = DEFAULT_ENCODER
    """The text encoder."""
    hypernetwork: Mapping[str, Any] = field(default_factory=dict)
    """Options of TextToLoRAConfig other than the target and the encoder; or, with the variant `attention_delta`, of AttentionDeltaToLoRAConfig."""
    l1_weight: float = 1e-3
    """Weight of the mean square of the generated numbers (published: 1e-3)."""
    null_condition_weight: float = 0.1
    """Weight of how large the deltas of meaningless conditions are, beside those of descriptions."""
    contrast_weight: float = 0.0
    """Weight of how much likelier the answers must be with their own description than with another task's."""
    contrast_examples: int = 2
    """Examples of each task that are answered with another task's description as well."""
    reading_is_trained: bool = False
    """Whether, with the variant `attention_delta`, the LoRA with which the base reads descriptions is trained on; the gradient then goes through the encoder."""
    reading_strength_after: float | None = None
    """Strength with which that LoRA is kept in the end; as in training if None. On a dev split half of it did better than all (docs/experiments.md)."""
    task_bank_only: bool = False
    """Whether, with the variant `attention_delta`, only the task bank is trained."""
    match: Match = "product"
    """Of reconstruction: what of a LoRA must match the oracle."""
    data: TaskDataConfig = field(default_factory=TaskDataConfig)
    training: TrainConfig = field(default_factory=TrainConfig)
    asked: frozenset[str] = frozenset()
    """Keys of the table `[hypernetwork]` that were given: `--init-from` leaves no room for any."""

    def __post_init__(self) -> None:
        if self.match not in get_args(Match):
            raise ConfigError(f"unknown match {self.match!r}; one of {', '.join(get_args(Match))}")
        if self.reading_strength_after is not None and self.reading_strength_after <= 0:
            raise ConfigError("reading_strength_after must be above 0")
        if min(self.l1_weight, self.null_condition_weight, self.contrast_weight) < 0 or self.contrast_examples < 1:
            raise ConfigError("weights must not be negative, and contrast_examples at least 1")
        if self.contrast_weight > 0 and self.data.tasks_per_step < 2:
            raise ConfigError("a contrast between tasks needs data.tasks_per_step of at least 2")


ATTENDING = "attention_delta"
"""The variant that is a hypernetwork of its own."""
_OURS = ("kinds", "layers", "encoder")  # of the table [hypernetwork]
_GIVEN = {"modules", "d_text", "d_state", "n_seen", "bank_sizes"}
"""Keys of the configs that a recipe does not say."""
_CHANGEABLE = {"depth", "dummy_input", "dummy_answer", "task_bank_rank", "task_bank_width"}
"""Keys of the table [hypernetwork] that the variant `attention_delta` may change when it starts from a checkpoint."""
_BY_EXAMPLES = (
    "l1_weight",
    "null_condition_weight",
    "contrast_weight",
    "contrast_examples",
    "reading_is_trained",
    "reading_strength_after",
    "task_bank_only",
)  # of the table [objective]
_BY_ORACLES = ("match",)


def read_text_recipe(path: Path | None, overrides: Sequence[str] = ()) -> TextRecipe:
    """A recipe from a TOML file, changed by overrides. Raises ConfigError as `read_tables` does."""
    return read_recipe_as(
        TextRecipe,
        path,
        overrides,
        architecture=(keys_of(TextToLoRAConfig) | keys_of(AttentionDeltaToLoRAConfig)) - _GIVEN,
        ours=_OURS,
        objective=(*_BY_EXAMPLES, *_BY_ORACLES),
        data=TaskDataConfig,
    )


def gibberish(rng: random.Random, n: int) -> list[str]:
    """Strings that describe nothing: random letters in the shape of a sentence."""

    def word() -> str:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9)))

    return [" ".join(word() for _ in range(rng.randint(3, 14))) for _ in range(n)]


def build_text_hypernet(base: Base, recipe: TextRecipe) -> DescriptionHypernetwork:
    """A fresh hypernetwork for a base. Raises ConfigError for options that the variant does not have."""
    torch.manual_seed(recipe.training.seed)
    modules = target_from_config(base.model.config, recipe.kinds, recipe.layers).rows
    options = dict(recipe.hypernetwork)
    if options.get("variant") != ATTENDING:
        _check_options(options, TextToLoRAConfig)
        encoder = load_text_encoder(recipe.encoder, base)
        return TextToLoRA(TextToLoRAConfig(d_text=encoder.d_text, modules=modules, encoder=encoder.name, **options))
    if "encoder" in recipe.asked:
        raise ConfigError(f"the variant {ATTENDING!r} reads descriptions with the base; leave hypernetwork.encoder out")
    del options["variant"]
    _check_options(options, AttentionDeltaToLoRAConfig)
    d_state = base.model.config.get_text_config().hidden_size
    return AttentionDeltaToLoRA(AttentionDeltaToLoRAConfig(d_state=d_state, modules=modules, **options))


def _check_options(options: Mapping[str, Any], config: type) -> None:
    if unknown := sorted(options.keys() - keys_of(config)):
        raise ConfigError(f"this variant has no {', '.join(f'hypernetwork.{name}' for name in unknown)}")


def train_text(
    base: Base,
    recipe: TextRecipe,
    tasks: Sequence[Task],
    out_dir: Path,
    *,
    oracles: Path | None = None,
    init_from: Path | None = None,
    shared_from: Path | None = None,
    command: str = "",
    workers: Workers | None = None,
    on_metrics: Callable[[dict[str, float]], None] = lambda metrics: None,
) -> dict[str, float]:
    """Train a hypernetwork for `base` on the tasks that are not held out, or go on where `out_dir` has a run with the same settings.

    Args:
        oracles: a library of LoRAs trained on tasks (`training/oracle.py`); the hypernetwork learns to give these to their tasks' descriptions
            (reconstruction), in place of what makes the base do the tasks' examples.
        init_from: a hypernetwork folder whose weights a fresh run starts from. Its config is used; the recipe's `[hypernetwork]` table may have, with the
            variant `attention_delta`, another dummy input, a smaller depth, and a `task_bank_rank`.
        shared_from: folder of a LoRA trained on all tasks (`train_multitask`), as which a fresh run's factors that all descriptions share start.
        command: kept in the checkpoint's provenance.

    Returns:
        the last metrics. The hypernetwork lies in `out_dir` (fp32), the metrics in `metrics.jsonl`.
    """
    workers = workers or Workers.join(base.device.type)
    known = tasks if oracles is None else tasks_with_oracles(tasks, oracles)
    source = TaskSource(recipe.data, known, base.chat, varied=oracles is None)
    hypernet = _start_from(init_from, recipe, base) if init_from is not None else build_text_hypernet(base, recipe)
    reads_otherwise_after = recipe.reading_is_trained or recipe.reading_strength_after is not None
    if reads_otherwise_after and not isinstance(hypernet, AttentionDeltaToLoRA):
        raise ConfigError(
            "only the variant 'attention_delta' has a LoRA to read with: leave objective.reading_is_trained and reading_strength_after out"
        )
    _check_recall(recipe, hypernet)
    encoder = hypernet.text_encoder(base)
    if shared_from is not None:
        hypernet.start_shared_from(read_oracle(shared_from, base.fingerprint))
    hypernet.to(workers.device)
    with torch.no_grad():
        seen = encoder(source.descriptions).to(workers.device)
    if isinstance(hypernet, AttentionDeltaToLoRA) and init_from is None:
        set_places(hypernet, base, source)
        hypernet.set_units(seen)
    hypernet.remember_seen(seen)
    if isinstance(hypernet, AttentionDeltaToLoRA) and hypernet.config.task_bank_rank:
        if hypernet.task_bank is None:
            torch.manual_seed(recipe.training.seed)
            hypernet.start_task_bank(seen, source.n_descriptions)
        else:
            hypernet.refresh_task_bank(seen)
    hypernet.train()
    if isinstance(hypernet, AttentionDeltaToLoRA):
        if recipe.task_bank_only and hypernet.task_bank is not None:
            hypernet.requires_grad_(False)
            hypernet.task_bank.requires_grad_(True)
        hypernet.encoder_lora.requires_grad_(recipe.reading_is_trained)
    wrapped = workers.wrap(hypernet)
    if oracles is None:
        for task in source.tasks:
            source.short_enough(task)  # told now, not in the middle of a training
        reads = encoder if recipe.reading_is_trained else _Remembering(encoder, source.descriptions, seen)
        of_step = _by_examples(base, recipe, hypernet, wrapped, source, reads)
    else:
        library = read_library(source.tasks, oracles, base.fingerprint, hypernet.config, recipe.match)
        of_step = _by_oracles(wrapped, source, library.to(workers.device), recipe.match, encoder)

    def objective(step: int, micro: int) -> tuple[Tensor, dict[str, float]]:
        number = step * recipe.training.accumulate + micro
        drawn = source.draw(number, workers.rank)
        torch.manual_seed(number)  # dropout depends on the step alone: resumed training is the same, on any device
        return of_step(number, drawn)

    about = {
        "tasks": [task.name for task in source.tasks],
        "tasks_sha256": source.sha256,
        "objective": {name: getattr(recipe, name) for name in (_BY_EXAMPLES if oracles is None else _BY_ORACLES)},
        "data": dataclasses.asdict(recipe.data),
    }
    if shared_from is not None:
        about["shared_from_sha256"] = file_sha256(shared_from / "adapter_model.safetensors")
    if oracles is not None:
        about["oracles_sha256"] = library_sha256(source.tasks, oracles)
    return train_hypernet(
        hypernet, objective, recipe.training, out_dir,
        base=base, init_from=init_from, about=about, command=command, workers=workers, on_metrics=on_metrics,
        finish=partial(_learn_known, hypernet, source, encoder, recipe.reading_strength_after) if reads_otherwise_after else None,
    )  # fmt: skip


def _start_from(folder: Path, recipe: TextRecipe, base: Base) -> DescriptionHypernetwork:
    """The hypernetwork that a fresh run starts from, with what the recipe may change of it."""
    asked = recipe.asked | recipe.hypernetwork.keys()
    hypernet = start_from(folder, DescriptionHypernetwork, base)
    changed = asked & _CHANGEABLE if isinstance(hypernet, AttentionDeltaToLoRA) else set()
    check_unasked(asked - changed)
    if isinstance(hypernet, AttentionDeltaToLoRA) and changed:
        hypernet = with_config(hypernet, {name: recipe.hypernetwork[name] for name in changed})
    return hypernet


def _check_recall(recipe: TextRecipe, hypernet: DescriptionHypernetwork) -> None:
    """Raises ConfigError where a task_bank is asked for that there is not, or its descriptions would be read otherwise in the end."""
    has_task_bank = isinstance(hypernet, AttentionDeltaToLoRA) and hypernet.config.task_bank_rank > 0
    if recipe.task_bank_only and not has_task_bank:
        raise ConfigError(
            "objective.task_bank_only trains the task bank: give the variant 'attention_delta' a hypernetwork.task_bank_rank"
        )
    if has_task_bank and (recipe.reading_is_trained or recipe.reading_strength_after is not None):
        raise ConfigError(
            "the task bank finds tasks by their descriptions as they are read at the start: leave objective.reading_is_trained and reading_strength_after out"
        )


@torch.no_grad()
def _learn_known(
    hypernet: DescriptionHypernetwork, source: TaskSource, encoder: TextEncoder, reading_strength: float | None
) -> None:
    """Let the hypernetwork keep what it is trained on, as it is read from now on."""
    if reading_strength is not None and isinstance(hypernet, AttentionDeltaToLoRA):
        hypernet.config = dataclasses.replace(hypernet.config, reading_strength=reading_strength)
    hypernet.remember_seen(encoder(source.descriptions).to(next(hypernet.parameters()).device))


class _Remembering:
    """A text encoder that has read some texts already."""

    def __init__(self, encoder: TextEncoder, texts: Sequence[str], read: Tensor):
        self.name, self.d_text, self._encoder = encoder.name, encoder.d_text, encoder
        self._read, self._row_of = read, {text: i for i, text in enumerate(texts)}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        new = [text for text in texts if text not in self._row_of]
        read = iter(self._encoder(new)) if new else iter(())
        return torch.stack([self._read[self._row_of[text]] if text in self._row_of else next(read) for text in texts])


OfStep = Callable[[int, DrawnTasks], tuple[Tensor, dict[str, float]]]
"""(number of the step, what was drawn) -> loss, and figures to log."""


def _by_examples(
    base: Base,
    recipe: TextRecipe,
    hypernet: DescriptionHypernetwork,
    wrapped: nn.Module,
    source: TaskSource,
    encoder: TextEncoder,
) -> OfStep:
    """The base does the tasks' examples, with a LoRA made from each task's description.

    Args:
        wrapped: the hypernetwork as its workers call it.
    """
    nonsense = gibberish(random.Random(recipe.data.seed), N_GIBBERISH)
    device = base.device

    def of_step(number: int, drawn: DrawnTasks) -> tuple[Tensor, dict[str, float]]:
        episodes = source.episodes(drawn)
        batch = pack(episodes, base.pad_id).to(device)
        n = len(episodes)
        rng = random.Random(f"{recipe.data.seed}/calm/{number}")
        conditions = encoder(drawn.descriptions).to(device)
        if recipe.null_condition_weight > 0:
            with torch.no_grad():
                undescribing = encoder(rng.sample(nonsense, (n + 1) // 2)).to(device)
            free = hypernet.meaningless(n // 2, torch.Generator().manual_seed(rng.randrange(2**31)))
            conditions = torch.cat([conditions, undescribing, hypernet.constant().to(free), free])
        autocast = torch.autocast(device.type, torch.bfloat16) if recipe.training.bf16 else nullcontext()
        with autocast:
            both = wrapped(conditions)
            loras = both.rows(0, n)
            seen = score_answers(base.model, loras, batch)
        squares = both.squared_norms()
        described, undescribed = squares[:n], squares[n:]
        # A LoRA that is hardly there yet is no measure.
        calm = undescribed.sum() / max(1, len(undescribed)) / described.mean().detach().clamp_min(1.0)
        size = torch.stack(
            [a.float().square().mean() + b.float().square().mean() for a, b in loras.factors.values()]
        ).mean()
        loss = seen.loss + recipe.l1_weight * size + recipe.null_condition_weight * calm
        contrasts: dict[str, float] = {}
        if recipe.contrast_weight > 0 and n > 1:
            with autocast:
                contrast = _contrast(base, loras, episodes, seen.by_question, recipe.contrast_examples)
            loss = loss + recipe.contrast_weight * contrast
            contrasts["contrast"] = contrast.item()
        return loss, {
            "answer_loss": seen.loss.item(),
            "exact": seen.exact,
            "token_accuracy": seen.token_accuracy,
            "delta_norm": described.mean().sqrt().item(),
            "calm": calm.item(),
            **contrasts,
            "questions": batch.n_questions,
            "tokens": batch.n_tokens,
        }

    return of_step


def _by_oracles(
    wrapped: nn.Module, source: TaskSource, library: LoRABatch, match: Match, encoder: TextEncoder
) -> OfStep:
    """What the descriptions become matches the LoRAs that were trained on their tasks; the base is not asked."""
    row_of = {task.name: i for i, task in enumerate(source.tasks)}
    loss_of = matching(library, match)
    device = next(iter(library.factors.values())).a.device

    def of_step(number: int, drawn: DrawnTasks) -> tuple[Tensor, dict[str, float]]:
        rows = [row_of[task.name] for task in drawn.tasks]
        made = wrapped(encoder(drawn.descriptions).to(device))
        with torch.no_grad():
            error = relative_square_error(made, library.take(rows)).clamp_min(0).mean().sqrt().item()
        return loss_of(made, rows), {"relative_error": error, "tasks": len(rows)}

    return of_step


def _contrast(base: Base, loras: LoRABatch, episodes: Sequence[Episode], own: Tensor, n_examples: int) -> Tensor:
    """How little likelier the answers are with their own LoRA than with that of the task before it: softplus of the difference in nats a token.

    It goes to zero as the difference grows, so that the other task's LoRA is not driven further than it needs to be.

    Args:
        own: the mean cross-entropy of each answer with its own LoRA [questions].
    """
    some = [dataclasses.replace(episode, questions=episode.questions[:n_examples]) for episode in episodes]
    batch = pack(some, base.pad_id).to(own.device)
    other = score_answers(base.model, loras.take([i - 1 for i in range(len(episodes))]), batch).by_question
    starts = itertools.accumulate((len(episode.questions) for episode in episodes[:-1]), initial=0)
    kept = [start + i for start, episode in zip(starts, some, strict=True) for i in range(len(episode.questions))]
    return functional.softplus(own[kept] - other).mean()
