"""Jobs that make adapters: a queue on the disk and one thread that works on it, so that a kill loses no job.

A job is in the records (state.py) before a client hears of it. A server that starts again takes up what was running
when it was killed; where several servers share a library, one of them works and the others wait for its lock.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loracast.errors import DocumentError, HypernetworkError, LoracastError, NameTakenError
from loracast.files import try_lock
from loracast.library.adapter import Adapter
from loracast.library.save import Progress
from loracast.serving.errors import ApiError, log_failure
from loracast.serving.state import Paging, Row, State, count, encode, known_row, new_id, now, one_row, page_of

JobKind = Literal["document", "task", "combination"]
JobStatus = Literal["queued", "running", "completed", "failed", "cancelled"]
Maker = Callable[["Job", Progress], Adapter]
"""Makes the adapter of a job, and says how far it is."""
_MAX_STARTS = 10
"""A job that was running each time when the server died is given up then: it may be what kills it."""
_RETRY_AFTER_S = 5
_WAIT_S = 1.0
"""Seconds until the worker looks for jobs that another server took in."""
_TIDY_S = 60.0
_KEPT_S = 7 * 86_400
"""Seconds that jobs stay in the records after their end."""


@dataclass(frozen=True)
class Job:
    """One adapter to be made."""

    id: str
    kind: JobKind
    adapter: str
    """The name that the adapter gets."""
    file: str | None
    """Id of the upload that it is made from."""
    work: Mapping[str, Any]
    """What the maker needs to know besides."""
    status: JobStatus
    done: int
    """Chunks."""
    total: int
    error: Mapping[str, str] | None
    """`code`, which is one of OpenAI's for a file of a vector store, and `message`."""
    version: str | None
    """Hash of the adapter that was made."""
    revision: int
    """Grows with every change: the id of the job's newest event."""
    created_at: int
    ended_at: int | None

    @property
    def has_ended(self) -> bool:
        return self.ended_at is not None

    def to_dict(self) -> dict[str, Any]:
        """What the API says of it."""
        shown = ("id", "kind", "status", "done", "total", "adapter", "version", "error", "created_at", "ended_at")
        return {"object": "job", **{key: getattr(self, key) for key in shown}}


