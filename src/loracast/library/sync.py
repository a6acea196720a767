"""Learns a folder of files: unchanged files are left alone, and a broken one is reported and holds up no other.

A journal beside the caches remembers each file's size, time, hash and fault, so that a second run over an unchanged
folder opens no file. The journal may be deleted at any time; the folder is then learned anew.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from types import MappingProxyType
from typing import Any, Literal, get_args

from loracast.documents.kind import EXTENSIONS
from loracast.errors import AdapterError, DocumentError, LoracastError
from loracast.files import file_sha256
from loracast.library.journal import Journal
from loracast.library.library import entries, remove_adapter
from loracast.library.manifest import name_from

Outcome = Literal["learned", "unchanged", "failed", "removed"]
_TEXT = {".txt", ".text", ".rst", ".log", ""}  # read as plain text, beside EXTENSIONS
_LONGEST_NAME = 64
_NOT_MOUNTED = (
    "no file is left, and its file system is not the one of before: mount the drive, or delete the adapters with "
    "`loracast rm`"
)

Learn = Callable[[Path, str], object]
"""Learns a file under a name and replaces what had the name. Raises DocumentError for a fault of the file itself."""


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
    ignored: int = 0
    """How many files are of other kinds."""
    is_complete: bool = True

    def count(self, outcome: Outcome) -> int:
        return sum(file.outcome == outcome for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        return {
            **{outcome: self.count(outcome) for outcome in get_args(Outcome)},
            "ignored": self.ignored,
            "is_complete": self.is_complete,
            "files": [asdict(file) for file in self.files],
        }


def learn_folder(
    folder: Path,
    library: Path,
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
    paths = list(files_in(folder, unread))
    wanted = [path for path in paths if is_readable(path.name)]
    journal = Journal(journals, folder, library, made_by)
    if paths:
        journal.device = device
    known = {path: entry["name"] for path, entry in journal.entries.items()}
    names = names_for([path.relative_to(folder).as_posix() for path in wanted], known)
    kept = _kept(library)
    report = BulkReport(ignored=len(paths) - len(wanted))
    try:
        for number, path in enumerate(wanted, 1):
            relative = path.relative_to(folder).as_posix()
            report.files.append(_learn_file(path, relative, names[relative], kept, learn, journal, again))
            journal.write_now_and_then()
            on_file(number, len(wanted), report.files[-1])
        gone = journal.entries.keys() - names.keys() if remove_gone else set()
        if gone and not paths and journal.device != device:
            unread.setdefault(".", _NOT_MOUNTED)
        for relative in sorted(path for path in gone if not _is_below(path, unread)):
            if removed := _remove(library, relative, journal):
                report.files.append(removed)
                on_file(len(wanted), len(wanted), removed)
        for relative, why in sorted(unread.items()):
            error = f"{folder / relative} cannot be read, and what was learned from it stays: {why}"
            report.files.append(FileReport(relative, "", "failed", error=error))
            on_file(len(wanted), len(wanted), report.files[-1])
    except KeyboardInterrupt:
        report.is_complete = False
    finally:
        journal.write()
    return report


def files_in(folder: Path, unread: dict[str, str]) -> Iterator[Path]:
    """The files of a folder and of those below it, in a fixed order, without hidden ones and links.

    Args:
        unread: receives the folders that cannot be listed, and the files of which nothing is told, each with the
            reason; relative to the folder, which is "." itself.
    """

    def note(error: OSError) -> None:
        unread[Path(error.filename).relative_to(folder).as_posix()] = error.strerror or type(error).__name__

    for where, folders, names in os.walk(folder, onerror=note):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(where) / name for name in sorted(names) if not name.startswith(".")):
            try:
                is_file = S_ISREG(path.lstat().st_mode)
            except OSError as error:
                note(error)
            else:
                if is_file:
                    yield path


def _is_below(path: str, folders: Collection[str]) -> bool:
    """Whether a path is one of these folders, or below one."""
    return "." in folders or any(path == folder or path.startswith(folder + "/") for folder in folders)


def is_readable(path: str) -> bool:
    """Whether a file's name is one of a document: its content is not looked at."""
    return PurePosixPath(path).suffix.lower() in EXTENSIONS.keys() | _TEXT


def names_for(paths: Sequence[str], known: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """A name for each file's adapter: its path without the ending, with a hash where that is taken or too long.

    Args:
        known: the names that files have already, which they keep.
    """
    made = {path: name_from(path.rpartition(".")[0] if "." in path.rpartition("/")[2] else path) for path in paths}
    taken = Counter(name for path, name in made.items() if path not in known)
    taken.update(known.values())
    names = {}
    for path, name in made.items():
        if taken[name] > 1 or len(name) >= _LONGEST_NAME:
            mark = hashlib.sha256(path.encode()).hexdigest()[:8]
            name = f"{name[: _LONGEST_NAME - 9]}-{mark}"
        names[path] = known.get(path, name)
    return names


def _learn_file(
    path: Path, relative: str, name: str, kept: Mapping[str, str], learn: Learn, journal: Journal, again: bool
) -> FileReport:
    started = time.perf_counter()
    known = journal.entries.get(relative)
    try:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        sha256 = known["sha256"] if known and known["stamp"] == stamp else file_sha256(path)
        if known and known["sha256"] == sha256 and not again:
            journal.entries[relative] = {**known, "stamp": stamp}
            if known["error"]:
                return FileReport(relative, name, "failed", error=known["error"])
            if kept.get(name) == sha256:
                return FileReport(relative, name, "unchanged")
        journal.entries[relative] = {"name": name, "sha256": sha256, "stamp": stamp, "error": None}
        try:
            learn(path, name)
        except LoracastError as error:
            if isinstance(error, DocumentError):  # the file's own fault: it fails again until it has changed
                journal.entries[relative]["error"] = str(error)
            else:  # a locked library, a base that cannot be fetched: the next run tries again
                journal.put_back(relative, known)
            return FileReport(relative, name, "failed", time.perf_counter() - started, str(error))
        return FileReport(relative, name, "learned", round(time.perf_counter() - started, 3))
    except OSError as error:  # gone meanwhile, or not to be read: what was learned from it is still the folder's
        journal.put_back(relative, known)
        return FileReport(relative, name, "failed", error=f"{relative} cannot be read: {error}")


def _remove(library: Path, relative: str, journal: Journal) -> FileReport | None:
    """Delete the adapter of a file that is gone, and only then forget the file: what fails is tried again."""
    entry, removed = journal.entries[relative], None
    if _kept(library).get(entry["name"]) == entry["sha256"]:
        try:
            remove_adapter(library, entry["name"])
        except (LoracastError, OSError) as error:
            return FileReport(relative, entry["name"], "failed", error=f"its adapter cannot be deleted: {error}")
        removed = FileReport(relative, entry["name"], "removed")
    del journal.entries[relative]
    return removed


def _kept(library: Path) -> dict[str, str]:
    """By the adapters' names, the hash of the file that each was made from."""
    return {entry.name: entry.source_sha256 for entry in entries(library)[0]}
