"""The LoRAs on the disk of a vLLM server: found by name, exported when they are first asked for, under a byte budget.

Names and files come from a library on this machine, or straight from a store that libraries share. The LoRAs that
were used least recently go first. One that a running request uses stays: vLLM reads its files whenever the LoRA has
left memory, and ends when they are missing.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Lock

from loracast.errors import AdapterError, ConfigError, LoracastError, NoSuchAdapterError
from loracast.export.adapter import export_adapter
from loracast.export.formats import MOST_LOST, VLLM_RANKS, too_much_lost
from loracast.files import move_unless_there, tidy, try_lock, work_folder
from loracast.library.adapter import Adapter
from loracast.library.library import Library
from loracast.library.manifest import VERSION_DIGITS
from loracast.library.storage import REFRESH_S, fetch_whole, size_of
from loracast.library.store import SharedStore

PREFIX = "loracast:"
"""What a request may write before an adapter's name."""
_ASKED = re.compile(r"([a-z0-9][a-z0-9._-]{0,63})(?:@([0-9a-f]{4,64}))?")
_KEPT = re.compile(rf"[a-z0-9][a-z0-9._-]{{0,63}}@[0-9a-f]{{{VERSION_DIGITS}}}")
_RETRY_S = 30.0  # after a store could not be reached
_ID_DIGITS = 15
_GRACE_S = 10.0
"""Files stay so long after a request: the server may begin a step with it while its client is leaving."""


class FromLibrary:
    """Finds adapters in a library on this machine, shared or not."""

    def __init__(self, library: Library):
        self._library = library

    def versions(self, name: str) -> list[str]:
        """The versions of a name, newest first; none where there is no such name."""
        try:
            return [entry.version for entry in self._library.versions(name)]
        except NoSuchAdapterError:
            return []

    def open(self, name: str, version: str, folder: Path) -> Adapter:
        """An adapter with its files on this machine; `folder` is a new one for those that are fetched."""
        return self._library.open(f"{name}@{version}")


class FromStore:
    """Finds adapters in a store that libraries share, without a library: a name costs two requests every few seconds.

    Where the store cannot be reached, a name keeps the versions known last.
    """

    def __init__(self, url: str):
        self._store = SharedStore(url)
        self._known: dict[str, tuple[float, list[str]]] = {}  # when to look again, and the versions

    def versions(self, name: str) -> list[str]:
        due, known = self._known.get(name, (0.0, None))
        if known is not None and time.monotonic() < due:
            return known
        wait_s = REFRESH_S
        try:
            number = self._store.newest([name]).get(name)
            named = () if number is None else self._store.read(name, number).versions
            found = list(dict.fromkeys(version for version, _ in reversed(named)))  # one may have come back
        except LoracastError:
            if known is None:
                raise
            found, wait_s = known, _RETRY_S
        self._known.pop(name, None)
        if found:
            self._known[name] = time.monotonic() + wait_s, found
        return found

    def open(self, name: str, version: str, folder: Path) -> Adapter:
        fetched = fetch_whole(self._store, version, folder)
        fetched.name = name
        return fetched


Source = FromLibrary | FromStore


def export_for_vllm(adapter: Adapter, folder: Path, max_rank: int | None = None) -> None:
    """Export all of an adapter for vLLM into a folder, so that nobody sees half of it.

    Args:
        max_rank: of the server; None for the largest that vLLM takes.

    Raises:
        AdapterError: too much would be lost at that rank.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(folder.parent, "new") as work:
        (made,) = export_adapter(adapter, "vllm", work / folder.name, max_rank=max_rank)
        if made.error > MOST_LOST:
            remedy = "ask through `loracast serve --engine`, which gives a question its chunks"
            raise too_much_lost(adapter.lora(dense=False).rank, max_rank or max(VLLM_RANKS), made.error, remedy)
        move_unless_there(made.path, folder)


class Kept:
    """A LoRA on the disk."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        """The name is `manual@3f9a...`, which never means other weights, as vLLM's prefix cache demands."""
        self.number = 0
        self.n_bytes = size_of(folder)
        self.n_users = 0
        self.free_at = 0.0
        self.lock = Lock()
        """Held while it is exported, so that requests for the same LoRA export it once."""


