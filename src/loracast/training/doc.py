"""Train Doc-to-LoRA: puts the base, the hypernetwork, the data and the loop together, from one recipe."""

from __future__ import annotations

import dataclasses
import random
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracast.base import Base
from loracast.chat import encode_text
from loracast.encoders.context import ContextEncoder
from loracast.errors import ConfigError
from loracast.fingerprint import check
from loracast.hypernets.doc_to_lora import DocToLoRA, DocToLoRAConfig
from loracast.hypernets.store import from_pretrained, read_provenance, save_pretrained
from loracast.target import target_from_config
from loracast.training.calibrate import calibrate
from loracast.training.episodes import Question, pack
from loracast.training.loop import TrainConfig, train
from loracast.training.objective import answer_questions
from loracast.training.runtime import Workers
from loracast.training.sources import DataConfig, EpisodeSource

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
    marks_weight: float = 0.3
    """Weight of the loss on what the memory writes."""
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainConfig = field(default_factory=TrainConfig)


def read_recipe(path: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a TOML file, changed by overrides such as `training.lr=2e-4`.

    Raises:
        ConfigError: the file cannot be read, or holds a table or key that nobody knows (all of them in one message).
    """
    tables: dict[str, Any] = {}
    if path is not None:
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"cannot read the recipe {path}: {error}") from error
    for override in overrides:
        key, separator, value = override.partition("=")
        table, dot, name = key.strip().partition(".")
        if not separator or not dot:
            raise ConfigError(f"{override!r} is not an override; write table.key=value, such as training.lr=2e-4")
        tables.setdefault(table, {})[name] = _value(value.strip())
    problems = [
        f"unknown table [{table}]" for table in tables.keys() - {"hypernetwork", "objective", "data", "training"}
    ]
    options = dict(tables.get("hypernetwork", {}))
    target = {name: tuple(options.pop(name)) for name in ("kinds", "layers", "memory_layers") if name in options}
    objective = tables.get("objective", {})
    allowed = {f.name for f in dataclasses.fields(DocToLoRAConfig)} - {"modules", "memory_modules", "d_features"}
    problems += [f"unknown key objective.{name}" for name in sorted(objective.keys() - {"marks_weight"})]
    problems += [f"unknown key hypernetwork.{name}" for name in sorted(options.keys() - allowed)]
    for table, config in (("data", DataConfig), ("training", TrainConfig)):
        known = {f.name for f in dataclasses.fields(config)}
        problems += [f"unknown key {table}.{name}" for name in sorted(tables.get(table, {}).keys() - known)]
    if problems:
        raise ConfigError("bad recipe: " + "; ".join(problems))
    return Recipe(
        **target,
        marks_weight=float(objective.get("marks_weight", Recipe.marks_weight)),
        hypernetwork=_tuples(options),
        data=DataConfig(**_tuples(tables.get("data", {}))),
        training=TrainConfig(**_tuples(tables.get("training", {}))),
    )


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def build_hypernet(base: Base, recipe: Recipe, source: EpisodeSource) -> DocToLoRA:
    """A fresh hypernetwork for a base, its units measured on the data's own text."""
    torch.manual_seed(recipe.training.seed)
    target = target_from_config(base.model.config, recipe.kinds, recipe.layers)
    d_features = base.model.config.get_text_config().hidden_size + recipe.hypernetwork.get("d_values", 0)
    options = {"lead_in": tuple(encode_text(base.tokenizer, "\n"))[:1], **recipe.hypernetwork}
    if recipe.memory_layers:
        options["memory_modules"] = memory_modules(base, recipe.memory_layers)
    hypernet = DocToLoRA(DocToLoRAConfig.for_target(target, d_features, **options))
    encoder = ContextEncoder.for_hypernet(base, hypernet.config)
    calibrate(hypernet, base, encoder, *calibration_data(base, recipe, source))
    return hypernet


def with_memory(hypernet: DocToLoRA, base: Base, recipe: Recipe, source: EpisodeSource) -> DocToLoRA:
    """The same hypernetwork with a fresh associative memory, which does nothing yet."""
    if hypernet.memory is not None:
        raise ConfigError("the checkpoint has a memory already; leave memory_layers out of the recipe")
    modules = memory_modules(base, recipe.memory_layers)
    torch.manual_seed(recipe.training.seed)
    grown = DocToLoRA(dataclasses.replace(hypernet.config, memory_modules=modules))
    encoder = ContextEncoder.for_hypernet(base, grown.config)
    calibrate(grown, base, encoder, *calibration_data(base, recipe, source))
    grown.load_state_dict(hypernet.state_dict(), strict=False)
    return grown


def memory_modules(base: Base, layers: Sequence[int]) -> tuple[tuple[str, int, str, int, int], ...]:
    """The modules of an associative memory in these layers."""
    return target_from_config(base.model.config, ("o_proj",), layers).rows


def calibration_data(base: Base, recipe: Recipe, source: EpisodeSource) -> tuple[list[Tensor], list[Question]]:
    """Text such as the documents are made of, as token ids [1, t], and questions with their answers."""
    rng = random.Random(recipe.data.seed)
    texts = [encode_text(base.tokenizer, source.sample_text(rng, 256)) for _ in range(CALIBRATION_ROWS)]
    asked = [q for step in range(4) for episode in source.step(step) for q in episode.questions[:3]]
    return [torch.tensor([text]) for text in texts], asked


def train_doc(
    base: Base,
    recipe: Recipe,
    out_dir: Path,
    *,
    init_from: Path | None = None,
    command: str = "",
    workers: Workers | None = None,
    on_metrics: Callable[[dict[str, float]], None] = lambda metrics: None,
) -> dict[str, float]:
    """Train a hypernetwork for `base`, or go on where `out_dir` has a run with the same settings.

    Args:
        init_from: a hypernetwork folder whose weights a fresh run starts from (its config is used, and the recipe's
            `[hypernetwork]` table must be empty).
        command: kept in the checkpoint's provenance.

    Returns:
        the last metrics. The hypernetwork lies in `out_dir` (fp32), the metrics in `metrics.jsonl`.
    """
    workers = workers or Workers.join(base.device.type)
    source = EpisodeSource(recipe.data, base.tokenizer, base.chat)
    if init_from is not None:
        if recipe.hypernetwork or recipe.layers:
            raise ConfigError(
                "--init-from takes the architecture from the checkpoint; leave all but memory_layers out of [hypernetwork]"
            )
        hypernet, made_for = from_pretrained(init_from)
        check(made_for, base.fingerprint, f"the hypernetwork in {init_from}")
        if recipe.memory_layers:
            hypernet = with_memory(hypernet, base, recipe, source)
        hypernet.requires_grad_(True)
    else:
        hypernet = build_hypernet(base, recipe, source)
    hypernet.to(workers.device).train()
    encoder = ContextEncoder.for_hypernet(base, hypernet.config)
    wrapped = workers.wrap(hypernet)
    n_micro = recipe.training.accumulate

    def objective(step: int, micro: int) -> tuple[Tensor, dict[str, float]]:
        episodes = source.step(step * n_micro + micro, workers.rank)
        batch = pack(episodes, base.pad_id).to(workers.device)
        autocast = torch.autocast(workers.device.type, torch.bfloat16) if recipe.training.bf16 else nullcontext()
        with autocast:
            seen, written = answer_questions(base.model, encoder, wrapped, batch)
        loss = seen.loss if written.loss is None else seen.loss + recipe.marks_weight * written.loss
        return loss, {
            "answer_loss": seen.loss.item(),
            **written.figures,
            "exact": seen.exact,
            f"exact_{episodes[0].task}": seen.exact,
            "token_accuracy": seen.token_accuracy,
            "questions": batch.n_questions,
            "tokens": batch.n_tokens,
            "context_tokens": batch.chunk_ids.numel(),
        }

    before = read_provenance(init_from).get("history", []) if init_from is not None else []
    texts = [Path(name).name for name in recipe.data.texts]
    run = {
        "command": command,
        "data": {**dataclasses.asdict(recipe.data), "texts": texts},
        "training": dataclasses.asdict(recipe.training),
    }
    provenance = {"history": [*before, run]}

    def save_model(folder: Path) -> None:
        save_pretrained(hypernet, folder, base.fingerprint, storage="float32", provenance=provenance)

    settings = {
        "data": dataclasses.asdict(recipe.data),
        "hypernetwork": dataclasses.asdict(hypernet.config),
        "base": base.fingerprint.norms,
    }
    return train(
        hypernet, objective, recipe.training, out_dir,
        settings=settings, save_model=save_model, on_metrics=on_metrics, workers=workers,
    )  # fmt: skip
