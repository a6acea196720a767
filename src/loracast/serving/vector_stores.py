"""The vector stores of a server: named sets of uploads, each file of which is cast into an adapter by a job.

The adapters belong to the stores: those that are lost or renamed are noted, and those that no store needs are removed.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, StringConstraints

from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.errors import LoracastError, NoSuchAdapterError
from loracast.library.index import read_chunks
from loracast.library.library import Library
from loracast.library.manifest import name_from
from loracast.reading.questions import QuestionReader
from loracast.reading.search import phrases
from loracast.serving.errors import ApiError, log
from loracast.serving.jobs import Jobs, cancel_in, update_jobs
from loracast.serving.schema import Filter, KnownFields
from loracast.serving.state import Paging, Row, State, Uploads, encode, known_row, new_id, now, one_row, page_of

FileStatus = Literal["in_progress", "completed", "failed", "cancelled"]
Json = dict[str, Any]
Id = Annotated[str, StringConstraints(max_length=80)]
Key = Annotated[str, StringConstraints(max_length=64)]
Text = Annotated[str, StringConstraints(max_length=512)]
Attributes = Annotated[dict[Key, bool | int | float | Text], Field(max_length=16)]
_MADE = "SELECT DISTINCT adapter, version FROM jobs WHERE for_stores AND status = 'completed'"
_UNDONE = "for_stores AND status = 'cancelled' AND version IS NOT NULL"
_LOST = {
    "code": "server_error",
    "message": "the library no longer has the adapter of this file: it was deleted or renamed; attach the file again",
}
_DAY_S = 86_400
_TOUCH_S = 60
"""Seconds between two notes of a store's use: a question does not wait for the disk."""
_STATUS = "CASE WHEN jobs.status IN ('queued', 'running') THEN 'in_progress' ELSE jobs.status END"
"""The status of a job's file in a store."""
_FILES = f"""
    SELECT store_files.number, store_files.id, store, store_files.created_at, attributes, jobs.id AS job,
        {_STATUS} AS status, error, work, jobs.n_bytes, adapter, version, filename
    FROM store_files JOIN jobs ON jobs.id = job JOIN files ON files.id = store_files.id
"""


class _StaticSizes(KnownFields):
    max_chunk_size_tokens: int = Field(ge=100, le=4096)
    chunk_overlap_tokens: int = Field(ge=0, le=2048)


class Chunking(KnownFields):
    """How a file is cut. Chunks are cast without an overlap, and none is longer than the hypernetwork is good for."""

    type: Literal["auto", "static"]
    static: _StaticSizes | None = None


class NewFile(KnownFields):
    """A file to be attached."""

    file_id: Id
    attributes: Attributes | None = None
    chunking_strategy: Chunking | None = None

    @property
    def max_chunk_tokens(self) -> int:
        static = self.chunking_strategy and self.chunking_strategy.static
        return min(static.max_chunk_size_tokens, DEFAULT_CHUNK_TOKENS) if static else DEFAULT_CHUNK_TOKENS


@dataclass(frozen=True)
class StoreFile:
    """A file of a vector store that has been cast."""

    id: str
    filename: str
    attributes: Mapping[str, str | float | bool]
    adapter: str
    """Its adapter's name."""
    version: str


