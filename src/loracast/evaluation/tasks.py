"""`loracast eval tasks`: what a description is worth as an adapter, beside description and examples in the prompt.

All baselines get the same test rows in one run, with several seeds that each draw a description, examples and another
task's description.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loracast.base.generate import Sampling
from loracast.data.answer_metrics import is_right
from loracast.data.benchmarks import check_one_source, tasks_or_benchmarks
from loracast.data.tasks import DescriptionKind, Example, Metric, Task
from loracast.errors import ConfigError
from loracast.evaluation.baseline import check_names, check_positive, choose_baselines
from loracast.evaluation.choice import Choice, likeliest
from loracast.evaluation.flops import QueryFlops
from loracast.evaluation.intervals import mean, mean_if_any, paired_bootstrap
from loracast.evaluation.plots import exact_by_operations, require_matplotlib
from loracast.evaluation.report import Progress, Report, ReportWriter, columns, no_progress
from loracast.evaluation.runner import Answered, Deadline, ask, made
from loracast.evaluation.task_baselines import (
    ADAPTER,
    BASELINES,
    MOST_SHOTS,
    SHOTS,
    Drawn,
    TaskBaseline,
    TaskCase,
    TaskSetup,
)
from loracast.training.peft_training import ABOUT
from loracast.training.text import gibberish

_FIRST_SHOTS = 5
LONGEST: dict[Metric, int] = {"exact": 32, "number": 256}
"""Longest answer to a task, in tokens, by its metric."""

COLUMNS = columns(
    label="method", n_tasks=("tasks", 0), n=("rows", 0), exact=("exact %", "%"), near=("near %", "%"),
    far=("far %", "%"), choice=("chosen %", "%"), choice_by_byte=("by byte %", "%"),
    difference=("adapter minus it, points (95 %)", "change"), difference_near=("near", "change"),
    difference_far=("far", "change"), prompt_tokens=("prompt tokens", 0), gflops=("GFLOP a query", 1),
)  # fmt: skip


@dataclass(frozen=True)
class TasksFrom:
    """Which tasks an experiment takes."""

    tasks: str | None = None
    """A folder of task files, or a file of examples."""
    benchmarks: tuple[str, ...] = ()
    """Files of benchmarks, in place of tasks."""
    heldout: bool = True
    """Take the tasks that no training has seen; or else those of the training."""

    def __post_init__(self) -> None:
        check_one_source(self.tasks, self.benchmarks)
        if self.benchmarks and not self.heldout:
            raise ConfigError("benchmarks are held out: leave --trained out")

    def read(self, descriptions: DescriptionKind = "heldout") -> list[Task]:
        """Read the tasks that have test rows, and descriptions of a kind. Raises ConfigError where there is none."""
        known = tasks_or_benchmarks(self.tasks, self.benchmarks)
        tasks = [t for t in known if t.is_heldout == self.heldout and t.test and t.descriptions.get(descriptions)]
        if not tasks:
            which = "held-out" if self.heldout else "training"
            raise ConfigError(
                f"{self.tasks or self.benchmarks} has no {which} task with test rows and descriptions of the kind "
                f"{descriptions!r}"
            )
        return tasks


@dataclass(frozen=True)
class TasksConfig(TasksFrom):
    """What `loracast eval tasks` measures."""

    descriptions: DescriptionKind = "heldout"
    """Kind of the descriptions."""
    rows: int = 50
    """Most test rows of a task."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds, each of which draws descriptions and examples anew."""
    baselines: tuple[str, ...] | None = None
    """Baselines to run; all that have what they need if None."""
    only_oracles: bool = False
    """Take only tasks that have an oracle."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; if None 32, or 256 where a number is worked out."""
    budget_s: float | None = None
    """Begin no further task after this many seconds; the table shows how many there were."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self.baselines or (), BASELINES)
        check_positive(self, "rows", "max_new_tokens")
        if self.benchmarks and self.descriptions != "heldout":
            raise ConfigError("benchmarks have held-out descriptions only: leave --descriptions out")
        if self.baselines == () or not self.seeds:
            raise ConfigError("baselines and seeds must be at least one")


def evaluate_tasks(setup: TaskSetup, config: TasksConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Run the evaluation; the table, the answers and the figures of each task are in `out` after every task.

    Raises:
        ConfigError: a baseline lacks what it needs, or there are too few tasks.
    """
    require_matplotlib()
    tasks = _with_oracles(config.read(config.descriptions), config, setup)
    baselines = _choose_baselines(config, setup, tasks)
    hypernetwork = setup.caster.caster.id if setup.caster else None
    writer = ReportWriter(out, "tasks", COLUMNS, config, setup.base, hypernetwork)
    writer.settings["seed"] = config.seeds[0]
    n_rows = sum(min(config.rows, len(task.test)) for task in tasks) * len(config.seeds) * len(baselines)
    deadline = Deadline(config.budget_s)
    tallies = {name: Tally() for name in baselines}
    n_done = 0
    for i in range(len(tasks)):
        if i and deadline.is_over:
            break
        for name, baseline in baselines.items():
            by_seed: list[list[Scored]] = []
            for seed in config.seeds:
                drawn = draw(tasks, i, seed, config.descriptions)
                if not by_seed or baseline.is_drawn:  # others answer as with the seed before
                    by_seed.append(_answer(setup, name, baseline, drawn, config))
                    writer.add_answers(_line(one, seed) for one in by_seed[-1])
                n_done += len(by_seed[-1])
                progress(n_done, n_rows)
            tallies[name].add(by_seed)
        report = writer.write(_rows(tasks[: i + 1], tallies), is_complete=i + 1 == len(tasks))
    exact_by_operations(out / "tasks.png", report.rows)
    return report


