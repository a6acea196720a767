"""`loracast eval tasks`: what a description is worth as an adapter, beside description and examples in the prompt.

All baselines get the same test rows in one run, with several seeds that each draw a description, examples and another
task's description.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from loracast.answering.model import ASK_SYSTEM_TURN
from loracast.base.embedded import DEFAULT_ENCODER
from loracast.base.generate import Sampling
from loracast.base.load import Base
from loracast.cast.task import TaskCaster
from loracast.documents.task_spec import Example, TaskSpec, with_description
from loracast.errors import ConfigError
from loracast.hypernets.encoders import TextEncoder, load_text_encoder
from loracast.lab.data.answer_metrics import is_right
from loracast.lab.data.tasks import DescriptionKind, Metric, Task, check_one_source, tasks_or_benchmarks
from loracast.lab.evaluation import report, runner
from loracast.lab.evaluation.cost import QueryFlops
from loracast.lab.evaluation.likelihood import likeliest
from loracast.lab.evaluation.report import Column, Progress, Report, columns, no_progress
from loracast.lab.evaluation.runner import Answered, Baseline, LoRASource, Request
from loracast.lab.training.loras import ABOUT, read_oracle
from loracast.lab.training.text import gibberish
from loracast.library.library import Library
from loracast.lora.algebra import LoRA

SHOTS = (1, 3, 5, 16, 32)
"""Numbers of examples in prompts, and of those that adapters are cast from."""
MAX_SHOTS = max(SHOTS)
_USUAL_SHOTS = (3, 5)
"""Numbers of examples of the baselines that run unless others are named."""
_NEAREST = 5


class NearestExamples:
    """Chooses the examples most like an input, by the cosine of their embeddings; the encoder loads on first use."""

    def __init__(self, encoder: str = DEFAULT_ENCODER):
        self._name = encoder
        self._vectors: dict[str, Tensor] = {}

    @cached_property
    def _encoder(self) -> TextEncoder:
        return load_text_encoder(self._name)

    def __call__(self, text: str, examples: Sequence[Example], n: int) -> tuple[Example, ...]:
        """The n examples nearest to the text, the nearest last."""
        inputs = [text, *(example.input for example in examples)]
        if new := [one for one in dict.fromkeys(inputs) if one not in self._vectors]:
            self._vectors.update(zip(new, self._encoder(new), strict=True))
        query, *keys = (self._vectors[one] for one in inputs)
        order = (torch.stack(keys) @ query).argsort().tolist()
        return tuple(examples[i] for i in order[-n:])


class TaskSetup(runner.EvaluatedModel):
    """A model, and where the LoRAs of a run's baselines come from; None for what the run does without."""

    def __init__(
        self,
        base: Base,
        caster: TaskCaster | None = None,
        oracles: Path | None = None,
        multitask: LoRA | None = None,
        multitask_described: LoRA | None = None,
    ):
        """
        Args:
            caster: casts descriptions into LoRAs.
            oracles: library of LoRAs trained on single tasks (`loracast train oracle`).
            multitask: one LoRA trained on all training tasks (`loracast train multitask`).
            multitask_described: the same, trained with descriptions in its prompts.
        """
        super().__init__(base, Library())
        self.caster, self.oracles = caster, oracles
        self.multitask, self.multitask_described = multitask, multitask_described
        self.nearest = NearestExamples()
        self._last: dict[Hashable, LoRA] = {}

    def made_once(self, key: Hashable, make: Callable[[], LoRA]) -> LoRASource:
        """A source whose LoRA is kept until another one is made: a task's rows follow each other, and need it often."""

        def kept() -> LoRA:
            if key not in self._last:
                self._last.clear()
                self._last[key] = make()
            return self._last[key]

        return LoRASource(key, kept)

    def report(self, out: Path, title: str, columns: Sequence[Column], config: Any, seeds: Sequence[int]) -> Report:
        """The report of an experiment with several seeds."""
        writer = Report(out, title, columns, config, self.base, self.caster.caster.id if self.caster else None)
        writer.settings["seed"] = seeds[0]
        return writer

    def missing(self) -> dict[str, str]:
        """The parts that this run does not have, each with how a user gives it."""
        return {name: how for name, how in _GIVEN_BY.items() if not getattr(self, name)}