class VectorStores:
    """The vector stores of a server. What methods return as `Json` are the objects of OpenAI's API."""

    def __init__(
        self, state: State, uploads: Uploads, jobs: Jobs, library: Library, reader: Callable[[], QuestionReader | None]
    ):
        """
        Args:
            reader: says how likely a file answers a query.
        """
        self._state, self._uploads, self._jobs, self._library = state, uploads, jobs, library
        self._reader = reader
        self._looked: tuple[int, bytes] | None = None

    @contextmanager
    def _reading(self, store: str | None = None) -> Iterator[sqlite3.Connection]:
        """The records, once it is noted which files have lost their adapters. Raises ApiError (404) for a store."""
        self._look()
        with self._state.reading() as db:
            if store is not None:
                _store_row(db, store)
            yield db

    # ---- stores

    def create(self, name: str, files: Sequence[NewFile], metadata: Mapping[str, str], n_days: int | None) -> Json:
        """Make a store and attach files. Errors as in `attach`; there is no store then."""
        id = new_id("vs_")
        self._look()
        with self._state.writing() as db:
            columns = "id, name, metadata, created_at, last_active_at, expires_days"
            values = (id, name, encode(metadata), now(), now(), n_days)
            db.execute(f"INSERT INTO stores ({columns}) VALUES (?, ?, ?, ?, ?, ?)", values)
            self._attach(db, id, files)
        self._jobs.wake()
        return self.find(id)

    def find(self, id: str) -> Json:
        """The store with an id. Raises ApiError (404)."""
        with self._reading() as db:
            return _store(db, _store_row(db, id))

    def page(self, paging: Paging) -> tuple[list[Json], bool]:
        """A page of the stores, and whether more follow."""
        with self._reading() as db:
            rows, has_more = page_of(db, ("SELECT * FROM stores", ()), paging, "vector store")
            return [_store(db, row) for row in rows], has_more

    def update(self, id: str, changes: Mapping[str, Any]) -> Json:
        """Change columns of a store: `name`, `metadata` as JSON, or `expires_days`. Raises ApiError (404)."""
        with self._state.writing() as db:
            _store_row(db, id)
            for column, value in changes.items():
                db.execute(f"UPDATE stores SET {column} = ? WHERE id = ?", (value, id))
        return self.find(id)

    def delete(self, id: str) -> None:
        """Delete a store, and the adapters that no other store needs. Raises ApiError (404)."""
        with self._state.writing() as db:
            _store_row(db, id)
            db.execute("DELETE FROM stores WHERE id = ?", (id,))
            self.tidy(db)
        self.remove_undone()

    # ---- their files

    def attach(self, store: str, files: Sequence[NewFile]) -> Json:
        """Attach files, which are cast from now on; one that is in the store already stays, with the new attributes.

        Raises:
            ApiError: there is no such store or file (404), the store has expired (400), the queue is full (429).
        """
        self._look()  # a file that has lost its adapter is cast anew
        with self._state.writing() as db:
            batch = self._attach(db, store, files)
        self._jobs.wake()
        return self.batch(store, batch)

    def _attach(self, db: sqlite3.Connection, store: str, files: Sequence[NewFile]) -> str:
        _touch(db, store)
        batch = new_id("vsfb_")
        db.execute("INSERT INTO batches VALUES (?, ?, ?)", (batch, store, now()))
        for one in files:
            job = self._job_for(db, one)
            db.execute(
                "INSERT INTO store_files (store, id, job, attributes, created_at) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (store, id) DO UPDATE SET job = excluded.job, attributes = excluded.attributes",
                (store, one.file_id, job, encode(one.attributes or {}), now()),
            )
            db.execute("INSERT OR REPLACE INTO batch_files VALUES (?, ?, ?)", (batch, one.file_id, job))
        return batch

    def _job_for(self, db: sqlite3.Connection, wanted: NewFile) -> str:
        """The job that casts a file in this way: one that is there, or a new one."""
        upload = self._uploads.find_in(db, wanted.file_id)
        name = f"{name_from(PurePath(upload.filename).stem)[:40].strip('-')}-{upload.id[-12:]}"
        if wanted.max_chunk_tokens != DEFAULT_CHUNK_TOKENS:
            name += f"-{wanted.max_chunk_tokens}"
        same = "SELECT id FROM jobs WHERE file = ? AND adapter = ? AND for_stores AND NOT wants_cancel AND status IN "
        row = one_row(db, same + "('queued', 'running', 'completed')", upload.id, name)
        if row is not None:
            return row["id"]
        work = {"max_chunk_tokens": wanted.max_chunk_tokens, "replace": True, "tags": []}
        return self._jobs.insert(db, "document", name, work, upload.id, for_stores=True)

    def file(self, store: str, file: str) -> Json:
        """A file of a store. Raises ApiError (404)."""
        return _file(self._file_row(store, file))

    def chunks(self, store: str, file: str) -> list[str]:
        """The texts of the chunks that a file was cut into. Raises ApiError: 404, or 409 where it is not cast."""
        row = self._file_row(store, file)
        if row["status"] != "completed":
            status = row["status"].replace("_", " ")
            raise ApiError(409, f"the file is {status}: it has chunks once it is completed")
        adapter = self._library.open(f"{row['adapter']}@{row['version']}")
        return [chunk.text for chunk in read_chunks(adapter.index)]

    def _file_row(self, store: str, file: str) -> Row:
        with self._reading(store) as db:
            query = f"{_FILES} WHERE store = ? AND store_files.id = ?"
            return known_row(db, "file in this vector store", file, query, store, file)

    def files(
        self, store: str, paging: Paging, status: FileStatus | None = None, batch: str | None = None
    ) -> tuple[list[Json], bool]:
        """A page of a store's files, perhaps only those with a status or of a batch, and whether more follow."""
        whole = f"{_FILES} WHERE store = ?"
        query = (
            f"{whole} AND coalesce({_STATUS} = ?, TRUE) "
            "AND (? IS NULL OR store_files.id IN (SELECT file FROM batch_files WHERE batch = ?))"
        )
        with self._reading(store) as db:
            values = (store, status, batch, batch)
            what = "file in this vector store"
            rows, has_more = page_of(db, (query, values), paging, what, (whole, (store,)))
        return [_file(row) for row in rows], has_more

    def set_attributes(self, store: str, file: str, attributes: Attributes) -> Json:
        """Change what a file is filtered by. Raises ApiError (404)."""
        self.file(store, file)
        with self._state.writing() as db:
            values = (encode(attributes), store, file)
            db.execute("UPDATE store_files SET attributes = ? WHERE store = ? AND id = ?", values)
        return self.file(store, file)

    def detach(self, store: str, file: str) -> None:
        """Take a file out of a store; the upload stays, and its adapter if another store has it. Raises ApiError."""
        self.file(store, file)
        with self._state.writing() as db:
            db.execute("DELETE FROM store_files WHERE store = ? AND id = ?", (store, file))
            self.tidy(db)
        self.remove_undone()

    # ---- batches

    def batch(self, store: str, id: str) -> Json:
        """A batch of a store. Raises ApiError (404)."""
        with self._reading(store) as db:
            query = "SELECT * FROM batches WHERE id = ? AND store = ?"
            row = known_row(db, "file batch in this vector store", id, query, id, store)
            counts = _counts(db, "batch_files WHERE batch = ?", id)
        status = next((one for one in ("in_progress", "cancelled") if counts[one]), "completed")
        if status == "completed" and counts["failed"] == counts["total"]:
            status = "failed"
        return {
            "id": id,
            "object": "vector_store.files_batch",
            "created_at": row["created_at"],
            "vector_store_id": store,
            "status": status,
            "file_counts": counts,
        }

    def cancel_batch(self, store: str, id: str) -> Json:
        """Cancel those jobs of a batch that no other store waits for. Raises ApiError (404)."""
        self.batch(store, id)
        with self._state.writing() as db:
            ours = "id IN (SELECT job FROM batch_files WHERE batch = ?)"
            cancel_in(db, f"{ours} AND id NOT IN (SELECT job FROM store_files WHERE store != ?)", id, store)
        return self.batch(store, id)

    # ---- use

    def documents(self, stores: Sequence[str]) -> list[StoreFile]:
        """The files of some stores that have been cast; this counts as a use of the stores.

        Raises:
            ApiError: there is no such store (404), or it has expired (400).
        """
        cast = f"{_FILES} WHERE store = ? AND status = 'completed' AND (expires_at IS NULL OR expires_at > ?)"
        with self._reading() as db:
            used = [_usable(db, store) for store in dict.fromkeys(stores)]
            rows = [row for store in used for row in db.execute(cast, (store["id"], now()))]
        for store in used:
            if now() - store["last_active_at"] > _TOUCH_S:
                with self._state.writing() as db:
                    _touch(db, store["id"])
        return [
            StoreFile(row["id"], row["filename"], json.loads(row["attributes"]), row["adapter"], row["version"])
            for row in rows
        ]

    def search(
        self, store: str, queries: Sequence[str], limit: int, filters: Filter | None, threshold: float
    ) -> list[Json]:
        """The chunks of a store that match one of the queries best, best first; each chunk once.

        A score is the chunk's BM25 beside the best one's, times how likely its file answers, where a reader tells that.

        Args:
            threshold: least score.
        """
        files = self.documents([store])
        by_name = {file.adapter: file for file in files if filters is None or filters.fits(file.attributes)}
        best: dict[tuple[str, int], float] = {}
        reader = self._reader()
        with self._library.reading() as register:
            for query in queries if by_name else ():
                matches = register.best_chunks(phrases(query), limit, tuple(by_name))
                for match in matches:
                    index = self._library.open(match.reference).index
                    read = None if reader is None else reader.match(index, query)
                    about = 1.0 if read is None or read.about is None else read.about
                    score = about * match.score / matches[0].score
                    best[match.name, match.chunk] = max(score, best.get((match.name, match.chunk), 0.0))
        chosen = sorted((place for place in best if best[place] >= threshold), key=lambda place: -best[place])[:limit]
        found = []
        for name, chunk in chosen:
            file = by_name[name]
            text = read_chunks(self._library.open(f"{name}@{file.version}").index, [chunk])[0].text
            head = {"file_id": file.id, "filename": file.filename, "score": round(best[name, chunk], 4)}
            found.append({**head, "attributes": file.attributes, "content": [{"type": "text", "text": text}]})
        return found

    # ---- tidying

    def tidy(self, db: sqlite3.Connection) -> None:
        """Note which stores have expired, and undo the jobs whose files no store holds any more, within a transaction.

        After it `remove_undone` removes what they made.
        """
        is_over = f"last_active_at + {_DAY_S} * expires_days <= ?"
        db.execute(f"UPDATE stores SET is_expired = 1 WHERE NOT is_expired AND {is_over}", (now(),))
        needed = "SELECT job FROM store_files JOIN stores ON stores.id = store WHERE NOT is_expired"
        unneeded = f"for_stores AND id NOT IN ({needed})"
        cancel_in(db, unneeded)
        update_jobs(db, "status = 'cancelled'", f"status = 'completed' AND {unneeded}")

    # ---- the adapters that files were cast into

    def _look(self) -> None:
        """As `note_lost`, unless the library is as it was at the last look."""
        self._library.refresh()
        changes = self._library.change_counter()
        if changes is None or changes != self._looked:
            self.note_lost()
            self._looked = changes

    def note_lost(self) -> None:
        """Note which files have lost their adapters, so that no store answers as if it had them.

        `loracast rm`, `edit --rename` and `gc` know nothing of stores.
        """
        with self._state.reading() as db:
            if not self._lost(db):
                return
        with self._state.writing() as db:
            for lost in self._lost(db):  # again: `rename` may have been at work
                same = "adapter = ? AND version = ? AND status = 'completed' AND for_stores"
                update_jobs(db, "status = 'failed', error = ?, version = NULL", same, encode(_LOST), *lost)

    def _lost(self, db: sqlite3.Connection) -> set[tuple[str, str]]:
        return self._library.lacking({(row["adapter"], row["version"]) for row in db.execute(_MADE)})

    def rename(self, name: str, new: str) -> None:
        """Give an adapter another name, and follow it; errors as in `Library.rename`."""
        with self._state.writing() as db:  # meanwhile nobody notes it as lost
            self._library.rename(name, new)
            db.execute("UPDATE jobs SET adapter = ? WHERE adapter = ? AND status = 'completed'", (new, name))

    def remove_undone(self) -> None:
        """Remove the adapters of jobs that were undone; what is left after a kill or an error, the next call removes.

        Each goes in a transaction of its own, so that no job that makes it anew begins meanwhile. Between them others
        have as long to write.
        """
        with self._state.reading() as db:
            undone = [row["id"] for row in db.execute(f"SELECT id FROM jobs WHERE {_UNDONE}")]
        for id in undone:
            began = time.monotonic()
            try:
                with self._state.writing() as db:
                    self._remove(db, id)
            except (LoracastError, OSError) as error:  # what it belonged to is gone, whether or not it goes now
                log.warning("adapters that no vector store needs are left: %s", error)
                return
            time.sleep(time.monotonic() - began)

    def _remove(self, db: sqlite3.Connection, id: str) -> None:
        """Remove the adapter of a job that was undone, unless another thread has, or another job makes it too."""
        row = one_row(db, f"SELECT adapter, version FROM jobs WHERE id = ? AND {_UNDONE}", id)
        if row is None:
            return
        other = "SELECT 1 FROM jobs WHERE adapter = ? AND status IN ('running', 'completed')"
        if one_row(db, other, row["adapter"]) is None:
            with suppress(NoSuchAdapterError):  # somebody deleted it, or gave it another name
                self._library.remove(f"{row['adapter']}@{row['version']}")
        db.execute("UPDATE jobs SET version = NULL WHERE id = ?", (id,))


