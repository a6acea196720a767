"""A store that many machines share: besides the adapters' files it holds their names, each as a log of its states.

    names/manual/00000012.json   all that is known of a name after its 12th change; without versions it is deleted
    uses/3f9a...                 written anew whenever a version is put or named, so that its age is known
    dying/3f9a...                there while a machine deletes a version

A change of a name creates the file of the next number, which no file system here lets two machines do. Files of
`names` are never changed; `tidy` deletes old ones that a newer one replaces.

Who deletes a version writes `dying` and then looks at `uses`; who puts or names one writes `uses` and then looks at
`dying` (Dekker's algorithm). So one of them sees the other: the first leaves the version alone, or the second waits.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from loracast.errors import AdapterError, LoracastError
from loracast.files import create_once
from loracast.library.adapter import INDEX, MANIFEST
from loracast.library.entry import NameState
from loracast.library.manifest import check_name
from loracast.library.store import MARK, Store, is_local, write

_STATE = re.compile(r".*/names/([a-z0-9][a-z0-9._-]{0,63})/(\d{8})\.json")
_VERSION = re.compile(r"[0-9a-f]{64}")
_GRACE = timedelta(days=1)
"""A version that nobody named or put for so long is garbage; a change takes an hour at most."""
_LONGEST_DELETION = timedelta(hours=1)
"""Whoever has not deleted a version by then was killed, or has to leave it alone."""
_PATIENCE_S = 30.0  # with another machine that deletes a version


class OvertakenError(LoracastError):
    """Another machine has changed a name in the meantime."""


class SharedStore(Store):
    """Adapters' files and the states of their names."""

    is_shared = True

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
            if not self._exists(f"dying/{version}"):
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

    def look_at(self, version: str, folder: Path) -> int:
        """Fetch what describes a version, not its factors; bytes of all its files. Raises AdapterError if missing."""
        if not self.has(version):
            raise AdapterError(f"the files of the version {version[:12]} are not at {self.url}")
        with self._at(version) as (fs, place):
            sizes = {entry["name"].rpartition("/")[2]: entry["size"] for entry in fs.ls(place, detail=True)}
            for name in (MANIFEST, INDEX):
                if name in sizes:
                    fs.get_file(f"{place}/{name}", str(folder / name))
        return sum(sizes.values())

    # ---- names

    def check(self) -> None:
        """Raise LoracastError where two machines could write the same file without one of them learning of it."""
        with self._at() as (fs, root):
            protocols = [fs.protocol] if isinstance(fs.protocol, str) else list(fs.protocol)
            if not is_local(fs) and "s3" not in protocols:
                raise LoracastError(
                    f"a library cannot be shared over {protocols[0]}: only folders, network drives and S3 are known to "
                    "create a file for one of two machines alone"
                )
            for _ in range(2):  # a server that knows nothing of conditions overwrites without a word
                try:
                    self._create(fs, f"{root}/names/_check", {})
                except OvertakenError:
                    return
                except OSError as error:
                    raise LoracastError(f"no file can be created at {self.url} on condition: {error}") from error
            raise LoracastError(
                f"{self.url} overwrites files that it is asked to create only if they are not there, so machines would "
                "lose each other's names: use another server, or a newer s3fs"
            )

    def newest(self, names: Iterable[str] | None = None) -> dict[str, int]:
        """The number of the newest state of these names, or of all; deleted ones included."""
        numbers: dict[str, int] = {}
        with self._at() as (fs, root):
            fs.invalidate_cache()
            folders = [f"{root}/names"] if names is None else [f"{root}/names/{name}" for name in names]
            found = [path for folder in folders for path in fs.find(folder)]
            if not found and not fs.exists(f"{root}/{MARK}"):  # a drive that is not mounted, say
                raise LoracastError(f"there is no shared library at {self.url}")
        for path in found:
            if match := _STATE.fullmatch(path):
                numbers[match[1]] = max(numbers.get(match[1], 0), int(match[2]))
        return numbers

    def read(self, name: str, number: int) -> NameState:
        """A state of a name. Raises LoracastError where it is missing or damaged."""
        with self._at() as (fs, root):
            try:
                found = json.loads(fs.cat_file(f"{root}/names/{name}/{number:08d}.json"))
            except FileNotFoundError as error:  # SeaweedFS lists a file a moment before it can be read
                raise OvertakenError(f"names/{name}/{number:08d}.json at {self.url} cannot be read yet") from error
        try:
            versions = tuple((version, added) for version, added in found["versions"])
            texts = [found["owner"], found["note"], *(added for _, added in versions)]
            if not all(_VERSION.fullmatch(v) for v, _ in versions) or not all(isinstance(text, str) for text in texts):
                raise ValueError
            return NameState(versions, found["owner"], found["note"], tuple(check_name(tag) for tag in found["tags"]))
        except (KeyError, TypeError, ValueError, AdapterError) as error:
            raise LoracastError(f"names/{name}/{number:08d}.json at {self.url} is damaged") from error

    def publish(self, name: str, number: int, state: NameState) -> None:
        """Create a state of a name. Raises OvertakenError where the name has a state of this number."""
        with self._at() as (fs, root):
            self._create(fs, f"{root}/names/{name}/{number:08d}.json", asdict(state))

    def _create(self, fs: Any, path: str, content: dict[str, Any]) -> None:
        change = uuid.uuid4().hex
        encoded = json.dumps({"format": 1, "change": change, **content}).encode()
        try:
            if is_local(fs):
                create_once(Path(path), encoded)
            else:
                fs.pipe_file(path, encoded, mode="create")
        except Exception as error:  # it is taken, or it was created and the answer was lost
            fs.invalidate_cache()
            if not fs.exists(path):
                raise
            if json.loads(fs.cat_file(path)).get("change") != change:
                raise OvertakenError(f"another machine wrote {path}") from error

    # ---- garbage

    def garbage(self, named: set[str]) -> Iterator[str]:
        """The versions without a name that were neither put nor named for a day, each looked at when it is asked for.

        Args:
            named: versions that a name has, according to a listing of now.
        """
        now = self._now()
        for version in sorted(self.versions() - named):
            if _VERSION.fullmatch(version) and self._is_older(f"uses/{version}", now, _GRACE):
                yield version

    def delete_unless_used(self, version: str) -> bool:
        """Delete a version that is garbage, unless a machine puts, names or deletes it just now; whether it did."""
        began = time.time()
        try:
            with self._at() as (fs, root):
                self._create(fs, f"{root}/dying/{version}", {})
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
            for path in fs.find(f"{root}/names"):
                match = _STATE.fullmatch(path)
                is_replaced = match is None or int(match[2]) < newest.get(match[1], 0)
                if is_replaced and self._is_older(path.removeprefix(f"{root}/"), now, _GRACE):
                    fs.rm_file(path)
            for path in fs.find(f"{root}/dying"):
                if self._is_older(path.removeprefix(f"{root}/"), now, _LONGEST_DELETION):
                    fs.rm_file(path)

    def _now(self) -> datetime:
        """The time by the store's own clock."""
        self.mark_used("now")
        with self._at() as (fs, root):
            fs.invalidate_cache()
            return fs.modified(f"{root}/uses/now")

    def _is_older(self, path: str, now: datetime, age: timedelta) -> bool:
        """Whether a file is missing, or was written longer ago than that."""
        with self._at() as (fs, root):
            fs.invalidate_cache()
            try:
                return bool(now - fs.modified(f"{root}/{path}") > age)
            except FileNotFoundError:
                return True

    def _exists(self, path: str) -> bool:
        """Whether a small file is there: it is read, for which S3 takes one request and not two."""
        with self._at() as (fs, root):
            try:
                fs.cat_file(f"{root}/{path}")
            except FileNotFoundError:
                return False
            return True

    def _remove(self, path: str) -> None:
        """Delete a file, if it is there."""
        with self._at() as (fs, root), suppress(FileNotFoundError):
            fs.rm_file(f"{root}/{path}")