class Replica:
    """Exported LoRAs in a folder of one server's own. Thread-safe."""

    def __init__(
        self,
        source: Source,
        folder: Path,
        *,
        max_bytes: int,
        max_rank: int,
        on_drop: Callable[[str], object] = lambda name: None,
    ):
        """
        Args:
            folder: what an earlier server of the same rank left there is used again.
            max_bytes: of files; those that requests use now, or used in the last seconds, may exceed it.
            max_rank: of the server. A LoRA of a higher rank is compressed to it where that loses little.
            on_drop: called with a LoRA's name before its files go.

        Raises:
            ConfigError: another server uses the folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._locked = try_lock(folder)
        if self._locked is None and os.name == "posix":
            raise ConfigError(f"another server uses {folder}: give each one a LORACAST_HOME of its own")
        for other in folder.glob("rank-*"):
            if other.name != f"rank-{max_rank}":
                shutil.rmtree(other)
        self._source, self._folder = source, folder / f"rank-{max_rank}"
        self._max_bytes, self._max_rank, self._on_drop = max_bytes, max_rank, on_drop
        self._folder.mkdir(exist_ok=True)
        tidy(self._folder)
        there = [path for path in self._folder.iterdir() if _KEPT.fullmatch(path.name)]
        there.sort(key=lambda path: path.stat().st_mtime)
        self._kept = OrderedDict((path.name, Kept(path.name, path)) for path in there)
        self._lock = Lock()

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        with self._lock:
            return sum(one.n_bytes for one in self._kept.values())

    def close(self) -> None:
        """Let another server use the folder."""
        if self._locked is not None:
            os.close(self._locked)
            self._locked = None

    def take(self, asked: str) -> Kept | None:
        """The LoRA of a name, exported in this thread if need be; `give_back` lets go of it.

        Args:
            asked: `manual` (its newest version) or `manual@3f9a`, with or without `loracast:` before it.

        Returns:
            None where no adapter has the name.

        Raises:
            AdapterError: the adapter is damaged, keeps no factors, or its rank is too high for the server.
            LoracastError: the store cannot be reached.
        """
        match = _ASKED.fullmatch(asked.removeprefix(PREFIX))
        if match is None:
            return None
        name, digits = match[1], match[2] or ""
        found = [version for version in self._source.versions(name) if version.startswith(digits)]
        if not found:
            return None
        if digits and len(found) > 1:
            raise AdapterError(f"{digits!r} begins several versions of {name!r}: give more digits")
        version = found[0]
        key = f"{name}@{version[:VERSION_DIGITS]}"
        with self._lock:
            one = self._kept.setdefault(key, Kept(key, self._folder / key))
            self._kept.move_to_end(key)
            one.n_users += 1
        with ExitStack() as failing:
            failing.callback(self.give_back, one)
            with one.lock:
                if not one.folder.is_dir():
                    self._export(one, name, version)
                one.number = lora_number(version)
                os.utime(one.folder)
            failing.pop_all()
        self._drop_over_budget()
        return one

    def give_back(self, one: Kept) -> None:
        """Let go of a LoRA."""
        with self._lock:
            one.n_users -= 1
            one.free_at = time.monotonic() + _GRACE_S
            if not one.n_users and not one.n_bytes:  # it could not be exported
                self._kept.pop(one.name, None)

    def _export(self, one: Kept, name: str, version: str) -> None:
        with work_folder(self._folder, "new") as work:
            export_for_vllm(self._source.open(name, version, work / "fetched"), one.folder, self._max_rank)
        with self._lock:
            one.n_bytes = size_of(one.folder)

    def _drop_over_budget(self) -> None:
        with ExitStack() as graves, self._lock:  # files are deleted once the lock is free again
            over, now = sum(one.n_bytes for one in self._kept.values()) - self._max_bytes, time.monotonic()
            for one in [*self._kept.values()]:
                if over > 0 and not one.n_users and one.free_at <= now:
                    del self._kept[one.name]
                    self._on_drop(one.name)
                    os.replace(one.folder, graves.enter_context(work_folder(self._folder, "rm")) / one.name)
                    over -= one.n_bytes


def lora_number(version: str) -> int:
    """The number by which vLLM tells LoRAs apart, from a version's hash: it is the same in every process, for ever."""
    return int(version[:_ID_DIGITS], 16) + 1
