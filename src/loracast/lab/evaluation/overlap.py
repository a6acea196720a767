"""`loracast eval overlap`: what held-out tasks or documents share with those of training.

Texts of tasks are compared as sets of words (lower case, no punctuation) by their Jaccard index, each held-out test
row with every row of every training task.

`loracast eval overlap` for documents: which training documents hold (parts of) held-out ones?

Texts are compared by their shingles, all runs of thirteen words (lower case, no punctuation). A training document
shares a held-out one where it has a good part of that one's shingles, however long the training document is: a
collection of twenty paragraphs shares a test paragraph that is one of them.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from loracast.documents.task_spec import Example
from loracast.errors import ConfigError
from loracast.lab.data.answer_metrics import normalise
from loracast.lab.data.rows import local_file, read_rows
from loracast.lab.data.tasks import read_tasks
from loracast.lab.evaluation.report import Progress, Report, columns, mean, no_progress

F = TypeVar("F", str, int)

COLUMNS = columns(
    task="held-out task", n=("test rows", 0), same=("same row %", "%"), same_input=("same input %", "%"),
    near_input=("near input %", "%"), near_task="most of them in", description=("nearest description", 2),
    description_task="which is of",
)  # fmt: skip


@dataclass(frozen=True)
class OverlapConfig:
    """Settings of `loracast eval overlap`."""

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
        return evaluate_document_overlap(config, out, progress)
    tasks = read_tasks(config.tasks)
    heldout = [task for task in tasks if task.is_heldout and task.test]
    training = [task for task in tasks if not task.is_heldout]
    if not heldout or not training:
        raise ConfigError(f"{config.tasks} needs held-out tasks with test rows, and others, to compare them")
    rows_of_training = [(task.name, row) for task in training for row in task.train + task.test]
    inputs = Index(words_of(row.input) for _, row in rows_of_training)
    input_texts = {normalise(row.input) for _, row in rows_of_training}
    pairs = {pair for _, row in rows_of_training for pair in _pairs(row)}
    described = [(task.name, text) for task in training for text in task.seen_descriptions()]
    descriptions = Index(words_of(text) for _, text in described)
    rows = []
    for i, task in enumerate(heldout):
        similar = [inputs.similarities(words_of(row.input)) for row in task.test]  # each [rows of training]
        same = [normalise(example.input) in input_texts for example in task.test]
        near = [is_same or some.max(initial=0.0) >= config.near for is_same, some in zip(same, similar, strict=True)]
        homes = [rows_of_training[j][0] for some in similar for j in np.flatnonzero(some >= config.near)]
        texts = [text for some in task.descriptions.values() for text in some]
        closeness = [descriptions.similarities(words_of(text)) for text in texts]
        best = max(closeness, key=lambda row: row.max(initial=0.0), default=None)
        row: dict[str, Any] = {"task": task.name, "is_near": task.is_near, "n": len(task.test)}
        row["same"] = mean([not pairs.isdisjoint(_pairs(example)) for example in task.test])
        row |= {"same_input": mean(same), "near_input": mean(near)}
        row["near_task"] = max(sorted(set(homes)), key=homes.count) if homes else "-"
        row["description"] = None if best is None else float(best.max(initial=0.0))
        row["description_task"] = described[int(np.argmax(best))][0] if best is not None and described else "-"
        rows.append(row)
        progress(i + 1, len(heldout))
    return Report(out, "overlap", COLUMNS, config, None).write(rows)


class Index(Generic[F]):
    """Texts as sets of features, such as words, which tells how many of them each has in common with another text."""

    def __init__(self, sets: Iterable[set[F]]):
        self._sizes: list[int] = []
        self._owners: dict[F, list[int]] = defaultdict(list)
        for i, features in enumerate(sets):
            self._sizes.append(len(features))
            for feature in features:
                self._owners[feature].append(i)

    def shared(self, features: set[F]) -> NDArray[np.float64]:
        """How many of these features each text has [texts]."""
        owners = [i for feature in features if feature in self._owners for i in self._owners[feature]]
        return np.bincount(np.array(owners, dtype=int), minlength=len(self._sizes)).astype(float)

    def similarities(self, features: set[F]) -> NDArray[np.float64]:
        """The Jaccard index with each text [texts]."""
        shared = self.shared(features)
        return shared / np.maximum(1, np.array(self._sizes) + len(features) - shared)

    def held_by(self, features: set[F], least: float) -> list[int]:
        """The texts of which at least this share is among these features."""
        shared = self.shared(features)
        return np.flatnonzero((shared > 0) & (shared >= least * np.array(self._sizes))).tolist()


def words_of(text: str) -> set[str]:
    """The words of a text: lower case, no punctuation."""
    return set(re.findall(r"\w+", text.lower()))


def shingles_of(text: str) -> set[int]:
    """Hashes of the shingles of a text; of all its words where it has fewer than N_WORDS."""
    words = re.findall(r"\w+", text.lower())
    return {hash(" ".join(words[i : i + N_WORDS])) for i in range(max(1, len(words) - N_WORDS + 1))}


def _pairs(row: Example) -> set[tuple[str, str]]:
    return {(normalise(row.input), normalise(output)) for output in row.outputs}


N_WORDS = 13
"""Length of a shingle, as usual for such checks (Brown et al., arXiv 2005.14165, appendix C)."""

DOCUMENT_COLUMNS = columns(
    source="training source", n=("documents", 0), n_sharing=("that share a held-out one", 0),
    held_out_source="held-out source", n_held_out=("documents", 0), n_shared=("shared", 0),
)  # fmt: skip


def evaluate_document_overlap(config: OverlapConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Look for held-out documents in training documents: rows with `document` or `text`, and optionally `source`.

    Training rows that share nothing are written to `config.keep`, unchanged and in order (JSONL, gzipped).
    """
    test = _rows(config.held_out)
    found = Index(shingles_of(_text(row)) for row in test)
    n_held_out = Counter(_source(row) for row in test)
    sizes: Counter[str] = Counter()
    sharing: dict[tuple[str, str], set[int]] = defaultdict(set)
    shared: dict[tuple[str, str], set[int]] = defaultdict(set)
    kept: list[dict[str, Any]] = []
    rows = _rows(config.documents)
    for i, row in enumerate(rows):
        source = _source(row)
        sizes[source] += 1
        theirs = found.held_by(shingles_of(_text(row)), config.shared)
        for one in theirs:
            key = source, _source(test[one])
            sharing[key].add(i)
            shared[key].add(one)
        if not theirs:
            kept.append(row)
        progress(i + 1, len(rows))
    if config.keep is not None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        Path(config.keep).write_bytes(gzip.compress(lines.encode(), mtime=0))
    table = [
        {
            "source": source, "n": sizes[source], "n_sharing": len(sharing[source, held_source]),
            "held_out_source": held_source, "n_held_out": n_held_out[held_source],
            "n_shared": len(shared[source, held_source]),
        }
        for source, held_source in sorted(shared)
    ]  # fmt: skip
    n_shared = len(set().union(*shared.values()))
    whole = {"source": "all", "n": len(rows), "n_sharing": len(rows) - len(kept)}
    table.append({**whole, "held_out_source": "all", "n_held_out": len(test), "n_shared": n_shared})
    return Report(out, "overlap", DOCUMENT_COLUMNS, config, None).write(table)


def _rows(files: Sequence[str]) -> list[dict[str, Any]]:
    return [row for file in files for row in read_rows(local_file(file), what="documents")]


def _text(row: dict[str, Any]) -> str:
    return row["text"] if "text" in row else row["document"]


def _source(row: dict[str, Any]) -> str:
    return row.get("source") or "-"
