"""Write a development set of tasks: 24 training tasks, whole groups of them, in the place of the held-out ones.

    python benchmarks/dev_tasks.py tasks.jsonl.gz --out dev

`loracast train ... --tasks dev` then sees the other training tasks alone, and `loracast eval tasks --tasks dev` the 24.
The held-out tasks are left out, so that nothing can be chosen by them.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from data_files import write

from loracast.lab.data.rows import read_rows

N_TASKS = 24
SEED = "dev tasks 1"


def dev_tasks(meta: Iterable[dict[str, Any]]) -> set[str]:
    """Names of 24 training tasks: groups in random order, each that still fits."""
    groups: dict[str, list[str]] = defaultdict(list)
    for row in meta:
        if row["task_split"] == "train":
            groups[row["group"]].append(row["task"])
    order = sorted(groups)
    random.Random(SEED).shuffle(order)
    chosen: set[str] = set()
    for group in order:
        if len(chosen) + len(groups[group]) <= N_TASKS:
            chosen |= set(groups[group])
    return chosen


def main(tasks: Path, *, out: Annotated[Path, typer.Option(help="Folder to write.")]) -> None:
    """Write the development set of tasks.jsonl.gz, which has its descriptions and metadata beside it."""
    chosen = dev_tasks(read_rows(tasks.with_name("tasks_meta.jsonl.gz")))
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tasks", "task_descriptions", "tasks_meta"):
        rows = [row for row in read_rows(tasks.with_name(f"{name}.jsonl.gz")) if row["task_split"] == "train"]
        for row in rows:
            row["task_split"] = "heldout" if row["task"] in chosen else "train"
        write(out / f"{name}.jsonl.gz", rows)
    print(f"{len(chosen)} development tasks in {out}: {', '.join(sorted(chosen))}")


if __name__ == "__main__":
    typer.run(main)
