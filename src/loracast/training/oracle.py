"""What generated adapters are measured by: LoRAs trained on the tasks themselves, with PEFT.

An **oracle** is trained on one task's examples: what a description could at best be worth. The **multi-task LoRA** is one LoRA for all
training tasks, trained on the same rows in the same steps as Text-to-LoRA: what is left of it without descriptions. Its second form
has the description in every prompt.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loracast.base import Base
from loracast.errors import AdapterError, ConfigError, TrainingError
from loracast.files import write_atomically
from loracast.fingerprint import Fingerprint, check
from loracast.lora import LoRA, LoRABatch
from loracast.manifest import check_name
from loracast.peft_format import read_peft
from loracast.target import target_from_config
from loracast.tasks import Task
from loracast.training.episodes import Episode, pack
from loracast.training.loop import TrainConfig, train
from loracast.training.objective import answer_with
from loracast.training.recipe import keys_of, read_tables
from loracast.training.runtime import Workers
from loracast.training.task_source import TaskDataConfig, TaskSource

ABOUT = "loracast.json"
"""Beside PEFT's files: what the LoRA was trained on and how. It is written last."""
_EXAMPLES_IN_A_ROW = 8  # a row's attention grows with its square

Metrics = Callable[[str, dict[str, float]], None]
"""(task, its latest figures)"""


@dataclass(frozen=True)
class OracleConfig:
    """The LoRA itself, as PEFT is told."""

    kinds: tuple[str, ...] = ("q_proj", "v_proj")
    """Module kinds that receive a LoRA."""
    layers: tuple[int, ...] | None = None
    """Layers that receive a LoRA; all if None."""
    rank: int = 8
    """Rank."""
    scale: float = 5.66
    """Factor on the delta; alpha is rank times this (published: 16 / sqrt(8))."""


@dataclass(frozen=True)
class OracleRecipe:
    """One training, as a TOML file with the tables `[lora]`, `[data]` and `[training]` says it."""

    lora: OracleConfig = field(default_factory=OracleConfig)
    data: TaskDataConfig = field(default_factory=lambda: TaskDataConfig(tasks_per_step=1, examples_per_task=64))
    training: TrainConfig = field(default_factory=lambda: TrainConfig(steps=100, lr=1e-3, warmup_steps=10))


def read_oracle_recipe(path: Path | None, overrides: Sequence[str] = ()) -> OracleRecipe:
    """A recipe from a TOML file, changed by overrides. Raises ConfigError as `read_tables` does."""
    known = {"lora": keys_of(OracleConfig), "data": keys_of(TaskDataConfig), "training": keys_of(TrainConfig)}
    tables = read_tables(path, overrides, known)
    default = OracleRecipe()
    return OracleRecipe(
        **{name: dataclasses.replace(getattr(default, name), **tables[name]) for name in ("lora", "data", "training")}
    )


def train_oracles(
    base: Base,
    recipe: OracleRecipe,
    tasks: Sequence[Task],
    library: Path,
    *,
    command: str = "",
    budget_s: float | None = None,
    on_metrics: Metrics = lambda task, figures: None,
) -> list[str]:
    """Train an oracle for each task, one after the other, each in a folder of its name. Those that are done are left alone.

    Args:
        budget_s: stop after this many seconds, also within a task; the same call goes on from there.

    Returns:
        the names of the tasks whose oracles are there now.

    Raises:
        TrainingError: the library has an oracle of one of these tasks that was trained otherwise.
    """
    ends_s = None if budget_s is None else time.monotonic() + budget_s
    done = []
    for task in tasks:
        check_name(task.name)
        left_s = None if ends_s is None else ends_s - time.monotonic()
        if left_s is not None and left_s <= 0:
            break
        source = TaskSource(dataclasses.replace(recipe.data, tasks_per_step=1), [task], base.chat, heldout_too=True)
        told = partial(on_metrics, task.name)
        if _train_one(base, recipe, source, library / task.name, command, left_s, told):
            done.append(task.name)
    return done


def train_multitask(
    base: Base,
    recipe: OracleRecipe,
    tasks: Sequence[Task],
    out_dir: Path,
    *,
    described: bool = False,
    command: str = "",
    budget_s: float | None = None,
    on_metrics: Metrics = lambda task, figures: None,
) -> bool:
    """Train one LoRA on all tasks that are not held out. True once it is done; until then the same call goes on.

    Args:
        described: the description that a step draws for a task stands in the prompts of its examples.
    """
    source = TaskSource(recipe.data, tasks, base.chat, described=described)
    return _train_one(base, recipe, source, out_dir, command, budget_s, partial(on_metrics, out_dir.name))


