"""The adapters of vector stores' files: those that are lost or renamed are noted, those that no store needs removed."""

from __future__ import annotations

import sqlite3
import time
from contextlib import suppress
from pathlib import Path

from loracast.errors import LoracastError, NoSuchAdapterError
from loracast.library.library import lacking, remove_adapter, rename_adapter
from loracast.library.register import change_counter
from loracast.library.shared import refresh
from loracast.serving.errors import log
from loracast.serving.state import State, encode, one_row

_MADE = "SELECT DISTINCT adapter, version FROM jobs WHERE for_stores AND status = 'completed'"
_UNDONE = "for_stores AND status = 'cancelled' AND version IS NOT NULL"
_LOST = {
    "code": "server_error",
    "message": "the library no longer has the adapter of this file: it was deleted or renamed; attach the file again",
}


class StoreAdapters:
    """The adapters that the files of a server's vector stores were cast into."""

    def __init__(self, state: State, library: Path):
        self._state, self._library = state, library
        self._looked: tuple[int, bytes] | None = None

    def look(self) -> None:
        """As `note_lost`, unless the library is as it was at the last look."""
        refresh(self._library)
        changes = change_counter(self._library)
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
            for adapter, version in self._lost(db):  # again: `rename` may have been at work
                db.execute(
                    "UPDATE jobs SET status = 'failed', error = ?, version = NULL, revision = revision + 1 "
                    "WHERE adapter = ? AND version = ? AND status = 'completed' AND for_stores",
                    (encode(_LOST), adapter, version),
                )

    def _lost(self, db: sqlite3.Connection) -> set[tuple[str, str]]:
        return lacking(self._library, {(row["adapter"], row["version"]) for row in db.execute(_MADE)})

    def rename(self, name: str, new: str) -> None:
        """Give an adapter another name, and follow it; errors as in `rename_adapter`."""
        with self._state.writing() as db:  # meanwhile nobody notes it as lost
            rename_adapter(self._library, name, new)
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
                remove_adapter(self._library, f"{row['adapter']}@{row['version']}")
        db.execute("UPDATE jobs SET version = NULL WHERE id = ?", (id,))