@dataclass(frozen=True)
class Drawn:
    """The description, examples and controls that one seed draws for one task; all baselines get the same."""

    task: Task
    description: str
    other_description: str | None
    """Of a task that is not related; None where there is none."""
    gibberish: str
    """Random letters, of the kind that training holds down."""
    shots: tuple[Example, ...]
    """Examples from the task's training rows; fewer than `MAX_SHOTS` where the task has fewer."""
    other_shots: tuple[Example, ...] = ()
    """Examples of the task of the other description."""


@dataclass(frozen=True)
class TaskCase:
    """One test row of a task, with what the seed has drawn for the task."""

    drawn: Drawn
    row: Example


TaskBaseline = Baseline[TaskSetup, TaskCase]
K = TypeVar("K", bound=Hashable)
Source = Callable[[TaskSetup, Drawn], LoRASource | None]

_GIVEN_BY = {
    "caster": "a text-to-LoRA hypernetwork (--hypernetwork)",
    "oracles": "a library of trained LoRAs (--oracles)",
    "multitask": "a LoRA of `loracast train multitask` (--multitask)",
    "multitask_described": "a LoRA of `loracast train multitask --described` (--multitask-described)",
}
"""By field of TaskSetup, the words for how a user gives it."""


def request_of(
    setup: TaskSetup, case: TaskCase, lora: LoRASource | None, shots: Sequence[Example] = (), is_described: bool = False
) -> Request:
    """The conversation: the description, if wanted, before the first input; examples as turns; then the input."""
    spec = TaskSpec(case.drawn.description if is_described else "", tuple(shots))
    return Request(setup.prepare(spec.conversation(case.row.input, ASK_SYSTEM_TURN)), lora)


def _baseline(
    label: str,
    source: Source = lambda setup, drawn: None,
    shots: Callable[[TaskSetup, TaskCase], Sequence[Example]] = lambda setup, case: (),
    is_described: bool = False,
    **options: Any,
) -> TaskBaseline:
    """A baseline with examples and perhaps the description in its prompt, and the LoRA of a source."""

    def request(setup: TaskSetup, case: TaskCase) -> Request:
        return request_of(setup, case, source(setup, case.drawn), shots(setup, case), is_described)

    return Baseline(label, request, **options)


def _examples(n: int) -> str:
    return f"{n} example{'s' * (n > 1)}"


def _shots(n: int, label: str, is_described: bool = False) -> TaskBaseline:
    """The first of the drawn examples in the prompt."""
    return _baseline(
        label.format(_examples(n)),
        shots=lambda setup, case: case.drawn.shots[:n],
        is_described=is_described,
        needs=(f"{n} examples",),
        is_optional=n not in _USUAL_SHOTS,
    )


def _reader_shots(n: int) -> TaskBaseline:
    """The LoRA that was trained with the task in its prompt, in the same format: the upper bound of what is cast."""

    def request(setup: TaskSetup, case: TaskCase) -> Request:
        text = TaskSpec(case.drawn.description, case.drawn.shots[:n]).text()
        assert setup.multitask_described is not None
        return Request(setup.prepare(with_description(text, case.row.input)), runner.fixed(setup.multitask_described))

    needs = ("multitask_described", f"{n} examples")
    return Baseline(f"multi-task LoRA, description and {n} examples", request, needs=needs, is_optional=True)


def _given(name: str) -> Source:
    """A LoRA that the setup holds."""
    return lambda setup, drawn: runner.fixed(getattr(setup, name))


def _cast(label: str, spec: Callable[[Drawn], str | TaskSpec], *needs: str, is_optional: bool = False) -> TaskBaseline:
    """A baseline with the LoRA that is cast for a specification of the task."""

    def source(setup: TaskSetup, drawn: Drawn) -> LoRASource:
        task, caster = spec(drawn), setup.caster
        assert caster is not None
        return setup.made_once(("cast", task), lambda: caster.loras([task])[0])

    return _baseline(label, source, needs=(*needs, "caster"), is_optional=is_optional)


