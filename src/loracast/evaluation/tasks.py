"""Tasks: what a description is worth as an adapter, beside what it is worth in the prompt, and beside examples.

The same test rows for all rivals, in one run, with several seeds (another description, other examples, another task's description each).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loracast.base import Base
from loracast.chat import Message
from loracast.describe import TaskCaster
from loracast.errors import ConfigError
from loracast.evaluation.metrics import is_exact, paired_bootstrap
from loracast.evaluation.report import Column, Report, environment, number, percent, text
from loracast.generate import Sampling, answer_batch
from loracast.lora import LoRA
from loracast.model import ASK_SYSTEM_TURN
from loracast.tasks import DescriptionKind, Example, Task, read_tasks
from loracast.training.text import gibberish

MAX_ROWS = 32
ADAPTER = "adapter"

Progress = Callable[[int, int], None]
"""(rows answered, rows in all)"""


@dataclass(frozen=True)
class Drawn:
    """What one seed draws for one task: all rivals get the same."""

    task: Task
    description: str
    other_description: str
    """Of another task."""
    shots: tuple[Example, ...]
    """Examples from the task's training rows."""


@dataclass(frozen=True)
class Rival:
    """What stands in the prompt, and which LoRA goes with it."""

    label: str
    n_shots: int = 0
    is_described: bool = False
    condition: Callable[[Drawn], str | None] = lambda drawn: None
    """The description that becomes the LoRA; None for no LoRA."""


CONSTANT = "<constant>"
"""Stands for an embedding of ones: a description that is the same for all tasks."""

RIVALS = {
    "none": Rival("base"),
    "described": Rival("description in the prompt", is_described=True),
    "shots3": Rival("3 examples in the prompt", n_shots=3),
    "shots5": Rival("5 examples in the prompt", n_shots=5),
    "described_shots3": Rival("description and 3 examples", n_shots=3, is_described=True),
    "described_shots5": Rival("description and 5 examples", n_shots=5, is_described=True),
    ADAPTER: Rival("adapter from the description", condition=lambda drawn: drawn.description),
    "other": Rival("adapter from another task's", condition=lambda drawn: drawn.other_description),
    "gibberish": Rival(
        "adapter from gibberish", condition=lambda drawn: gibberish(random.Random(drawn.task.name), 1)[0]
    ),
    "constant": Rival("adapter from a constant embedding", condition=lambda drawn: CONSTANT),
}

COLUMNS: tuple[Column, ...] = (
    text("label", "what answers"),
    number("n_tasks", "tasks"),
    number("n", "rows"),
    percent("exact", "exact %"),
    percent("near", "near %"),
    percent("far", "far %"),
    Column("adapter minus it, points (95 %)", lambda row: _difference(row)),
    number("prompt_tokens", "prompt tokens"),
)


