"""What is remembered of a learned folder's files, so that a second run over an unchanged folder opens none of them."""

from __future__ import annotations

import hashlib
import json
import time
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
        self.device: int | None = None
        """The file system on which the folder's files were seen last."""
        self._written_s = time.monotonic()
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            if stored["about"] == self._about:
                self.entries, self.device = stored["entries"], stored.get("device")
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none yet, or damaged: everything is learned anew

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
        content = {"about": self._about, "device": self.device, "entries": self.entries}
        write_atomically(self._path, json.dumps(content, ensure_ascii=False).encode())
        self._written_s = time.monotonic()
