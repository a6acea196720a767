"""Train Doc-to-LoRA: puts the base, the hypernetwork, the data and the loop together, from one recipe."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracast.base.chat import encode_text
from loracast.base.load import Base
from loracast.errors import ConfigError
from loracast.hypernets.doc_to_lora import DocToLoRA, DocToLoRAConfig
from loracast.lora.algebra import LoRA
from loracast.lora.target import target_from_config
from loracast.scoring.episodes import Episode, pack
from loracast.training.calibrate import calibrate, set_memory_units
from loracast.training.loop import TrainConfig
from loracast.training.objective import answer_questions
from loracast.training.recipe import keys_of, read_recipe_as
from loracast.training.run import start_from, train_hypernet
from loracast.training.runtime import Workers
from loracast.training.sources import DataConfig, EpisodeSource
from loracast.training.teacher import Distillation, Teacher

CALIBRATION_ROWS = 12


@dataclass(frozen=True)
class Recipe:
    """One training run, as a TOML file with the tables `[hypernetwork]`, `[data]` and `[training]` says it."""

    kinds: tuple[str, ...] = ("down_proj",)
    """Module kinds that receive a LoRA."""
    layers: tuple[int, ...] | None = None
    """Layers that receive a LoRA; all if None."""
    hypernetwork: Mapping[str, Any] = field(default_factory=dict)
    """Options of DocToLoRAConfig other than the target."""
    memory_layers: tuple[int, ...] = ()
    """Layers whose attention output (`o_proj`) holds an associative memory."""
    static_kinds: tuple[str, ...] = ()
    """Kinds of the modules, in the targeted layers, that receive a LoRA which is the same for every document."""
    encoder_kinds: tuple[str, ...] = ()
    """Kinds of the modules, in the blocks up to the deepest one read, that carry a trained LoRA while the base reads a document."""
    calibration_questions: int = 3000
    """Questions from which a new memory learns, before training, how a statement and its question look to the base."""
    memory_loss_weight: float = 0.3
    """Weight of the loss on what the memory writes, and on finding it."""
    distillation_weight: float = 0.0
    """Share of the answers' loss that is the divergence from a teacher which sees the document (context distillation)."""
    kl_to_base_weight: float = 1.0
    """Weight of the divergence from the plain base on questions that have nothing to do with the documents."""
    l1_weight: float = 0.0
    """Weight of the mean absolute value of the chunks' factors (published: L1 of 0.1)."""
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainConfig = field(default_factory=TrainConfig)
    asked: frozenset[str] = frozenset()
    """Keys of the table `[hypernetwork]` that were given: those that `--init-from` leaves no room for are refused with it."""


_ADDED = {"memory_layers", "calibration_questions", "static_kinds", "static_modules_rank", "head_shared_rank"}
"""May be asked for with --init-from: they add what is missing, or make what is there smaller."""
_OURS = (
    "kinds",
    "layers",
    "memory_layers",
    "static_kinds",
    "encoder_kinds",
    "calibration_questions",
)  # of the table [hypernetwork]


