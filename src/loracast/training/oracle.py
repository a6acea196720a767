"""What generated adapters are measured by: LoRAs trained on the tasks themselves, with PEFT.

An **oracle** is trained on one task's examples: what a description could at best be worth. The **multi-task LoRA** is one LoRA for all
training tasks, trained on the same rows in the same steps as Text-to-LoRA: what is left of it without descriptions. Its second form
has the description in every prompt.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from loracast.base.fingerprint import Fingerprint
from loracast.base.load import Base
from loracast.data.tasks import Task
from loracast.errors import AdapterError, TrainingError
from loracast.library.manifest import check_name
from loracast.lora.algebra import LoRA, concat
from loracast.lora.peft_format import read_peft
from loracast.scoring.episodes import Episode, Question
from loracast.training.loop import TrainConfig
from loracast.training.peft_training import ABOUT, PeftConfig, read_about, train_lora
from loracast.training.recipe import keys_of, read_tables
from loracast.training.task_source import TaskDataConfig, TaskSource

_TOKENS_IN_A_ROW = 384  # a row's attention grows with its square

OnMetrics = Callable[[str, dict[str, float]], None]
"""(task, its latest figures)"""


@dataclass(frozen=True)
class OracleRecipe:
    """One training, as a TOML file with the tables `[lora]`, `[data]` and `[training]` says it."""

    lora: PeftConfig = field(default_factory=PeftConfig)
    data: TaskDataConfig = field(
        default_factory=lambda: TaskDataConfig(tasks_per_step=1, examples_per_task=64, tokens_per_task=2048)
    )
    training: TrainConfig = field(default_factory=lambda: TrainConfig(steps=100, lr=1e-3, warmup_steps=10))


MULTITASK = OracleRecipe(data=TaskDataConfig(), training=TrainConfig())
"""Data and training as Text-to-LoRA has them where its recipe says nothing."""


def read_oracle_recipe(
    path: Path | None, overrides: Sequence[str] = (), default: OracleRecipe = OracleRecipe()
) -> OracleRecipe:
    """A recipe from a TOML file, changed by overrides. Raises ConfigError as `read_tables` does."""
    known = {"lora": keys_of(PeftConfig), "data": keys_of(TaskDataConfig), "training": keys_of(TrainConfig)}
    tables = read_tables(path, overrides, known)
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
    on_metrics: OnMetrics = lambda task, figures: None,
) -> list[str]:
    """Train an oracle for each task, one after the other, each in a folder of its name. Those that are done are left alone.

    Args:
        budget_s: stop after this many seconds, also within a task; the same call goes on from there.

    Returns:
        the names of those of the tasks whose oracles are there now.

    Raises:
        TrainingError: a task cannot be trained on (nothing is done then), or the library has an oracle of it that was trained otherwise.
    """
    if recipe.data.tasks_per_step != 1:
        raise TrainingError("an oracle learns one task; leave data.tasks_per_step at 1")
    sources = _sources(base, recipe, tasks)
    ends_s = None if budget_s is None else time.monotonic() + budget_s
    for name, source in sources.items():
        left_s = None if ends_s is None else ends_s - time.monotonic()
        if left_s is not None and left_s <= 0:
            break
        if not _train(base, recipe, source, library / name, command, left_s, partial(on_metrics, name)):
            break  # asked to stop, or out of time
    return [name for name in sources if (library / name / ABOUT).is_file()]


def _sources(base: Base, recipe: OracleRecipe, tasks: Sequence[Task]) -> dict[str, TaskSource]:
    """What each task is learned from, by its name. Raises TrainingError for all that cannot be, in one message."""
    sources: dict[str, TaskSource] = {}
    problems = []
    for task in tasks:
        try:
            check_name(task.name)
            sources[task.name] = TaskSource(recipe.data, [task], base.chat, heldout_too=True)
            sources[task.name].short_enough(task)
        except TrainingError as error:
            problems.append(f"{task.name}: {error}" if task.train else f"{task.name}: no example to train on")
    if problems:
        raise TrainingError("; ".join(problems))
    return sources


def train_multitask(
    base: Base,
    recipe: OracleRecipe,
    tasks: Sequence[Task],
    out_dir: Path,
    *,
    described: bool = False,
    command: str = "",
    budget_s: float | None = None,
    on_metrics: OnMetrics = lambda task, figures: None,
) -> bool:
    """Train one LoRA on all tasks that are not held out. True once it is done; until then the same call goes on.

    Args:
        recipe: its defaults are an oracle's; `MULTITASK` has those of Text-to-LoRA.
        described: the description that a step draws for a task stands in the prompts of its examples.
    """
    source = TaskSource(recipe.data, tasks, base.chat, described=described, varied=described)
    for task in source.tasks:
        source.short_enough(task)
    return _train(base, recipe, source, out_dir, command, budget_s, partial(on_metrics, out_dir.name), True)


def read_oracle(folder: Path, base: Fingerprint) -> LoRA:
    """A LoRA that one of these trainings made, checked against a base's fingerprint.

    Raises:
        AdapterError: there is none, or it is not done.
    """
    _about(folder, base)
    return read_peft(folder)


def read_multitask(folder: Path, base: Fingerprint, described: bool) -> LoRA:
    """The same of a multi-task LoRA.

    Raises:
        AdapterError: also where it is another: an oracle, or trained with descriptions and not without, or the other way round.
    """
    settings = _about(folder, base)["settings"]
    if settings["described"] != described or not settings["is_multitask"]:
        how = "with" if settings["described"] else "without"
        what = f"a multi-task LoRA {how} descriptions" if settings["is_multitask"] else "the LoRA of a single task"
        wanted = "`loracast train multitask --described`" if described else "`loracast train multitask`"
        raise AdapterError(f"{folder} holds {what}; give what {wanted} makes")
    return read_peft(folder)


def _about(folder: Path, base: Fingerprint) -> dict[str, Any]:
    return read_about(folder, base, "loracast train oracle")


def average_of_oracles(library: Path, base: Fingerprint) -> LoRA | None:
    """The mean of the deltas of a library's oracles, those of held-out tasks left out; None where there is none."""
    folders = [library / name for name in oracles_in(library)]
    loras = [read_peft(folder) for folder in folders if not _about(folder, base)["settings"]["heldout"]]
    return concat([lora.scale(1 / len(loras)) for lora in loras]) if loras else None


