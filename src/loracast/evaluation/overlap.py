"""`loracast eval overlap`: what held-out tasks share with training tasks, in rows and in descriptions.

Texts of tasks are compared as sets of words (lower case, no punctuation) by their Jaccard index, each held-out test
row with every row of every training task. Documents are compared by document_overlap.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loracast.data.answer_metrics import normalise
from loracast.data.tasks import Example, read_tasks
from loracast.errors import ConfigError
from loracast.evaluation.document_overlap import evaluate_document_overlap
from loracast.evaluation.intervals import mean
from loracast.evaluation.report import Progress, Report, ReportWriter, columns, no_progress

COLUMNS = columns(
    task="held-out task", n=("test rows", 0), same=("same row %", "%"), same_input=("same input %", "%"),
    near_input=("near input %", "%"), near_task="most of them in", description=("nearest description", 2),
    description_task="which is of",
)  # fmt: skip


@dataclass(frozen=True)
class OverlapConfig:
    """What `loracast eval overlap` compares."""

    tasks: str | None = None
    """A folder of task files, or a file of examples."""
    documents: tuple[str, ...] = ()
    """Documents of the training, in place of tasks: JSONL(.gz) rows."""
    held_out: tuple[str, ...] = ()
    """Documents that are held out: JSONL(.gz) rows."""
    near: float = 0.8
    """Jaccard index of their words from which two inputs of tasks count as nearly the same."""
    shared: float = 0.2
    """Share of the shingles (runs of 13 words) of a held-out document from which a training document shares it."""
    keep: str | None = None
    """Write the training documents that share no held-out one to this JSONL.gz file."""

    def __post_init__(self) -> None:
        if not 0 < self.near <= 1 or not 0 < self.shared <= 1:
            raise ConfigError("near and shared must lie above 0 and be at most 1")
        if bool(self.tasks) == bool(self.documents) or bool(self.documents) != bool(self.held_out):
            raise ConfigError("give either --tasks, or --documents of the training and documents that are --held-out")


def evaluate_overlap(config: OverlapConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Compare every held-out task with all training tasks, or held-out documents with those of the training.

    Raises:
        ConfigError: there are no held-out tasks, or no others.
    """
    if config.tasks is None:
        keep = None if config.keep is None else Path(config.keep)
        files = config.documents, config.held_out
        return evaluate_document_overlap(*files, config.shared, keep, config, out, progress)
    tasks = read_tasks(config.tasks)
    heldout = [task for task in tasks if task.is_heldout and task.test]
    training = [task for task in tasks if not task.is_heldout]
    if not heldout or not training:
        raise ConfigError(f"{config.tasks} needs held-out tasks with test rows, and others, to compare them")
    rows_of_training = [(task.name, row) for task in training for row in task.train + task.test]
    inputs = WordIndex([row.input for _, row in rows_of_training])
    input_texts = {normalise(row.input) for _, row in rows_of_training}
    pairs = {pair for _, row in rows_of_training for pair in _pairs(row)}
    described = [(task.name, words) for task in training for words in task.seen_descriptions()]
    descriptions = WordIndex([words for _, words in described])
    rows = []
    for i, task in enumerate(heldout):
        similar = [inputs.similarities(row.input) for row in task.test]  # each [rows of training]
        same = [normalise(row.input) in input_texts for row in task.test]
        near = [is_same or row.max(initial=0.0) >= config.near for is_same, row in zip(same, similar, strict=True)]
        homes = [rows_of_training[j][0] for row in similar for j in np.flatnonzero(row >= config.near)]
        texts = [text for some in task.descriptions.values() for text in some]
        closeness = [descriptions.similarities(text) for text in texts]
        best = max(range(len(texts)), key=lambda k: closeness[k].max(initial=0.0)) if texts else None
        rows.append(
            {
                "task": task.name,
                "is_near": task.is_near,
                "n": len(task.test),
                "same": mean([not pairs.isdisjoint(_pairs(row)) for row in task.test]),
                "same_input": mean(same),
                "near_input": mean(near),
                "near_task": max(sorted(set(homes)), key=homes.count) if homes else "-",
                "description": float(closeness[best].max(initial=0.0)) if best is not None else None,
                "description_task": described[int(np.argmax(closeness[best]))][0]
                if best is not None and described
                else "-",
            }
        )
        progress(i + 1, len(heldout))
    return ReportWriter(out, "overlap", COLUMNS, config, None).write(rows)


class WordIndex:
    """Texts as sets of words, which tells how many words each of them has in common with another text."""

    def __init__(self, texts: Sequence[str]):
        sets = [_words(text) for text in texts]
        self._sizes = np.array([len(words) for words in sets])
        found: dict[str, list[int]] = {}
        for i, words in enumerate(sets):
            for word in words:
                found.setdefault(word, []).append(i)
        self._rows = {word: np.array(rows) for word, rows in found.items()}

    def similarities(self, text: str) -> np.ndarray:
        """The Jaccard index of its words with those of each text [texts]."""
        words = _words(text)
        shared = np.zeros(len(self._sizes))
        for word in words:
            if word in self._rows:
                shared[self._rows[word]] += 1
        return shared / np.maximum(1, self._sizes + len(words) - shared)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _pairs(row: Example) -> set[tuple[str, str]]:
    return {(normalise(row.input), normalise(output)) for output in row.outputs}