def _store_row(db: sqlite3.Connection, id: str) -> Row:
    return known_row(db, "vector store", id, "SELECT * FROM stores WHERE id = ?", id)


def _usable(db: sqlite3.Connection, id: str) -> Row:
    """The row of a store. Raises ApiError where there is none (404) or it has expired (400)."""
    row = _store_row(db, id)
    if _is_expired(row):
        raise ApiError(400, f"the vector store {id!r} has expired: make a new one with its files", code="expired")
    return row


def _touch(db: sqlite3.Connection, id: str) -> None:
    """Note that a store is used now. Raises ApiError as `_usable` does."""
    _usable(db, id)
    db.execute("UPDATE stores SET last_active_at = ? WHERE id = ?", (now(), id))


def _is_expired(row: Row) -> bool:
    days = row["expires_days"]
    return bool(row["is_expired"]) or (days is not None and row["last_active_at"] + _DAY_S * days <= now())


def _counts(db: sqlite3.Connection, files: str, id: str) -> dict[str, int]:
    """How many files of a table there are of each status, and in all."""
    query = f"SELECT {_STATUS} AS shown, count(*) AS n FROM jobs JOIN (SELECT job FROM {files}) AS f ON f.job = jobs.id"
    counts = dict.fromkeys(get_args(FileStatus), 0)
    counts |= {row["shown"]: row["n"] for row in db.execute(f"{query} GROUP BY shown", (id,))}
    return {**counts, "total": sum(counts.values())}


