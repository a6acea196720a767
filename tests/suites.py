"""Small suites of tasks as files, a text encoder without a model, and the loss of a hypernetwork on tasks."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import torch

from loracast.documents.task_spec import TaskSpec
from loracast.lab.data.tasks import Task, read_tasks
from loracast.lab.training.document_source import SYSTEM_TURNS
from loracast.lab.training.scoring import Episode, pack, score_answers
from loracast.lab.training.task_source import DEFAULT_STYLE, DrawnTask, TaskDataConfig, TaskSource

DATA = Path(__file__).parent / "files" / "data"
"""Excerpts of real task sets."""
OPPOSITES = {"hot": "cold", "big": "small", "wet": "dry", "old": "new", "up": "down", "in": "out"}
SEVEN_OPPOSITES = OPPOSITES | {"old": "young", "full": "empty"}


def write_rows(path: Path, rows: list[dict]) -> None:
    """JSON lines; compressed where the name ends in .gz."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_suite(folder: Path, ending: str = "") -> Path:
    """Two tasks for training and a held-out one, as rows in three files."""
    rows, descriptions = [], []
    for name, split, change in (
        ("opposite", "train", OPPOSITES.get),
        ("shout", "train", str.upper),
        ("first", "heldout", lambda word: word[0]),
    ):
        for i, word in enumerate(OPPOSITES):
            rows.append(
                {
                    "task": name,
                    "task_split": split,
                    "split": "test" if i == 5 else "train",
                    "input": word,
                    "output": change(word),
                }
            )
        for kind in ("train", "paraphrase", "heldout"):
            descriptions.append({"task": name, "kind": kind, "description": f"{kind} words for {name}"})
    rows[0]["alts"] = ["chilly"]
    write_rows(folder / f"tasks.jsonl{ending}", rows)
    write_rows(folder / f"task_descriptions.jsonl{ending}", descriptions)
    about = [{"task": "first", "group": "letters", "labels": ["h", "b"], "heldout_kind": "near"}]
    write_rows(folder / f"tasks_meta.jsonl{ending}", about)
    return folder / f"tasks.jsonl{ending}"


def write_held_out_suite(folder: Path) -> Path:
    """Three held-out tasks (one of them near) and one of the training."""
    rows, descriptions = [], []
    changes = {"opposite": SEVEN_OPPOSITES.get, "shout": str.upper, "first": lambda word: word[0], "echo": str}
    for name, change in changes.items():
        held_out = {"task": name, "task_split": "train" if name == "echo" else "heldout"}
        for i, word in enumerate(SEVEN_OPPOSITES):
            rows.append({**held_out, "split": "train" if i < 5 else "test", "input": word, "output": change(word)})
        descriptions += [{"task": name, "kind": "heldout", "description": f"{i} {name} please"} for i in range(3)]
    write_rows(folder / "tasks.jsonl", rows)
    write_rows(folder / "task_descriptions.jsonl", descriptions)
    write_rows(folder / "tasks_meta.jsonl", [{"task": "first", "heldout_kind": "near"}])
    return folder


class WordCounts:
    """A text encoder that needs no model: a fixed random vector for each word, added up."""

    name, d_text = "words", 12

    def __call__(self, texts):
        rows = [
            sum(torch.randn(12, generator=torch.Generator().manual_seed(sum(map(ord, w)))) for w in t.split())
            for t in texts
        ]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1) * 12**0.5


def episode_of(source: TaskSource, task: Task, seed: int) -> Episode:
    """Some examples of one task."""
    rng, n = random.Random(seed), source.config.examples_per_task
    pool, system = source.short_enough[task.name], rng.choice(SYSTEM_TURNS)
    rows = tuple(rng.sample(pool, min(n, len(pool))))
    return source.episodes([DrawnTask(task, TaskSpec(""), DEFAULT_STYLE, rows, system)])[0]


def answer_loss(base, hypernet, descriptions: list[str], tasks: list[str], suite: Path) -> float:
    """Of the training examples of some tasks, each done with the LoRA of the description beside it."""
    by_name = {task.name: task for task in read_tasks(suite)}
    source = TaskSource(TaskDataConfig(), [by_name[name] for name in tasks], base.chat)
    batch = pack([episode_of(source, by_name[name], 0) for name in tasks], base.pad_id)
    with torch.no_grad():
        return score_answers(base.model, hypernet(WordCounts()(descriptions)), batch).loss.item()