def _cast_from(n: int) -> TaskBaseline:
    label = f"adapter from description and {_examples(n)}"
    return _cast(label, lambda drawn: TaskSpec(drawn.description, drawn.shots[:n]), f"{n} examples", is_optional=True)


def _oracle(setup: TaskSetup, drawn: Drawn) -> LoRASource:
    assert setup.oracles is not None
    folder = setup.oracles / drawn.task.name
    return LoRASource(("oracle", drawn.task.name), lambda: read_oracle(folder, setup.base.fingerprint))


ADAPTER = "adapter"
BASELINES: dict[str, TaskBaseline] = {
    "none": _baseline("base", is_drawn=False),
    "described": _baseline("description in the prompt", is_described=True),
    **{f"shots{n}": _shots(n, "{} in the prompt") for n in SHOTS},
    **{f"described_shots{n}": _shots(n, "description and {}", is_described=True) for n in SHOTS},
    f"nearest{_NEAREST}": _baseline(
        f"{_NEAREST} nearest of {MAX_SHOTS} examples",
        shots=lambda setup, case: setup.nearest(case.row.input, case.drawn.shots, _NEAREST),
        needs=(f"{MAX_SHOTS} examples",),
        is_optional=True,
    ),
    "multitask": _baseline("multi-task LoRA", _given("multitask"), needs=("multitask",), is_drawn=False),
    "multitask_described": _baseline(
        "multi-task LoRA and description",
        _given("multitask_described"),
        is_described=True,
        needs=("multitask_described",),
    ),
    **{f"multitask_described_shots{n}": _reader_shots(n) for n in SHOTS[:-1]},
    ADAPTER: _cast("adapter from the description", lambda drawn: drawn.description),
    **{f"{ADAPTER}_shots{n}": _cast_from(n) for n in SHOTS},
    "other": _cast("adapter from another task's description", lambda drawn: drawn.other_description or "", "tasks"),
    "other_shots5": _cast(
        "adapter from another task's description and 5 examples",
        lambda drawn: TaskSpec(drawn.other_description or "", drawn.other_shots),
        "tasks",
        "5 examples",
        is_optional=True,
    ),
    "gibberish": _cast("adapter from random letters", lambda drawn: drawn.gibberish),
    "oracle": _baseline("oracle", _oracle, needs=("oracles",), is_drawn=False),
}


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
class TasksFrom(runner.Settings):
    """Settings that choose the tasks of an experiment."""

    tasks: str | None = None
    """A folder of task files, or a file of examples."""
    benchmarks: tuple[str, ...] = ()
    """Files of benchmarks, in place of tasks."""
    heldout: bool = True
    """Take the tasks that no training has seen; or else those of the training."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
    """Settings of `loracast eval tasks`."""

    POSITIVE = ("rows", "max_new_tokens")
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
        runner.check_names(self.baselines or (), BASELINES)
        if self.benchmarks and self.descriptions != "heldout":
            raise ConfigError("benchmarks have held-out descriptions only: leave --descriptions out")
        if self.baselines == () or not self.seeds:
            raise ConfigError("baselines and seeds must be at least one")


def evaluate_tasks(setup: TaskSetup, config: TasksConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Run the evaluation; the table, the answers and the figures of each task are in `out` after every task.

    Raises:
        ConfigError: a baseline lacks what it needs, or there are too few tasks.
    """
    tasks = _with_oracles(config.read(config.descriptions), config, setup)
    baselines = _choose_baselines(config, setup, tasks)
    n_rows = sum(min(config.rows, len(task.test)) for task in tasks) * len(config.seeds) * len(baselines)
    n_done = 0

    def answer(i: int) -> Iterator[tuple[str, int, list[Answered[TaskCase]]]]:
        nonlocal n_done
        for name, baseline in baselines.items():
            seeds = config.seeds if baseline.is_drawn else config.seeds[:1]  # others answer alike with every seed
            for seed in seeds:
                answered = _answer(setup, name, baseline, draw(tasks, i, seed, config.descriptions), config)
                yield name, seed, answered
                n_done += len(answered) * len(config.seeds) // len(seeds)
                progress(n_done, n_rows)

    writer = setup.report(out, "tasks", COLUMNS, config, config.seeds)
    return evaluate_by_task(writer, tasks, answer, _rows, lambda name: {"baseline": name}, config.budget_s)


