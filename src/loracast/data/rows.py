"""Read rows of JSONL files, gzipped or not, the texts in them, and the package's own content."""

from __future__ import annotations

import gzip
import json
import tomllib
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from loracast.errors import ConfigError


@cache
def read_content(name: str) -> dict[str, Any]:
    """Read a TOML file of data/content, once."""
    return tomllib.loads((files("loracast.data") / "content" / f"{name}.toml").read_text(encoding="utf-8"))


def each_row(path: Path, take: Callable[[dict[str, Any]], None], what: str = "rows") -> None:
    """Call `take` with every row of a JSONL file, gzipped or not.

    Args:
        what: what the file holds, for the message if it does not exist.

    Raises:
        ConfigError: the file does not exist or cannot be read, or `take` fails on a row (named by its line).
    """
    if not path.is_file():
        raise ConfigError(f"no such file of {what}: {path}")
    opener: Callable = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                number += 1
                take(json.loads(line))
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}, line {number}: {type(error).__name__}: {error}") from error


def read_texts(paths: Sequence[str], sources: Sequence[str] = ()) -> list[str]:
    """Read natural texts: `text` or `document` of JSONL rows, or whole plain files.

    Args:
        sources: of rows with a `source` field, take only these; all if empty.

    Raises:
        ConfigError: no file is given, one does not exist, or a row is malformed.
    """
    if not paths:
        raise ConfigError("prose is needed for needles to hide in: give at least one file (--texts FILE)")
    texts: list[str] = []

    def take(row: dict[str, Any]) -> None:
        if not sources or row.get("source") in sources:
            texts.append(row["text"] if "text" in row else row["document"])

    for path in map(Path, paths):
        if path.is_file() and ".jsonl" not in path.name:
            texts.append(path.read_text(encoding="utf-8"))
        else:
            each_row(path, take, "texts (JSONL or plain text)")
    return texts
