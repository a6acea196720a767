"""The adapters of vector stores' files: one that somebody took away is noted, one that is renamed is followed."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from loracast.library.library import lacking, rename_adapter
from loracast.library.register import change_counter
from loracast.library.shared import refresh
from loracast.serving.state import State, encode

_MADE = "SELECT DISTINCT adapter, version FROM jobs WHERE for_stores AND status = 'completed'"
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
