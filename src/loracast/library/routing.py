"""Which chunks of a document a question is about: BM25 over the chunks' text, in SQLite's full-text index (FTS5).

With hundreds of chunks the sum of all their LoRAs drowns each in the others; a question needs the few that speak of it. SQLite counts (Porter
stemming, k1 = 1.2, b = 0.75); how rare a word is, is weighed here: for SQLite's `bm25` a word that stands in half of the chunks tells nothing at
all, which in a manual of eight chunks are most words. Neighbouring words of the question count once more where a chunk has them side by side
(Metzler and Croft, A Markov random field model for term dependencies, 2005).
"""

from __future__ import annotations

import math
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from loracast.errors import AdapterError

if TYPE_CHECKING:
    from loracast.documents import Chunk
    from loracast.library.adapter import Adapter

_WORD = re.compile(r"\w+")
DEFAULT_ROUTE = 2
"""Chunks that a question is given by default (measured: docs/experiments.md)."""

_LEAST_IDF = 1e-6  # SQLite's own, which its scores hold as a factor
_PAIR_WEIGHT = 0.5
_SHARPNESS = 8  # of the weights of chunks picked from many
_LEAST_WEIGHT = 0.3  # of a chunk of a document that is given whole

# Words that nearly every question has and that say nothing about where its answer is.
_STOP = frozenset(
    [
        "a",
        "about",
        "an",
        "and",
        "any",
        "are",
        "as",
        "at",
        "be",
        "been",
        "by",
        "can",
        "could",
        "did",
        "do",
        "does",
        "for",
        "from",
        "give",
        "had",
        "has",
        "have",
        "he",
        "her",
        "his",
        "how",
        "i",
        "in",
        "is",
        "it",
        "its",
        "me",
        "my",
        "of",
        "on",
        "or",
        "please",
        "she",
        "so",
        "some",
        "tell",
        "that",
        "the",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "to",
        "was",
        "we",
        "were",
        "what",
        "when",
        "where",
        "which",
        "who",
        "whom",
        "whose",
        "why",
        "will",
        "with",
        "would",
        "you",
        "your",
    ]
)


@dataclass(frozen=True)
class Route:
    """The chunks picked for a request, best first, and why."""

    chunks: tuple[int, ...] | None
    """None: all of them, merged."""
    scores: tuple[float, ...]
    weights: tuple[float, ...]
    """What each chunk's LoRA counts: 1 for the best one."""
    reason: str

    @property
    def picked(self) -> dict[int, float] | None:
        """The weight of each chunk; None: all of them, merged."""
        return None if self.chunks is None else dict(zip(self.chunks, self.weights, strict=True))


Index = Path | sqlite3.Connection
"""Where an index is: a file (an adapter's), or an open database (in memory, where nothing is kept)."""


def write_index(index: Index, chunks: Sequence[Chunk]) -> None:
    """Store the chunks' text and offsets with a full-text index over heading and text."""
    with _opened(index, sqlite3.connect) as database, database:
        database.execute("CREATE VIRTUAL TABLE chunks USING fts5(heading, text, tokenize = 'porter unicode61')")
        database.execute(
            "CREATE TABLE places (chunk INTEGER PRIMARY KEY, start INTEGER, stop INTEGER, n_tokens INTEGER)"
        )
        for i, chunk in enumerate(chunks):
            database.execute(
                "INSERT INTO chunks (rowid, heading, text) VALUES (?, ?, ?)", (i, chunk.heading, chunk.text)
            )
            database.execute("INSERT INTO places VALUES (?, ?, ?, ?)", (i, chunk.start, chunk.end, chunk.n_tokens))


