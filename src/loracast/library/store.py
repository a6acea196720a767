"""Keeps a library's adapters at a URL (an object store, a network drive); the folder on this machine is then a cache.

A store belongs to one library, whose register alone knows its names, unless several share it (`SharedStore`).
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime, timedelta
from functools import cache
from glob import escape
from pathlib import Path
from typing import Any

from loracast.errors import AdapterError, LoracastError
from loracast.files import create_once, frozen, value_faults, write_atomically
from loracast.library.manifest import MANIFEST, STATIC_FILE, VERSION
from loracast.library.register import NameState

MARK = "loracast-library.json"
SHARED = "shared"
"""What the mark of a store says in the place of a library's id when libraries share it."""


@contextmanager
def file_system(where: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL, and the path in it; what a service raises becomes a LoracastError of one line."""
    try:
        import fsspec

        fs, root = fsspec.core.url_to_fs(where)
        yield fs, root.rstrip("/")
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

    def __init__(self, url: str):
        self.url = url

    @contextmanager
    def _at(self, version: str = "", *, anew: bool = False) -> Iterator[tuple[Any, str]]:
        """The file system, and the path of a version in it; `anew` forgets what it listed: others may have written."""
        with file_system(self.url) as (fs, root):
            if anew:
                fs.invalidate_cache()
            yield fs, f"{root}/{version[:2]}/{version}" if version else root

    def put(self, version: str, folder: Path) -> None:
        """Copy the files of a folder to the store, unless the store has the version."""
        if self.has(version):
            return
        with self._at(version) as (fs, place):
            fs.makedirs(place, exist_ok=True)
            for path in folder.iterdir():
                if path.name != MANIFEST:
                    fs.put_file(str(path), f"{place}/{path.name}")
            write(fs, f"{place}/{MANIFEST}", (folder / MANIFEST).read_bytes())

    def fetch(self, version: str, folder: Path, only: Collection[str] | None = None) -> int:
        """Copy the files of a version into a folder; bytes of all its files but the static LoRA, as in `size_of`.

        Raises AdapterError where the store lacks it.

        Args:
            only: names of the files that are copied; None for all.
        """
        if not self.has(version):
            raise AdapterError(f"the files of the version {version[:12]} are neither on this machine nor at {self.url}")
        with self._at(version, anew=True) as (fs, place):
            files = {entry["name"].rpartition("/")[2]: entry for entry in fs.ls(place, detail=True)}
            for name, entry in files.items():
                if name and entry["type"] == "file" and (only is None or name in only):
                    fs.get_file(entry["name"], str(folder / name))
        return sum(entry["size"] or 0 for name, entry in files.items() if name != STATIC_FILE)

    def delete(self, version: str) -> None:
        """Delete the files of a version, the manifest first, so that half of it never counts as whole."""
        with self._at(version) as (fs, place):
            if fs.exists(f"{place}/{MANIFEST}"):
                fs.rm_file(f"{place}/{MANIFEST}")
            if fs.exists(place):
                fs.rm(place, recursive=True)

    def has(self, version: str) -> bool:
        """Whether the store has all files of a version."""
        return self._content(f"{version[:2]}/{version}/{MANIFEST}") is not None

    def _content(self, path: str) -> bytes | None:
        """The content of a small file; None where it is missing. S3 takes one request for it."""
        with self._at() as (fs, root):
            try:
                return fs.cat_file(f"{root}/{path}")
            except FileNotFoundError:
                return None

    def versions(self) -> set[str]:
        """All versions in the store, those that are not whole included."""
        with self._at(anew=True) as (fs, root):
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
            mark = self._content(MARK)
            found = owner if mark is None else json.loads(mark).get("library")
            if found == SHARED != owner:
                raise AdapterError(f"{self.url} is shared by libraries: `loracast store URL --shared` joins them")
            if found not in (owner, own) and not take_over:
                raise AdapterError(
                    f"{self.url} belongs to another library: give another URL, or --take-over to use what lies there "
                    "in this one from now on"
                )
            write(fs, f"{root}/{MARK}", json.dumps({"library": owner}).encode())


_STATE = re.compile(r"(?:.*/)?names/([a-z0-9][a-z0-9._-]{0,63})/(\d{8})\.json")
_GRACE = timedelta(days=1)
"""A version that nobody named or put for so long is garbage; a change takes an hour at most."""
_LONGEST_DELETION = timedelta(hours=1)
"""Whoever has not deleted a version by then was killed, or has to leave it alone."""
_PATIENCE_S = 30.0  # with another machine that deletes a version


_TOO_OLD = "0-this-loracast-is-too-old-update-it"
"""In the place of a name, before all others: older versions, which would lose adapters of format 5, stop there."""


class OvertakenError(LoracastError):
    """Another machine has changed a name in the meantime."""


class SharedStore(Store):
    """Adapters' files and the states of their names."""

    def put(self, version: str, folder: Path) -> None:
        """As `Store.put`; no other machine deletes the version within a day."""
        self.keep(version)
        super().put(version, folder)

    def keep(self, version: str) -> None:
        """Have no machine delete a version within a day; whether it is there now is to be asked afterwards.

        Raises LoracastError where another machine goes on deleting it, or was killed doing so within an hour.
        """
        until = time.monotonic() + _PATIENCE_S
        while True:
            self.mark_used(version)
            if self._content(f"dying/{version}") is None:
                return
            if self._is_older(f"dying/{version}", self._now(), _LONGEST_DELETION):
                self._remove(f"dying/{version}")
            elif time.monotonic() > until:
                raise LoracastError(f"another machine is deleting {version[:12]} at {self.url}; try again in an hour")
            else:
                time.sleep(0.1)

    def mark_used(self, version: str) -> None:
        """Keep `garbage` from a version for a day."""
        with self._at() as (fs, root):
            write(fs, f"{root}/uses/{version}", b"")

    # ---- names

    def check(self) -> None:
        """Raise LoracastError where two machines could write the same file without one of them learning of it."""
        with self._at() as (fs, _):
            if not is_local(fs) and "s3" not in fs.protocol:
                raise LoracastError(
                    f"a library cannot be shared at {self.url}: only folders, network drives and S3 are known to "
                    "create a file for one of two machines alone"
                )
        try:
            for _ in range(2):  # a server that knows nothing of conditions overwrites without a word
                self._create("names/_check", {})
        except OvertakenError:
            return
        raise LoracastError(
            f"{self.url} overwrites files that it is asked to create only if they are not there, so machines would "
            "lose each other's names: use another server, or a newer s3fs"
        )

    def newest(self, names: Iterable[str] | None = None) -> dict[str, int]:
        """The number of the newest state of these names, or of all; deleted ones included."""
        numbers: dict[str, int] = {}
        with self._at(anew=True) as (fs, root):
            folders = [f"{root}/names"] if names is None else [f"{root}/names/{name}" for name in names]
            found = [path for folder in folders for path in fs.find(folder)]
            if not found and self._content(MARK) is None:  # a drive that is not mounted, say
                raise LoracastError(f"there is no shared library at {self.url}")
        for path in found:
            if (match := _STATE.fullmatch(path)) and match[1] != _TOO_OLD:
                numbers[match[1]] = max(numbers.get(match[1], 0), int(match[2]))
        return numbers

    def read(self, name: str, number: int) -> NameState:
        """A state of a name. Raises LoracastError where it is missing or damaged."""
        path = f"names/{name}/{number:08d}.json"
        content = self._content(path)
        if content is None:  # SeaweedFS lists a file a moment before it can be read
            raise OvertakenError(f"{path} at {self.url} cannot be read yet")
        try:
            stored = json.loads(content)
            values = {key: frozen(stored[key]) for key in ("owner", "note", "tags")}
            values["versions"] = frozen(stored["history"] if stored["format"] > 1 else stored["versions"])
            if faults := value_faults(NameState, values):
                raise ValueError("; ".join(faults))
            return NameState(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise LoracastError(f"{path} at {self.url} is damaged: {error}") from error

    def publish(self, name: str, number: int, state: NameState) -> None:
        """Create a state of a name. Raises OvertakenError where the name has a state of this number."""
        _refuse_older(self.url)
        content = asdict(state)
        self._create(f"names/{name}/{number:08d}.json", {"history": content.pop("versions"), **content})

    def _create(self, path: str, content: dict[str, Any]) -> None:
        change = uuid.uuid4().hex
        encoded = json.dumps({"format": 2, "change": change, **content}).encode()
        with self._at() as (fs, root):
            try:
                if is_local(fs):
                    create_once(Path(root) / path, encoded)
                else:
                    fs.pipe_file(f"{root}/{path}", encoded, mode="create")
            except Exception as error:  # it is taken, or it was created and the answer was lost
                found = self._content(path)
                if found is None:
                    raise
                if json.loads(found).get("change") != change:
                    raise OvertakenError(f"another machine wrote {path}") from error

    # ---- garbage

    def garbage(self, named: set[str]) -> Iterator[str]:
        """The versions without a name that were neither put nor named for a day, each looked at when it is asked for.

        Args:
            named: versions that a name has, according to a listing of now.
        """
        now = self._now()
        for version in sorted(self.versions() - named):
            if VERSION.fullmatch(version) and self._is_older(f"uses/{version}", now, _GRACE):
                yield version

    def delete_unless_used(self, version: str) -> bool:
        """Delete a version that is garbage, unless a machine puts, names or deletes it just now; whether it did."""
        began = time.time()
        try:
            self._create(f"dying/{version}", {})
        except OvertakenError:
            return False
        is_awake = time.time() - began < _LONGEST_DELETION.total_seconds() / 2
        is_garbage = is_awake and self._is_older(f"uses/{version}", self._now(), _GRACE)
        if is_garbage:
            self.delete(version)
            self._remove(f"uses/{version}")
        self._remove(f"dying/{version}")
        return is_garbage

    def tidy(self) -> None:
        """Delete states of names that a newer one has replaced for a day, and what killed processes left."""
        newest, now = self.newest(), self._now()
        with self._at() as (fs, root):
            found = [path.removeprefix(f"{root}/") for name in ("names", "dying") for path in fs.find(f"{root}/{name}")]
        for path in found:
            match = _STATE.fullmatch(path)
            is_newest = match is not None and int(match[2]) >= newest.get(match[1], 0)
            age = _LONGEST_DELETION if path.startswith("dying/") else _GRACE
            if not is_newest and self._is_older(path, now, age):
                self._remove(path)

    def _now(self) -> datetime:
        """The time by the store's own clock."""
        self.mark_used("now")
        with self._at(anew=True) as (fs, root):
            return fs.modified(f"{root}/uses/now")

    def _is_older(self, path: str, now: datetime, age: timedelta) -> bool:
        """Whether a file is missing, or was written longer ago than that."""
        with self._at(anew=True) as (fs, root):
            try:
                return bool(now - fs.modified(f"{root}/{path}") > age)
            except FileNotFoundError:
                return True

    def _remove(self, path: str) -> None:
        """Delete a file, if it is there."""
        with self._at() as (fs, root), suppress(FileNotFoundError):
            fs.rm_file(f"{root}/{path}")


@cache
def _refuse_older(url: str) -> None:
    """Have versions from before format 5, which leave out what they cannot read, say that they cannot use the names.

    They look for `versions` in a state, and name the file that lacks them.
    """
    with suppress(OvertakenError):
        SharedStore(url)._create(f"names/{_TOO_OLD}/00000001.json", {})
