"""Labelled examples of another modality: images from a folder or a zip file, with a folder for each class."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracast.documents.images import decode_image, image_format
from loracast.errors import ConfigError

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_LABEL = re.compile(r"^\d+[_-]")


@dataclass(frozen=True)
class Labelled:
    """Examples with class labels; an example is loaded when it is needed."""

    modality: str  # the table of content/modalities.toml that has the questions about them, such as "image"
    names: tuple[str, ...]  # of the classes, as an answer says them
    is_held_out: tuple[bool, ...]  # by class, whether training leaves it out: what is said about unseen classes?
    labels: tuple[int, ...]  # the class of each example
    titles: tuple[str, ...]  # a name for each example
    load: Callable[[int], Any]  # loads one example, in the form that its encoder takes
    fingerprint: str  # hash of which examples they are

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, held_out: bool) -> list[int]:
        """Indices of the examples of held-out classes, or of the other classes."""
        return [i for i, label in enumerate(self.labels) if self.is_held_out[label] == held_out]


def read_images(path: str | Path) -> Labelled:
    """Read a labelled set of images: a folder or a zip file, with a folder for each class.

    Folders are named after their classes ("golden retriever", "01_golden_retriever"). A `classes.json` beside them may
    list `label` (the number at the front of the folder's name), `name` and `primary` (false for held-out classes).
    Raises ConfigError if the path does not exist, no class folder holds an image, or classes.json has another shape;
    loading a damaged image raises DocumentError.
    """
    root = Path(path)
    if not root.exists():
        raise ConfigError(f"no images at {root}: give a folder or a zip file with a folder for each class")
    there, read = _zip(root) if root.is_file() else _folder(root)
    members = sorted(name for name in there if Path(name).suffix.lower() in _SUFFIXES and "/" in name and _is_own(name))
    folders = sorted({name.rpartition("/")[0] for name in members})
    if not folders:
        raise ConfigError(f"{root} holds no folder with images: each class needs one")
    above = os.path.commonpath([folder.rpartition("/")[0] for folder in folders])
    listing = f"{above}/classes.json" if above else "classes.json"
    listed = read(listing) if listing in there else None
    try:
        names, is_held_out = _classes(folders, json.loads(listed) if listed else None, root)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{root / listing} is not JSON: {error}") from error
    labels = tuple(folders.index(name.rpartition("/")[0]) for name in members)
    files = [[name, hashlib.sha256(read(name)).hexdigest()] for name in members]
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]

    def load(i: int) -> Any:
        data = read(members[i])
        return decode_image(data, image_format(data) or "JPEG", members[i])

    return Labelled("image", names, is_held_out, labels, tuple(members), load, digest)


Store = tuple[set[str], Callable[[str], bytes]]
"""The names of the files, and what reads a file."""


def _folder(root: Path) -> Store:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix() for path in files}, lambda name: (root / name).read_bytes()


def _zip(path: Path) -> Store:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ConfigError(f"{path} is no zip file: {error}") from error
    return {info.filename for info in archive.infolist() if not info.is_dir()}, archive.read


def _is_own(name: str) -> bool:
    """Whether a file is a set's own: not one that is hidden, or that a Mac put beside it in a zip file."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _classes(folders: Sequence[str], listed: Any, root: Path) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """Names of the classes, and which of them are held out."""
    bare = [_LABEL.sub("", folder.rsplit("/", 1)[-1]).replace("_", " ") for folder in folders]
    if listed is None:
        return tuple(bare), (False,) * len(bare)
    try:
        by_label = {int(row["label"]): (str(row["name"]), not row.get("primary", True)) for row in listed}
        numbers = [re.match(r"\d+", folder.rsplit("/", 1)[-1]) for folder in folders]
        found = [by_label[int(number[0])] for number in numbers]  # type: ignore[index]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the classes.json of {root} does not fit its folders ({type(error).__name__}: {error}): it is a list of "
            "`label`, `name` and `primary`, and a folder's name begins with its label"
        ) from error
    return tuple(name for name, _ in found), tuple(held_out for _, held_out in found)
