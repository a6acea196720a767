"""What a server has been given, in one SQLite file: uploads, jobs and vector stores, so that a kill loses none of them.

    LIBRARY/serving/state.sqlite     a row for each upload, job, vector store and file in one
    LIBRARY/serving/files/ID         the bytes of an upload; they are on the disk before their row is

Every change is one transaction that is flushed to the disk before a client hears of success. Servers on one library
share the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import BaseModel, Field

from loracast.documents.clean import bare_name
from loracast.errors import LoracastError
from loracast.files import write_with
from loracast.library.library import Library
from loracast.library.register import migrate, schema_version
from loracast.serving.errors import ApiError

FOLDER = "serving"
"""The folder in the library."""
_WAIT_S = 30.0  # for another thread or process to finish its write
_MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE files (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, filename TEXT NOT NULL, purpose TEXT NOT
        NULL, n_bytes INTEGER NOT NULL, sha256 TEXT NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER
    );
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, adapter TEXT NOT NULL,
        file TEXT, work TEXT NOT NULL, for_stores INTEGER NOT NULL, status TEXT NOT NULL DEFAULT 'queued',
        wants_cancel INTEGER NOT NULL DEFAULT 0, done INTEGER NOT NULL DEFAULT 0, total INTEGER NOT NULL DEFAULT 0,
        error TEXT, n_starts INTEGER NOT NULL DEFAULT 0, n_bytes INTEGER NOT NULL DEFAULT 0, version TEXT,
        revision INTEGER NOT NULL DEFAULT 1, created_at INTEGER NOT NULL, ended_at INTEGER
    );
    CREATE INDEX jobs_by_status ON jobs (status, number);
    CREATE INDEX jobs_by_file ON jobs (file);
    CREATE TABLE stores (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, name TEXT NOT NULL, metadata TEXT NOT NULL,
        created_at INTEGER NOT NULL, last_active_at INTEGER NOT NULL, expires_days INTEGER, is_expired INTEGER NOT NULL
        DEFAULT 0
    );
    CREATE TABLE store_files (
        number INTEGER PRIMARY KEY AUTOINCREMENT, store TEXT NOT NULL REFERENCES stores (id) ON DELETE CASCADE,
        id TEXT NOT NULL REFERENCES files (id) ON DELETE CASCADE, job TEXT NOT NULL REFERENCES jobs (id),
        attributes TEXT NOT NULL, created_at INTEGER NOT NULL, UNIQUE (store, id)
    );
    CREATE INDEX store_files_by_id ON store_files (id);
    CREATE INDEX store_files_by_job ON store_files (job);
    CREATE TABLE batches (
        id TEXT PRIMARY KEY, store TEXT NOT NULL REFERENCES stores (id) ON DELETE CASCADE, created_at INTEGER NOT NULL
    );
    CREATE TABLE batch_files (
        batch TEXT NOT NULL REFERENCES batches (id) ON DELETE CASCADE, file TEXT NOT NULL, job TEXT NOT NULL,
        PRIMARY KEY (batch, file)
    );
    """,
)
"""As in library/register.py: append, and never change a script that was released."""
Row = sqlite3.Row
Query = tuple[str, Sequence[Any]]
"""An SQL query and the values of its parameters."""


def new_id(prefix: str) -> str:
    """An id that nobody can guess: `prefix` and 24 hexadecimal digits."""
    return prefix + secrets.token_hex(12)


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


class Paging(BaseModel):
    """Which part of a list a client wants, as in OpenAI's API: after or before an id, newest first by default."""

    after: str | None = Field(None, max_length=80)
    before: str | None = Field(None, max_length=80)
    limit: int = Field(20, ge=1, le=100)
    order: Literal["asc", "desc"] = "desc"


