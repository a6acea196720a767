"""Learns a folder of files: unchanged files are left alone, and a broken one is reported and holds up no other.

A journal beside the caches remembers each file's size, time, hash and fault, so that a second run over an unchanged
folder opens no file, and which versions of which names the folder made: others are neither replaced nor deleted. The
journal may be deleted at any time. The folder is then learned anew: what was made from the same content goes on under
its name, but stays when its file goes.

A folder has a journal for each way in which it is cast, and all of them together say which names are the folder's own:
cast in another way, it goes on under the same names.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from types import MappingProxyType
from typing import Any, Literal, get_args

from loracast.documents.file_types import EXTENSIONS
from loracast.errors import AdapterError, DocumentError, LoracastError, NameTakenError
from loracast.files import file_sha256, write_atomically
from loracast.library.library import Library
from loracast.library.manifest import LONGEST_NAME, marked_name, name_from

_WRITE_EVERY_S = 5.0


Outcome = Literal["learned", "unchanged", "failed", "removed"]
_TEXT = {".txt", ".text", ".rst", ".log", ""}  # read as plain text, beside EXTENSIONS
_NOT_MOUNTED = (
    "no file is left, and its file system is not the one of before: mount the drive, or delete the adapters with "
    "`loracast rm`"
)

Learn = Callable[[Path, str], object]
"""Learns a file under a name, as its newest version. Raises DocumentError for a fault of the file itself."""


@dataclass(frozen=True)
class FileReport:
    """The outcome of one file."""

    path: str
    """Relative to the folder, with slashes."""
    name: str
    """Name of its adapter; "" of a folder."""
    outcome: Outcome
    seconds: float = 0.0
    error: str | None = None


@dataclass
class BulkReport:
    """The outcomes of a folder's files, and of the folders below it that cannot be listed."""

    files: list[FileReport] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    """Files of other kinds, which are not read: their paths in the folder."""
    is_complete: bool = True

    def count(self, outcome: Outcome) -> int:
        return sum(file.outcome == outcome for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        return {
            **{outcome: self.count(outcome) for outcome in get_args(Outcome)},
            "ignored": len(self.ignored),
            "ignored_files": self.ignored,
            "is_complete": self.is_complete,
            "files": [asdict(file) for file in self.files],
        }


class Journal:
    """Remembers the files of one folder, cast in one way into one library, and learns and removes them."""

    def __init__(self, journals: Path, folder: Path, library: Library, made_by: str):
        self.folder, self.library = folder, library
        self.kept = {entry.name: entry for entry in library.entries()[0]}
        """The adapters that the library had at the beginning, by name."""
        self._about = {"folder": str(folder.resolve()), "library": str(library.folder.resolve()), "made_by": made_by}
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

    def take(self, names: Collection[str]) -> None:
        """Note names, each with the versions that are not the folder's, before anything is learned under them.

        Whatever a kill then interrupts, the next run knows what the folder made.
        """
        known = dict(self.before)
        for name in names:
            if name not in self.kept:
                self.before[name] = []
            elif name not in known:
                self.before[name] = [one.version for one in self.library.versions_of(name)]
        self._taken = set(names)
        if self.before != known:
            self.write()

    def forget(self, path: str) -> None:
        """Forget a file that is gone, in whichever way it was cast."""
        self.entries.pop(path, None)
        self._forgotten.add(path)

    def write(self, every_s: float = 0.0) -> None:
        """Write the journal, unless it was written within so many seconds: a kill costs their work."""
        if time.monotonic() - self._written_s < every_s:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        used = self._taken | {entry["name"] for entry in self.entries.values()}
        before = {name: versions for name, versions in self.before.items() if name in used}
        _store(self._path, {"about": self._about, "device": self.device, "before": before, "entries": self.entries})
        for path in self._siblings if self._forgotten else ():
            with suppress(FileNotFoundError):  # any journal may be deleted at any time
                # Another process may have written to it meanwhile.
                stored = json.loads(path.read_text(encoding="utf-8"))
                entries = {one: entry for one, entry in stored["entries"].items() if one not in self._forgotten}
                if len(entries) < len(stored["entries"]):
                    _store(path, {**stored, "entries": entries})
        self._forgotten.clear()
        self._written_s = time.monotonic()

    def follow_renames(self, paths: Sequence[str]) -> None:
        """Let a new file take the place of one that is gone and had its name, as where Manual.txt becomes manual.md.

        It is learned as a new version of that name, which keeps its tags and its note.
        """
        there = set(paths)
        gone = {entry["name"]: path for path, entry in self.entries.items() if path not in there}
        wanted = Counter(map(_name_of, paths))
        for path in paths:
            name = _name_of(path)
            if path not in self.sources and name in gone and wanted[name] == 1:
                before = gone.pop(name)
                self.entries[path] = {**self.entries[before], "stamp": [], "sha256": ""}
                self.sources[path] = self.sources.pop(before)
                self.forget(before)

    def names_of(self, paths: Sequence[str]) -> dict[str, str]:
        """A name for each file that means nothing else in the library.

        It is the one that the file has, unless somebody has given that to another adapter; or else a free one, or one
        whose adapter was made from the very same content.
        """
        sources, others = self.sources, self.elsewhere.union(*self.sources.values())

        @cache
        def content(path: str) -> str:
            try:
                return file_sha256(self.folder / path)
            except OSError:  # learning it says so
                return ""

        def may_have(path: str, name: str) -> bool:
            own = sources.get(path, {})
            if name not in self.kept or self.kept[name].source_sha256 in own.get(name, ()):
                return True
            return (name in own or name not in others) and self.kept[name].source_sha256 == content(path)

        owners: dict[str, str] = {}
        for path in paths:
            own = (name for name in sources.get(path, {}) if name not in owners and may_have(path, name))
            if name := next(own, None):
                owners[name] = path
        return names_for(paths, {path: name for name, path in owners.items()}, may_have)

    def learn(self, relative: str, name: str, learn: Learn, again: bool) -> FileReport:
        """Learn a file, unless nothing has changed."""
        started, path = time.perf_counter(), self.folder / relative
        before, newest = self.entries.get(relative), self.kept.get(name)
        try:
            stat = path.stat()
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]  # the last tells files that changed places
            sha256 = before["sha256"] if before and before["stamp"] == stamp else file_sha256(path)
            sources = sorted({*self.sources.get(relative, {}).get(name, ()), sha256})
            entry = {"name": name, "sha256": sha256, "stamp": stamp, "error": None, "sources": sources}
            self.entries[relative] = entry
            if before and before["sha256"] == sha256 and not again:
                if before["error"]:
                    raise DocumentError(before["error"])
                if newest and newest.source_sha256 == sha256:
                    return FileReport(relative, name, "unchanged")
            now = next(iter(self.library.versions_of(name)), None)
            if now and now.source_sha256 != sha256 and now.version != (newest and newest.version):
                raise NameTakenError(f"another adapter is called {name!r} meanwhile; the next run finds a free name")
            learn(path, name)
            made = next((one.source_sha256 for one in self.library.versions_of(name)), sha256)
            if made != sha256:  # the file changed before it was read, and may have changed again since
                entry |= {"sha256": made, "stamp": [], "sources": sorted({*sources, made})}
            return FileReport(relative, name, "learned", round(time.perf_counter() - started, 3))
        except DocumentError as error:  # the file's own fault: it fails again until it has changed
            entry["error"] = message = str(error)
        except (LoracastError, OSError) as error:  # a locked library, a file that is gone: the next run tries again
            message = f"{relative} cannot be read: {error}" if isinstance(error, OSError) else str(error)
            self.entries.pop(relative, None)
            if before:
                self.entries[relative] = before
        return FileReport(relative, name, "failed", time.perf_counter() - started, message)

    def remove(self, relative: str, others: Collection[str]) -> Iterator[FileReport]:
        """Delete what was learned from a file that is gone, and only then forget the file: what fails is tried again.

        A name whose newest version is not the folder's means something else by now, and keeps all that it has.

        Args:
            others: names that are left alone.
        """
        for name, sources in self.sources[relative].items():
            versions = self.library.versions_of(name) if name in self.kept and name not in others else []
            not_ours = self.before.get(name, ())
            made = [one for one in versions if one.version not in not_ours and one.source_sha256 in sources]
            if not made or made[0] != versions[0]:
                continue
            try:
                for one in reversed(made):  # the newest goes last: until then the next run knows the name
                    self.library.remove(f"{name}@{one.version}")
            except (LoracastError, OSError) as error:
                yield FileReport(relative, name, "failed", error=f"its adapter cannot be deleted: {error}")
                return
            yield FileReport(relative, name, "removed")
        self.forget(relative)


