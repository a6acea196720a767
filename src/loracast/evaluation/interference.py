"""`loracast eval interference`: general-knowledge questions while unrelated documents are learned.

The base chooses among the answers of a question by log-likelihood for each byte, without a document and with several at
once. Doc-to-LoRA as published loses half of its accuracy to one irrelevant document (arXiv 2602.15902).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracast.data.qa import read_questioned
from loracast.data.tasks import Example
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.errors import ConfigError
from loracast.evaluation.baseline import Request
from loracast.evaluation.benchmarks import read_benchmark
from loracast.evaluation.choice import likeliest
from loracast.evaluation.documents import DocumentSetup, adapters, pick, plain
from loracast.evaluation.in_memory import InMemoryAdapter
from loracast.evaluation.intervals import cluster_bootstrap
from loracast.evaluation.report import (
    Progress,
    Report,
    ReportWriter,
    change,
    interval,
    no_progress,
    number,
    percent,
    text,
)
from loracast.evaluation.runner import made
from loracast.model import Model

_QUESTIONS_AT_ONCE = 16  # whose LoRAs are held at once

COLUMNS = (
    text("benchmark", "questions"),
    number("n_documents", "documents learned"),
    number("n", "n"),
    percent("accuracy", "accuracy %"),
    interval("low", "high", "95 %"),
    change("change", "change, points (95 %)"),
    percent("same", "same choice %"),
)


@dataclass(frozen=True)
class InterferenceConfig:
    """What `loracast eval interference` measures."""

    benchmarks: tuple[str, ...] = ()
    """Files of questions with choices."""
    documents: tuple[str, ...] = ()
    """Files of documents that are learned."""
    sources: tuple[str, ...] = ()
    """Sources to take of documents with a `source` field; all if empty."""
    counts: tuple[int, ...] = (0, 1, 4, 16)
    """Numbers of documents that are learned at once."""
    questions: int = 200
    """Most questions of each benchmark."""
    route: int = 2
    """Chunks of each document that a question is given."""
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    """Longest chunk, in tokens."""
    split: str = "test"
    """Split to take of documents with a `split` field."""
    seed: int = 0
    """Seed of the draw of questions and documents."""

    def __post_init__(self) -> None:
        if not self.benchmarks or not self.documents:
            raise ConfigError("give questions (--benchmark FILE) and documents to learn (--documents FILE)")
        if min(self.counts) < 0 or self.questions < 1 or self.route < 1:
            raise ConfigError("counts must not be negative, questions and route at least 1")


@dataclass(frozen=True)
class Chosen:
    """The choice for one question."""

    place: int
    """Of the likeliest answer among the choices."""
    is_right: bool


def evaluate_interference(
    model: Model, config: InterferenceConfig, out: Path, progress: Progress = no_progress
) -> Report:
    """Run the evaluation; the table is in `out` after every benchmark."""
    setup = DocumentSetup(model, config.route)
    tasks = [read_benchmark(Path(file), lists_choices=False) for file in config.benchmarks]
    if without := [task.name for task in tasks if not any(row.choices for row in task.test)]:
        raise ConfigError(f"{', '.join(without)}: its questions have no choices")
    counts = sorted({0, *config.counts})
    documents = read_questioned(config.documents, config.sources, config.split)
    if len(documents) < counts[-1]:
        raise ConfigError(f"{counts[-1]} documents are to be learned at once, and there are {len(documents)}")
    writer = ReportWriter(out, "interference", COLUMNS, config, model.base, model.documents.id)
    rows: list[dict[str, Any]] = []
    of_all: dict[int, list[Chosen]] = {count: [] for count in counts}
    for done, task in enumerate(tasks):
        rng = random.Random(f"{config.seed}/{task.name}")
        asked = rng.sample([row for row in task.test if row.choices], min(config.questions, len(task.test)))
        of_task: dict[int, list[Chosen]] = {count: [] for count in counts}
        for first in range(0, len(asked), _QUESTIONS_AT_ONCE):
            some = asked[first : first + _QUESTIONS_AT_ONCE]
            texts = rng.sample(documents, counts[-1])  # each few questions meet documents of their own
            learned = [InMemoryAdapter(model, d.text, d.title, config.chunk_tokens) for d in texts]
            for count in counts:
                of_task[count] += _choose(setup, some, learned[:count])
            for one in learned:
                one.close()
            progress(done * config.questions + first + len(some), len(tasks) * config.questions)
        for count in counts:
            of_all[count] += of_task[count]
        rows += _rows(task.name, of_task)
        writer.write(rows, is_complete=False)
    if len(tasks) > 1:
        rows += _rows("all", of_all)
    return writer.write(rows)


def _choose(setup: DocumentSetup, rows: Sequence[Example], learned: Sequence[InMemoryAdapter]) -> list[Chosen]:
    """The likeliest choice of each row with these documents learned, each routed."""
    requests = []
    for row in rows:
        picked = [(document, pick(setup, document, row.input)) for document in learned]
        requests.append(Request(plain(setup, row.input), adapters(setup, picked)))
    setup.prepare(requests)
    choices = [row.choices for row in rows]
    found = likeliest(setup.base, [r.prompt for r in requests], choices, made(setup.base, requests))
    return [
        Chosen(choice.by_byte, row.choices[choice.by_byte] in row.outputs)
        for row, choice in zip(rows, found, strict=True)
    ]


def _rows(name: str, chosen: Mapping[int, Sequence[Chosen]]) -> list[dict[str, Any]]:
    """A row for each number of documents. A question is a cluster of its own."""
    before = chosen[0]
    rows = []
    for count, now in chosen.items():
        low, high = cluster_bootstrap([[float(one.is_right)] for one in now])
        row: dict[str, Any] = {
            "benchmark": name,
            "n_documents": count,
            "n": len(now),
            "accuracy": sum(one.is_right for one in now) / len(now),
            "low": low,
            "high": high,
        }
        if count:
            changes = [[float(a.is_right) - float(b.is_right)] for a, b in zip(now, before, strict=True)]
            row["change"] = sum(change for (change,) in changes) / len(changes)
            row["change_low"], row["change_high"] = cluster_bootstrap(changes)
            row["same"] = sum(a.place == b.place for a, b in zip(now, before, strict=True)) / len(now)
        rows.append(row)
    return rows
