"""Writes an embedded base as a Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from loracast.base.load import DEFAULT_BASE, EMBEDDED, pull
from loracast.errors import BaseModelError


def write_base(name: str | None, out: Path, say: Callable[[str], None] = lambda text: None) -> list[Path]:
    """Copy an embedded base, its GGUF file included, into a folder; returns the files.

    Raises:
        BaseModelError: it is not an embedded one, or the folder is not empty.
    """
    name = name or DEFAULT_BASE
    if name not in EMBEDDED:
        raise BaseModelError(
            f"{name!r} is no embedded base but a folder or hub repository: other programs load it from there"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BaseModelError(f"{out} is there already and not an empty folder; give another one")
    folder = pull(name, say=say)
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        shutil.copyfile(path, out / path.name)
    return sorted(out.iterdir())
