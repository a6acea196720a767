"""`loracast eval overlap` for documents: which training documents hold (parts of) held-out ones?

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
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracast.data.rows import each_row, local_file
from loracast.evaluation.report import Progress, Report, ReportWriter, columns, no_progress

N_WORDS = 13
"""Length of a shingle, as usual for such checks (Brown et al., arXiv 2005.14165, appendix C)."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word of a shingle is lost modulo 2^64

COLUMNS = columns(
    source="training source", n=("documents", 0), n_sharing=("that share a held-out one", 0),
    held_out_source="held-out source", n_held_out=("documents", 0), n_shared=("shared", 0),
)  # fmt: skip


class Shingles:
    """Numbers for the shingles of texts: equal shingles have the same number, others in practice never."""

    def __init__(self) -> None:
        self._words: dict[str, int] = {}

    def of(self, text: str) -> NDArray[np.uint64]:
        """The shingles of a text, each once, ascending; one of all its words where it has fewer than N_WORDS."""
        words = re.findall(r"\w+", text.lower())
        ids = np.array([self._words.setdefault(word, len(self._words) + 1) for word in words], dtype=np.uint64)
        n = max(1, len(ids) - N_WORDS + 1)
        numbers = np.zeros(n, dtype=np.uint64)
        for i in range(min(N_WORDS, len(ids))):
            numbers = numbers * _MULTIPLIER + ids[i : i + n]
        return np.unique(numbers)


class HeldOut:
    """The shingles of held-out texts, to find those that another text holds."""

    def __init__(self, shingles: Shingles, texts: Iterable[str]):
        of_texts = [shingles.of(text) for text in texts]
        self._shingles = shingles
        self._sizes = np.array([len(some) for some in of_texts])
        numbers = np.concatenate(of_texts)
        order = np.argsort(numbers, kind="stable")
        self._numbers, self._owners = numbers[order], np.repeat(np.arange(len(of_texts)), self._sizes)[order]

    def shared_by(self, text: str, least: float) -> list[int]:
        """The held-out texts of whose shingles a text has at least this share."""
        own = self._shingles.of(text)
        first, last = np.searchsorted(self._numbers, own), np.searchsorted(self._numbers, own, side="right")
        met = [self._owners[a:b] for a, b in zip(first, last, strict=True) if a < b]
        if not met:
            return []
        counts = np.bincount(np.concatenate(met), minlength=len(self._sizes))
        return [int(i) for i in np.flatnonzero(counts >= least * self._sizes)]


def evaluate_document_overlap(
    documents: Sequence[str],
    held_out: Sequence[str],
    least: float,
    keep: Path | None,
    config: Any,
    out: Path,
    progress: Progress = no_progress,
) -> Report:
    """Look for held-out documents in training documents.

    Args:
        documents, held_out: files of JSONL rows with `document` or `text`, and optionally `source`.
        least: share of a held-out document's shingles from which on it counts as shared.
        keep: where the training rows that share nothing are written, unchanged and in order (JSONL, gzipped).
        config: the settings for the report.
    """
    test = _rows(held_out)
    found = HeldOut(Shingles(), [_text(row) for row in test])
    n_held_out = Counter(_source(row) for row in test)
    sizes: Counter[str] = Counter()
    sharing: dict[tuple[str, str], set[int]] = defaultdict(set)
    shared: dict[tuple[str, str], set[int]] = defaultdict(set)
    kept: list[dict[str, Any]] = []
    rows = _rows(documents)
    for i, row in enumerate(rows):
        source = _source(row)
        sizes[source] += 1
        theirs = found.shared_by(_text(row), least)
        for one in theirs:
            key = source, _source(test[one])
            sharing[key].add(i)
            shared[key].add(one)
        if not theirs:
            kept.append(row)
        progress(i + 1, len(rows))
    if keep is not None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        keep.write_bytes(gzip.compress(lines.encode(), mtime=0))
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
    return ReportWriter(out, "overlap", COLUMNS, config, None).write(table)


def _rows(files: Sequence[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for file in files:
        each_row(local_file(file), found.append, "documents")
    return found


def _text(row: dict[str, Any]) -> str:
    return row["text"] if "text" in row else row["document"]


def _source(row: dict[str, Any]) -> str:
    return row.get("source") or "-"
