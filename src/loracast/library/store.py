"""Keeps a library's adapters at a URL (an object store, a network drive); the folder on this machine is then a cache.

A store belongs to one library, whose register alone knows its names, unless several share it (shared_store.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from loracast.errors import AdapterError, LoracastError
from loracast.files import write_atomically

MARK = "loracast-library.json"
SHARED = "shared"
"""What the mark of a store says in the place of a library's id when libraries share it."""
_LAST = "adapter.json"  # a version without it is not whole


@contextmanager
def file_system(where: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL, and the path in it."""
    import fsspec

    with store_errors(where):
        fs, root = fsspec.core.url_to_fs(where)
        yield fs, root.rstrip("/")


@contextmanager
def store_errors(where: str) -> Iterator[None]:
    """Turn whatever a remote service raises into a LoracastError of one line."""
    try:
        yield
    except LoracastError:
        raise
    except ImportError as error:
        raise LoracastError(f"{where} needs another package: {error}") from error
    except Exception as error:  # each of these services has errors of its own
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise LoracastError(f"{where} cannot be used: {said[0]}") from error


def is_local(fs: Any) -> bool:
    """Whether a file system is made of folders: of this machine, or of a network drive."""
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(fs, LocalFileSystem)


def write(fs: Any, path: str, content: bytes) -> None:
    """Write a file so that nobody sees half of it, as object stores do by themselves."""
    if is_local(fs):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), content)
    else:
        fs.pipe_file(path, content)


class Store:
    """Adapters' files by version, at `URL/3f/3f9a.../`."""

    is_shared = False

    def __init__(self, url: str):
        self.url = url

    @contextmanager
    def _at(self, version: str = "") -> Iterator[tuple[Any, str]]:
        with file_system(self.url) as (fs, root):
            yield fs, f"{root}/{version[:2]}/{version}" if version else root

    def put(self, version: str, folder: Path) -> None:
        """Copy the files of a folder to the store, unless the store has the version."""
        if self.has(version):
            return
        with self._at(version) as (fs, place):
            fs.makedirs(place, exist_ok=True)
            for path in sorted(folder.iterdir(), key=lambda path: path.name == _LAST):
                if path.name == _LAST:
                    write(fs, f"{place}/{_LAST}", path.read_bytes())
                else:
                    fs.put_file(str(path), f"{place}/{path.name}")

    def fetch(self, version: str, folder: Path) -> None:
        """Copy the files of a version into a folder. Raises AdapterError where the store lacks it."""
        if not self.has(version):
            raise AdapterError(f"the files of the version {version[:12]} are neither on this machine nor at {self.url}")
        with self._at(version) as (fs, place):
            for entry in fs.ls(place, detail=True):
                name = entry["name"].rstrip("/").rpartition("/")[2]
                if entry["type"] == "file" and name:
                    fs.get_file(entry["name"], str(folder / name))

    def delete(self, version: str) -> None:
        """Delete the files of a version, the manifest first, so that half of it never counts as whole."""
        with self._at(version) as (fs, place):
            if fs.exists(f"{place}/{_LAST}"):
                fs.rm_file(f"{place}/{_LAST}")
            if fs.exists(place):
                fs.rm(place, recursive=True)

    def has(self, version: str) -> bool:
        with self._at(version) as (fs, place):
            fs.invalidate_cache()  # another machine may have deleted it
            return bool(fs.exists(f"{place}/{_LAST}"))

    def versions(self) -> set[str]:
        """All versions in the store, those that are not whole included."""
        with self._at() as (fs, root):
            fs.invalidate_cache()
            found = fs.glob(f"{escape(root)}/??/*")
        return {path.rstrip("/").rpartition("/")[2] for path in found}

    def claim(self, owner: str, *, take_over: bool = False, own: str | None = None) -> None:
        """Mark the store as a library's own, or as `SHARED`. Raises AdapterError where it is another's.

        Args:
            take_over: another library's store may become this one's; one that is shared may not.
            own: id of the library, whose own store may become a shared one.
        """
        with self._at() as (fs, root):
            fs.makedirs(root, exist_ok=True)
            mark = f"{root}/{MARK}"
            found = json.loads(fs.cat_file(mark)).get("library") if fs.exists(mark) else owner
            if found == SHARED != owner:
                raise AdapterError(f"{self.url} is shared by libraries: `loracast store URL --shared` joins them")
            if found not in (owner, own) and not take_over:
                raise AdapterError(
                    f"{self.url} belongs to another library: give another URL, or --take-over to use what lies there "
                    "in this one from now on"
                )
            write(fs, mark, json.dumps({"library": owner}).encode())