@dataclass(frozen=True)
class Scored:
    """A test row's answer, and what it scored."""

    answered: Answered[TaskCase]
    is_exact: bool
    choice: tuple[bool, bool] | None
    """Where there are choices: whether the likeliest is right, by its sum and for each byte."""
    gflops: float
    """Operations of the query with an answer as long as the right one, in units of 10^9 (flops.py)."""


@dataclass
class Tally:
    """For each row of each task, the share of the seeds with which one baseline got it right."""

    exact: list[list[float]] = field(default_factory=list)
    choice: list[list[float]] = field(default_factory=list)
    choice_by_byte: list[list[float]] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    gflops: list[float] = field(default_factory=list)

    def add(self, by_seed: Sequence[Sequence[Scored]]) -> None:
        """Add the rows of another task, the same for each seed."""
        rows = list(zip(*by_seed, strict=True))
        self.exact.append([mean([one.is_exact for one in row]) for row in rows])
        for i, shares in enumerate((self.choice, self.choice_by_byte)):
            shares.append([mean([one.choice[i] for one in row if one.choice]) for row in rows if row[0].choice])
        self.prompt_tokens += [one.answered.n_prompt_tokens for scored in by_seed for one in scored]
        self.gflops += [one.gflops for scored in by_seed for one in scored]


def _choose_baselines(config: TasksConfig, setup: TaskSetup, tasks: Sequence[Task]) -> dict[str, TaskBaseline]:
    """The baselines that are asked for, or all that have what they need."""
    drawn = [draw(tasks, i, 0, config.descriptions) for i in range(len(tasks))]
    missing = setup.missing()
    if any(d.other_description is None for d in drawn):
        missing["tasks"] = "for every task another one that is not related (of another `group`)"
    fewest = min(len(d.shots) for d in drawn)
    missing |= {f"{n} examples": f"{n} training examples of every task" for n in SHOTS if n > fewest}
    return choose_baselines(BASELINES, config.baselines or (), missing)


def _with_oracles(tasks: list[Task], config: TasksConfig, setup: TaskSetup) -> list[Task]:
    """The tasks that have an oracle, where oracles answer. Raises ConfigError unless tasks without may be left out."""
    if setup.oracles is None or not (config.only_oracles or config.baselines is None or "oracle" in config.baselines):
        return tasks
    without = [task.name for task in tasks if not (setup.oracles / task.name / ABOUT).is_file()]
    if without and (not config.only_oracles or len(without) == len(tasks)):
        raise ConfigError(
            f"{setup.oracles} has no oracle of {', '.join(without)}: train them (`loracast train oracle`), evaluate "
            "the tasks that have one (--only-oracles), or leave the oracle out"
        )
    return [task for task in tasks if task.name not in without]


def draw(tasks: Sequence[Task], i: int, seed: int, descriptions: DescriptionKind = "heldout") -> Drawn:
    """Draw description, examples and controls for one of the tasks."""
    task = tasks[i]
    rng = random.Random(f"{seed}/{task.name}")
    unrelated = [t for t in tasks if t is not task and (not t.group or t.group != task.group)]
    other = rng.choice(unrelated) if unrelated else None
    shots = rng.sample(task.train, min(_FIRST_SHOTS, len(task.train)))
    description = rng.choice(task.descriptions[descriptions])
    other_description = rng.choice(other.descriptions[descriptions]) if other else None
    more = random.Random(f"{seed}/{task.name}/more examples")  # of their own, so that all else is drawn as without
    left = [example for example in task.train if example not in shots]
    shots += more.sample(left, min(MOST_SHOTS - len(shots), len(left)))
    other_shots = more.sample(other.train, min(_FIRST_SHOTS, len(other.train))) if other else []
    words = [word for t in tasks for text in t.descriptions[descriptions] for word in text.split()]
    return Drawn(
        task,
        description,
        other_description,
        gibberish=gibberish(rng, 1)[0],
        shuffled=" ".join(rng.sample(words, min(len(words), len(description.split())))),
        shots=tuple(shots),
        other_shots=tuple(other_shots),
    )


