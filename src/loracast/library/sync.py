"""Learns a folder of files: unchanged files are left alone, and a broken one is reported and holds up no other.

A journal beside the caches remembers each file's size, time, hash and fault, so that a second run over an unchanged
folder opens no file, and which versions of which names the folder made: others are neither replaced nor deleted. The
journal may be deleted at any time. The folder is then learned anew: what was made from the same content goes on under
its name, but stays when its file goes.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from types import MappingProxyType
from typing import Any, Literal, get_args

from loracast.documents.kind import EXTENSIONS
from loracast.errors import AdapterError, DocumentError, LoracastError, NameTakenError
from loracast.files import file_sha256
from loracast.library.entry import Entry
from loracast.library.journal import Journal
from loracast.library.library import entries, remove_adapter
from loracast.library.manifest import LONGEST_NAME, marked_name, name_from
from loracast.library.shared import reading

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
    paths = {path.relative_to(folder).as_posix(): path for path in files_in(folder, unread)}
    wanted = {relative: path for relative, path in paths.items() if is_readable(relative)}
    journal = Journal(journals, folder, library, made_by)
    if paths:
        journal.device = device
    kept = {entry.name: entry for entry in entries(library)[0]}
    if remove_gone and not unread:
        _follow_renames([*wanted], journal)
    names = _own_names(folder, [*wanted], kept, journal)
    journal.take({name: _not_ours(library, name, kept, journal) for name in names.values()})
    report = BulkReport(ignored=[relative for relative in paths if relative not in wanted])
    try:
        for number, (relative, path) in enumerate(wanted.items(), 1):
            name = names[relative]
            report.files.append(_learn_file(path, relative, name, kept.get(name), library, learn, journal, again))
            journal.write_now_and_then()
            on_file(number, len(wanted), report.files[-1])
        gone = journal.sources.keys() - names.keys() if remove_gone else set()
        has_adapters = any(name in kept for path in gone for name in journal.sources[path])
        if has_adapters and not paths and journal.device != device:
            unread.setdefault(".", _NOT_MOUNTED)
        others = journal.elsewhere.union(names.values())
        for relative in sorted(path for path in gone if not _is_below(path, unread)):
            for removed in _remove(relative, kept.keys() - others, library, journal):
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
        unread: receives the folders that cannot be listed, and the files that are not in the report, each with the
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


def names_for(
    paths: Sequence[str],
    known: Mapping[str, str] = MappingProxyType({}),
    may_have: Callable[[str, str], bool] = lambda path, name: True,
) -> dict[str, str]:
    """A name for each file's adapter: its path without the ending, with a hash where that is taken or too long.

    Args:
        known: the names that files have already, which they keep.
        may_have: whether a file may have a name, as far as the other files do not matter.
    """
    made = {path: _name_of(path) for path in paths}
    taken = Counter(name for path, name in made.items() if path not in known)
    taken.update(known.values())
    names = {}
    for path, name in made.items():
        is_free = taken[name] == 1 and len(name) < LONGEST_NAME
        candidates = itertools.chain([name] if is_free else [], _marked(path, name))
        names[path] = known.get(path) or next(one for one in candidates if may_have(path, one))
    return names


def _name_of(path: str) -> str:
    """The name that a file's adapter has where nothing else has it."""
    return name_from(path.rpartition(".")[0] if "." in path.rpartition("/")[2] else path)


def _follow_renames(paths: Sequence[str], journal: Journal) -> None:
    """Let a new file take the place of one that is gone and had its name, as where Manual.txt becomes manual.md.

    It is learned as a new version of that name, which keeps its tags and its note.
    """
    there = set(paths)
    gone = {entry["name"]: path for path, entry in journal.entries.items() if path not in there}
    wanted = Counter(map(_name_of, paths))
    for path in paths:
        name = _name_of(path)
        if path not in journal.sources and name in gone and wanted[name] == 1:
            journal.rename(gone.pop(name), path)


def _marked(path: str, name: str) -> Iterator[str]:
    """Names with a hash of the path; from the second on also of a number."""
    for number in itertools.count(1):
        yield marked_name(name, path if number == 1 else f"{path} {number}")


