"""The adapters kept on this machine: found, added, named, removed and checked.

    register.sqlite             names, versions, tags, notes, text to search in (register.py)
    objects/3f/3f9a.../         the files of one adapter, under its content hash; they never change

`manual` is the newest version of a name, `manual@3f9a` the one whose hash begins so. Files come before their row in the
register, and a row goes before its files: whenever a process is killed, the register names only whole adapters.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from loracast.errors import LEARN_AGAIN, AdapterError, NoSuchAdapterError
from loracast.files import tidy
from loracast.library.adapter import Adapter, size_of
from loracast.library.manifest import VERSION_DIGITS, Manifest, check_name
from loracast.library.register import Entry, Hit, Register, taken
from loracast.library.storage import LibraryStorage, coming_in, texts_in
from loracast.library.store import SharedStore, Store

_HASH = re.compile(r"[0-9a-f]{4,64}")
_NAMES_IN_MESSAGE = 12


@dataclass(frozen=True)
class Collected:
    """What `collect_garbage` deleted, or would delete."""

    versions: tuple[str, ...]
    n_bytes: int


class Library(LibraryStorage):
    """The adapters in a folder, by name and version; what it needs is opened on first use.

        library = loracast.Library("library")
        lora = library.open("manual").lora()

    Threads may share one object, and processes one folder.
    """

    @classmethod
    def of(cls, given: Library | str | Path | None) -> Library:
        """A library as it was given, or the one in a folder."""
        return given if isinstance(given, Library) else cls(given)

    def __str__(self) -> str:
        return str(self.folder)

    # ---- finding

    def names(self) -> list[str]:
        """The names of all adapters."""
        with self.reading() as register:
            return register.names()

    def entries(
        self, *, like: str = "", tag: str = "", owner: str = "", kind: str = "", limit: int = -1, offset: int = 0
    ) -> tuple[list[Entry], int]:
        """A page of names with their newest versions, and how many match; arguments as in `Register.entries`."""
        with self.reading() as register:
            return register.entries(like=like, tag=tag, owner=owner, kind=kind, limit=limit, offset=offset)

    def search(self, words: str, limit: int = 20) -> list[Hit]:
        """The chunks of documents, and the descriptions of tasks, that hold all these words; best first."""
        with self.reading() as register:
            return register.search(words, limit)

    def open(self, reference: str) -> Adapter:
        """Open the newest version of a name, or `name@hash` with the first digits of a version's hash.

        Raises:
            AdapterError: no adapter has the name (the message lists similar ones), several versions begin with the
                digits, or the files are damaged.
        """
        entry = self.find(reference)
        return Adapter(self.local(entry.version), name=entry.name)

    def find(self, reference: str) -> Entry:
        """The register's entry of `name` or `name@hash`. Raises AdapterError as `open` does."""
        name, at, digits = reference.partition("@")
        if at and not _HASH.fullmatch(digits):
            raise AdapterError(f"{reference[:100]!r} names no version: after @ come 4 to 64 of the digits 0-9 and a-f")
        versions = self.versions(name)
        matching = [entry for entry in versions if entry.version.startswith(digits)]
        if at and len(matching) != 1:
            problem = "is none of its versions" if not matching else "begins several of its versions"
            listed = ", ".join(entry.version[:VERSION_DIGITS] for entry in versions)
            raise NoSuchAdapterError(f"{name!r} is there, but {digits!r} {problem}: {listed}")
        return matching[0]

    def versions(self, name: str) -> list[Entry]:
        """The versions of a name, newest first. Raises AdapterError where there is no such name."""
        check_name(name)
        if entries := self.versions_of(name):
            return entries
        self.refresh([name])
        if entries := self.versions_of(name):
            return entries
        names = self.names()
        if len(names) > _NAMES_IN_MESSAGE:
            near = get_close_matches(name, names, n=_NAMES_IN_MESSAGE, cutoff=0.5)
            hint = f"near it are: {', '.join(near)}" if near else f"`loracast list` shows the {len(names):,} there are"
        else:
            hint = f"there are: {', '.join(names) or 'none yet: `loracast learn FILE` makes one'}"
        raise NoSuchAdapterError(f"no adapter is called {name!r}; {hint}")

    def versions_of(self, name: str) -> list[Entry]:
        """The versions of a name, newest first; none where there is no such name."""
        with self.reading() as register:
            return register.versions_of(name)

    def lacking(self, named: Collection[tuple[str, str]]) -> set[tuple[str, str]]:
        """Those of some names, each with the hash of a version, that the library does not have."""
        with self.reading() as register:
            return set(named) - register.named([name for name, _ in named])

    def find_cached(self, cache_keys: Sequence[str]) -> str | None:
        """The version that was cast from the same source in the same way, or None; `cache_keys` as in `Manifest`."""
        with self.reading() as register:
            return next((version for key in cache_keys if (version := register.cached(key)) is not None), None)

    def check_whole(self, version: str) -> None:
        """Raise AdapterError where files of a version are damaged or missing, so that its text has to be cast anew."""
        if faults := _problems(self.local(version)):
            raise AdapterError(
                f"the library has this document already, and its files are damaged: {'; '.join(faults)}; {LEARN_AGAIN}"
            )

    def change_counter(self) -> tuple[int, bytes] | None:
        """What differs after every change of the register; None where there is no register.

        It is the file and the counter in SQLite's header, read in microseconds; opening the register takes a
        millisecond.
        """
        try:
            with open(self.register_file, "rb", buffering=0) as file:
                return os.fstat(file.fileno()).st_ino, file.read(28)[24:]
        except OSError:
            return None

    # ---- adding

    def check_free(self, name: str, *, unless_from: str | None = None) -> None:
        """Raise AdapterError for a name that is taken: asked before a model is loaded for nothing.

        Args:
            unless_from: hash of a source. A newest version made from it is let pass: it may turn out to be the same
                adapter, which only the cache key tells (`find_cached`).
        """
        check_name(name)
        with self.reading() as register:
            newest = register.newest(name)
        if newest is not None and newest.source_sha256 != unless_from:
            raise taken(name)

    def add(self, name: str, folder: Path, manifest: Manifest, *, replace: bool) -> Adapter:
        """Move a whole adapter's folder to its home and give it a name.

        Where the library has the same adapter already, that one gets the name, and `folder` is left alone.

        Args:
            folder: in a work folder of this library, flushed to the disk.
            replace: the name may have other versions, of which this becomes the newest.
        """
        version, texts, n_bytes = manifest.version, texts_in(folder), size_of(folder)

        def add(register: Register) -> None:
            if not register.has_version(version):
                if folder.exists():  # otherwise an attempt that was overtaken has moved it
                    self.move_in(folder, version)
                register.add_version(manifest, n_bytes, texts)
            register.recover(version)
            register.name_version(name, version, replace)

        try:
            with self.work(coming_in(version)):  # others leave the version alone meanwhile
                with Register.writing(self.register_file) as register:
                    register.mark_unrecovered(version)  # in a transaction of its own: a kill from here leaves a trace
                    store = self.store(register)
                if store is not None:
                    store.put(version, folder)
                self.changing([name], add)
        except BaseException:
            self.recover()
            raise
        return Adapter(self.local(version), name=name)

    def give_name(self, name: str, version: str, *, replace: bool) -> Adapter:
        """Make a version of the library the newest of a name. Raises AdapterError where the name is taken."""
        check_name(name)
        self.changing([name], lambda register: register.name_version(name, version, replace))
        return Adapter(self.local(version), name=name)

    # ---- changing and taking away

    def remove(self, reference: str) -> None:
        """Delete a name with all its versions, or one version (`name@hash`), from the register and then from the disk.

        Versions that another name has as well stay. A damaged adapter can be deleted too.
        """
        entry = self.find(reference)
        version = entry.version if "@" in reference else None

        def remove(register: Register) -> None:
            register.check_is_there(entry.name)
            register.drop(entry.name, version)
            register.drop_unnamed()

        self.changing([entry.name], remove)
        self.recover()

    def erase_traces(self) -> None:
        """Rewrite the register, in whose free pages the text of removed adapters would stay readable."""
        with Register.reading(self.register_file) as register:
            register.vacuum()

    def rename(self, name: str, new: str) -> None:
        """Give a name's adapters, tags and note another name. Raises AdapterError where that is taken."""
        check_name(new)
        self.versions(name)
        self.changing([new, name], lambda register: register.rename(name, new))

    def describe(
        self,
        name: str,
        *,
        owner: str | None = None,
        note: str | None = None,
        tags: Sequence[str] = (),
        untag: Sequence[str] = (),
    ) -> None:
        """Change a name's owner, note (None keeps them) and tags. Raises AdapterError for a tag that is not allowed."""
        self.versions(name)
        for tag in tags:
            check_name(tag)
        self.changing([name], lambda register: register.describe(name, owner, note, tags, untag))

    # ---- upkeep

    def collect_garbage(self, *, keep: int | None = None, dry_run: bool = False) -> Collected:
        """Delete versions without a name, and what killed processes left.

        Args:
            keep: how many of the newest versions each name keeps; None keeps all.
            dry_run: delete nothing, only report.
        """
        if keep is not None and keep < 1:
            raise AdapterError("keep at least one version of each name; `loracast rm NAME` deletes all")
        if not self.make_ready():
            return Collected((), 0)

        def sweep(register: Register) -> tuple[set[str], set[str]]:
            if keep is not None:
                register.drop_older(keep)
            register.drop_unnamed()
            named = set(register.all_versions())
            gone = self._everywhere(register) - named
            for version in gone:
                register.mark_unrecovered(version)
            return gone, named

        if dry_run:
            with self.reading() as register:
                named = {e.version for name in register.names() for e in register.versions_of(name)[:keep]}
                gone = self._everywhere(register) - named
        else:
            gone, named = self.changing(None, sweep)
        n_bytes = sum(size_of(self.home(version)) for version in gone)
        if not dry_run:
            tidy(self.folder)  # first: the folder of a killed process says that it is still at work
            self.recover()
        if (shared := self.shared_store) is not None:
            gone |= {version for version in shared.garbage(named) if dry_run or shared.delete_unless_used(version)}
            if not dry_run:
                shared.tidy()
        return Collected(tuple(sorted(gone)), n_bytes)

    def _everywhere(self, register: Register) -> set[str]:
        """The versions on this machine, or in a store that is this library's own."""
        store = self.store(register)
        return self.homes().keys() | (set() if store is None or isinstance(store, SharedStore) else store.versions())

    def verify(self, names: Sequence[str] = ()) -> list[str]:
        """Every fault of the library in a line: files missing, changed or half-written, a damaged register.

        Args:
            names: only these adapters (`name` or `name@hash`); all of them, and the register, if empty.
        """
        if names:
            found = [self.find(name).version for name in names]
            with Register.reading(self.register_file) as register:
                store = self.store(register)
            return [problem for version in found for problem in self._verify_one(version, store)]
        if not self.make_ready():
            return []
        shared = self.shared_store
        if shared is not None:
            self.take_in(shared)
        with Register.reading(self.register_file) as register:
            problems = register.problems() + ([] if shared is None else _verify_names(register, shared))
            versions, store = register.all_versions(), self.store(register)
            # Without a name, in a shared store, another machine may be adding it.
            nameless = self._everywhere(register).difference(versions, register.unrecovered())
        for version in versions:
            problems += self._verify_one(version, store)
        for version in sorted(nameless):
            problems.append(f"the version {version[:VERSION_DIGITS]} belongs to no name: `loracast gc` deletes it")
        good, bad = self.orphans()
        problems += [f"{folder} cannot be taken into the register: {why}" for folder, why in bad]
        return problems + [
            f"{folder} is in no register: `loracast pull-adapter {folder}` takes it in" for folder, _ in good
        ]

    def _verify_one(self, version: str, store: Store | None) -> list[str]:
        """The faults of a version: of its files, if they are here, and that its library's store lacks it."""
        home, missing = self.home(version), []
        if store is not None and not store.has(version):
            missing = [f"the version {version[:VERSION_DIGITS]} is not at {store.url}"]
        if store is not None and not home.exists():
            return missing
        return [f"{home}: {problem}" for problem in _problems(home)] + missing


def _problems(home: Path) -> list[str]:
    """The faults of the files of a version in its home."""
    try:
        adapter = Adapter(home)
    except AdapterError as error:  # perhaps not even adapter.json is there
        return [str(error)]
    is_other = adapter.manifest.version != home.name
    return adapter.problems() + (["adapter.json is not the one it was stored with"] if is_other else [])


def _verify_names(register: Register, store: SharedStore) -> list[str]:
    """Names that are not in the register what they are at a shared store, one a line."""
    numbers, newest = register.numbers(), store.newest()
    wrong = [name for name in register.names() if name not in newest]
    known = {name: number for name, number in newest.items() if numbers.get(name) == number}
    wrong += [name for name, number in known.items() if store.read(name, number) != register.state(name)]
    return [f"{name} is not here what it is at {store.url}" for name in sorted(wrong)]
