"""chunks.sqlite: text and offsets of an adapter's chunks, with SQLite's full-text index (FTS5) over them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loracast.errors import AdapterError

if TYPE_CHECKING:
    from loracast.documents import Chunk

Index = Path | sqlite3.Connection
"""An index: a file (an adapter's), or an open database (in memory, for evaluations that keep nothing)."""


def write_index(index: Index, chunks: Sequence[Chunk]) -> None:
    """Store the chunks' text and offsets with a full-text index over heading and text."""
    with _opened(index, sqlite3.connect) as database, database:
        database.execute("CREATE VIRTUAL TABLE chunks USING fts5(heading, text, tokenize = 'porter unicode61')")
        database.execute(
            "CREATE TABLE places (chunk INTEGER PRIMARY KEY, start INTEGER, stop INTEGER, n_tokens INTEGER)"
        )
        for i, chunk in enumerate(chunks):
            row = (i, chunk.heading, chunk.text)
            database.execute("INSERT INTO chunks (rowid, heading, text) VALUES (?, ?, ?)", row)
            database.execute("INSERT INTO places VALUES (?, ?, ?, ?)", (i, chunk.start, chunk.end, chunk.n_tokens))


def read_chunks(index: Index, chunks: Sequence[int] | None = None) -> list[Chunk]:
    """The chunks of these numbers, in the order given; all of them if None. Raises AdapterError for a damaged index."""
    from loracast.documents import Chunk

    with open_index(index) as database:
        rows = database.execute(
            "SELECT text, start, stop, heading, n_tokens FROM chunks JOIN places ON chunks.rowid = places.chunk"
            " ORDER BY places.chunk"
        ).fetchall()
    return [Chunk(*row) for row in (rows if chunks is None else [rows[i] for i in chunks])]


@contextmanager
def open_index(index: Index) -> Iterator[sqlite3.Connection]:
    """An index's database, to read. Raises AdapterError where the file is missing or damaged."""
    with _opened(index, _connect) as database:
        yield database


@contextmanager
def _opened(index: Index, connect: Callable[[Path], sqlite3.Connection]) -> Iterator[sqlite3.Connection]:
    """The database of an index; what is opened here is closed here."""
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


def _connect(path: Path) -> sqlite3.Connection:
    if not path.is_file():
        raise AdapterError(
            f"the index {path.name} of the adapter in {path.parent} is missing; learn the document again"
        )
    database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
    database.execute("PRAGMA trusted_schema = OFF")  # the file may come from a stranger
    return database