class State:
    """The file with a server's records; each thread opens it for itself."""

    def __init__(self, library: Library):
        self.folder = library.folder / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / "state.sqlite"
        with self._connected() as db:
            db.execute("PRAGMA journal_mode = WAL")  # kept in the file: readers do not wait for a writer
            if schema_version(db) > len(_MIGRATIONS):
                raise LoracastError(f"{self._path} was written by a newer loracast; update loracast")
        with self.writing() as db:
            migrate(db, _MIGRATIONS)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The records as they are at one moment."""
        with self._connected() as db:
            db.execute("BEGIN")
            yield db

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """The records under the write lock. On return the change is on the disk; an error undoes all of it."""
        with self._connected() as db, db:  # the second commits or rolls back
            db.execute("BEGIN IMMEDIATE")
            yield db

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self._path, timeout=_WAIT_S, isolation_level=None)
        try:
            db.row_factory = Row
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA foreign_keys = ON")
            yield db
        except sqlite3.OperationalError as error:
            raise LoracastError(f"the server's records cannot be used ({error}): is the disk full?") from error
        finally:
            db.close()


def one_row(db: sqlite3.Connection, query: str, *values: Any) -> Row | None:
    """The first row of a query."""
    return db.execute(query, values).fetchone()


def known_row(db: sqlite3.Connection, what: str, id: str, query: str, *values: Any) -> Row:
    """The first row of a query for something with an id. Raises ApiError (404) where there is none."""
    if (row := one_row(db, query, *values)) is None:
        raise ApiError(404, f"there is no {what} with the id {id[:80]!r}")
    return row


def count(db: sqlite3.Connection, query: str) -> int:
    """The number that a query selects."""
    return db.execute(query).fetchone()[0]


def page_of(
    db: sqlite3.Connection, query: Query, paging: Paging, what: str, whole: Query | None = None
) -> tuple[list[Row], bool]:
    """A page of the rows of a query that selects `number` and `id`, and whether more follow.

    Args:
        whole: the query without its filter: a cursor may have left the filtered rows meanwhile.

    Raises ApiError for a cursor that is not in the list.
    """
    where, bounds = [], []
    descending = paging.order == "desc"
    for cursor, is_after in ((paging.after, True), (paging.before, False)):
        if cursor is not None:
            rows_of, given = whole or query
            row = known_row(db, what, cursor, f"SELECT number FROM ({rows_of}) WHERE id = ?", *given, cursor)
            where.append(f"number {'<' if descending == is_after else '>'} ?")
            bounds.append(row["number"])
    # Before a cursor alone: the rows next to it, then turned round.
    is_reversed = paging.before is not None and paging.after is None
    order = "DESC" if descending != is_reversed else "ASC"
    condition = f"WHERE {' AND '.join(where)}" if where else ""
    chosen = f"SELECT * FROM ({query[0]}) {condition} ORDER BY number {order} LIMIT ?"
    rows = db.execute(chosen, (*query[1], *bounds, paging.limit + 1)).fetchall()
    page = rows[: paging.limit]
    return page[::-1] if is_reversed else page, len(rows) > paging.limit


def encode(value: object) -> str:
    """A value as JSON for a column."""
    return json.dumps(value, ensure_ascii=False)


INTERNAL = ""
"""Purpose of an upload that only a job needs: no list shows it, and it goes when the job has ended."""
_PIECE = 2**20
_GRACE_S = 3600.0
_LISTED = """
    SELECT number, id, filename, purpose, n_bytes, sha256, created_at, expires_at FROM files
    WHERE purpose != ? AND (expires_at IS NULL OR expires_at > ?)
