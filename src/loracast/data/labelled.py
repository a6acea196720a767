"""Things that were sensed and what they are: images from a folder or a zip file, signals that are generated."""

from __future__ import annotations

import hashlib
import json
import math
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracast.documents.images import decode_image, image_format
from loracast.errors import ConfigError

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_LABEL = re.compile(r"\d+[_-]")
SIGNAL_STEPS = 256


@dataclass(frozen=True)
class Labelled:
    """n things of some classes, loaded when they are needed."""

    sense: str
    """"image" or "signal"."""
    names: tuple[str, ...]
    """Of the classes, as an answer says them."""
    is_held_out: tuple[bool, ...]
    """By class: kept out of training, to see what is said of things that were never seen."""
    labels: tuple[int, ...]
    """The class of each thing."""
    titles: tuple[str, ...]
    """A name for each thing."""
    load: Callable[[int], Any]
    """Reads one thing, as its encoder takes it."""
    fingerprint: str
    """Hash of which things they are."""

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, spare: bool) -> list[int]:
        """The places of the things whose class is spare, or of those whose class is not."""
        return [i for i, label in enumerate(self.labels) if self.is_held_out[label] == spare]


def read_images(path: str | Path) -> Labelled:
    """A labelled set of images: a folder, or a zip file, with a folder for each class.

    Folders are called after their classes ("golden retriever", "01_golden_retriever"). A `classes.json` beside them may give a list of
    `label` (the number in front of the folder's name), `name` and `primary` (false for spare classes).

    Raises:
        ConfigError: nothing there, no image in a class's folder, or a classes.json of another shape.
        DocumentError: an image is damaged, when it is loaded.
    """
    root = Path(path)
    if not root.exists():
        raise ConfigError(f"no images at {root}: give a folder or a zip file with a folder for each class")
    store = _Zip(root) if root.is_file() else _Folder(root)
    members = sorted(name for name in store.names if Path(name).suffix.lower() in _SUFFIXES and "/" in name)
    folders = sorted({_folder(name) for name in members})
    if not folders:
        raise ConfigError(f"{root} holds no folder with images: each class needs one")
    told = store.read("classes.json") if "classes.json" in store.names else None
    names, is_held_out = _classes(folders, json.loads(told) if told else None, root)
    labels = tuple(folders.index(_folder(name)) for name in members)
    digest = hashlib.sha256(json.dumps([[name, store.size(name)] for name in members]).encode()).hexdigest()[:16]

    def load(i: int) -> Any:
        data = store.read(members[i])
        return decode_image(data, image_format(data) or "JPEG", members[i])

    return Labelled("image", names, is_held_out, labels, tuple(members), load, digest)


class _Folder:
    def __init__(self, root: Path):
        self.root = root
        self.names = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def size(self, name: str) -> int:
        return (self.root / name).stat().st_size


class _Zip:
    def __init__(self, path: Path):
        try:
            self._archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ConfigError(f"{path} is no zip file: {error}") from error
        self.names = {info.filename for info in self._archive.infolist() if not info.is_dir()}

    def read(self, name: str) -> bytes:
        return self._archive.read(name)

    def size(self, name: str) -> int:
        return self._archive.getinfo(name).file_size


def _folder(name: str) -> str:
    return name.rsplit("/", 1)[0]


def _classes(folders: Sequence[str], told: Any, root: Path) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """The classes' names, and which of them are spare."""
    bare = [_LABEL.sub("", folder.rsplit("/", 1)[-1]).replace("_", " ") for folder in folders]
    if told is None:
        return tuple(bare), (False,) * len(bare)
    try:
        by_label = {int(row["label"]): (str(row["name"]), not row.get("primary", True)) for row in told}
        found = [by_label[int(re.match(r"\d+", folder.rsplit("/", 1)[-1])[0])] for folder in folders]  # type: ignore[index]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the classes.json of {root} does not fit its folders ({type(error).__name__}: {error}): it is a list of `label`, `name` and "
            "`primary`, and a folder's name begins with its label"
        ) from error
    return tuple(name for name, _ in found), tuple(spare for _, spare in found)


def make_signals(seed: int, per_class: int, steps: int = SIGNAL_STEPS) -> Labelled:
    """Generated time series of known classes: a wave of some frequency, phase, level and size, with noise on it. Each is [1, steps]."""
    import torch

    waves: dict[str, Callable[[Any, Any], Any]] = {
        "sine wave": lambda turn, at: torch.sin(2 * math.pi * turn),
        "square wave": lambda turn, at: torch.where(turn % 1 < 0.5, 1.0, -1.0),
        "sawtooth wave": lambda turn, at: 2 * (turn % 1) - 1,
        "triangle wave": lambda turn, at: 4 * (turn % 1 - 0.5).abs() - 1,
        "noise": lambda turn, at: torch.zeros_like(turn),
        "single pulse": lambda turn, at: 4 * torch.exp(-(((turn - at) / 0.15) ** 2)),
        "rising tone": lambda turn, at: torch.sin(2 * math.pi * turn * (0.5 + turn / turn[-1])),
        "step": lambda turn, at: torch.where(turn < at, -1.0, 1.0),
    }

    def load(i: int) -> Any:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
        cycles, phase, at, level, size, noise = torch.rand(6, generator=generator).tolist()
        turn = torch.linspace(0, 3 + 7 * cycles, steps) + phase
        wave = waves[names[labels[i]]](turn, turn[0] + (0.2 + 0.6 * at) * (turn[-1] - turn[0]))
        is_noise = names[labels[i]] == "noise"
        rough = torch.randn(steps, generator=generator) * (1.0 if is_noise else 0.05 + 0.25 * noise)
        return (4 * (level - 0.5) + (0.2 + 3 * size) * (wave + rough))[None]

    names = tuple(waves)
    labels = tuple(i % len(names) for i in range(per_class * len(names)))
    titles = tuple(f"{names[label]} {i}" for i, label in enumerate(labels))
    return Labelled("signal", names, (False,) * len(names), labels, titles, load, f"{seed}-{per_class}-{steps}")
