"""Where the adapters and names of a library lie: in a folder of this machine, and at a store if the library has one.

`reading` and `changing` are how everything else gets at the register of names. Of a shared library the store holds the
truth (store.py) and the register a copy that `shared.json` lets a machine make again: readers bring it up to
date every few seconds, and a server has a thread for that (`refreshing`). A change runs in one transaction of the
register, creates the next state of each name that it changed at the store, and then commits. Whoever finds that state
taken rolls back, takes in what is new and tries again.

A process that is killed leaves versions half moved in or out; the register marks them, and `recover` finishes the work.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from loracast.errors import AdapterError, LoracastError
from loracast.files import (
    file_sha256,
    is_at_work,
    library_dir,
    move_unless_there,
    sync_folder,
    work_folder,
    write_atomically,
)
from loracast.library.adapter import STATIC_FOLDER, Adapter, size_of
from loracast.library.index import read_chunks
from loracast.library.manifest import INDEX, MANIFEST, STATIC_FILE, Manifest
from loracast.library.register import FILE, NameState, Register
from loracast.library.store import SHARED, OvertakenError, SharedStore, Store

REFRESH_S = 3.0
"""Readers look for new names at most this often."""
_STORE = "store"  # the setting that holds the URL of a store that is this library's own
_SHARED_FILE = "shared.json"  # holds the URL of a store that several libraries share; it outlives a lost register
_OBJECTS = "objects"
_RETRY_S = 30.0  # after a store could not be reached
_ATTEMPTS = 12
_LONGEST_CHANGE_S = 3600.0  # far below the day for which the store keeps what a slow change may rely on
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class LibraryStorage:
    """The files and the register of a library."""

    def __init__(self, folder: str | Path | None = None):
        """
        Args:
            folder: made when the first adapter is added; that of the user's own library if None.
        """
        self.folder = Path(folder or library_dir())
        self.register_file = self.folder / FILE
        self._due = (0.0, True)
        """When to look next at a shared store; whether it could be reached last."""
        self._in_background = False
        """Whether a thread of this process keeps the names up to date."""

    def work(self, purpose: str) -> AbstractContextManager[Path]:
        """A folder of this process alone, in the library's, deleted afterwards."""
        return work_folder(self.folder, purpose)

    def home(self, version: str) -> Path:
        """Where the files of a version lie."""
        return self.folder / _OBJECTS / version[:2] / version

    def homes(self) -> dict[str, Path]:
        """The folders of all adapters, by the version that each is called after."""
        return {path.name: path for path in (self.folder / _OBJECTS).glob("??/*") if path.is_dir()}

    def local(self, version: str) -> Path:
        """The folder of a version, fetched from the library's store unless it is on this machine.

        Raises:
            AdapterError: the files in the store are damaged or missing.
        """
        home = self.home(version)
        if home.exists():
            return home
        with Register.reading(self.register_file) as register:
            store = self.store(register)
        if store is not None:  # otherwise the files are missing: whoever opens them says so
            with self.work("new") as work:
                fetched = work / version
                fetch_whole(store, version, fetched)
                home.parent.mkdir(parents=True, exist_ok=True)
                self._share_static(fetched)
                move_unless_there(fetched, home)
        return home

    def move_in(self, folder: Path, version: str) -> None:
        """Move an adapter's folder to its home, in place of whatever a killed process left there."""
        home = self.home(version)
        home.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(home, ignore_errors=True)
        self._share_static(folder)
        os.replace(folder, home)
        sync_folder(home.parent)

    def _share_static(self, folder: Path) -> None:
        """Make the static LoRA in an adapter's folder one file on the disk with that of the other adapters.

        Both are hard links, so that a folder is whole wherever it is copied to, and the file goes with its last link.
        Without hard links (FAT, some network drives) each adapter keeps a file of its own.
        """
        own = folder / STATIC_FILE
        if not own.is_file():
            return
        shared = self.folder / STATIC_FOLDER / file_sha256(own)
        shared.parent.mkdir(exist_ok=True)
        with self.work("link") as work, suppress(OSError):
            is_whole = shared.is_file() and file_sha256(shared) == shared.name
            source, target = (shared, own) if is_whole else (own, shared)
            os.link(source, work / STATIC_FILE)
            os.replace(work / STATIC_FILE, target)

    def orphans(self) -> tuple[list[tuple[Path, Manifest]], list[tuple[Path, str]]]:
        """Adapters' folders that no register names: those that can be taken in, and those that cannot, with why."""
        good, bad = [], []
        for path in sorted(self.folder.iterdir()):
            if path.name != _OBJECTS and not path.name.startswith(".") and (path / MANIFEST).is_file():
                try:
                    good.append((path, Manifest.read(path / MANIFEST)))
                except AdapterError as error:
                    bad.append((path, str(error)))
        return good, bad

    # ---- the register

    @contextmanager
    def reading(self) -> Iterator[Register]:
        """The register, made ready and brought up to date first, for reading; an empty one without a library.

        Where the store of a shared library cannot be reached, the names are those known last, and a warning says so.
        """
        is_ready = self.make_ready()
        if is_ready:
            self.refresh()
        with Register.reading(self.register_file) if is_ready else Register.writing(Path(FILE), "memory") as register:
            yield register

    def changing(self, names: Sequence[str] | None, change: Callable[[Register], _Result]) -> _Result:
        """Change names in one transaction, here and at the store that a library shares; an error undoes everything.

        Args:
            names: those that may change, in the order in which the store learns of them; None for all. A process that
                is killed on the way leaves the first of them changed.
            change: may run several times, each on newer names.

        Raises:
            LoracastError: the store cannot be reached, or others keep changing these names.
        """
        store = self.shared_store
        if store is None:
            with Register.writing(self.register_file) as register:
                return change(register)
        self.make_ready()
        for attempt in range(_ATTEMPTS):
            began = time.time()
            published: list[tuple[str, int, NameState, NameState]] = []
            try:
                self.take_in(store, names)
                with Register.writing(self.register_file) as register:
                    numbers = register.numbers()
                    states = {name: register.state(name) for name in (register.names() if names is None else names)}
                    result = change(register)
                    for name, before in states.items():
                        state, number = register.state(name), numbers.get(name, 0) + 1
                        if state == before:
                            continue
                        self._keep(store, before, state)
                        if time.time() - began > _LONGEST_CHANGE_S:
                            raise OvertakenError("the machine slept")
                        store.publish(name, number, state)
                        published.append((name, number, before, state))
                        register.set_number(name, number)
                    return result
            except OvertakenError:  # take back what was published, but for names on which somebody has built
                for name, number, before, state in reversed(published):
                    with suppress(OvertakenError):
                        self._keep(store, state, before)
                        store.publish(name, number + 1, before)
            time.sleep(random.random() * min(2.0, 0.05 * 2**attempt))
        raise AdapterError(f"others keep changing the same names at {store.url}; try again")

    def _keep(self, store: SharedStore, before: NameState, after: NameState) -> None:
        """Have the store keep versions that a name gets, and send it those that are gone in the meantime."""
        for version, _ in (one for one in after.versions if one not in before.versions):
            store.keep(version)
            if not store.has(version):
                home = self.home(version)
                if not home.is_dir():
                    raise AdapterError(f"the files of the version {version[:12]} are neither here nor at {store.url}")
                store.put(version, home)

    def make_ready(self) -> bool:
        """Whether the library has a register; a missing or old one is made or migrated now, and orphans are entered."""
        if not self.folder.is_dir():
            return False
        is_new, is_shared = not self.register_file.is_file(), self.shared_store is not None
        orphans = [] if is_shared else self.orphans()[0]  # of a shared library `verify` speaks of them
        if is_new and not orphans and not self.homes() and not is_shared:
            return False
        if not is_new and not orphans:
            with Register.reading(self.register_file) as register:
                if register.is_current():
                    return True
        with Register.writing(self.register_file) as register:
            if is_new and not is_shared:  # lost, or deleted: the adapters' own manifests say what it held
                whole = []
                for version, home in self.homes().items():
                    with suppress(AdapterError):
                        if (manifest := Manifest.read(home / MANIFEST)).version == version:
                            whole.append(manifest)
                self.enter(register, whole)
            store = self.store(register)
            for folder, manifest in orphans:  # of a library from before there was a register, or put there by hand
                if not folder.exists():  # another process was faster
                    continue
                if store is not None:
                    store.put(manifest.version, folder)
                if register.has_version(manifest.version):
                    shutil.rmtree(folder)
                else:
                    self.move_in(folder, manifest.version)
                self.enter(register, [manifest])
        return True

    def enter(self, register: Register, manifests: Iterable[Manifest]) -> None:
        """Register adapters that lie in their homes, each under the name that it was made under, the newest last."""
        for manifest in sorted(manifests, key=lambda m: (m.created, m.version)):
            home = self.home(manifest.version)
            register.add_version(manifest, size_of(home), texts_in(home))
            register.name_version(manifest.name, manifest.version)

    def recover(self) -> None:
        """Finish what killed processes began: delete the files that were on their way out, or never fully came in.

        What living processes are adding is left to them. Files at a shared store stay, since another machine may be
        about to name them; `collect_garbage` deletes them.
        """
        with ExitStack() as graves, Register.writing(self.register_file) as register:  # deleted once the lock is free
            store = self.store(register)
            for version in register.unrecovered():
                if is_at_work(self.folder, coming_in(version)):
                    continue
                if not register.has_version(version):
                    if store is not None and not isinstance(store, SharedStore):
                        store.delete(version)
                    home = self.home(version)
                    if home.exists():
                        os.replace(home, graves.enter_context(self.work("rm")) / home.name)
                        _drop_if_empty(home.parent)
                register.recover(version)
        for shared in (self.folder / STATIC_FOLDER).glob("*"):
            with suppress(FileNotFoundError):  # another process was faster
                if shared.stat().st_nlink == 1:
                    shared.unlink()
        _drop_if_empty(self.folder / STATIC_FOLDER)
        _drop_if_empty(self.folder / _OBJECTS)

    # ---- the store

    @property
    def shared_store(self) -> SharedStore | None:
        """The store that the library shares with others, if it does."""
        try:
            return SharedStore(json.loads((self.folder / _SHARED_FILE).read_bytes())["store"])
        except (FileNotFoundError, NotADirectoryError):
            return None

    @property
    def store_url(self) -> str | None:
        """The URL of the library's store; None where adapters lie on this machine alone."""
        with self.reading() as register:
            store = self.store(register)
        return None if store is None else store.url

    def store(self, register: Register) -> Store | None:
        """The store of the library, if it has one."""
        url = register.setting(_STORE)
        return self.shared_store or (None if url is None else Store(url))

    def refresh(self, names: Sequence[str] | None = None, *, in_thread: bool = False) -> None:
        """Take in what others changed: of all names every few seconds, of some names whenever it is asked for.

        Where the store cannot be reached, a warning says so.

        Args:
            in_thread: called by the thread of `refreshing`, which alone looks for all names while it runs.
        """
        now, (due, is_reachable) = time.monotonic(), self._due
        if now < due and (names is None or not is_reachable):
            return
        if names is None:
            if self._in_background and not in_thread:
                return
            self._due = (now + REFRESH_S, True)  # threads that come meanwhile need not wait
        store = self.shared_store
        if store is None:
            return
        try:
            self.take_in(store, names)
            if names is None:
                with suppress(OSError):
                    os.utime(self.folder / _SHARED_FILE)
        except OvertakenError:
            pass  # another process of this machine changed the register just now: next time
        except (LoracastError, OSError) as error:
            self._due = (time.monotonic() + _RETRY_S, False)
            since = datetime.fromtimestamp((self.folder / _SHARED_FILE).stat().st_mtime)
            _log.warning("%s; the names of the library are those of %s", error, since.isoformat(" ", "seconds"))

    @contextmanager
    def refreshing(self) -> Iterator[None]:
        """Take in what others changed every few seconds, in a thread, so that no reader here waits for a slow store.

        Only a name that is not known is still looked for at once.
        """
        stopping = threading.Event()

        def keep_up() -> None:
            while not stopping.is_set():
                self.refresh(in_thread=True)
                stopping.wait(REFRESH_S)

        self._in_background = True
        threading.Thread(target=keep_up, name="names", daemon=True).start()
        try:
            yield
        finally:
            stopping.set()  # the thread may be waiting for the store, which nobody else need do
            self._in_background = False

    def take_in(self, store: SharedStore, names: Sequence[str] | None = None) -> None:
        """Bring the register up to what the store says of these names, or of all.

        Raises LoracastError where the store cannot be used. A version whose files it has lost is left out, which a
        warning says.
        """
        newest = store.newest(names)
        with Register.reading(self.register_file) as register:
            numbers, versions_here = register.numbers(), set(register.all_versions())
        states = {name: store.read(name, number) for name, number in newest.items() if number > numbers.get(name, 0)}
        if not states:
            return
        new, missing = [], set()
        with self.work("new") as work:
            for version in {version for state in states.values() for version, _ in state.versions} - versions_here:
                folder = work / version
                folder.mkdir()
                try:
                    n_bytes = store.fetch(version, folder, only=(MANIFEST, INDEX))
                    manifest = Manifest.read(folder / MANIFEST)
                    if manifest.version != version:
                        raise AdapterError(f"the version {version[:12]} at {store.url} is damaged")
                    new.append((manifest, n_bytes, texts_in(folder)))
                except AdapterError as error:
                    missing.add(version)
                    _log.warning("%s", error)
        with Register.writing(self.register_file) as register:
            for manifest, n_bytes, texts in new:
                register.add_version(manifest, n_bytes, texts)
            numbers = register.numbers()
            for name, state in states.items():
                if newest[name] > numbers.get(name, 0):
                    whole = tuple(one for one in state.versions if one[0] not in missing)
                    if not all(register.has_version(version) for version, _ in whole):
                        raise OvertakenError(f"a version of {name} was dropped meanwhile")
                    register.set_state(name, replace(state, versions=whole))
                    register.set_number(name, newest[name])
            register.drop_unnamed()

    def share(self, url: str) -> int:
        """Share the library with all machines that give the same URL: names and adapters go there, theirs come here.

        Returns:
            how many adapters the library has now.

        Raises:
            AdapterError: names here mean other adapters there (nothing is changed), the store is another library's, or
                this library is shared at another URL.
            LoracastError: the store cannot be used, or cannot create a file for one of two machines alone.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.make_ready()
        if (other := self.shared_store) is not None and other.url != url:
            raise AdapterError(f"the library is shared at {other.url}: `loracast store --leave` first")
        store = SharedStore(url)
        with Register.writing(self.register_file) as register:
            own = register.setting("id")
            states = {} if other else {name: register.state(name) for name in register.names()}
        store.check()
        store.claim(SHARED, own=own)
        there = store.newest()
        theirs = {name: dict(store.read(name, there[name]).versions) if name in there else {} for name in states}
        taken = [name for name, state in states.items() if theirs[name] and state.versions[-1][0] not in theirs[name]]
        if taken:
            raise AdapterError(f"{', '.join(taken)} mean other adapters at {url}: rename or remove them here first")
        for name, state in states.items():
            if not theirs[name]:
                for version, _ in state.versions:
                    store.put(version, self.local(version))
                store.publish(name, there.get(name, 0) + 1, state)
        write_atomically(self.folder / _SHARED_FILE, json.dumps({"store": url}).encode())
        with Register.writing(self.register_file) as register:
            register.set(_STORE, None)
        self.take_in(store)
        with Register.reading(self.register_file) as register:
            return len(register.all_versions())

    def use_store(self, url: str, *, take_over: bool = False) -> int:
        """Copy the library's adapters to a URL and keep them there from now on, with this machine's folder as a cache.

        Args:
            take_over: make another library's store this one's, with its adapters under the names they were made under.

        Returns:
            how many adapters the store holds now.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.make_ready()
        if (shared := self.shared_store) is not None:
            raise AdapterError(f"the library is shared at {shared.url}: `loracast store --leave` first")
        store = Store(url)
        with Register.writing(self.register_file) as register:
            owner = register.setting("id") or uuid.uuid4().hex
            store.claim(owner, take_over=take_over)
            register.set("id", owner)
            versions = register.all_versions()
        for version in versions:
            store.put(version, self.local(version))
        with Register.writing(self.register_file) as register:
            register.set(_STORE, url)
        others = {one for one in store.versions() if store.has(one)} - set(versions) if take_over else set()
        manifests = [Manifest.read(self.local(version) / MANIFEST) for version in others]
        with Register.writing(self.register_file) as register:
            self.enter(register, manifests)
        return len(versions) + len(others)

    def leave_store(self) -> None:
        """Fetch all adapters to this machine and use the store no longer. Its files stay where they are."""
        if self.make_ready():
            with self.reading() as register:
                versions = register.all_versions()
            for version in versions:
                self.local(version)
            with Register.writing(self.register_file) as register:
                register.forget_numbers()
                register.set(_STORE, None)
            (self.folder / _SHARED_FILE).unlink(missing_ok=True)

    def evict(self) -> int:
        """Delete this machine's copies of adapters in the store; the bytes freed.

        Raises AdapterError without a store.
        """
        with self.reading() as register:
            store = self.store(register)
        if store is None:
            raise AdapterError(
                "this library has no store: its adapters lie on this machine alone (`loracast store URL` sets one)"
            )
        n_bytes = 0
        for version, folder in self.homes().items():
            if store.has(version):
                n_bytes += size_of(folder)
                with self.work("rm") as grave:
                    os.replace(folder, grave / folder.name)
        self.recover()
        return n_bytes


def fetch_whole(store: Store, version: str, folder: Path) -> Adapter:
    """Fetch a version into a new folder. Raises AdapterError where the files in the store are damaged or missing."""
    folder.mkdir()
    store.fetch(version, folder)
    adapter = Adapter(folder)
    faults = adapter.faults()
    if adapter.manifest.version != version:
        faults.append("it is another version")
    if faults:
        raise AdapterError(f"the version {version[:12]} at {store.url} is damaged: {'; '.join(faults)}")
    return adapter


def texts_in(folder: Path) -> list[tuple[str, str]]:
    """Heading and text of each chunk of the adapter in a folder; none where the index is damaged: `verify` says so."""
    try:
        return [(chunk.heading, chunk.text) for chunk in read_chunks(folder / INDEX)]
    except AdapterError:
        return []


def coming_in(version: str) -> str:
    """The purpose of the work folder that a process has while it adds a version, to a store perhaps for minutes."""
    return f"in-{version}"


def _drop_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it is not empty, or another process was faster
        folder.rmdir()
