"""`loracast eval refining`: what gradient descent on a task's examples adds, second by second, from several starts.

Each start descends once for each task and seed; what it would have been at every second and step that is asked for is
noted on the way, and answers the task's test rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loracast.base.generate import Sampling
from loracast.cast.refine import FEWEST_EXAMPLES, RefineConfig, descent, loras_of, rows_of
from loracast.documents.task_spec import Example, TaskSpec
from loracast.errors import ConfigError
from loracast.lab.data.answer_metrics import is_right
from loracast.lab.data.tasks import Task
from loracast.lab.evaluation.plots import exact_by_seconds, require_matplotlib
from loracast.lab.evaluation.report import (
    Progress,
    Report,
    columns,
    mean,
    named_interval,
    no_progress,
    paired_bootstrap,
)
from loracast.lab.evaluation.runner import Answered, Baseline, Deadline, Request, ask, check_positive, fixed, grouped
from loracast.lab.evaluation.tasks import (
    ADAPTER,
    LONGEST,
    Drawn,
    TaskCase,
    TaskSetup,
    TasksFrom,
    draw,
    prompt_of,
    seed_shares,
    task_figures,
    test_rows,
)
from loracast.lora.algebra import LoRA
from loracast.lora.factors import Factors

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
        check_positive(self, "rows", "seconds", "steps")
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
    """Run the evaluation; the table, its picture and the answers are in `out` after every task.

    Raises:
        ConfigError: a task has too few training examples, or there is no task.
    """
    require_matplotlib()
    tasks = config.read()
    if few := [task.name for task in tasks if len(task.train) < FEWEST_EXAMPLES]:
        raise ConfigError(f"refining takes {FEWEST_EXAMPLES} training examples; fewer have {', '.join(few)}")
    starts = {name: start for name, start in STARTS.items() if name != "multitask" or setup.multitask is not None}
    writer = setup.writer(out, "refining", COLUMNS, config, config.seeds)
    marks = config.marks
    exact: dict[Key, list[list[float]]] = defaultdict(list)  # of each task, the shares of its rows
    n_steps: dict[Key, list[int]] = defaultdict(list)
    deadline = Deadline(config.budget_s)
    n_all, n_done = len(tasks) * len(config.seeds) * len(starts), 0
    for i, task in enumerate(tasks):
        if i and deadline.is_over:
            break
        by_seed: dict[Key, list[list[bool]]] = defaultdict(list)
        for seed in config.seeds:
            drawn = draw(tasks, i, seed)
            for name, start in starts.items():
                stages = descend(setup, drawn, start, marks, start.config)
                answered = _answer(setup, drawn, stages, test_rows(task, config.rows))
                for at, some in answered.items():
                    right = [is_right(a.text, a.case.row.outputs, task.metric) for a in some]
                    by_seed[name, at].append(right)
                    n_steps[name, at].append(stages[at].n_steps)
                    writer.add_answers(_line(name, at, seed, a, hit) for a, hit in zip(some, right, strict=True))
                n_done += 1
                progress(n_done, n_all)
        for key, hits in by_seed.items():
            exact[key].append(seed_shares(hits))
        report = writer.write(_rows(tasks[: i + 1], starts, marks, exact, n_steps), is_complete=i + 1 == len(tasks))
        exact_by_seconds(out / "refining.png", report.rows)
    return report


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


def _answer(
    setup: TaskSetup, drawn: Drawn, stages: Mapping[str, Stage], rows: Sequence[Example]
) -> dict[str, list[Answered[TaskCase]]]:
    """The test rows as the LoRA of each stage answers them; stages that share a LoRA are asked once."""

    def baseline(stage: Stage) -> Baseline[TaskSetup, TaskCase]:
        lora = fixed(stage.lora)
        return Baseline("", lambda setup, case: Request(prompt_of(setup.base, case.drawn, case.row.input), lora))

    cases = [TaskCase(drawn, row) for row in rows]
    baselines = {at: baseline(stage) for at, stage in stages.items()}
    answered = ask(setup, baselines, dict.fromkeys(stages, cases), Sampling(max_new_tokens=LONGEST[drawn.task.metric]))
    return grouped(answered, lambda one: one.baseline)


def _rows(
    tasks: Sequence[Task],
    starts: Mapping[str, Start],
    marks: Sequence[Mark],
    exact: Mapping[Key, Sequence[Sequence[float]]],
    n_steps: Mapping[Key, Sequence[int]],
) -> list[dict[str, Any]]:
    """A row for each start at each mark over the tasks that are done."""
    rows = []
    for name, start in starts.items():
        for mark in marks:
            key = name, mark.name
            row: dict[str, Any] = {"start": name, "label": start.label, "at": mark.name}
            row["seconds"] = None if math.isinf(mark.seconds) else mark.seconds
            row |= {**task_figures(tasks, exact[key]), "n_steps": mean(n_steps[key])}
            if name != ADAPTER:
                row |= named_interval("difference", paired_bootstrap(exact[ADAPTER, mark.name], exact[key]))
            rows.append(row)
    return rows


def _line(start: str, at: str, seed: int, a: Answered[TaskCase], is_exact: bool) -> dict[str, Any]:
    """One line of answers.jsonl."""
    drawn, row = a.case.drawn, a.case.row
    return {
        "start": start, "at": at, "seed": seed, "task": drawn.task.name, "description": drawn.description,
        "input": row.input, "outputs": row.outputs, **a.said, "exact": is_exact,
    }  # fmt: skip