def read_oracle(folder: Path, base: Fingerprint) -> LoRA:
    """A LoRA that one of these trainings made, checked against a base's fingerprint.

    Raises:
        AdapterError: there is none, or it is not done.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        made_for = Fingerprint(**about["made_for"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{folder} holds no trained LoRA, or one whose training is not done (`loracast train oracle` goes on): {error}"
        ) from error
    check(made_for, base, f"the LoRA in {folder}")
    return read_peft(folder)


def oracles_in(library: Path) -> tuple[str, ...]:
    """The names of the tasks whose oracles are done."""
    return tuple(sorted(path.parent.name for path in library.glob(f"*/{ABOUT}")))


def _train_one(
    base: Base,
    recipe: OracleRecipe,
    source: TaskSource,
    folder: Path,
    command: str,
    budget_s: float | None,
    on_metrics: Callable[[dict[str, float]], None],
) -> bool:
    """Train one LoRA, or go on with it; whether it is done now."""
    if Workers.join(base.device.type).n > 1:
        raise TrainingError("LoRAs of single tasks are trained by one process; start it without a launcher")
    settings = {
        "lora": dataclasses.asdict(recipe.lora),
        "data": dataclasses.asdict(source.config),
        "training": {k: v for k, v in dataclasses.asdict(recipe.training).items() if k not in _FREE},
        "described": source.described,
        "tasks": [task.name for task in source.tasks],
        "tasks_sha256": hashlib.sha256(repr(source.tasks).encode()).hexdigest(),
    }
    if (folder / ABOUT).is_file():
        stored = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        differing = sorted(k for k, v in _plain(settings).items() if stored.get("settings", {}).get(k) != v)
        if differing:
            raise TrainingError(
                f"{folder} holds a LoRA that was trained otherwise ({', '.join(differing)}); give another --out, or remove it"
            )
        return True
    fingerprint = base.fingerprint  # before the base has other modules
    config = dataclasses.replace(recipe.training, budget_s=budget_s)
    started = time.monotonic()
    with _with_lora(base, recipe) as (wrapped, factors):

        def objective(step: int, micro: int) -> tuple[Tensor, dict[str, float]]:
            rows = _rows(source.step(step * config.accumulate + micro).episodes)
            batch = pack(rows, base.pad_id).to(base.device)
            with torch.autocast(base.device.type, torch.bfloat16) if config.bf16 else nullcontext():
                seen, _ = answer_with(base.model, LoRABatch(1, {}, {}), batch)  # PEFT adds the LoRA
            figures = {"exact": seen.exact, "token_accuracy": seen.token_accuracy, "tokens": batch.n_tokens}
            return seen.loss, figures

        last = train(
            factors, objective, config, folder,
            save_model=lambda out: wrapped.save_pretrained(str(out)), settings={"oracle": settings}, on_metrics=on_metrics,
        )  # fmt: skip
    if last.get("step") != config.steps:
        return False
    about = {
        "made_for": fingerprint.to_dict(), "command": command, "settings": settings, "last": last,
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    write_atomically(folder / ABOUT, json.dumps(about, indent=1).encode())
    for state in folder.glob("state*"):  # done: nothing goes on from it
        shutil.rmtree(state) if state.is_dir() else state.unlink()
    return True


_FREE = {"budget_s", "save_every_s", "log_every"}  # may differ between calls of one training


@contextmanager
def _with_lora(base: Base, recipe: OracleRecipe) -> Iterator[tuple[Any, nn.Module]]:
    """PEFT's model around the base, and a module of nothing but its factors; the base is its old self afterwards."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("training LoRAs needs PEFT: pip install 'loracast[train]'") from error
    target = target_from_config(base.model.config, recipe.lora.kinds, recipe.lora.layers)
    torch.manual_seed(recipe.training.seed)
    options = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.rank * recipe.lora.scale,  # type: ignore[arg-type]  # PEFT takes and divides any number
        target_modules=list(target.names),
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(base.model, options)
    try:
        trained = {name.replace(".", "/"): p for name, p in wrapped.named_parameters() if p.requires_grad}
        yield wrapped, nn.ParameterDict(trained)
    finally:
        wrapped.unload()


def _rows(episodes: Sequence[Episode]) -> list[Episode]:
    """The same questions in rows of a few: all of them have the same LoRA."""
    return [
        dataclasses.replace(episode, questions=episode.questions[start : start + _EXAMPLES_IN_A_ROW])
        for episode in episodes
        for start in range(0, len(episode.questions), _EXAMPLES_IN_A_ROW)
    ]


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """In JSON's types, as they are stored."""
    return json.loads(json.dumps(settings))
