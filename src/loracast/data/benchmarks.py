"""Read benchmarks as held-out tasks: files of questions with choices, or with a number as the answer.

A row is `{"question": ..., "choices": [...], "answer": index}`, or has a `rationale` and a number as the `answer`. The
examples for the prompts of `NAME_test.jsonl.gz` come from `NAME_train.jsonl.gz` beside it, or else are its first rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loracast.data.rows import each_row, read_content
from loracast.data.tasks import Example, Task, read_tasks
from loracast.errors import ConfigError

_N_SHOWN = 100
"""Rows that serve as examples and are never asked, in a file without one for training."""


def check_one_source(tasks: str | Path | None, benchmarks: Sequence[str | Path]) -> None:
    """Raises ConfigError unless there are either tasks or benchmarks."""
    if (tasks is None) == (not benchmarks):
        raise ConfigError("give either tasks (--tasks) or benchmarks (--benchmark)")


def tasks_or_benchmarks(tasks: str | Path | None, benchmarks: Sequence[str | Path]) -> tuple[Task, ...]:
    """Read tasks of a folder or file, or benchmarks' files as tasks. Raises ConfigError unless exactly one is given."""
    check_one_source(tasks, benchmarks)
    return read_tasks(tasks) if tasks is not None else tuple(read_benchmark(Path(file)) for file in benchmarks)


def read_benchmark(path: Path, *, lists_choices: bool = True) -> Task:
    """Read a benchmark's file as a held-out task.

    Args:
        lists_choices: the input of a question with choices lists them; without the list it is the question alone.

    Raises:
        ConfigError: the file cannot be read, or the benchmark has no description (`content/benchmarks.toml`).
    """
    stem = re.sub(r"\.jsonl(\.gz)?$", "", path.name)
    name = re.sub(r"^bench_|_(test|train|sample)$", "", stem)
    known = read_content("benchmarks")
    if (about := known.get(name)) is None:
        raise ConfigError(
            f"nothing is known of a benchmark {name!r}; write it as a task file (docs/tasks.md). "
            f"Known: {', '.join(sorted(known))}"
        )
    rows = _examples(path, lists_choices)
    beside = path.with_name(path.name.replace("_test.", "_train."))
    shown = _examples(beside, lists_choices) if beside != path and beside.is_file() else rows[:_N_SHOWN]
    asked = rows if beside != path and beside.is_file() else rows[_N_SHOWN:]
    if not asked:
        raise ConfigError(
            f"{path} has no more than {_N_SHOWN} rows, which are its examples: put those into {beside.name}"
        )
    return Task(
        name=name,
        descriptions={"heldout": tuple(about["descriptions"])},
        train=tuple(shown),
        test=tuple(asked),
        group=about["group"],
        is_heldout=True,
        metric=about.get("metric", "exact"),
    )


def _examples(path: Path, lists_choices: bool) -> list[Example]:
    found: list[Example] = []

    def take(row: dict[str, Any]) -> None:
        if "choices" in row:
            choices = tuple(row["choices"])
            listed = "".join(f"\n- {choice}" for choice in choices) if lists_choices else ""
            found.append(Example(row["question"] + listed, (choices[row["answer"]],), choices))
        else:
            found.append(Example(row["question"], (f"{row['rationale']}\n{row['answer']}",)))

    each_row(path, take)
    return found
