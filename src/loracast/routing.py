"""Which chunks of a document a question is about: BM25 over the chunks' text, in SQLite's full-text index (FTS5).

With hundreds of chunks the sum of all their LoRAs drowns each in the others; a question needs the few that speak of it. SQLite's `bm25` with
Porter stemming and its usual constants (k1 = 1.2, b = 0.75).
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loracast.errors import AdapterError

if TYPE_CHECKING:
    from loracast.adapter import Adapter
    from loracast.documents import Chunk

_WORD = re.compile(r"\w+")
DEFAULT_ROUTE = 2
"""Chunks that a question is given by default (measured: docs/experiments.md)."""

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
    reason: str


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
    words = [word.lower() for word in _WORD.findall(question)]
    words = [word for word in dict.fromkeys(words) if word not in _STOP]
    if not words:
        return []
    query = " OR ".join(f'"{word}"' for word in words)
    with _opened(index, _open) as database:
        rows = database.execute(
            "SELECT rowid, -bm25(chunks, 0.5, 1.0) AS score FROM chunks WHERE chunks MATCH ? ORDER BY score DESC, rowid LIMIT ?",
            (query, k),
        ).fetchall()
    return [(int(chunk), float(score)) for chunk, score in rows]


def chunk_texts(index: Index, chunks: Sequence[int] | None = None) -> list[str]:
    """The text of some chunks in the order given, or of all."""
    with _opened(index, _open) as database:
        rows = dict(database.execute("SELECT rowid, text FROM chunks").fetchall())
    return [rows[i] for i in (sorted(rows) if chunks is None else chunks)]


@dataclass(frozen=True)
class Place:
    """Where a chunk stands in its document."""

    heading: str
    start: int
    end: int
    """Offsets in characters of the document's text."""
    n_tokens: int


def chunk_places(index: Index) -> list[Place]:
    """The place of each chunk, in their order."""
    with _opened(index, _open) as database:
        rows = database.execute(
            "SELECT heading, start, stop, n_tokens FROM chunks JOIN places ON chunks.rowid = places.chunk ORDER BY places.chunk"
        )
        return [Place(*row) for row in rows]


def route(adapter: Adapter, question: str, k: int | None = DEFAULT_ROUTE) -> Route:
    """Pick the chunks of an adapter for a question, as `pick` does."""
    return pick(adapter.folder / "chunks.sqlite", adapter.manifest.n_chunks, question, k)


def pick(index: Index, n_chunks: int, question: str, k: int | None = DEFAULT_ROUTE) -> Route:
    """Pick the chunks for a question: at most `k` of the document's `n_chunks`, or all (None).

    Where no word of the question occurs in the document there is nothing to go by, and all chunks are merged.
    """
    if k is not None and k < 1:
        raise AdapterError(f"a route needs at least one chunk, not {k}; give a number from 1 on, or 'all'")
    if k is None or n_chunks <= k:
        return Route(None, (), "all chunks" if k is None else f"the document has only {n_chunks} chunk(s)")
    found = search(index, question, k)
    if not found:
        return Route(None, (), "no word of the question occurs in the document: all chunks")
    return Route(tuple(i for i, _ in found), tuple(score for _, score in found), f"best {len(found)} by BM25")


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
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