Asked = Mapping[K, Sequence[Sequence[Sequence[Answered[TaskCase]]]]]
"""By the name of what answers: for each task, with each seed, the answers to the task's rows."""


def evaluate_by_task(
    writer: Report,
    tasks: Sequence[Task],
    answer: Callable[[int], Iterable[tuple[K, int, list[Answered[TaskCase]]]]],
    rows_of: Callable[[Sequence[Task], Asked[K]], list[dict[str, Any]]],
    line_of: Callable[[K], dict[str, Any]],
    budget_s: float | None,
) -> Report:
    """Answer the rows of one task after the other; the table and the answers are written after every task.

    Args:
        answer: gives the answers to the i-th task's rows, each time with what answered and the seed.
        line_of: what a line of answers.jsonl says of what answered.
        budget_s: begin no further task after this many seconds.
    """
    deadline, asked = runner.Deadline(budget_s), defaultdict[K, list[list[list[Answered[TaskCase]]]]](list)
    for i in range(len(tasks)):
        if i and deadline.is_over:
            break
        by_seed = defaultdict[K, list[list[Answered[TaskCase]]]](list)
        for name, seed, answered in answer(i):
            by_seed[name].append(answered)
            writer.add_answers({**line_of(name), "seed": seed, **_line(one)} for one in answered)
        for name, some in by_seed.items():
            asked[name].append(some)
        writer.write(rows_of(tasks[: i + 1], asked), is_complete=i + 1 == len(tasks))
    return writer


def exact_shares(asked: Asked[K]) -> dict[K, list[list[float]]]:
    """By what answered, for each task, the share of the seeds with which each row was right."""
    return {
        name: [seed_shares([[one.scores["exact"] for one in some] for some in by_seed]) for by_seed in of_tasks]
        for name, of_tasks in asked.items()
    }


def seed_shares(by_seed: Sequence[Sequence[float]]) -> list[float]:
    """For each row of a task, the share of the seeds with which it was right."""
    return [report.mean(row) for row in zip(*by_seed, strict=True)]