@dataclass(frozen=True)
class TasksConfig:
    """What `loracast eval tasks` measures."""

    tasks: str
    """A folder of task files, or a file of examples."""
    heldout: bool = True
    """Tasks that no training has seen; or else those of the training."""
    descriptions: DescriptionKind = "heldout"
    """Kind of the descriptions that are used."""
    rows: int = 50
    """Most test rows of a task."""
    seeds: tuple[int, ...] = (0, 1)
    """Each draws descriptions and examples anew."""
    systems: tuple[str, ...] = tuple(RIVALS)
    """Rivals to run."""
    max_new_tokens: int = 32
    """Longest answer."""
    budget_s: float | None = None
    """Begin no further task after this many seconds; the table shows how many there were."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.systems) - RIVALS.keys()):
            raise ConfigError(f"unknown systems: {', '.join(unknown)}; choose from {', '.join(RIVALS)}")
        if not self.systems or not self.seeds or min(self.rows, self.max_new_tokens) < 1:
            raise ConfigError("systems, seeds, rows and max_new_tokens must be at least one")


def evaluate_tasks(
    base: Base, caster: TaskCaster | None, config: TasksConfig, out: Path, progress: Progress = lambda done, total: None
) -> Report:
    """Run the evaluation; the table, the answers and the figures of each task are in `out` after every task.

    Args:
        caster: None where no rival is an adapter.
    """
    tasks = _tasks(config)
    rivals = {name: rival for name, rival in RIVALS.items() if name in config.systems}
    if caster is None and any(rival.condition(_draw(tasks, 0, 0, config)) for rival in rivals.values()):
        raise ConfigError(
            "adapters are among the rivals: give a text-to-LoRA hypernetwork (--hypernetwork), or other --systems"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "answers.jsonl").unlink(missing_ok=True)
    about = environment(base, caster.hypernet_hash if caster else None)
    n_rows = sum(min(config.rows, len(task.test)) for task in tasks) * len(config.seeds) * len(rivals)
    ends_s = None if config.budget_s is None else time.monotonic() + config.budget_s
    hits: dict[str, list[list[bool]]] = {name: [] for name in rivals}  # by rival and task, row by row and seed by seed
    tokens: dict[str, list[int]] = {name: [] for name in rivals}
    done_tasks: list[Task] = []
    n_done = 0
    for i, task in enumerate(tasks):
        if i and ends_s is not None and time.monotonic() > ends_s:
            break
        for name in rivals:
            hits[name].append([])
        for seed in config.seeds:
            drawn = _draw(tasks, i, seed, config)
            for name, rival in rivals.items():
                answered = list(_answers(base, caster, rival, drawn, config))
                hits[name][-1] += [is_right for _, _, is_right, _ in answered]
                tokens[name] += [n for *_, n in answered]
                _write_answers(out, name, seed, drawn, answered)
                n_done += len(answered)
                progress(n_done, n_rows)
        done_tasks.append(task)
        report = _report(config, rivals, done_tasks, hits, tokens, about, is_complete=len(done_tasks) == len(tasks))
        report.write(out)
    return report


def _tasks(config: TasksConfig) -> list[Task]:
    tasks = [
        task
        for task in read_tasks(config.tasks)
        if task.is_heldout == config.heldout and task.test and task.descriptions.get(config.descriptions)
    ]
    if len(tasks) < 2:
        which = "held-out" if config.heldout else "training"
        raise ConfigError(
            f"{config.tasks} has {len(tasks)} {which} tasks with test rows and descriptions of the kind {config.descriptions!r}; "
            "at least two are needed, since each is also given the other's description"
        )
    return tasks


def _draw(tasks: Sequence[Task], i: int, seed: int, config: TasksConfig) -> Drawn:
    task = tasks[i]
    rng = random.Random(f"{seed}/{task.name}")
    other = rng.choice(
        [t for t in tasks if t.name != task.name and (not t.group or t.group != task.group)]
        or [t for t in tasks if t is not task]
    )
    shots = rng.sample(task.train, min(5, len(task.train)))
    return Drawn(
        task,
        rng.choice(task.descriptions[config.descriptions]),
        rng.choice(other.descriptions[config.descriptions]),
        tuple(shots),
    )


def _answers(
    base: Base, caster: TaskCaster | None, rival: Rival, drawn: Drawn, config: TasksConfig
) -> Iterator[tuple[Example, str, bool, int]]:
    """Each test row with its answer, whether that is right, and the tokens of its prompt."""
    lora: LoRA | None = None
    if (condition := rival.condition(drawn)) is not None:
        assert caster is not None
        lora = (caster.constant_lora() if condition == CONSTANT else caster.loras([condition])[0]).to(base.device)
    rows = random.Random(drawn.task.name).sample(drawn.task.test, min(config.rows, len(drawn.task.test)))
    prompts = [_prompt(base, rival, drawn, row.input) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    answers: dict[int, str] = {}
    sampling = Sampling(max_new_tokens=config.max_new_tokens)
    for start in range(0, len(order), MAX_ROWS):
        some = order[start : start + MAX_ROWS]
        answers.update(
            zip(some, answer_batch(base, [prompts[i] for i in some], [lora] * len(some), sampling), strict=True)
        )
    for i, row in enumerate(rows):
        yield row, answers[i], any(is_exact(answers[i], output) for output in row.outputs), len(prompts[i])


def _prompt(base: Base, rival: Rival, drawn: Drawn, asked: str) -> list[int]:
    """The conversation: the description, if it is told, before the first input; then examples as turns; then what is asked."""
    turns = [(example.input, example.outputs[0]) for example in drawn.shots[: rival.n_shots]]
    messages: list[Message] = [{"role": "system", "content": ASK_SYSTEM_TURN}]
    for user, assistant in [*turns, (asked, "")]:
        first = rival.is_described and len(messages) == 1
        messages.append({"role": "user", "content": f"{drawn.description}\n\n{user}" if first else user})
        if len(messages) < 2 * len(turns) + 2:
            messages.append({"role": "assistant", "content": assistant})
    return base.chat.conversation(messages)


def _report(
    config: TasksConfig,
    rivals: dict[str, Rival],
    tasks: Sequence[Task],
    hits: dict[str, list[list[bool]]],
    tokens: dict[str, list[int]],
    about: dict[str, Any],
    is_complete: bool,
) -> Report:
    rows = []
    for name, rival in rivals.items():
        shares = [sum(task) / len(task) for task in hits[name]]
        row: dict[str, Any] = {
            "system": name,
            "label": rival.label,
            "n_tasks": len(tasks),
            "n": sum(map(len, hits[name])),
            "exact": sum(shares) / len(shares),
            "prompt_tokens": sum(tokens[name]) / len(tokens[name]),
            "by_task": dict(zip([task.name for task in tasks], shares, strict=True)),
        }
        for key, is_near in (("near", True), ("far", False)):
            some = [share for share, task in zip(shares, tasks, strict=True) if task.is_near == is_near]
            row[key] = sum(some) / len(some) if some else None
        if ADAPTER in rivals and name != ADAPTER:
            row["difference"], row["difference_low"], row["difference_high"] = paired_bootstrap(
                hits[ADAPTER], hits[name]
            )
        rows.append(row)
    return Report("tasks", COLUMNS, rows, {**asdict(config), "seed": config.seeds[0]}, about, is_complete)


def _difference(row: Any) -> str:
    if row.get("difference") is None:
        return "-"
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(
        *(100 * row[k] for k in ("difference", "difference_low", "difference_high"))
    )


def _write_answers(
    out: Path, name: str, seed: int, drawn: Drawn, answered: Sequence[tuple[Example, str, bool, int]]
) -> None:
    with open(out / "answers.jsonl", "a", encoding="utf-8") as file:
        for row, answer, is_right, _ in answered:
            line = {
                "system": name, "seed": seed, "task": drawn.task.name, "description": drawn.description, "input": row.input,
                "outputs": row.outputs, "answer": answer, "exact": is_right,
            }  # fmt: skip
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