def search(index: Index, question: str, k: int) -> list[tuple[int, float]]:
    """The k chunks that match a question best, as (chunk, score), higher scores first; fewer where fewer match."""
    scores: dict[int, float] = {}
    with _opened(index, _open) as database:
        (n_chunks,) = database.execute("SELECT count(*) FROM places").fetchone()
        for phrase, weight in _phrases(question):
            rows = database.execute(
                "SELECT rowid, -bm25(chunks, 0.5, 1.0) FROM chunks WHERE chunks MATCH ?", (f'"{phrase}"',)
            ).fetchall()
            odds = (n_chunks - len(rows) + 0.5) / (len(rows) + 0.5)
            theirs, ours = max(math.log(odds), _LEAST_IDF), math.log(1 + odds)
            for chunk, score in rows:
                scores[chunk] = scores.get(chunk, 0.0) + weight * ours / theirs * score
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))[:k]


def _phrases(question: str) -> list[tuple[str, float]]:
    """What is looked for, with its weight: the question's words that say something, and those of them that are neighbours."""
    words = [word.lower() for word in _WORD.findall(question)]
    telling = [word for word in dict.fromkeys(words) if word not in _STOP]
    pairs = [(one, other) for one, other in dict.fromkeys(pairwise(words)) if _STOP.isdisjoint((one, other))]
    return [(word, 1.0) for word in telling] + [(f"{one} {other}", _PAIR_WEIGHT) for one, other in pairs]


def read_chunks(index: Index, chunks: Sequence[int] | None = None) -> list[Chunk]:
    """Some chunks in the order given, or all: their text, heading, place in the document and tokens."""
    from loracast.documents import Chunk

    with _opened(index, _open) as database:
        rows = database.execute(
            "SELECT text, start, stop, heading, n_tokens FROM chunks JOIN places ON chunks.rowid = places.chunk ORDER BY places.chunk"
        ).fetchall()
    return [Chunk(*row) for row in (rows if chunks is None else [rows[i] for i in chunks])]


def route(adapter: Adapter, question: str, k: int | None = DEFAULT_ROUTE) -> Route:
    """Pick the chunks of an adapter for a question, as `pick` does."""
    return pick(adapter.index, adapter.manifest.n_chunks, question, k)


def pick(index: Index, n_chunks: int, question: str, k: int | None = DEFAULT_ROUTE) -> Route:
    """Pick the chunks for a question: at most `k` of the document's `n_chunks`, or all (None).

    A chunk counts the less, the lower its score is beside the best one's, so that one that hardly matches does not stand in the way of the
    one that does (measured: docs/experiments.md). A document of k chunks or fewer is given whole, and each of its chunks counts for something.
    Where no word of the question occurs in the document there is nothing to go by, and all chunks are merged.
    """
    if k is not None and k < 1:
        raise AdapterError(f"a route needs at least one chunk, not {k}; give a number from 1 on, or 'all'")
    if k is None or n_chunks == 1:
        return Route(None, (), (), "all chunks" if k is None else "the document has only one chunk")
    found = search(index, question, k)
    if not found:
        return Route(None, (), (), "no word of the question occurs in the document: all chunks")
    if n_chunks > k:
        weights = [(score / found[0][1]) ** _SHARPNESS for _, score in found]
        reason = f"best {len(found)} by BM25"
    else:
        matching = dict(found)
        found += [(chunk, 0.0) for chunk in range(n_chunks) if chunk not in matching]
        weights = [max(_LEAST_WEIGHT, score / found[0][1]) for _, score in found]
        reason = f"all {n_chunks} chunks, weighed by BM25"
    chunks, scores = zip(*found, strict=True)
    return Route(chunks, scores, tuple(weights), reason)


@contextmanager
def _opened(index: Index, connect: Callable[[Path], sqlite3.Connection]) -> Iterator[sqlite3.Connection]:
    """The database of an index; one that was opened here is closed here."""
    if isinstance(index, sqlite3.Connection):
        yield index
        return
    database = connect(index)
    try:
        yield database
    except sqlite3.DatabaseError as error:
        raise AdapterError(f"the index {index} cannot be used ({error}); learn the document again") from error
    finally:
        database.close()


def _open(path: Path) -> sqlite3.Connection:
    if not path.is_file():
        raise AdapterError(
            f"the index {path.name} of the adapter in {path.parent} is missing; learn the document again"
        )
    database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
    database.execute("PRAGMA trusted_schema = OFF")  # it may come from a stranger
    return database
