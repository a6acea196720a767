"""Tasks: what a description is worth as an adapter, beside what it is worth in the prompt, and beside examples.

The same test rows for all rivals, in one run, with several seeds (another description, other examples, another task's description each).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loracast.base.generate import Sampling, answer_batch
from loracast.base.load import Base
from loracast.data.answer_metrics import is_right
from loracast.data.tasks import DescriptionKind, Example, Metric, Task
from loracast.errors import ConfigError
from loracast.evaluation.benchmarks import check_one_source, tasks_or_benchmarks
from loracast.evaluation.choice import likeliest
from loracast.evaluation.intervals import paired_bootstrap
from loracast.evaluation.report import Column, Progress, Report, change, environment, number, percent, text
from loracast.evaluation.task_baselines import ADAPTER, BASELINES, NEEDED, Baseline, Drawn, Given, prompt_of
from loracast.lora.algebra import LoRA
from loracast.training.peft_training import ABOUT
from loracast.training.text import gibberish

MAX_ROWS = 32
_LONGEST: dict[Metric, int] = {"exact": 32, "number": 256}

COLUMNS: tuple[Column, ...] = (
    text("label", "what answers"),
    number("n_tasks", "tasks"),
    number("n", "rows"),
    percent("exact", "exact %"),
    percent("near", "near %"),
    percent("far", "far %"),
    percent("choice", "chosen %"),
    percent("choice_by_byte", "by byte %"),
    change("difference", "adapter minus it, points (95 %)"),
    change("difference_near", "near"),
    change("difference_far", "far"),
    number("prompt_tokens", "prompt tokens"),
)


@dataclass(frozen=True)
class TasksConfig:
    """What `loracast eval tasks` measures."""

    tasks: str | None = None
    """A folder of task files, or a file of examples."""
    benchmarks: tuple[str, ...] = ()
    """Files of benchmarks, in place of tasks."""
    heldout: bool = True
    """Tasks that no training has seen; or else those of the training."""
    descriptions: DescriptionKind = "heldout"
    """Kind of the descriptions that are used."""
    rows: int = 50
    """Most test rows of a task."""
    seeds: tuple[int, ...] = (0, 1)
    """Each draws descriptions and examples anew."""
    systems: tuple[str, ...] | None = None
    """Rivals to run; None for all for which there is what they need."""
    only_oracles: bool = False
    """Of the tasks only those that have an oracle."""
    max_new_tokens: int | None = None
    """Longest answer; if None 32 tokens, or 256 where a number is worked out."""
    budget_s: float | None = None
    """Begin no further task after this many seconds; the table shows how many there were."""

    def __post_init__(self) -> None:
        check_one_source(self.tasks, self.benchmarks)
        if unknown := sorted(set(self.systems or ()) - BASELINES.keys()):
            raise ConfigError(f"unknown systems: {', '.join(unknown)}; choose from {', '.join(BASELINES)}")
        if self.benchmarks and (not self.heldout or self.descriptions != "heldout"):
            raise ConfigError(
                "benchmarks are held out and have held-out descriptions; leave --trained and --descriptions out"
            )
        if self.systems == () or not self.seeds or min(self.rows, self.max_new_tokens or 1) < 1:
            raise ConfigError("systems, seeds, rows and max_new_tokens must be at least one")


def evaluate_tasks(
    given: Given, config: TasksConfig, out: Path, progress: Progress = lambda done, total: None
) -> Report:
    """Run the evaluation; the table, the answers and the figures of each task are in `out` after every task.

    Raises:
        ConfigError: a rival lacks what it needs, or there are too few tasks.
    """
    base = given.base
    tasks = _with_oracles(read_all(config), config, given)
    rivals = _rivals(config, given, tasks)
    out.mkdir(parents=True, exist_ok=True)
    (out / "answers.jsonl").unlink(missing_ok=True)
    about = environment(base, given.caster.caster.id if given.caster else None)
    n_rows = sum(min(config.rows, len(task.test)) for task in tasks) * len(config.seeds) * len(rivals)
    ends_s = None if config.budget_s is None else time.monotonic() + config.budget_s
    tallies = {name: Tally() for name in rivals}
    done_tasks: list[Task] = []
    n_done = 0
    for i, task in enumerate(tasks):
        if i and ends_s is not None and time.monotonic() > ends_s:
            break
        for name, rival in rivals.items():
            by_seed: list[list[Answered]] = []
            for seed in config.seeds:
                drawn = draw(tasks, i, seed, config)
                if not by_seed or rival.is_drawn:  # others answer as with the seed before
                    by_seed.append(_answers(given, rival, drawn, config))
                    _write_answers(out, name, seed, drawn, by_seed[-1])
                n_done += len(by_seed[-1])
                progress(n_done, n_rows)
            tallies[name].add(by_seed)
        done_tasks.append(task)
        report = _report(config, rivals, done_tasks, tallies, about, is_complete=len(done_tasks) == len(tasks))
        report.write(out)
    return report


@dataclass(frozen=True)
class Answered:
    """One test row, answered."""

    row: Example
    text: str
    is_exact: bool
    choice: tuple[bool, bool] | None
    """Where there are choices: whether the likeliest is right, by its sum and for each byte."""
    n_prompt_tokens: int


@dataclass
class Tally:
    """How often one rival got each row of each task right: a share of the seeds, since a row is one row however often it is asked."""

    exact: list[list[float]] = field(default_factory=list)
    choice: list[list[float]] = field(default_factory=list)
    choice_by_byte: list[list[float]] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)

    def add(self, by_seed: Sequence[Sequence[Answered]]) -> None:
        """The rows of another task, the same for each seed."""
        rows = list(zip(*by_seed, strict=True))
        self.exact.append([_share([a.is_exact for a in row]) for row in rows])
        self.choice.append([_share([a.choice[0] for a in row if a.choice]) for row in rows if row[0].choice])
        self.choice_by_byte.append([_share([a.choice[1] for a in row if a.choice]) for row in rows if row[0].choice])
        self.prompt_tokens += [a.n_prompt_tokens for answered in by_seed for a in answered]


def _rivals(config: TasksConfig, given: Given, tasks: Sequence[Task]) -> dict[str, Baseline]:
    """Those that are asked for, or all for which there is what they need."""
    missing = {
        name: rival.needs for name, rival in BASELINES.items() if rival.needs and not getattr(given, rival.needs)
    }
    drawn = [draw(tasks, i, 0, config) for i in range(len(tasks))]
    if any(d.other_description is None for d in drawn):
        missing["other"] = "tasks"
    fewest = min(len(d.shots) for d in drawn)
    missing |= {name: "examples" for name, rival in BASELINES.items() if rival.n_shots > fewest}
    if config.systems is None:
        return {name: rival for name, rival in BASELINES.items() if name not in missing}
    if lacking := [name for name in config.systems if name in missing]:
        needed = "; ".join(f"{name!r} needs {NEEDED[missing[name]]}" for name in lacking)
        raise ConfigError(f"{needed}: give it, or leave these out of --systems")
    return {name: rival for name, rival in BASELINES.items() if name in config.systems}


def read_all(config: TasksConfig) -> list[Task]:
    """The tasks, or benchmarks, that a config asks for.

    Raises:
        ConfigError: there is none.
    """
    known = tasks_or_benchmarks(config.tasks, config.benchmarks)
    tasks = [
        task
        for task in known
        if task.is_heldout == config.heldout and task.test and task.descriptions.get(config.descriptions)
    ]
    if not tasks:
        which = "held-out" if config.heldout else "training"
        raise ConfigError(
            f"{config.tasks or config.benchmarks} has no {which} task with test rows and descriptions of the kind {config.descriptions!r}"
        )
    return tasks


def _with_oracles(tasks: list[Task], config: TasksConfig, given: Given) -> list[Task]:
    """Those tasks that are asked for, an oracle being there for each where oracles answer."""
    if given.oracles is None or not (config.only_oracles or config.systems is None or "oracle" in config.systems):
        return tasks
    without = [task.name for task in tasks if not (given.oracles / task.name / ABOUT).is_file()]
    if without and (not config.only_oracles or len(without) == len(tasks)):
        raise ConfigError(
            f"{given.oracles} has no oracle of {', '.join(without)}: train them (`loracast train oracle`), evaluate the tasks that have "
            "one (--only-oracles), or leave the oracle out of --systems"
        )
    return [task for task in tasks if task.name not in without]


def draw(tasks: Sequence[Task], i: int, seed: int, config: TasksConfig) -> Drawn:
    """What a seed draws for one of the tasks."""
    task = tasks[i]
    rng = random.Random(f"{seed}/{task.name}")
    orphans = [t for t in tasks if t is not task and (not t.group or t.group != task.group)]
    other = rng.choice(orphans) if orphans else None
    shots = rng.sample(task.train, min(5, len(task.train)))
    description = rng.choice(task.descriptions[config.descriptions])
    other_description = rng.choice(other.descriptions[config.descriptions]) if other else None
    words = [word for t in tasks for text in t.descriptions[config.descriptions] for word in text.split()]
    return Drawn(
        task,
        description,
        other_description,
        gibberish=gibberish(rng, 1)[0],
        shuffled=" ".join(rng.sample(words, min(len(words), len(description.split())))),
        shots=tuple(shots),
    )


def _answers(given: Given, rival: Baseline, drawn: Drawn, config: TasksConfig) -> list[Answered]:
    """The task's test rows, the same for all rivals and seeds, as one rival answers them."""
    base = given.base
    lora = rival.lora(given, drawn)
    lora = lora.to(base.device) if lora is not None else None
    rows = random.Random(drawn.task.name).sample(drawn.task.test, min(config.rows, len(drawn.task.test)))
    prompts = [prompt_of(base, rival, drawn, row.input) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    answers: dict[int, str] = {}
    sampling = Sampling(max_new_tokens=config.max_new_tokens or _LONGEST[drawn.task.metric])
    for start in range(0, len(order), MAX_ROWS):
        some = order[start : start + MAX_ROWS]
        answers.update(
            zip(some, answer_batch(base, [prompts[i] for i in some], [lora] * len(some), sampling), strict=True)
        )
    choices = _choose(base, rows, drawn.task, prompts, lora)
    return [
        Answered(
            row,
            answers[i],
            is_right(answers[i], row.outputs, drawn.task.metric),
            choices.get(i),
            len(prompts[i]),
        )
        for i, row in enumerate(rows)
    ]


def _choose(
    base: Base, rows: Sequence[Example], task: Task, prompts: Sequence[Sequence[int]], lora: LoRA | None
) -> dict[int, tuple[bool, bool]]:
    """For the rows that have choices, of their own or the task's labels: whether the likeliest is right."""
    asked = [i for i, row in enumerate(rows) if row.choices or task.labels]
    texts = [rows[i].choices or task.labels for i in asked]
    chosen = likeliest(base, [prompts[i] for i in asked], texts, lora)
    return {
        i: (some[choice.by_sum] in rows[i].outputs, some[choice.by_byte] in rows[i].outputs)
        for i, some, choice in zip(asked, texts, chosen, strict=True)
    }


def _report(
    config: TasksConfig,
    rivals: dict[str, Baseline],
    tasks: Sequence[Task],
    tallies: dict[str, Tally],
    about: dict[str, Any],
    is_complete: bool,
) -> Report:
    rows = []
    for name, rival in rivals.items():
        tally = tallies[name]
        shares = [_share(hits) for hits in tally.exact]
        row: dict[str, Any] = {
            "system": name,
            "label": rival.label,
            "n_tasks": len(tasks),
            "n": sum(map(len, tally.exact)),
            "exact": _mean(shares),
            "near": _mean([share for share, task in zip(shares, tasks, strict=True) if task.is_near]),
            "far": _mean([share for share, task in zip(shares, tasks, strict=True) if not task.is_near]),
            "choice": _mean([_share(hits) for hits in tally.choice if hits]),
            "choice_by_byte": _mean([_share(hits) for hits in tally.choice_by_byte if hits]),
            "prompt_tokens": _mean(tally.prompt_tokens),
            "by_task": {task.name: share for task, share in zip(tasks, shares, strict=True)},
        }
        if ADAPTER in rivals and name != ADAPTER:
            for key, kept in _KINDS.items():
                row[f"difference{key}"], row[f"difference{key}_low"], row[f"difference{key}_high"] = _paired(
                    tallies[ADAPTER], tally, tasks, kept
                )
        rows.append(row)
    return Report("tasks", COLUMNS, rows, {**asdict(config), "seed": config.seeds[0]}, about, is_complete)


_KINDS: dict[str, Callable[[Task], bool]] = {
    "": lambda task: True,
    "_near": lambda task: task.is_near,
    "_far": lambda task: not task.is_near,
}


def _paired(
    one: Tally, other: Tally, tasks: Sequence[Task], kept: Callable[[Task], bool]
) -> tuple[float | None, float | None, float | None]:
    """The mean of the paired differences over some tasks, and its 95 % interval."""
    some = [i for i, task in enumerate(tasks) if kept(task)]
    if not some:
        return None, None, None
    return paired_bootstrap([one.exact[i] for i in some], [other.exact[i] for i in some])


def _share(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean(values: Sequence[float]) -> float | None:
    return _share(values) if values else None


def _write_answers(out: Path, name: str, seed: int, drawn: Drawn, answered: Sequence[Answered]) -> None:
    with open(out / "answers.jsonl", "a", encoding="utf-8") as file:
        for a in answered:
            line = {
                "system": name, "seed": seed, "task": drawn.task.name, "description": drawn.description, "input": a.row.input,
                "outputs": a.row.outputs, "answer": a.text, "exact": a.is_exact, "chosen": a.choice,
            }  # fmt: skip
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