def test_rows(task: Task, n: int) -> list[Example]:
    """At most n test rows of a task, always the same ones."""
    return random.Random(task.name).sample(task.test, min(n, len(task.test)))


def _answer(setup: TaskSetup, name: str, baseline: TaskBaseline, drawn: Drawn, config: TasksConfig) -> list[Scored]:
    """The task's test rows, the same for all baselines and seeds, as one baseline answers them."""
    task = drawn.task
    cases = [TaskCase(drawn, row) for row in test_rows(task, config.rows)]
    sampling = Sampling(max_new_tokens=config.max_new_tokens or LONGEST[task.metric])
    answered = ask(setup, {name: baseline}, {name: cases}, sampling)
    choices = _choose(setup, baseline, cases)
    formula = QueryFlops.of(setup.base.model.config)
    (lora,) = made(setup.base, [baseline.request(setup, cases[0])])
    scored = []
    for i, a in enumerate(answered):
        n_new = len(setup.base.chat.reply(a.case.row.outputs[0]))
        is_exact = is_right(a.text, a.case.row.outputs, task.metric)
        gflops = formula.query(a.n_prompt_tokens, n_new, lora) / 1e9
        scored.append(Scored(a, is_exact, choices.get(i), gflops))
    return scored


def _choose(setup: TaskSetup, baseline: TaskBaseline, cases: Sequence[TaskCase]) -> dict[int, tuple[bool, bool]]:
    """For the rows that have choices, of their own or the task's labels: whether the likeliest is right."""
    choices = {i: c.row.choices or c.drawn.task.labels for i, c in enumerate(cases)}
    asked = [i for i, texts in choices.items() if texts]
    requests = [baseline.request(setup, cases[i]) for i in asked]
    loras = made(setup.base, requests)
    chosen = likeliest(setup.base, [r.prompt for r in requests], [choices[i] for i in asked], loras)

    def is_right_choice(i: int, choice: Choice) -> tuple[bool, bool]:
        return choices[i][choice.by_sum] in cases[i].row.outputs, choices[i][choice.by_byte] in cases[i].row.outputs

    return {i: is_right_choice(i, choice) for i, choice in zip(asked, chosen, strict=True)}


_KINDS: dict[str, Callable[[Task], bool]] = {
    "exact": lambda task: True,
    "near": lambda task: task.is_near,
    "far": lambda task: not task.is_near,
}


def _rows(tasks: Sequence[Task], tallies: Mapping[str, Tally]) -> list[dict[str, Any]]:
    """A row for each baseline over the tasks that are done."""
    rows = []
    for name, tally in tallies.items():
        shares = [mean(hits) for hits in tally.exact]
        row: dict[str, Any] = {
            "baseline": name,
            "label": BASELINES[name].label,
            "n_tasks": len(tasks),
            "n": sum(map(len, tally.exact)),
            "choice": mean_if_any([mean(hits) for hits in tally.choice if hits]),
            "choice_by_byte": mean_if_any([mean(hits) for hits in tally.choice_by_byte if hits]),
            "prompt_tokens": mean_if_any(tally.prompt_tokens),
            "gflops": mean_if_any(tally.gflops),
            "by_task": {task.name: share for task, share in zip(tasks, shares, strict=True)},
        }
        for key, is_counted in _KINDS.items():
            some = [i for i, task in enumerate(tasks) if is_counted(task)]
            row[key] = mean_if_any([shares[i] for i in some])
            if ADAPTER in tallies and name != ADAPTER:
                gain = f"difference_{key}".removesuffix("_exact")
                pair = ([t.exact[i] for i in some] for t in (tallies[ADAPTER], tally))
                found = paired_bootstrap(*pair) if some else (None, None, None)
                row[gain], row[f"{gain}_low"], row[f"{gain}_high"] = found
        rows.append(row)
    return rows


def _line(scored: Scored, seed: int) -> dict[str, Any]:
    """One line of answers.jsonl."""
    a, drawn = scored.answered, scored.answered.case.drawn
    return {
        "baseline": a.baseline, "seed": seed, "task": drawn.task.name, "description": drawn.description,
        "input": a.case.row.input, "outputs": a.case.row.outputs, **a.said, "exact": scored.is_exact,
        "chosen": scored.choice,
    }  # fmt: skip
