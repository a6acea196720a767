"""Train oracles and the multi-task LoRA with PEFT: the references for LoRAs that are cast from descriptions.

An **oracle** is trained on one task's examples: what a description could at best be worth. The **multi-task LoRA** is
one LoRA for all training tasks, trained on the same rows in the same steps as Text-to-LoRA: what remains of it without
descriptions. Its second form has the description in every prompt.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from loracast.base.fingerprint import Fingerprint
from loracast.base.load import Base
from loracast.data.tasks import Task
from loracast.errors import AdapterError, TrainingError
from loracast.library.manifest import check_name
from loracast.lora.algebra import LoRA, concat
from loracast.lora.peft_format import read_peft
from loracast.scoring.episodes import Episode, Question, common_prefix
from loracast.training.loop import OnMetrics, TrainConfig
from loracast.training.peft_training import ABOUT, PeftConfig, read_about, train_lora
from loracast.training.recipe import read_lora_recipe
from loracast.training.task_source import TaskDataConfig, TaskSource

_MADE_BY = "loracast train oracle"
_TOKENS_IN_A_ROW = 384  # of questions; the cost of attention grows with the square of a row's length

OnTaskMetrics = Callable[[str, dict[str, float]], None]
"""Receives (task, its latest metrics)."""


@dataclass(frozen=True)
class OracleRecipe:
    """One training run, as the tables `[lora]`, `[data]` and `[training]` of a TOML file."""

    lora: PeftConfig = field(default_factory=PeftConfig)
    data: TaskDataConfig = field(
        default_factory=lambda: TaskDataConfig(tasks_per_step=1, examples_per_task=64, tokens_per_task=2048)
    )
    training: TrainConfig = field(default_factory=lambda: TrainConfig(steps=100, lr=1e-3, warmup_steps=10))


MULTITASK = OracleRecipe(data=TaskDataConfig(), training=TrainConfig())  # with the defaults of Text-to-LoRA


def read_oracle_recipe(
    path: Path | None, overrides: Sequence[str] = (), default: OracleRecipe = OracleRecipe()
) -> OracleRecipe:
    """Read a recipe from a TOML file, changed by overrides. Raises ConfigError as `read_tables`."""
    return read_lora_recipe(default, path, overrides)


def train_oracles(
    base: Base,
    recipe: OracleRecipe,
    tasks: Sequence[Task],
    library: Path,
    *,
    command: str = "",
    budget_s: float | None = None,
    on_metrics: OnTaskMetrics = lambda task, figures: None,
) -> list[str]:
    """Train an oracle for each task, one after the other, each in a folder of its name; finished oracles are skipped.

    It stops after `budget_s` seconds, also within a task; the same call resumes there. Returns the names of the tasks
    whose oracles are finished. Raises TrainingError if a task cannot be trained on (then nothing is done), or its
    folder has an oracle with other settings.
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
            break  # stopped by a signal or the budget
    return [name for name in sources if (library / name / ABOUT).is_file()]


def _sources(base: Base, recipe: OracleRecipe, tasks: Sequence[Task]) -> dict[str, TaskSource]:
    """The data of each task, by name. Raises TrainingError for all tasks that cannot be trained on, in one message."""
    sources: dict[str, TaskSource] = {}
    problems = []
    for task in tasks:
        try:
            check_name(task.name)
            sources[task.name] = TaskSource(recipe.data, [task], base.chat, heldout_too=True)
            sources[task.name].check_lengths()
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
    on_metrics: OnTaskMetrics = lambda task, figures: None,
) -> bool:
    """Train one LoRA on all tasks that are not held out, or resume. Returns whether it is finished.

    `MULTITASK` is the recipe with the defaults of Text-to-LoRA; the class's own defaults are an oracle's. `described`
    puts the description that a step draws for a task into the prompts of its examples.
    """
    source = TaskSource(recipe.data, tasks, base.chat, described=described, is_specified=described)
    source.check_lengths()
    return _train(base, recipe, source, out_dir, command, budget_s, partial(on_metrics, out_dir.name), True)


def read_oracle(folder: Path, base: Fingerprint) -> LoRA:
    """Read a LoRA that `train_oracles` or `train_multitask` made for a base; AdapterError if none is finished."""
    read_about(folder, base, _MADE_BY)
    return read_peft(folder)


def read_multitask(folder: Path, base: Fingerprint, described: bool) -> LoRA:
    """Read a multi-task LoRA. Raises AdapterError as `read_oracle`, or if it is an oracle, or `described` differs."""
    settings = read_about(folder, base, _MADE_BY)["settings"]
    if settings["described"] != described or not settings["is_multitask"]:
        how = "with" if settings["described"] else "without"
        what = f"a multi-task LoRA {how} descriptions" if settings["is_multitask"] else "the LoRA of a single task"
        wanted = "`loracast train multitask --described`" if described else "`loracast train multitask`"
        raise AdapterError(f"{folder} holds {what}; give what {wanted} makes")
    return read_peft(folder)


def average_of_oracles(library: Path, base: Fingerprint) -> LoRA | None:
    """The mean of the deltas of a library's oracles, without those of held-out tasks; None if there is none."""
    folders = [library / name for name in oracles_in(library)]
    trained = [folder for folder in folders if not read_about(folder, base, _MADE_BY)["settings"]["heldout"]]
    loras = [read_peft(folder) for folder in trained]
    return concat([lora.scale(1 / len(loras)) for lora in loras]) if loras else None


def oracles_in(library: Path) -> tuple[str, ...]:
    """The names of the tasks whose oracles are finished."""
    return tuple(sorted(path.parent.name for path in library.glob(f"*/{ABOUT}")))


def _train(
    base: Base,
    recipe: OracleRecipe,
    source: TaskSource,
    folder: Path,
    command: str,
    budget_s: float | None,
    on_metrics: OnMetrics,
    is_multitask: bool = False,
) -> bool:
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
    """The same questions in shorter rows, since all of them have the same LoRA.

    What the prompts of an episode begin with, such as a description and examples, stands once in a row.
    """
    rows = []
    for episode in episodes:
        n_shared = common_prefix([question.prompt for question in episode.questions])
        row: list[Question] = []
        n_tokens = 0
        for question in episode.questions:
            n = len(question.prompt) - n_shared + len(question.answer)
            if row and n_tokens + n > _TOKENS_IN_A_ROW:
                rows.append(dataclasses.replace(episode, questions=tuple(row)))
                row, n_tokens = [], 0
            row.append(question)
            n_tokens += n
        rows.append(dataclasses.replace(episode, questions=tuple(row)))
    return rows