"""


@dataclass(frozen=True)
class Upload:
    """One uploaded file, as a row of `_LISTED` after its number."""

    id: str
    filename: str
    """For people: without folders and characters that do not print. It never becomes a path."""
    purpose: str
    n_bytes: int
    sha256: str
    created_at: int
    expires_at: int | None


class Uploads:
    """The uploads of a server."""

    def __init__(self, state: State, max_stored_bytes: int):
        """
        Args:
            max_stored_bytes: of all uploads together.
        """
        self._state, self._max_stored_bytes = state, max_stored_bytes
        self._folder = state.folder / "files"
        self._folder.mkdir(exist_ok=True)

    def add(self, source: BinaryIO, filename: str | None, purpose: str, expires_s: int | None = None) -> Upload:
        """Keep the bytes of a stream. When this returns they are on the disk.

        Args:
            filename: as the client gave it.
            expires_s: seconds until the file is deleted.

        Raises:
            ApiError: the uploads would take more than `max_stored_bytes` (413).
        """
        digest, id = hashlib.sha256(), new_id("file-")

        def copy(temporary: Path) -> None:
            with open(temporary, "wb") as out:
                while piece := source.read(_PIECE):
                    with self._state.reading() as db:
                        self._check_room(db, out.tell() + len(piece))
                    digest.update(piece)
                    out.write(piece)

        write_with(self.path(id), copy)
        n_bytes, created_at = self.path(id).stat().st_size, now()
        expires_at = None if expires_s is None else created_at + expires_s
        name = bare_name(filename) or "file"
        upload = Upload(id, name, purpose, n_bytes, digest.hexdigest(), created_at, expires_at)
        try:
            with self._state.writing() as db:
                self._check_room(db, n_bytes)  # others may have come meanwhile
                columns = "id, filename, purpose, n_bytes, sha256, created_at, expires_at"
                db.execute(f"INSERT INTO files ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", tuple(vars(upload).values()))
        except BaseException:
            self.path(id).unlink(missing_ok=True)
            raise
        return upload

    def _check_room(self, db: sqlite3.Connection, n_bytes: int) -> None:
        """Raise ApiError (413) where there is no room for so many bytes more."""
        room = self._max_stored_bytes - count(db, "SELECT coalesce(sum(n_bytes), 0) FROM files")
        if n_bytes > room:
            most = f"{self._max_stored_bytes:,} bytes together, and {max(0, room):,} are left"
            raise ApiError(413, f"the uploads of this server may take {most}: delete some")

    def path(self, id: str) -> Path:
        """Where the bytes of an upload lie. Call it only with ids of this class."""
        return self._folder / id

    def find(self, id: str) -> Upload:
        """The upload with an id. Raises ApiError (404)."""
        with self._state.reading() as db:
            return self.find_in(db, id)

    @staticmethod
    def find_in(db: sqlite3.Connection, id: str) -> Upload:
        """As `find`, within a transaction."""
        return Upload(*known_row(db, "file", id, f"{_LISTED} AND id = ?", INTERNAL, now(), id)[1:])

    def page(self, paging: Paging, purpose: str | None = None) -> tuple[list[Upload], bool]:
        """A page of the uploads, and whether more follow."""
        query = f"{_LISTED} AND coalesce(purpose = ?, TRUE)"
        with self._state.reading() as db:
            rows, has_more = page_of(db, (query, (INTERNAL, now(), purpose)), paging, "file")
        return [Upload(*row[1:]) for row in rows], has_more

    def name_of(self, id: str) -> str | None:
        """The file name of an upload, also of an internal one; None where it is gone."""
        with self._state.reading() as db:
            row = one_row(db, "SELECT filename FROM files WHERE id = ?", id)
        return None if row is None else row["filename"]

    # ---- deleting

    def discard(self, id: str) -> None:
        """Delete an internal upload that became no job."""
        with self._state.writing() as db:
            db.execute("DELETE FROM files WHERE id = ?", (id,))
        self.unlink([id])

    @staticmethod
    def drop_expired(db: sqlite3.Connection) -> list[str]:
        """Delete the rows of uploads that have expired, and of internal ones whose job has ended; their ids."""
        needless = "purpose = ? AND (id IN (SELECT file FROM jobs WHERE ended_at IS NOT NULL) OR created_at <= ?)"
        rows = db.execute(
            f"DELETE FROM files WHERE (expires_at <= ? OR {needless}) AND id NOT IN "
            "(SELECT file FROM jobs WHERE ended_at IS NULL AND file IS NOT NULL AND NOT for_stores) RETURNING id",
            (now(), INTERNAL, now() - _GRACE_S),
        ).fetchall()
        return [row["id"] for row in rows]

    def unlink(self, ids: Iterable[str]) -> None:
        """Delete the bytes of uploads whose rows are gone."""
        for id in ids:
            self.path(id).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Delete the bytes that a killed server left without a row."""
        with self._state.reading() as db:
            known = {row["id"] for row in db.execute("SELECT id FROM files")}
        for entry in os.scandir(self._folder):
            # Another server may be about to write the row of a new one.
            if entry.name not in known and time.time() - entry.stat().st_mtime > _GRACE_S:
                Path(entry.path).unlink(missing_ok=True)