def task_figures(tasks: Sequence[Task], exact: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The figures of a row of the table, from the share of each row of each task; all tasks count the same."""
    by_task = {task.name: report.mean(shares) for task, shares in zip(tasks, exact, strict=True)}
    n_rows = sum(map(len, exact))
    return {"n_tasks": len(tasks), "n": n_rows, "exact": report.mean(list(by_task.values())), "by_task": by_task}


def _choose_baselines(config: TasksConfig, setup: TaskSetup, tasks: Sequence[Task]) -> dict[str, TaskBaseline]:
    """The baselines that are asked for, or all that have what they need."""
    drawn = [draw(tasks, i, 0, config.descriptions) for i in range(len(tasks))]
    missing = setup.missing()
    if any(d.other_description is None for d in drawn):
        missing["tasks"] = "for every task another one that is not related (of another `group`)"
    fewest = min(len(d.shots) for d in drawn)
    missing |= {f"{n} examples": f"{n} training examples of every task" for n in SHOTS if n > fewest}
    return runner.choose_baselines(BASELINES, config.baselines or (), missing)


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
    shots += more.sample(left, min(MAX_SHOTS - len(shots), len(left)))
    other_shots = more.sample(other.train, min(_FIRST_SHOTS, len(other.train))) if other else []
    letters = gibberish(rng, 1)[0]
    return Drawn(task, description, other_description, letters, tuple(shots), tuple(other_shots))


def test_rows(task: Task, n: int) -> list[Example]:
    """At most n test rows of a task, always the same ones."""
    return random.Random(task.name).sample(task.test, min(n, len(task.test)))


def _answer(
    setup: TaskSetup, name: str, baseline: TaskBaseline, drawn: Drawn, config: TasksConfig
) -> list[Answered[TaskCase]]:
    """The task's test rows, the same for all baselines and seeds, as one baseline answers them.

    GFLOP are those of the query with an answer as long as the right one.
    """
    task = drawn.task
    cases = [TaskCase(drawn, row) for row in test_rows(task, config.rows)]
    sampling = Sampling(max_new_tokens=config.max_new_tokens or LONGEST[task.metric])
    answered = runner.ask(setup, {name: baseline}, {name: cases}, sampling)
    choices = _choose(setup, baseline, cases)
    formula = QueryFlops.of(setup.base.model.config)
    (lora,) = runner.made(setup.base, [baseline.request(setup, cases[0])])
    scored = []
    for i, one in enumerate(answered):
        n_new = len(setup.base.chat.reply(one.case.row.outputs[0]))
        scores = {"exact": is_right(one.text, one.case.row.outputs, task.metric)}
        gflops = formula.query(one.n_prompt_tokens, n_new, lora) / 1e9
        scored.append(replace(one, scores={**scores, "gflops": gflops, **choices.get(i, {})}))
    return scored


def _choose(setup: TaskSetup, baseline: TaskBaseline, cases: Sequence[TaskCase]) -> dict[int, dict[str, bool]]:
    """For the rows that have choices, of their own or the task's labels: whether the likeliest is right.

    It is the one whose tokens are likeliest together, or the one that is likeliest for each of its bytes.
    """
    choices = {i: texts for i, c in enumerate(cases) if (texts := c.row.choices or c.drawn.task.labels)}
    requests = [baseline.request(setup, cases[i]) for i in choices]
    loras = runner.made(setup.base, requests)
    chosen = likeliest(setup.base, [r.prepared.prompt for r in requests], list(choices.values()), loras)
    return {
        i: {
            "choice": texts[choice.by_sum] in cases[i].row.outputs,
            "choice_by_byte": texts[choice.by_byte] in cases[i].row.outputs,
        }
        for (i, texts), choice in zip(choices.items(), chosen, strict=True)
    }


def _rows(tasks: Sequence[Task], asked: Asked[str]) -> list[dict[str, Any]]:
    """A row for each baseline over the tasks that are done."""
    exact = exact_shares(asked)
    parts = {
        "exact": range(len(tasks)),
        "near": [i for i, task in enumerate(tasks) if task.is_near],
        "far": [i for i, task in enumerate(tasks) if not task.is_near],
    }
    rows = []
    for name, of_tasks in asked.items():
        every = [one for by_seed in of_tasks for some in by_seed for one in some]
        row = {"baseline": name, "label": BASELINES[name].label, **task_figures(tasks, exact[name])}
        for key in ("choice", "choice_by_byte"):
            given = [[[one.scores[key] for one in some if key in one.scores] for some in t] for t in of_tasks]
            row[key] = report.mean_if_any(
                [report.mean(shares) for by_seed in given if (shares := seed_shares(by_seed))]
            )
        row["prompt_tokens"] = report.mean_if_any([one.n_prompt_tokens for one in every])
        row["gflops"] = report.mean_if_any([one.scores["gflops"] for one in every])
        for key, part in parts.items():
            row[key] = report.mean_if_any([report.mean(exact[name][i]) for i in part])
            if ADAPTER in asked and name != ADAPTER:
                pair = ([exact[one][i] for i in part] for one in (ADAPTER, name))
                found = report.paired_bootstrap(*pair) if part else (None, None, None)
                row |= report.named_interval(f"difference_{key}".removesuffix("_exact"), found)
        rows.append(row)
    return rows


def _line(one: Answered[TaskCase]) -> dict[str, Any]:
    """What a line of answers.jsonl says of a row and its answer."""
    drawn, row = one.case.drawn, one.case.row
    return {
        "task": drawn.task.name, "description": drawn.description, "input": row.input, "outputs": row.outputs,
        **one.said, **one.scores,
    }  # fmt: skip
