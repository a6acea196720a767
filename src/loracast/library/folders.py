"""Hidden work folders of a library, each locked by its process; `tidy` deletes those of killed processes."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from loracast.errors import AdapterError
from loracast.files import move_unless_there, sync_folder, try_lock
from loracast.library.adapter import INDEX, MANIFEST, Adapter
from loracast.library.index import read_chunks
from loracast.library.manifest import Manifest
from loracast.library.register import FILE, Register
from loracast.library.store import SharedStore, Store

_PREFIX = ".loracast-"
_MADE = "made"  # the purpose in the name of a folder that is made, but perhaps not yet locked
_GRACE_S = 10.0


@contextmanager
def work_folder(library: Path, purpose: str) -> Iterator[Path]:
    """A folder of this process alone, deleted afterwards; if the process is killed, `tidy` deletes it."""
    made = Path(tempfile.mkdtemp(dir=library, prefix=f"{_PREFIX}{_MADE}-"))
    lock = try_lock(made)
    folder = made.rename(made.with_name(made.name.replace(_MADE, purpose, 1)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def is_at_work(library: Path, purpose: str) -> bool:
    """Whether a process has such a work folder, or was killed with one that `tidy` has not deleted yet."""
    return any(library.glob(f"{_PREFIX}{purpose}-*"))


@contextmanager
def exclusively(library: Path, what: str) -> Iterator[None]:
    """Wait until nobody else does the same to this library, and keep them off meanwhile; on POSIX systems only."""
    library.mkdir(parents=True, exist_ok=True)
    with open(library / f"{_PREFIX}{what}.lock", "w") as file:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)  # of this open file, so that threads wait for each other too
        yield


def tidy(library: Path) -> None:
    """Delete the work folders of killed processes."""
    for folder in library.glob(f"{_PREFIX}*-*"):
        with suppress(OSError):  # another process may be tidying too
            is_made = folder.name.startswith(f"{_PREFIX}{_MADE}-")
            is_new = is_made and time.time() - folder.stat().st_mtime < _GRACE_S
            lock = None if is_new else try_lock(folder)
            if lock is not None:
                try:
                    shutil.rmtree(folder)
                finally:
                    os.close(lock)


_OBJECTS = "objects"
STORE = "store"
"""The setting that holds the URL of a store that is this library's own."""
SHARED = "shared.json"
"""The file that holds the URL of a store that several libraries share (shared.py); it outlives a lost register."""


def is_ready(library: Path) -> bool:
    """Whether the library has a register; a missing or old one is made or migrated now, and orphans are taken in."""
    if not library.is_dir():
        return False
    is_new, is_shared = not (library / FILE).is_file(), shared_url(library) is not None
    found_here = [] if is_shared else orphans(library)[0]  # of a shared library `verify` speaks of them
    if is_new and not found_here and not folders(library) and not is_shared:
        return False
    if not is_new and not found_here:
        with Register.reading(library) as register:
            if register.is_current():
                return True
    with Register.writing(library) as register:
        if is_new and not is_shared:  # lost, or deleted: the adapters' own manifests say what it held
            found = []
            for version, folder in folders(library).items():
                with suppress(AdapterError):
                    manifest = Manifest.read(folder / MANIFEST)
                    if manifest.version == version:
                        found.append((manifest, folder))
            for manifest, folder in sorted(found, key=lambda f: (f[0].created, f[0].version)):
                enter(register, manifest, folder)
        store = store_in(library, register)
        for folder, manifest in found_here:  # of a library from before there was a register, or put there by hand
            if not folder.exists():  # another process was faster
                continue
            if store is not None:
                store.put(manifest.version, folder)
            home = home_of(library, manifest.version)
            if register.has_version(manifest.version):
                shutil.rmtree(folder)
            else:
                move_in(folder, home)
            enter(register, manifest, home)
    return True


def move_in(folder: Path, home: Path) -> None:
    """Move an adapter's folder to its home, in place of whatever a killed process left there."""
    home.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(home, ignore_errors=True)
    os.replace(folder, home)
    sync_folder(home.parent)


def enter(register: Register, manifest: Manifest, folder: Path) -> None:
    """Register an adapter that lies in its home, under the name that it was made under."""
    register.add_version(manifest, size_of(folder), texts_of(folder))
    register.name_version(manifest.name, manifest.version)


def orphans(library: Path) -> tuple[list[tuple[Path, Manifest]], list[tuple[Path, str]]]:
    """Adapters' folders that no register names: those that can be taken in, and those that cannot, with the reason."""
    good, bad = [], []
    for path in sorted(library.iterdir()):
        if path.name != _OBJECTS and not path.name.startswith(".") and (path / MANIFEST).is_file():
            try:
                good.append((path, Manifest.read(path / MANIFEST)))
            except AdapterError as error:
                bad.append((path, str(error)))
    return good, bad


def folders(library: Path) -> dict[str, Path]:
    """The folders of all adapters, by the version that each is called after."""
    return {path.name: path for path in (library / _OBJECTS).glob("??/*") if path.is_dir()}


def home_of(library: Path, version: str) -> Path:
    """Where the files of a version lie."""
    return library / _OBJECTS / version[:2] / version


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0


def shared_url(library: Path) -> str | None:
    """The URL of the store that a library shares with others; None where it does not."""
    try:
        return json.loads((library / SHARED).read_bytes())["store"]
    except (FileNotFoundError, NotADirectoryError):
        return None


def store_in(library: Path, register: Register) -> Store | None:
    """The store of a library, if it has one."""
    if (url := shared_url(library)) is not None:
        return SharedStore(url)
    url = register.setting(STORE)
    return None if url is None else Store(url)


def ensure_local(library: Path, version: str) -> Path:
    """The folder of a version, fetched from the library's store unless it is on this machine.

    Raises:
        AdapterError: the files in the store are damaged or missing.
    """
    home = home_of(library, version)
    if home.exists():
        return home
    with Register.reading(library) as register:
        store = store_in(library, register)
    if store is None:
        return home  # missing: whoever opens it says so
    with work_folder(library, "new") as work:
        fetched = work / version
        fetch_whole(store, version, fetched)
        home.parent.mkdir(parents=True, exist_ok=True)
        move_unless_there(fetched, home)
    return home


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


def texts_of(folder: Path) -> list[tuple[str, str]]:
    """As `texts_in`; none where the index is damaged, of which `verify` speaks."""
    try:
        return texts_in(folder)
    except AdapterError:
        return []


def coming_in(version: str) -> str:
    """The purpose of the work folder that a process has while it adds a version, to a store perhaps for minutes."""
    return f"in-{version}"


def recover(library: Path) -> None:
    """Finish what killed processes began: delete the files that were on their way out, or never fully came in.

    What living processes are adding is left to them. Files at a shared store stay, since another machine may be about
    to name them; `collect_garbage` deletes them.
    """
    with ExitStack() as graves, Register.writing(library) as register:  # deleted once the lock is free again
        store = store_in(library, register)
        for version in register.unrecovered():
            if is_at_work(library, coming_in(version)):
                continue
            if not register.has_version(version):
                if store is not None and not store.is_shared:
                    store.delete(version)
                home = home_of(library, version)
                if home.exists():
                    os.replace(home, graves.enter_context(work_folder(library, "rm")) / home.name)
                    _drop_if_empty(home.parent)
            register.recover(version)
    _drop_if_empty(library / _OBJECTS)


def _drop_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it is not empty, or another process was faster
        folder.rmdir()
