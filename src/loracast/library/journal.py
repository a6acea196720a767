"""What is remembered of a learned folder's files, so that a second run opens only what is new and knows what it made.

A folder has a journal for each way in which it is cast, and all of them together say which names are the folder's own:
cast in another way, it goes on under the same names.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from loracast.files import write_atomically

_WRITE_EVERY_S = 5.0


class Journal:
    """What is known of the files of one folder, cast in one way into one library."""

    def __init__(self, journals: Path, folder: Path, library: Path, made_by: str):
        self._about = {"folder": str(folder.resolve()), "library": str(library.resolve()), "made_by": made_by}
        key = hashlib.sha256(json.dumps(self._about, sort_keys=True).encode()).hexdigest()[:24]
        self._path = journals / f"{key}.json"
        self.entries: dict[str, dict[str, Any]] = {}
        """By path: the file's name, its size and time, hash and fault, and its `sources` under that name."""
        self.sources: dict[str, dict[str, set[str]]] = {}
        """By path and name, the hashes of what a file has held under that name, whichever way it was cast."""
        self.before: dict[str, list[str]] = {}
        """By name, the versions that it had when the folder took it: those are not the folder's."""
        self.elsewhere: set[str] = set()
        """The names that files of other folders have."""
        self._siblings: list[Path] = []
        self._taken: set[str] = set()
        self._forgotten: set[str] = set()
        self.device: int | None = None
        """The file system on which the folder's files were seen last."""
        self._written_s = time.monotonic()
        for path in sorted(journals.glob("*.json"), key=lambda path: path != self._path):  # its own comes first
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged: all is learned anew
                self._take_in(path, json.loads(path.read_text(encoding="utf-8")))

    def _take_in(self, path: Path, stored: Mapping[str, Any]) -> None:
        about, entries = stored["about"], stored["entries"]
        names = {entry["name"] for entry in entries.values()}
        if {**about, "made_by": self._about["made_by"]} != self._about:
            if about["library"] == self._about["library"] and Path(about["folder"]).is_dir():
                self.elsewhere |= names
            return
        if path == self._path:
            self.entries = entries
        else:
            self._siblings.append(path)
        if self.device is None:
            self.device = stored.get("device")
        self.before = {**stored.get("before", {name: [] for name in names}), **self.before}
        for relative, entry in entries.items():
            sources = self.sources.setdefault(relative, {}).setdefault(entry["name"], set())
            sources.update(entry.get("sources", [entry["sha256"]]))  # up to 0.2.0 only the last one was noted

    def take(self, before: Mapping[str, list[str]]) -> None:
        """Note names, each with the versions that are not the folder's, before anything is learned under them.

        Whatever a kill then interrupts, the next run knows what the folder made.
        """
        is_known = all(self.before.get(name) == versions for name, versions in before.items())
        self._taken = set(before)
        self.before.update(before)
        if not is_known:
            self.write()

    def forget(self, path: str) -> None:
        """Forget a file that is gone, in whichever way it was cast."""
        self.entries.pop(path, None)
        self._forgotten.add(path)

    def rename(self, path: str, new: str) -> None:
        """Let a file that is to be learned anew have the names of one that is gone."""
        self.entries[new] = {**self.entries[path], "stamp": [], "sha256": ""}
        self.sources[new] = self.sources.pop(path)
        self.forget(path)

    def put_back(self, path: str, entry: dict[str, Any] | None) -> None:
        """Let a file's entry be what it was, None for none."""
        self.entries.pop(path, None)
        if entry:
            self.entries[path] = entry

    def write_now_and_then(self) -> None:
        """Write the journal if the last time is some seconds ago: a kill then costs seconds of work."""
        if time.monotonic() - self._written_s > _WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        used = self._taken | {entry["name"] for entry in self.entries.values()}
        before = {name: versions for name, versions in self.before.items() if name in used}
        _store(self._path, {"about": self._about, "device": self.device, "before": before, "entries": self.entries})
        for path in self._siblings if self._forgotten else ():
            with suppress(FileNotFoundError):  # any journal may be deleted at any time
                _drop(path, self._forgotten)
        self._forgotten.clear()
        self._written_s = time.monotonic()


def _drop(journal: Path, paths: set[str]) -> None:
    """Take files out of a journal of the same folder, which another process may have written to meanwhile."""
    stored = json.loads(journal.read_text(encoding="utf-8"))
    entries = {path: entry for path, entry in stored["entries"].items() if path not in paths}
    if len(entries) < len(stored["entries"]):
        _store(journal, {**stored, "entries": entries})


def _store(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content).encode())  # in ASCII: names of files may be no text
