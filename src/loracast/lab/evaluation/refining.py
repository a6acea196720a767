"""`loracast eval refining`: what gradient descent on a task's examples adds, second by second, from several starts.

Each start descends once for each task and seed; what it would have been at every second and step that is asked for is
noted on the way, and answers the task's test rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from loracast.base.generate import Sampling
from loracast.cast.refine import FEWEST_EXAMPLES, RefineConfig, descent
from loracast.documents.task_spec import Example, TaskSpec
from loracast.errors import ConfigError
from loracast.lab.data.answer_metrics import is_right
from loracast.lab.data.tasks import Task
from loracast.lab.evaluation import report, tasks
from loracast.lab.evaluation.report import Progress, Report, columns, no_progress
from loracast.lab.evaluation.runner import Answered, Baseline, ask, fixed, grouped
from loracast.lab.evaluation.tasks import ADAPTER, Drawn, TaskCase, TaskSetup, TasksFrom
from loracast.lora.algebra import LoRA, LoRABatch
from loracast.lora.factors import Factors, Rows

COLUMNS = columns(
    label="what descent starts from", at="after", n_tasks=("tasks", 0), n=("rows", 0), exact=("exact %", "%"),
    difference=("adapter minus it, points (95 %)", "change"), n_steps=("steps kept", 1),
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """A LoRA that gradient descent starts from."""

    label: str
    make: Callable[[TaskSetup, Drawn], LoRA]
    config: RefineConfig = field(default_factory=RefineConfig)
    """How it descends: as did best from this start on tasks for development (docs/notebook/2026-12-01.md)."""


def _cast(setup: TaskSetup, drawn: Drawn) -> LoRA:
    """The LoRA that refining a task starts from; the next start of the same one has it at once."""
    caster, task = setup.caster, TaskSpec(drawn.description, drawn.shots)
    assert caster is not None
    return setup.made_once(
        ("start", task), lambda: caster.hypernetwork.loras(caster.start_of_descent(task)).row(0)
    ).make()


def _nothing(setup: TaskSetup, drawn: Drawn) -> LoRA:
    """A LoRA of rank 0 with the caster's modules."""
    factors = _cast(setup, drawn).factors
    return LoRA({name: Factors(a.new_zeros(0, a.shape[1]), b.new_zeros(len(b), 0)) for name, (a, b) in factors.items()})


def _multitask(setup: TaskSetup, drawn: Drawn) -> LoRA:
    assert setup.multitask is not None
    return setup.multitask


STARTS = {
    ADAPTER: Start("adapter from the description", _cast),
    "nothing": Start("nothing", _nothing, RefineConfig(decay_passes=0)),
    "multitask": Start("multi-task LoRA", _multitask),
}
"""By name, what gradient descent starts from."""


@dataclass(frozen=True)
class RefiningConfig(TasksFrom):
    """Settings of `loracast eval refining`."""

    POSITIVE = ("rows", "seconds", "steps")
    rows: int = 50
    """Most test rows of a task."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds, each of which draws descriptions and examples anew."""
    seconds: tuple[int, ...] = (5, 10, 20, 30)
    """Seconds of descent after which the LoRA answers."""
    steps: tuple[int, ...] = (20,)
    """Steps after which it answers, so that machines of other speed compare."""
    budget_s: float | None = None
    """Begin no further task after this many seconds; the table shows how many there were."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds:
            raise ConfigError("seeds must be at least one")

    @property
    def marks(self) -> list[Mark]:
        """When the LoRAs answer: before descent, then after each of the seconds and of the steps."""
        seconds = [Mark(f"{n} s", seconds=n) for n in (0, *sorted(self.seconds))]
        return [*seconds, *(Mark(f"{n} steps", steps=n) for n in sorted(self.steps))]


@dataclass(frozen=True)
class Mark:
    """A moment of a descent at which its LoRA answers."""

    name: str
    seconds: float = math.inf
    steps: float = math.inf

    def is_past(self, steps: int, seconds: float) -> bool:
        return steps > self.steps or seconds > self.seconds


Key = tuple[str, str]
"""The names of a start and of a mark."""


@dataclass(frozen=True)
class Stage:
    """The LoRA of a descent at one mark."""

    lora: LoRA
    n_steps: int = 0
    """Steps after which this LoRA was kept."""


def evaluate_refining(setup: TaskSetup, config: RefiningConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Run the evaluation; the table and the answers are in `out` after every task.

    Raises:
        ConfigError: a task has too few training examples, or there is no task.
    """
    chosen = config.read()
    if few := [task.name for task in chosen if len(task.train) < FEWEST_EXAMPLES]:
        raise ConfigError(f"refining takes {FEWEST_EXAMPLES} training examples; fewer have {', '.join(few)}")
    starts = {name: start for name, start in STARTS.items() if name != "multitask" or setup.multitask is not None}
    n_all, n_done = len(chosen) * len(config.seeds) * len(starts), 0

    def answer(i: int) -> Iterator[tuple[Key, int, list[Answered[TaskCase]]]]:
        nonlocal n_done
        for seed in config.seeds:
            drawn = tasks.draw(chosen, i, seed)
            for name, start in starts.items():
                stages = descend(setup, drawn, start, config.marks, start.config)
                for at, answered in _answer(setup, drawn, stages, tasks.test_rows(chosen[i], config.rows)).items():
                    yield (name, at), seed, answered
                n_done += 1
                progress(n_done, n_all)

    writer = setup.report(out, "refining", COLUMNS, config, config.seeds)
    rows = partial(_rows, config.marks)
    return tasks.evaluate_by_task(
        writer, chosen, answer, rows, lambda key: {"start": key[0], "at": key[1]}, config.budget_s
    )