def _own_names(folder: Path, paths: Sequence[str], kept: Mapping[str, Entry], journal: Journal) -> dict[str, str]:
    """A name for each file that means nothing else in the library.

    It is the one that the file has, unless somebody has given that to another adapter; or else a free one, or one whose
    adapter was made from the very same content.
    """
    others = journal.elsewhere.union(*journal.sources.values())

    @cache
    def content(path: str) -> str:
        try:
            return file_sha256(folder / path)
        except OSError:  # learning it says so
            return ""

    def may_have(path: str, name: str) -> bool:
        own = journal.sources.get(path, {})
        if name not in kept or kept[name].source_sha256 in own.get(name, ()):
            return True
        return (name in own or name not in others) and kept[name].source_sha256 == content(path)

    known: dict[str, str] = {}
    taken: set[str] = set()
    for path in paths:
        own = (name for name in journal.sources.get(path, {}) if name not in taken and may_have(path, name))
        if name := next(own, None):
            known[path] = name
            taken.add(name)
    return names_for(paths, known, may_have)


def _not_ours(library: Path, name: str, kept: Mapping[str, Entry], journal: Journal) -> list[str]:
    """The versions of a name that the folder did not make."""
    if name not in kept:
        return []
    return journal.before[name] if name in journal.before else [one.version for one in _versions(library, name)]


def _learn_file(
    path: Path,
    relative: str,
    name: str,
    newest: Entry | None,
    library: Path,
    learn: Learn,
    journal: Journal,
    again: bool,
) -> FileReport:
    started = time.perf_counter()
    known = journal.entries.get(relative)
    try:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]  # the last tells files that changed places
        sha256 = known["sha256"] if known and known["stamp"] == stamp else file_sha256(path)
        sources = sorted({*journal.sources.get(relative, {}).get(name, ()), sha256})
        entry = {"name": name, "sha256": sha256, "stamp": stamp, "error": None, "sources": sources}
        journal.entries[relative] = entry
        if known and known["sha256"] == sha256 and not again:
            if known["error"]:
                entry["error"] = known["error"]
                return FileReport(relative, name, "failed", error=known["error"])
            if newest and newest.source_sha256 == sha256:
                return FileReport(relative, name, "unchanged")
        try:
            _check_is_as_before(library, name, newest, sha256)
            learn(path, name)
        except LoracastError as error:
            if isinstance(error, DocumentError):  # the file's own fault: it fails again until it has changed
                entry["error"] = str(error)
            else:  # a locked library, a base that cannot be fetched: the next run tries again
                journal.put_back(relative, known)
            return FileReport(relative, name, "failed", time.perf_counter() - started, str(error))
        made = next((one.source_sha256 for one in _versions(library, name)), sha256)
        if made != sha256:  # the file changed before it was read, and may have changed again since
            entry |= {"sha256": made, "stamp": [], "sources": sorted({*sources, made})}
        return FileReport(relative, name, "learned", round(time.perf_counter() - started, 3))
    except OSError as error:  # gone meanwhile, or not to be read: what was learned from it is still the folder's
        journal.put_back(relative, known)
        return FileReport(relative, name, "failed", error=f"{relative} cannot be read: {error}")


def _check_is_as_before(library: Path, name: str, newest: Entry | None, sha256: str) -> None:
    """Raise NameTakenError where somebody has named another adapter so since names were chosen, maybe hours ago."""
    now = next(iter(_versions(library, name)), None)
    if now and now.source_sha256 != sha256 and now.version != (newest and newest.version):
        raise NameTakenError(f"another adapter has been called {name!r} meanwhile; the next run finds a free name")


def _remove(relative: str, may_go: Collection[str], library: Path, journal: Journal) -> Iterator[FileReport]:
    """Delete what was learned from a file that is gone, and only then forget the file: what fails is tried again.

    A name whose newest version is not the folder's means something else by now, and keeps all that it has.
    """
    for name, sources in journal.sources[relative].items():
        versions = _versions(library, name) if name in may_go else []
        not_ours = journal.before.get(name, ())
        made = [one for one in versions if one.version not in not_ours and one.source_sha256 in sources]
        if not made or made[0] != versions[0]:
            continue
        try:
            for one in reversed(made):  # the newest goes last: until then the next run knows the name for the folder's
                remove_adapter(library, f"{name}@{one.version}")
        except (LoracastError, OSError) as error:
            yield FileReport(relative, name, "failed", error=f"its adapter cannot be deleted: {error}")
            return
        yield FileReport(relative, name, "removed")
    journal.forget(relative)


def _versions(library: Path, name: str) -> list[Entry]:
    """The versions of a name, newest first; none where there is no such name."""
    with reading(library) as register:
        return register.versions_of(name)