class Jobs:
    """The queue of a server, and the thread that works on it."""

    def __init__(self, state: State, make: Maker, tidy: Callable[[], None], max_active: int):
        """
        Args:
            make: does a job.
            tidy: called when the worker begins, when it has done its jobs, and every minute.
            max_active: most jobs that wait or run.
        """
        self._state, self._maker, self._tidy, self._max_active = state, make, tidy, max_active
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    # ---- from any thread

    def add(self, kind: JobKind, adapter: str, work: Mapping[str, Any], *, file: str | None = None) -> Job:
        """Take a job in. When this returns, the job is on the disk.

        Args:
            work: with `replace` true, the job takes its turn after another one of the same name, and replaces what that
                makes.

        Raises:
            ApiError: the queue is full (429). NameTakenError: another job is making an adapter of that name.
        """
        with self._state.writing() as db:
            same = "SELECT 1 FROM jobs WHERE adapter = ? AND ended_at IS NULL"
            if not work.get("replace") and one_row(db, same, adapter) is not None:
                raise NameTakenError(f"an adapter called {adapter!r} is being made already; choose another name")
            id = self.insert(db, kind, adapter, work, file)
        self.wake()
        return self.find(id)

    def insert(
        self, db: sqlite3.Connection, kind: JobKind, adapter: str, work: Mapping[str, Any], file: str | None,
        for_stores: bool = False,
    ) -> str:  # fmt: skip
        """Take a job in within a transaction; `wake` the worker after it. Raises ApiError for a full queue (429).

        Args:
            for_stores: its adapter belongs to vector stores, and goes with the last one that holds its file.
        """
        if (n := _n_active(db)) >= self._max_active:
            after = {"Retry-After": str(_RETRY_AFTER_S)}
            raise ApiError(429, f"{n:,} documents are waiting to be learned; try again later", **after)
        values = (id := new_id("job-"), kind, adapter, file, encode(work), for_stores, now())
        columns = "id, kind, adapter, file, work, for_stores, created_at"
        db.execute(f"INSERT INTO jobs ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        return id

    def n_active(self) -> int:
        """How many jobs wait or run."""
        with self._state.reading() as db:
            return _n_active(db)

    def wake(self) -> None:
        """Have the worker look for new jobs now."""
        self._wake.set()

    def find(self, id: str) -> Job:
        """The job with an id. Raises ApiError (404)."""
        with self._state.reading() as db:
            return _job(known_row(db, "job", id, "SELECT * FROM jobs WHERE id = ?", id))

    def page(self, paging: Paging) -> tuple[list[Job], bool]:
        """A page of the jobs, and whether more follow."""
        with self._state.reading() as db:
            rows, has_more = page_of(db, ("SELECT * FROM jobs", ()), paging, "job")
        return [_job(row) for row in rows], has_more

    def cancel(self, id: str) -> Job:
        """Cancel a job: at once if it waits, before its next batch of chunks if it runs. One that has ended stays so.

        Raises ApiError (404).
        """
        with self._state.writing() as db:
            cancel_in(db, "id = ?", id)
        return self.find(id)

    # ---- the worker

    def start(self) -> None:
        """Start the worker, which goes on with what a killed server left."""
        self._thread = threading.Thread(target=self._work, name="loracast-jobs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the worker before its next batch of chunks; its job goes on when a server starts again."""
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        lock: int | None = None
        is_ours, has_lost, tidied = False, True, -math.inf
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                if not is_ours:
                    lock = try_lock(self._state.folder)
                    is_ours = lock is not None or os.name != "posix"  # without locks it has to be the only server
                if is_ours and has_lost:
                    self._requeue()
                    has_lost = False
                while is_ours and not self._stopping.is_set() and (job := self._claim()) is not None:
                    self._make(job)
                    tidied = -math.inf
                if is_ours and time.monotonic() - tidied > _TIDY_S:
                    self._tidy()
                    tidied = time.monotonic()
            except Exception as error:  # a full disk, say: the job is still there
                log_failure(error)
                has_lost = True
            self._wake.wait(_WAIT_S)
        if lock is not None:
            os.close(lock)

    def _requeue(self) -> None:
        """Put back what was running when a server was killed, or could not note a job's end."""
        with self._state.writing() as db:
            update_jobs(db, "status = 'queued'", "status = 'running'")

    def _claim(self) -> Job | None:
        first = "number = (SELECT number FROM jobs WHERE status = 'queued' ORDER BY number LIMIT 1)"
        with self._state.writing() as db:
            rows = update_jobs(db, "status = 'running', n_starts = n_starts + 1, done = 0, total = 0", first)
        if not rows:
            return None
        if rows[0]["n_starts"] <= _MAX_STARTS:
            return _job(rows[0])
        message = f"the server died {_MAX_STARTS} times while it was learning this: it is given up"
        self._fail(rows[0]["id"], "server_error", message)
        return self._claim()

    def _make(self, job: Job) -> None:
        """Do a job. Whatever goes wrong in it is its error and nobody else's."""
        try:
            made = self._maker(job, lambda done, total: self._progress(job.id, done, total))
        except _Cancelled:
            self._end(job.id, "cancelled")
        except _Stopped:
            with self._state.writing() as db:
                update_jobs(db, "status = 'queued', n_starts = n_starts - 1", "id = ?", job.id)
        except LoracastError as error:
            codes = {DocumentError: "invalid_file", HypernetworkError: "unsupported_file"}  # OpenAI's
            code = next((code for kind, code in codes.items() if isinstance(error, kind)), "server_error")
            self._fail(job.id, code, str(error))
        except Exception as error:
            log_failure(error)
            message = f"the server failed to learn this ({type(error).__name__}); its log says where"
            self._fail(job.id, "server_error", message)
        else:
            n_chunks, version = made.manifest.n_chunks, made.manifest.version
            self._end(job.id, "completed", n_bytes=made.n_bytes, version=version, done=n_chunks, total=n_chunks)

    def _progress(self, id: str, done: int, total: int) -> None:
        with self._state.writing() as db:
            rows = update_jobs(db, "done = ?, total = ?", "id = ?", done, total, id)
        if not rows or rows[0]["wants_cancel"]:
            raise _Cancelled
        if self._stopping.is_set():
            raise _Stopped

    def _fail(self, id: str, code: str, message: str) -> None:
        self._end(id, "failed", error=encode({"code": code, "message": message}))

    def _end(self, id: str, status: JobStatus, **others: Any) -> None:
        """Note that a job has ended, with other columns of its row."""
        with self._state.writing() as db:
            values = {"status": status, "error": None, "ended_at": now(), **others}
            update_jobs(db, ", ".join(f"{column} = ?" for column in values), "id = ?", *values.values(), id)

    @staticmethod
    def drop_old(db: sqlite3.Connection) -> None:
        """Forget jobs that ended long ago and that no vector store needs."""
        db.execute(
            "DELETE FROM jobs WHERE ended_at < ? AND NOT (for_stores AND version IS NOT NULL) "
            "AND id NOT IN (SELECT job FROM store_files) AND id NOT IN (SELECT job FROM batch_files)",
            (now() - _KEPT_S,),
        )


class _Cancelled(Exception):
    """The job that runs was cancelled."""


class _Stopped(Exception):
    """The server stops."""


def update_jobs(db: sqlite3.Connection, changes: str, where: str, *values: Any) -> list[Row]:
    """Change the jobs that a condition selects, within a transaction; their rows afterwards."""
    query = f"UPDATE jobs SET {changes}, revision = revision + 1 WHERE {where} RETURNING *"
    return db.execute(query, values).fetchall()


def cancel_in(db: sqlite3.Connection, where: str, *values: Any) -> None:
    """Cancel the jobs that a condition selects, within a transaction; as `Jobs.cancel`."""
    update_jobs(db, "status = 'cancelled', ended_at = ?", f"status = 'queued' AND {where}", now(), *values)
    db.execute(f"UPDATE jobs SET wants_cancel = 1 WHERE status = 'running' AND {where}", values)


def _n_active(db: sqlite3.Connection) -> int:
    return count(db, "SELECT count(*) FROM jobs WHERE ended_at IS NULL")


def _job(row: Row) -> Job:
    values = {key: row[key] for key in Job.__dataclass_fields__}
    return Job(**values | {key: json.loads(row[key] or "null") for key in ("work", "error")})
