"""Files that clients uploaded, under ids of the server's making; each is flushed to the disk before it is answered."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from loracast.documents.clean import bare_name
from loracast.files import write_with
from loracast.serving.errors import ApiError
from loracast.serving.state import Paging, State, count, known_row, new_id, now, one_row, page_of

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
            rows, has_more = page_of(db, query, (INTERNAL, now(), purpose), paging, "file")
        return [Upload(*row[1:]) for row in rows], has_more

    def name_of(self, id: str) -> str | None:
        """The file name of an upload, also of an internal one; None where it is gone."""
        with self._state.reading() as db:
            row = one_row(db, "SELECT filename FROM files WHERE id = ?", id)
        return None if row is None else row["filename"]

    # ---- deleting

    def delete_in(self, db: sqlite3.Connection, id: str) -> None:
        """Delete an upload's row, and it from all vector stores; `unlink` it after. Raises ApiError (404)."""
        self.find_in(db, id)
        db.execute("DELETE FROM files WHERE id = ?", (id,))

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
