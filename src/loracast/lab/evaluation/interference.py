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

from loracast.answering.model import Model
from loracast.documents.task_spec import Example
from loracast.errors import ConfigError
from loracast.lab.data.tasks import read_benchmark
from loracast.lab.evaluation import report
from loracast.lab.evaluation.documents import DocumentSetup, LearnedDocument, QuestionedConfig, RoutedConfig
from loracast.lab.evaluation.likelihood import likeliest
from loracast.lab.evaluation.report import Progress, Report, columns, no_progress
from loracast.lab.evaluation.runner import made

_QUESTIONS_AT_ONCE = 16  # whose LoRAs are held at once

INTERFERENCE_COLUMNS = columns(
    benchmark="questions", n_documents=("documents learned", 0), n=("n", 0), accuracy=("accuracy %", "%"),
    low=("95 %", "interval"), change=("change, points (95 %)", "change"), same=("same choice %", "%"),
)  # fmt: skip


@dataclass(frozen=True)
class InterferenceConfig(QuestionedConfig, RoutedConfig):
    """Settings of `loracast eval interference`."""

    POSITIVE = ("questions", "route")
    benchmarks: tuple[str, ...] = ()
    """Files of questions with choices."""
    counts: tuple[int, ...] = (0, 1, 4, 16)
    """Numbers of documents that are learned at once."""
    questions: int = 200
    """Most questions of each benchmark."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.benchmarks:
            raise ConfigError("no questions: give files of questions with choices (--benchmark FILE)")
        if min(self.counts) < 0:
            raise ConfigError("counts must not be negative")


Chosen = tuple[int, bool]
"""The place of the likeliest answer among a question's choices, and whether it is right."""


def evaluate_interference(
    model: Model, config: InterferenceConfig, out: Path, progress: Progress = no_progress
) -> Report:
    """Run the evaluation; the table is in `out` after every benchmark."""
    setup = DocumentSetup(model, config)
    tasks = [read_benchmark(Path(file), lists_choices=False) for file in config.benchmarks]
    if without := [task.name for task in tasks if not any(row.choices for row in task.test)]:
        raise ConfigError(f"{', '.join(without)}: its questions have no choices")
    counts = sorted({0, *config.counts})
    documents = config.read()
    if len(documents) < counts[-1]:
        raise ConfigError(f"{counts[-1]} documents are to be learned at once, and there are {len(documents)}")
    writer = Report(out, "interference", INTERFERENCE_COLUMNS, config, model.base, model.documents.id)
    rows: list[dict[str, Any]] = []
    of_tasks: list[dict[int, list[Chosen]]] = []
    for done, task in enumerate(tasks):
        rng = random.Random(f"{config.seed}/{task.name}")
        asked = rng.sample([row for row in task.test if row.choices], min(config.questions, len(task.test)))
        of_task: dict[int, list[Chosen]] = {count: [] for count in counts}
        for first in range(0, len(asked), _QUESTIONS_AT_ONCE):
            some = asked[first : first + _QUESTIONS_AT_ONCE]
            texts = rng.sample(documents, counts[-1])  # each few questions meet documents of their own
            learned = [setup.keep(d.text, d.title) for d in texts]
            plainly = _choose(setup, some)
            for count in counts:
                of_task[count] += _choose(setup, some, learned[:count], plainly) if count else plainly
            setup.free(learned)
            progress(done * config.questions + first + len(some), len(tasks) * config.questions)
        of_tasks.append(of_task)
        rows += _rows(task.name, of_task)
        writer.write(rows, is_complete=False)
    if len(tasks) > 1:
        rows += _rows("all", {count: [one for of_task in of_tasks for one in of_task[count]] for count in counts})
    return writer.write(rows)


def _choose(
    setup: DocumentSetup,
    rows: Sequence[Example],
    learned: Sequence[LearnedDocument] = (),
    plainly: Sequence[Chosen] = (),
) -> list[Chosen]:
    """The likeliest choice of each row with these documents learned, each routed.

    Args:
        plainly: the choices without a document, which stay where a question gets nothing of the documents.
    """
    requests = [setup.request(row.input, [document.adapter for document in learned]) for row in rows]
    chosen = dict(enumerate(plainly))
    asked = [i for i, request in enumerate(requests) if not plainly or request.lora is not None]
    setup.cast_ahead([requests[i] for i in asked])
    loras = made(setup.base, [requests[i] for i in asked])
    prompts = [requests[i].prepared.prompt for i in asked]
    found = likeliest(setup.base, prompts, [rows[i].choices for i in asked], loras)
    for i, choice in zip(asked, found, strict=True):
        chosen[i] = choice.by_byte, rows[i].choices[choice.by_byte] in rows[i].outputs
    return [chosen[i] for i in range(len(rows))]


def _rows(name: str, chosen: Mapping[int, Sequence[Chosen]]) -> list[dict[str, Any]]:
    """A row for each number of documents. A question is a cluster of its own."""
    before = chosen[0]
    rows = []
    for count, now in chosen.items():
        row: dict[str, Any] = {"benchmark": name, "n_documents": count, "n": len(now)}
        row["accuracy"], row["low"], row["high"] = report.mean_with_interval([[float(is_right)] for _, is_right in now])
        if count:
            pairs = list(zip(now, before, strict=True))
            row |= report.with_interval("change", [[float(a) - float(b)] for (_, a), (_, b) in pairs])
            row["same"] = report.mean([a == b for (a, _), (b, _) in pairs])
        rows.append(row)
    return rows