def oracles_in(library: Path) -> tuple[str, ...]:
    """The names of the tasks whose oracles are done."""
    return tuple(sorted(path.parent.name for path in library.glob(f"*/{ABOUT}")))


def _train(
    base: Base,
    recipe: OracleRecipe,
    source: TaskSource,
    folder: Path,
    command: str,
    budget_s: float | None,
    on_metrics: Callable[[dict[str, float]], None],
    is_multitask: bool = False,
) -> bool:
    """Train one LoRA on tasks, or go on with it; whether it is done now."""
    about = {
        "data": dataclasses.asdict(source.config),
        "is_multitask": is_multitask,
        "described": source.described,
        "heldout": [task.name for task in source.tasks if task.is_heldout],
        "tasks": [task.name for task in source.tasks],
        "tasks_sha256": source.sha256,
    }
    return train_lora(
        base, recipe.lora, recipe.training, lambda number: _rows(source.episodes(source.draw(number))), folder,
        about=about, command=command, budget_s=budget_s, on_metrics=on_metrics,
    )  # fmt: skip


def _rows(episodes: Sequence[Episode]) -> list[Episode]:
    """The same questions in short rows: all of them have the same LoRA."""
    rows = []
    for episode in episodes:
        row: list[Question] = []
        n_tokens = 0
        for question in episode.questions:
            n = len(question.prompt) + len(question.answer)
            if row and n_tokens + n > _TOKENS_IN_A_ROW:
                rows.append(dataclasses.replace(episode, questions=tuple(row)))
                row, n_tokens = [], 0
            row.append(question)
            n_tokens += n
        rows.append(dataclasses.replace(episode, questions=tuple(row)))
    return rows
