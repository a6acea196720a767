"""Labelled images, from a folder or a zip file with a folder for each class."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracast.documents.images import decode_image, image_format
from loracast.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
Place = Path | zipfile.Path
"""A file or folder on the disk or in a zip file."""


@dataclass(frozen=True)
class Labelled:
    """Images with class labels; an image is loaded when it is needed."""

    names: tuple[str, ...]  # of the classes
    labels: tuple[int, ...]  # the class of each image
    files: tuple[Any, ...]  # each a Place

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, i: int) -> Image:
        """An image in RGB. Raises DocumentError if it is damaged."""
        data = self.files[i].read_bytes()
        return decode_image(data, image_format(data) or "JPEG", self.files[i].name)


def read_images(path: str | Path) -> Labelled:
    """Read a labelled set of images: a folder or a zip file, with a folder for each class.

    Folders are named after their classes ("golden retriever", "01_golden_retriever"). Raises ConfigError if there are
    none with images.
    """
    try:
        root: Place = zipfile.Path(path) if Path(path).is_file() else Path(path)
        files = sorted((file for one in root.iterdir() if one.is_dir() for file in _images(one)), key=str)
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"there are no images at {path}: give a folder or a zip file ({error})") from error
    classes = [re.sub(r"^\d+[_-]", "", file.parent.name).replace("_", " ") for file in files]
    if not classes:
        raise ConfigError(f"{path} holds no folder with images: each class needs one")
    names = tuple(sorted(set(classes)))
    return Labelled(names, tuple(map(names.index, classes)), tuple(files))


def _images(folder: Any) -> Iterator[Any]:
    """The images below a folder, but those that are hidden, or that a Mac put beside them in a zip file."""
    for one in folder.iterdir():
        if one.is_dir():
            yield from _images(one)
        elif Path(one.name).suffix.lower() in _SUFFIXES and not one.name.startswith("."):
            yield one
