"""The files of a library: where its adapters and its register lie, and which store keeps copies of them.

A process that is killed leaves versions half moved in or out; the register marks them, and `recover` finishes the work.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path

from loracast.errors import AdapterError
from loracast.files import is_at_work, move_unless_there, sync_folder, work_folder
from loracast.library.adapter import INDEX, MANIFEST, Adapter
from loracast.library.index import read_chunks
from loracast.library.manifest import Manifest
from loracast.library.register import FILE, Register
from loracast.library.store import SharedStore, Store

_OBJECTS = "objects"
STORE = "store"
"""The setting that holds the URL of a store that is this library's own."""
SHARED_FILE = "shared.json"
"""The file that holds the URL of a store that several libraries share (shared.py); it outlives a lost register."""


class LibraryFiles:
    """The files in a library's folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.register = folder / FILE

    def work(self, purpose: str) -> AbstractContextManager[Path]:
        """A folder of this process alone, in the library's, deleted afterwards."""
        return work_folder(self.folder, purpose)

    def home(self, version: str) -> Path:
        """Where the files of a version lie."""
        return self.folder / _OBJECTS / version[:2] / version

    def homes(self) -> dict[str, Path]:
        """The folders of all adapters, by the version that each is called after."""
        return {path.name: path for path in (self.folder / _OBJECTS).glob("??/*") if path.is_dir()}

    def size(self, version: str) -> int:
        """Bytes of a version's files on this machine."""
        return size_of(self.home(version))

    def make_ready(self) -> bool:
        """Whether the library has a register; a missing or old one is made or migrated now, and orphans are entered."""
        if not self.folder.is_dir():
            return False
        is_new, is_shared = not self.register.is_file(), self.shared_url is not None
        orphans = [] if is_shared else self.orphans()[0]  # of a shared library `verify` speaks of them
        if is_new and not orphans and not self.homes() and not is_shared:
            return False
        if not is_new and not orphans:
            with Register.reading(self.register) as register:
                if register.is_current():
                    return True
        with Register.writing(self.register) as register:
            if is_new and not is_shared:  # lost, or deleted: the adapters' own manifests say what it held
                self._enter_homes(register)
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
                self.enter(register, manifest)
        return True

    def _enter_homes(self, register: Register) -> None:
        manifests = []
        for version, home in self.homes().items():
            with suppress(AdapterError):
                manifest = Manifest.read(home / MANIFEST)
                if manifest.version == version:
                    manifests.append(manifest)
        for manifest in sorted(manifests, key=lambda m: (m.created, m.version)):
            self.enter(register, manifest)

    def move_in(self, folder: Path, version: str) -> None:
        """Move an adapter's folder to its home, in place of whatever a killed process left there."""
        home = self.home(version)
        home.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(home, ignore_errors=True)
        os.replace(folder, home)
        sync_folder(home.parent)

    def enter(self, register: Register, manifest: Manifest) -> None:
        """Register an adapter that lies in its home, under the name that it was made under."""
        home = self.home(manifest.version)
        register.add_version(manifest, size_of(home), texts_unless_damaged(home))
        register.name_version(manifest.name, manifest.version)

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

    # ---- the store

    @property
    def shared_url(self) -> str | None:
        """The URL of the store that the library shares with others; None where it does not."""
        try:
            return json.loads((self.folder / SHARED_FILE).read_bytes())["store"]
        except (FileNotFoundError, NotADirectoryError):
            return None

    def store(self, register: Register) -> Store | None:
        """The store of the library, if it has one."""
        if (url := self.shared_url) is not None:
            return SharedStore(url)
        url = register.setting(STORE)
        return None if url is None else Store(url)

    def local(self, version: str) -> Path:
        """The folder of a version, fetched from the library's store unless it is on this machine.

        Raises:
            AdapterError: the files in the store are damaged or missing.
        """
        home = self.home(version)
        if home.exists():
            return home
        with Register.reading(self.register) as register:
            store = self.store(register)
        if store is None:
            return home  # missing: whoever opens it says so
        with self.work("new") as work:
            fetched = work / version
            fetch_whole(store, version, fetched)
            home.parent.mkdir(parents=True, exist_ok=True)
            move_unless_there(fetched, home)
        return home

    # ---- what killed processes left

    def recover(self) -> None:
        """Finish what killed processes began: delete the files that were on their way out, or never fully came in.

        What living processes are adding is left to them. Files at a shared store stay, since another machine may be
        about to name them; `collect_garbage` deletes them.
        """
        with ExitStack() as graves, Register.writing(self.register) as register:  # deleted once the lock is free again
            store = self.store(register)
            for version in register.unrecovered():
                if is_at_work(self.folder, coming_in(version)):
                    continue
                if not register.has_version(version):
                    if store is not None and not store.is_shared:
                        store.delete(version)
                    home = self.home(version)
                    if home.exists():
                        os.replace(home, graves.enter_context(self.work("rm")) / home.name)
                        _drop_if_empty(home.parent)
                register.recover(version)
        _drop_if_empty(self.folder / _OBJECTS)


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0


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
    """Heading and text of each chunk of the adapter in a folder."""
    return [(chunk.heading, chunk.text) for chunk in read_chunks(folder / INDEX)]


def texts_unless_damaged(folder: Path) -> list[tuple[str, str]]:
    """As `texts_in`; none where the index is damaged, of which `verify` speaks."""
    try:
        return texts_in(folder)
    except AdapterError:
        return []


def coming_in(version: str) -> str:
    """The purpose of the work folder that a process has while it adds a version, to a store perhaps for minutes."""
    return f"in-{version}"


def _drop_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it is not empty, or another process was faster
        folder.rmdir()