def read_recipe(path: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a TOML file, changed by overrides such as `training.lr=2e-4`.

    Raises:
        ConfigError: the file cannot be read, or holds a table or key that nobody knows (all of them in one message).
    """
    return read_recipe_as(
        Recipe,
        path,
        overrides,
        architecture=keys_of(DocToLoRAConfig)
        - {"modules", "memory_modules", "static_modules", "encoder_modules", "d_features"},
        ours=_OURS,
        objective={"memory_loss_weight", "distillation_weight", "kl_to_base_weight", "l1_weight"},
        data=DataConfig,
    )


def build_hypernet(base: Base, recipe: Recipe, source: EpisodeSource) -> DocToLoRA:
    """A fresh hypernetwork for a base, its units measured on the data's own text."""
    torch.manual_seed(recipe.training.seed)
    target = target_from_config(base.model.config, recipe.kinds, recipe.layers)
    d_features = base.model.config.get_text_config().hidden_size + recipe.hypernetwork.get("d_values", 0)
    options = {"prefix": tuple(encode_text(base.tokenizer, "\n"))[:1], **recipe.hypernetwork}
    if recipe.memory_layers:
        options["memory_modules"] = memory_modules(base, recipe.memory_layers)
    if recipe.static_kinds:
        options["static_modules"] = target_from_config(base.model.config, recipe.static_kinds, recipe.layers).rows
    if recipe.encoder_kinds:
        depth = max(options.get("reader_layers", DocToLoRAConfig.reader_layers))
        options["encoder_modules"] = target_from_config(base.model.config, recipe.encoder_kinds, range(depth)).rows
    hypernet = DocToLoRA(DocToLoRAConfig.for_target(target, d_features, **options))
    encoder = hypernet.hidden_states_encoder(base)
    calibrate(hypernet, base, encoder, *calibration_data(base, recipe, source))
    return hypernet


def grown(hypernet: DocToLoRA, base: Base, recipe: Recipe, source: EpisodeSource) -> DocToLoRA:
    """The same hypernetwork with what the recipe adds: an associative memory or further layers of it, shared modules (which do nothing yet), heads of
    low rank."""
    c = hypernet.config
    changes: dict[str, Any] = {}
    if recipe.memory_layers:
        changes["memory_modules"] = modules = memory_modules(base, recipe.memory_layers)
        if not set(c.memory_modules) < set(modules):
            raise ConfigError(
                f"the checkpoint has a memory in the layers {[layer for _, layer, *_ in c.memory_modules]}; leave memory_layers out of the recipe, "
                "or give these and more"
            )
    if recipe.static_kinds:
        if c.static_modules:
            raise ConfigError("the checkpoint has shared modules already; leave static_kinds out of the recipe")
        changes["static_modules"] = target_from_config(base.model.config, recipe.static_kinds, c.layers).rows
        changes["static_modules_rank"] = recipe.hypernetwork.get("static_modules_rank", c.static_modules_rank)
    head_rank = recipe.hypernetwork.get("head_shared_rank")
    if head_rank is not None:
        if c.head_shared_rank is not None:
            raise ConfigError(
                "the checkpoint's heads are of low rank already; leave head_shared_rank out of the recipe"
            )
        changes["head_shared_rank"] = head_rank
    if not changes:
        return hypernet
    torch.manual_seed(recipe.training.seed)
    larger = DocToLoRA(dataclasses.replace(c, **changes))
    kept = {
        name: value
        for name, value in hypernet.state_dict().items()
        if not (recipe.memory_layers and name.startswith("memory."))
    }
    larger.load_state_dict(kept, strict=False)
    if recipe.memory_layers:
        set_memory_units(larger, base, larger.hidden_states_encoder(base), *calibration_data(base, recipe, source))
        if hypernet.memory is not None and larger.memory is not None:
            at = [larger.config.memory_modules.index(module) for module in c.memory_modules]
            larger.memory.take_modules(hypernet.memory, at)
    if head_rank is not None:
        for kind in c.kinds:
            larger.head(kind).take_low_rank(hypernet.head(kind))
    return larger


def memory_modules(base: Base, layers: Sequence[int]) -> tuple[tuple[str, int, str, int, int], ...]:
    """The modules of an associative memory in these layers."""
    return target_from_config(base.model.config, ("o_proj",), layers).rows


def calibration_data(base: Base, recipe: Recipe, source: EpisodeSource) -> tuple[list[Tensor], list[Episode]]:
    """Text such as the documents are made of, as token ids [1, t], and documents with their questions."""
    rng = random.Random(recipe.data.seed)
    texts = [encode_text(base.tokenizer, source.sample_text(rng, 256)) for _ in range(CALIBRATION_ROWS)]
    episodes: list[Episode] = []
    n_questions = 0
    for step in itertools.count():
        if n_questions >= (recipe.calibration_questions if recipe.memory_layers else 1):
            break
        episodes += source.step(step)
        n_questions = sum(len(episode.questions) for episode in episodes)
    return [torch.tensor([text]) for text in texts], episodes


def train_doc(
    base: Base,
    recipe: Recipe,
    out_dir: Path,
    *,
    init_from: Path | None = None,
    teacher: LoRA | None = None,
    command: str = "",
    workers: Workers | None = None,
    on_metrics: Callable[[dict[str, float]], None] = lambda metrics: None,
) -> dict[str, float]:
    """Train a hypernetwork for `base`, or go on where `out_dir` has a run with the same settings.

    Args:
        init_from: a hypernetwork folder whose weights a fresh run starts from (its config is used, and the recipe's
            `[hypernetwork]` table must be empty).
        teacher: with `distillation_weight`, the LoRA with which the base reads the document in its window (train_reader's); none if None.
        command: kept in the checkpoint's provenance.

    Returns:
        the last metrics. The hypernetwork lies in `out_dir` (fp32), the metrics in `metrics.jsonl`.
    """
    workers = workers or Workers.join(base.device.type)
    is_taught = recipe.distillation_weight > 0
    if teacher is not None and not is_taught:
        raise ConfigError(
            "a teacher is given and nothing is learned from it: set objective.distillation_weight, 0.5 say"
        )
    source = EpisodeSource(recipe.data, base.tokenizer, base.chat, shows_documents=is_taught)
    plain = Teacher(base.model, base.pad_id)
    distillation = Distillation(plain, dataclasses.replace(plain, lora=teacher) if is_taught else None)
    if init_from is not None:
        hypernet = start_from(init_from, DocToLoRA, base, (recipe.asked | recipe.hypernetwork.keys()) - _ADDED)
        hypernet = grown(hypernet, base, recipe, source)
    else:
        hypernet = build_hypernet(base, recipe, source)
    hypernet.to(workers.device).train()
    encoder = hypernet.hidden_states_encoder(base)
    wrapped = workers.wrap(hypernet)
    n_micro = recipe.training.accumulate

    def objective(step: int, micro: int) -> tuple[Tensor, dict[str, float]]:
        episodes = distillation.with_soft_targets(source.step(step * n_micro + micro, workers.rank))
        batch = pack(episodes, base.pad_id).to(workers.device)
        autocast = torch.autocast(workers.device.type, torch.bfloat16) if recipe.training.bf16 else nullcontext()
        with autocast:
            seen, written, cast = answer_questions(base.model, encoder, wrapped, batch)
        losses = {
            "answer_loss": seen.loss,
            "distillation_loss": seen.distillation_loss,
            "memory_loss": written.loss,
            "kl_to_base": seen.kl_to_base,
            "l1": cast.mean_absolute() if recipe.l1_weight > 0 else None,
        }
        weights = {
            "answer_loss": 1 - recipe.distillation_weight,
            "distillation_loss": recipe.distillation_weight,
            "memory_loss": recipe.memory_loss_weight,
            "kl_to_base": recipe.kl_to_base_weight,
            "l1": recipe.l1_weight,
        }
        present = {name: loss for name, loss in losses.items() if loss is not None and weights[name] > 0}
        total = torch.stack([weights[name] * loss for name, loss in present.items()]).sum()
        return total, {
            **{name: loss.item() for name, loss in present.items()},
            **written.figures,
            "exact": seen.exact,
            f"exact_{episodes[0].task}": seen.exact,
            "token_accuracy": seen.token_accuracy,
            f"token_accuracy_{episodes[0].task}": seen.token_accuracy,
            "questions": batch.n_questions,
            "tokens": batch.n_tokens,
            "context_tokens": batch.chunk_ids.numel(),
        }

    # Of the files their names, not where they lie on this machine.
    files = {
        key: [Path(name).name for name in getattr(recipe.data, key)] for key in ("texts", "documents", "unrelated")
    }
    data = {**dataclasses.asdict(recipe.data), **files}
    return train_hypernet(
        hypernet, objective, recipe.training, out_dir,
        base=base, init_from=init_from, about={"data": data}, command=command, workers=workers, on_metrics=on_metrics,
    )  # fmt: skip
