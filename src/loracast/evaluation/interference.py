"""Harm: what learned documents do to questions that have nothing to do with them.

General-knowledge questions with choices, answered by log-likelihood for each byte of a choice, with no document and with the adapters of some documents at once, as
`loracast ask -a one -a two` combines them. The published system loses half of its accuracy to one irrelevant document (arXiv 2602.15902).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loracast.data.qa import read_questioned
from loracast.data.tasks import Example
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.errors import ConfigError
from loracast.evaluation.benchmarks import read_benchmark
from loracast.evaluation.choice import likeliest
from loracast.evaluation.in_memory import InMemoryAdapter, cast
from loracast.evaluation.intervals import cluster_bootstrap
from loracast.evaluation.report import Column, Progress, Report, change, environment, interval, number, percent, text
from loracast.lora.algebra import LoRA, concat
from loracast.model import ASK_SYSTEM_TURN, Model

_QUESTIONS_AT_ONCE = 16  # whose LoRAs are held at once

COLUMNS: tuple[Column, ...] = (
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
    """Of documents with a `source` field, take only these sources."""
    counts: tuple[int, ...] = (0, 1, 4, 16)
    """How many documents are learned at once."""
    questions: int = 200
    """Questions of each benchmark."""
    route: int = 2
    """Chunks of each document that a question is given."""
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    """Longest chunk."""
    split: str = "test"
    """Of documents with a `split` field, take only this one."""
    seed: int = 0
    """Seed of the draw: each question meets documents of its own."""

    def __post_init__(self) -> None:
        if not self.benchmarks or not self.documents:
            raise ConfigError("give questions (--benchmark FILE) and documents to learn (--documents FILE)")
        if min(self.counts) < 0 or self.questions < 1 or self.route < 1:
            raise ConfigError("counts must not be negative, questions and route at least 1")


def evaluate_interference(
    model: Model, config: InterferenceConfig, out: Path, progress: Progress = lambda done, total: None
) -> Report:
    """Run the evaluation; the table is in `out` after every benchmark."""
    tasks = [read_benchmark(Path(file), lists_choices=False) for file in config.benchmarks]
    if without := [task.name for task in tasks if not any(row.choices for row in task.test)]:
        raise ConfigError(f"{', '.join(without)}: its questions have no choices")
    counts = sorted({0, *config.counts})
    documents = read_questioned(config.documents, config.sources, config.split)
    if len(documents) < counts[-1]:
        raise ConfigError(f"{counts[-1]} documents are to be learned at once, and there are {len(documents)}")
    about = environment(model.base, model.documents.id)
    rows: list[dict[str, Any]] = []
    hits: dict[int, list[list[float]]] = {count: [] for count in counts}
    chosen: dict[int, list[list[int]]] = {count: [] for count in counts}
    report = Report("interference", COLUMNS, rows, asdict(config), about, is_complete=False)
    for done, task in enumerate(tasks):
        rng = random.Random(f"{config.seed}/{task.name}")
        asked = rng.sample([row for row in task.test if row.choices], min(config.questions, len(task.test)))
        for count in counts:
            hits[count].append([])
            chosen[count].append([])
        for first in range(0, len(asked), _QUESTIONS_AT_ONCE):
            some = asked[first : first + _QUESTIONS_AT_ONCE]
            texts = rng.sample(documents, counts[-1])
            learned = [InMemoryAdapter(model, d.text, d.title, config.chunk_tokens) for d in texts]
            cast(model, [(one, range(len(one.chunks))) for one in learned])
            for count in counts:
                picks = _choose(model, some, learned[:count], config.route)
                chosen[count][-1] += picks
                hits[count][-1] += [float(row.choices[i] in row.outputs) for row, i in zip(some, picks, strict=True)]
            for one in learned:
                one.close()
            progress(done * config.questions + first + len(some), len(tasks) * config.questions)
        rows += _rows(task.name, {c: hits[c][-1:] for c in counts}, {c: chosen[c][-1:] for c in counts})
        report.write(out)
    if len(tasks) > 1:
        rows += _rows("all", hits, chosen)
    report = Report("interference", COLUMNS, rows, asdict(config), about)
    report.write(out)
    return report


def _choose(model: Model, rows: Sequence[Example], learned: Sequence[InMemoryAdapter], route: int) -> list[int]:
    """Which choice of each row is the likeliest with these documents learned."""
    base = model.base
    prompts = [base.chat.prompt(row.input, ASK_SYSTEM_TURN) for row in rows]
    loras: list[LoRA | None] = [_together(learned, row.input, route) for row in rows]
    return [choice.by_byte for choice in likeliest(base, prompts, [row.choices for row in rows], loras)]


def _together(learned: Sequence[InMemoryAdapter], question: str, route: int) -> LoRA | None:
    """The sum of the documents' LoRAs, each routed; what all of them share counts once."""
    if not learned:
        return None
    loras = [one.lora(one.route(question, route).picked, static=i == 0) for i, one in enumerate(learned)]
    return concat(loras)


def _rows(
    name: str, hits: Mapping[int, list[list[float]]], chosen: Mapping[int, list[list[int]]]
) -> list[dict[str, Any]]:
    """A row for each number of documents. A question is a cluster of its own."""
    before = [hit for of_task in hits[0] for hit in of_task]
    chosen_before = [pick for of_task in chosen[0] for pick in of_task]
    rows = []
    for count in hits:
        now = [hit for of_task in hits[count] for hit in of_task]
        low, high = cluster_bootstrap([[hit] for hit in now])
        row: dict[str, Any] = {
            "benchmark": name,
            "n_documents": count,
            "n": len(now),
            "accuracy": sum(now) / len(now),
            "low": low,
            "high": high,
        }
        if count:
            changes = [[a - b] for a, b in zip(now, before, strict=True)]
            row["change"] = sum(change for (change,) in changes) / len(changes)
            row["change_low"], row["change_high"] = cluster_bootstrap(changes)
            picks = [pick for of_task in chosen[count] for pick in of_task]
            row["same"] = sum(a == b for a, b in zip(picks, chosen_before, strict=True)) / len(picks)
        rows.append(row)
    return rows