def _store(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content).encode())  # in ASCII: names of files may be no text


def learn_folder(
    folder: Path,
    library: Library,
    learn: Learn,
    *,
    journals: Path,
    made_by: str,
    again: bool = False,
    remove_gone: bool = False,
    on_file: Callable[[int, int, FileReport], None] = lambda done, total, report: None,
) -> BulkReport:
    """Learn the new and changed files of a folder and the folders below it.

    Args:
        learn: called once for each new or changed file.
        journals: where journals are kept.
        made_by: how files are cast (hypernetwork, chunk length, ...): where it differs, everything is learned anew.
        again: learn unchanged files too.
        remove_gone: delete the adapters of files that are gone, unless a name has got another adapter since. Nothing
            is gone below a folder that cannot be listed, or where no file is left and the folder is on another file
            system than before, as that of a drive that is not mounted.
        on_file: called after each file.

    Raises:
        AdapterError: there is no such folder. Faults of files are in the report.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder")
    device, unread = folder.stat().st_dev, dict[str, str]()
    paths = {path.relative_to(folder).as_posix(): path for path in files_in(folder, unread)}
    wanted = [relative for relative in paths if is_readable(relative)]
    journal = Journal(journals, folder, library, made_by)
    if paths:
        journal.device = device
    if remove_gone and not unread:
        journal.follow_renames(wanted)
    names = journal.names_of(wanted)
    journal.take(names.values())
    report = BulkReport(ignored=[relative for relative in paths if not is_readable(relative)])

    def note(file: FileReport, n_done: int = len(wanted)) -> None:
        report.files.append(file)
        on_file(n_done, len(wanted), file)

    try:
        for number, relative in enumerate(wanted, 1):
            learned = journal.learn(relative, names[relative], learn, again)
            journal.write(_WRITE_EVERY_S)
            note(learned, number)
        gone = journal.sources.keys() - names.keys() if remove_gone else set()
        has_adapters = any(name in journal.kept for path in gone for name in journal.sources[path])
        if has_adapters and not paths and journal.device != device:
            unread.setdefault(".", _NOT_MOUNTED)
        others = journal.elsewhere.union(names.values())
        for relative in sorted(path for path in gone if not _is_below(path, unread)):
            for removed in journal.remove(relative, others):
                note(removed)
        for relative, why in sorted(unread.items()):
            error = f"{folder / relative} cannot be read, and what was learned from it stays: {why}"
            note(FileReport(relative, "", "failed", error=error))
    except KeyboardInterrupt:
        report.is_complete = False
    finally:
        journal.write()
    return report


def files_in(folder: Path, unread: dict[str, str]) -> Iterator[Path]:
    """The files of a folder and of those below it, in a fixed order, without hidden ones and links.

    Args:
        unread: receives the folders that cannot be listed, and the files that are not in the report, each with the
            reason; relative to the folder, which is "." itself.
    """

    def note(error: OSError) -> None:
        unread[Path(error.filename).relative_to(folder).as_posix()] = error.strerror or type(error).__name__

    for where, folders, names in os.walk(folder, onerror=note):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(where) / name for name in sorted(names) if not name.startswith(".")):
            try:
                if S_ISREG(path.lstat().st_mode):
                    yield path
            except OSError as error:
                note(error)


def _is_below(path: str, folders: Collection[str]) -> bool:
    """Whether a path is one of these folders, or below one."""
    return "." in folders or any(path == folder or path.startswith(folder + "/") for folder in folders)


def is_readable(path: str) -> bool:
    """Whether a file's name is one of a document: its content is not looked at."""
    return PurePosixPath(path).suffix.lower() in EXTENSIONS.keys() | _TEXT


def names_for(
    paths: Sequence[str],
    kept: Mapping[str, str] = MappingProxyType({}),
    may_have: Callable[[str, str], bool] = lambda path, name: True,
) -> dict[str, str]:
    """A name for each file's adapter: its path without the ending, with a hash where that is taken or too long.

    Args:
        kept: the names that files have already, which they keep.
        may_have: whether a file may have a name, as far as the other files do not matter.
    """
    made = {path: _name_of(path) for path in paths}
    taken = Counter([*kept.values(), *(name for path, name in made.items() if path not in kept)])
    names = {}
    for path, name in made.items():
        is_free = taken[name] == 1 and len(name) < LONGEST_NAME
        marks = itertools.chain([path], (f"{path} {number}" for number in itertools.count(2)))
        candidates = itertools.chain([name] if is_free else [], (marked_name(name, mark) for mark in marks))
        names[path] = kept.get(path) or next(one for one in candidates if may_have(path, one))
    return names


def _name_of(path: str) -> str:
    """The name that a file's adapter has where nothing else has it."""
    return name_from(path.rpartition(".")[0] if "." in path.rpartition("/")[2] else path)
