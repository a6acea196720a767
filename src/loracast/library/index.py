"""chunks.sqlite: text and offsets of an adapter's chunks, with full-text indices (FTS5) over chunks and sentences."""

from __future__ import annotations

import math
import sqlite3
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import cached_property
from pathlib import Path
from sqlite3 import Connection
from typing import TYPE_CHECKING, NamedTuple

from loracast.errors import LEARN_AGAIN, AdapterError
from loracast.files import value_faults

if TYPE_CHECKING:
    from loracast.documents import Chunk


class OpenIndex:
    """An index in a file, which stays open from its first use on: opening takes as long as routing a question does.

    Threads take turns.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.RLock()

    @contextmanager
    def use(self) -> Iterator[sqlite3.Connection]:
        """The open database. Raises as opening one does."""
        with self._lock:
            yield self._database

    @cached_property
    def _database(self) -> sqlite3.Connection:
        database = _connect(self.path)
        weakref.finalize(self, database.close)
        database.execute("PRAGMA cache_size = -512")  # kB: a server keeps hundreds open
        return database


Index = Path | sqlite3.Connection | OpenIndex
"""An index: a file (an adapter's), or an open database."""


class SentencePlace(NamedTuple):
    """Where a sentence stands: its chunk, and its (start, end) characters in the chunk's prompt."""

    chunk: int
    start: int
    end: int


_STEMMED = "tokenize = 'porter unicode61'"


def write_index(index: Index, chunks: Sequence[Chunk]) -> None:
    """Store the chunks' text and offsets with full-text indices over heading and text, and over the sentences."""
    with changing_index(index) as database:
        database.execute(f"CREATE VIRTUAL TABLE chunks USING fts5(heading, text, {_STEMMED})")
        database.execute(
            "CREATE TABLE places (chunk INTEGER PRIMARY KEY, start INTEGER, stop INTEGER, n_tokens INTEGER)"
        )
        for i, chunk in enumerate(chunks):
            row = (i, chunk.heading, chunk.text)
            database.execute("INSERT INTO chunks (rowid, heading, text) VALUES (?, ?, ?)", row)
            database.execute("INSERT INTO places VALUES (?, ?, ?, ?)", (i, chunk.start, chunk.end, chunk.n_tokens))
        # A sentence that follows a question is found by the words of both: it may be the answer ("Price? 20 euros.").
        # Its index keeps no second copy of the text.
        places = [SentencePlace(i, *span) for i, chunk in enumerate(chunks) for span in chunk.units]
        texts = [chunks[i].prompt[start:end] for i, start, end in places]
        database.execute(f"CREATE VIRTUAL TABLE sentences USING fts5(text, content = '', {_STEMMED})")
        database.execute(
            "CREATE TABLE sentence_places (sentence INTEGER PRIMARY KEY, chunk INTEGER, start INTEGER, stop INTEGER)"
        )
        database.execute("CREATE INDEX sentences_by_chunk ON sentence_places (chunk)")
        for i, place in enumerate(places):
            is_answer = i > 0 and places[i - 1].chunk == place.chunk and texts[i - 1].endswith("?")
            found_by = f"{texts[i - 1]} {texts[i]}" if is_answer else texts[i]
            database.execute("INSERT INTO sentences (rowid, text) VALUES (?, ?)", (i, found_by))
            database.execute("INSERT INTO sentence_places VALUES (?, ?, ?, ?)", (i, *place))


def read_sentences(index: Index, chunks: Sequence[int] | None = None) -> list[SentencePlace]:
    """The sentences of these chunks, or of all, in order; empty in an index from before sentences were kept."""
    with open_index(index) as database:
        if not has_sentences(database):
            return []
        places = "SELECT chunk, start, stop FROM sentence_places"
        if chunks is None:
            rows = database.execute(f"{places} ORDER BY sentence").fetchall()
        else:
            of_chunk = f"{places} WHERE chunk = ? ORDER BY sentence"
            rows = [row for chunk in chunks for row in database.execute(of_chunk, (chunk,))]
    return [SentencePlace(*row) for row in rows]


def has_sentences(database: sqlite3.Connection) -> bool:
    """Whether an index holds sentences: those that older versions wrote do not."""
    return bool(database.execute("SELECT 1 FROM sqlite_master WHERE name = 'sentence_places'").fetchone())


def read_chunks(index: Index, chunks: Sequence[int] | None = None) -> list[Chunk]:
    """The chunks of these numbers, in the order given; all of them if None. Raises AdapterError for a damaged index."""
    from loracast.documents import Chunk

    of_each = "SELECT text, start, stop, heading, n_tokens FROM chunks JOIN places ON chunks.rowid = places.chunk"
    with open_index(index) as database:
        if chunks is None:
            rows = database.execute(f"{of_each} ORDER BY places.chunk").fetchall()
        else:
            rows = [database.execute(f"{of_each} WHERE places.chunk = ?", (i,)).fetchone() for i in chunks]
        return [Chunk(*row) for row in rows]


def index_faults(index: Path, n_chunks: int) -> list[str]:
    """What is wrong in the index of an adapter from elsewhere: its schema, its chunks, the places of its sentences."""
    from loracast.documents import Chunk

    try:
        chunks, sentences = read_chunks(index), read_sentences(index)
        with open_index(index) as database:
            numbers = [n for (n,) in database.execute("SELECT chunk FROM places ORDER BY chunk")]
    except AdapterError as error:
        return [str(error)]
    is_whole = len(chunks) == n_chunks
    faults = [] if is_whole else [f"{index.name} has {len(chunks)} chunks, and the manifest says {n_chunks}"]
    if numbers != list(range(len(chunks))) or any(value_faults(Chunk, vars(chunk)) for chunk in chunks):
        faults.append(f"{index.name} holds chunks that are none")
    elif not all(_is_place(place, chunks) for place in sentences):
        faults.append(f"{index.name} holds sentences that are none")
    return faults


def _is_place(place: SentencePlace, chunks: Sequence[Chunk]) -> bool:
    if not all(type(number) is int for number in place) or not 0 <= place.chunk < len(chunks):
        return False
    return 0 <= place.start <= place.end <= len(chunks[place.chunk].prompt)


@contextmanager
def changing_index(index: Index) -> Iterator[sqlite3.Connection]:
    """An index's database, made if it is not there, to write to in one transaction."""
    with _opened(index, sqlite3.connect) as database, database:
        yield database


def open_index(index: Index) -> AbstractContextManager[sqlite3.Connection]:
    """An index's database, to read. Raises AdapterError where the file is missing or damaged."""
    return _opened(index, _connect)


@contextmanager
def _opened(index: Index, connect: Callable[[Path], sqlite3.Connection]) -> Iterator[sqlite3.Connection]:
    """The database of an index; what is opened here is closed here."""
    if isinstance(index, sqlite3.Connection):
        yield index
        return
    try:
        with index.use() if isinstance(index, OpenIndex) else closing(connect(index)) as database:
            yield database
    except UnicodeEncodeError:  # of what is asked, not of what is stored
        raise
    except (sqlite3.DatabaseError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        path = index.path if isinstance(index, OpenIndex) else index
        raise AdapterError(f"the index {path} cannot be used ({error}); {LEARN_AGAIN}") from error


def _connect(path: Path) -> sqlite3.Connection:
    """Open an index for reading. Raises sqlite3.DatabaseError for views and triggers: a stranger's may never end."""
    if not path.is_file():
        raise AdapterError(f"the index {path.name} of the adapter in {path.parent} is missing; {LEARN_AGAIN}")
    uri = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
    database = sqlite3.connect(uri, uri=True, check_same_thread=False)
    database.execute("PRAGMA trusted_schema = OFF")  # the file may come from a stranger
    query = (
        "SELECT name FROM sqlite_master WHERE type NOT IN ('table', 'index')"
        " OR sql LIKE 'CREATE VIRTUAL%' AND sql NOT LIKE '%USING fts5(%'"
    )
    if found := database.execute(query).fetchone():
        raise sqlite3.DatabaseError(f"{str(found[0])[:80]!r} is neither a table nor a full-text index")
    return database


_LEAST_IDF = 1e-6  # SQLite's own floor, a factor of its scores
Phrases = Sequence[tuple[str, float]]
"""Words, or words that stand side by side, each with its weight."""


def match_scores(
    database: Connection, table: str, rank: str, n_rows: int, phrases: Phrases, documents: Sequence[range] = ()
) -> dict[int, float]:
    """BM25 of the rows of a full-text table that hold one of some weighted phrases, by their numbers.

    Args:
        rank: the call of SQLite's `bm25` with the weights of the columns.
        n_rows: of the table.
        documents: rows of each document, ascending, where a word's rarity is counted over documents: a product's name
            in all chunks of its manual is rare if no other manual has it. Other rows get no score. If empty, all rows
            count, and rarity is counted over them.
    """
    scores: dict[int, float] = {}
    firsts = [rows.start for rows in documents]
    for phrase, weight in phrases:
        rows = database.execute(f"SELECT rowid, -{rank} FROM {table} WHERE {table} MATCH ?", (f'"{phrase}"',))
        found = rows.fetchall()
        theirs = max(math.log(_odds(len(found), n_rows)), _LEAST_IDF)
        ours = math.log(1 + _odds(len(found), n_rows))
        if documents:
            owners = {row: bisect_right(firsts, row) - 1 for row, _ in found}
            found = [(row, score) for row, score in found if owners[row] >= 0 and row in documents[owners[row]]]
            ours = math.log(1 + _odds(len({owners[row] for row, _ in found}), len(documents)))
        for row, score in found:
            scores[row] = scores.get(row, 0.0) + weight * ours / theirs * score
    return scores


def _odds(n_holders: int, n: int) -> float:
    """The smoothed odds that a text lacks a word that n_holders of n texts contain, as in BM25's IDF."""
    return (n - n_holders + 0.5) / (n_holders + 0.5)