def descend(
    setup: TaskSetup, drawn: Drawn, start: Start, marks: Sequence[Mark], config: RefineConfig
) -> dict[str, Stage]:
    """Descend once, past the last mark or until it ends early; what it had come to at each mark."""
    began = start.make(setup, drawn)
    stages: dict[str, Stage] = {}
    stage = Stage(began)
    for n_steps, refined in enumerate(descent(setup.base, rows_of(began), loras_of, drawn.shots, config)):
        if refined.steps != stage.n_steps:
            stage = Stage(loras_of(refined.rows).row(0), refined.steps)
        ahead = [mark.name for mark in marks if n_steps == 0 or not mark.is_past(n_steps, refined.seconds)]
        if not ahead:
            break
        stages |= dict.fromkeys(ahead, stage)
    return stages


def rows_of(lora: LoRA) -> Rows:
    """A LoRA of factors as rows, each module on its own; `loras_of` is the way back."""
    return {name: (a[None, None], b.T[None, None]) for name, (a, b) in lora.factors.items()}


def loras_of(rows: Rows) -> LoRABatch:
    """The LoRA of rows that have a module each."""
    return LoRABatch(1, {name: Factors(a[:, 0], b[:, 0].transpose(1, 2)) for name, (a, b) in rows.items()}, {})


def _answer(
    setup: TaskSetup, drawn: Drawn, stages: Mapping[str, Stage], rows: Sequence[Example]
) -> dict[str, list[Answered[TaskCase]]]:
    """The test rows as the LoRA of each stage answers them; stages that share a LoRA are asked once."""

    def baseline(stage: Stage) -> Baseline[TaskSetup, TaskCase]:
        lora = fixed(stage.lora)
        return Baseline("", lambda setup, case: tasks.request_of(setup, case, lora))

    cases, metric = [TaskCase(drawn, row) for row in rows], drawn.task.metric
    baselines = {at: baseline(stage) for at, stage in stages.items()}
    answered = ask(setup, baselines, dict.fromkeys(stages, cases), Sampling(max_new_tokens=tasks.LONGEST[metric]))

    def scored(one: Answered[TaskCase]) -> Answered[TaskCase]:
        is_exact = is_right(one.text, one.case.row.outputs, metric)
        return replace(one, scores={"exact": is_exact, "n_steps": stages[one.baseline].n_steps})

    return grouped(map(scored, answered), lambda one: one.baseline)


def _rows(marks: Sequence[Mark], done: Sequence[Task], asked: tasks.Asked[Key]) -> list[dict[str, Any]]:
    """A row for each start at each mark over the tasks that are done."""
    exact = tasks.exact_shares(asked)
    seconds = {mark.name: None if math.isinf(mark.seconds) else mark.seconds for mark in marks}
    rows = []
    for (name, at), of_tasks in asked.items():
        row: dict[str, Any] = {"start": name, "label": STARTS[name].label, "at": at, "seconds": seconds[at]}
        n_steps = [some[0].scores["n_steps"] for by_seed in of_tasks for some in by_seed]
        row |= {**tasks.task_figures(done, exact[name, at]), "n_steps": report.mean(n_steps)}
        if name != ADAPTER:
            row |= report.named_interval("difference", report.paired_bootstrap(exact[ADAPTER, at], exact[name, at]))
        rows.append(row)
    return rows