def _store(db: sqlite3.Connection, row: Row) -> Json:
    """What the API says of a store."""
    id, days = row["id"], row["expires_days"]
    size = one_row(db, "SELECT coalesce(sum(n_bytes), 0) AS n FROM jobs WHERE status = 'completed' AND id IN "
                   "(SELECT job FROM store_files WHERE store = ?)", id)  # fmt: skip
    counts = _counts(db, "store_files WHERE store = ?", id)
    return {
        "id": id,
        "object": "vector_store",
        "created_at": row["created_at"],
        "name": row["name"],
        "usage_bytes": size["n"] if size else 0,
        "file_counts": counts,
        "status": "expired" if _is_expired(row) else "in_progress" if counts["in_progress"] else "completed",
        "expires_after": None if days is None else {"anchor": "last_active_at", "days": days},
        "expires_at": None if days is None else row["last_active_at"] + _DAY_S * days,
        "last_active_at": row["last_active_at"],
        "metadata": json.loads(row["metadata"]),
    }


def _file(row: Row) -> Json:
    """What the API says of a file; its chunking strategy is the one that is used, whatever was wished for."""
    sizes = {"max_chunk_size_tokens": json.loads(row["work"])["max_chunk_tokens"], "chunk_overlap_tokens": 0}
    return {
        "id": row["id"],
        "object": "vector_store.file",
        "created_at": row["created_at"],
        "usage_bytes": row["n_bytes"],
        "vector_store_id": row["store"],
        "status": row["status"],
        "last_error": None if row["error"] is None else json.loads(row["error"]),
        "attributes": json.loads(row["attributes"]),
        "chunking_strategy": {"type": "static", "static": sizes},
    }
