"""Natural text to train and measure on: JSONL files, gzipped or not, or plain files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from loracast.errors import ConfigError


def read_texts(paths: Sequence[str], sources: Sequence[str] = ()) -> list[str]:
    """The texts of files: `text` or `document` of JSONL rows, or a whole plain file.

    Args:
        sources: of rows with a `source` field, take only these, all if empty.

    Raises:
        ConfigError: no file is given, or one is not there.
    """
    if not paths:
        raise ConfigError("prose is needed for needles to hide in: give at least one file (--texts FILE)")
    return [text for path in paths for text in _read(Path(path), sources)]


def _read(path: Path, sources: Sequence[str]) -> Iterator[str]:
    if not path.is_file():
        raise ConfigError(f"no such file of texts: {path}; give a JSONL or plain text file with --texts")
    if ".jsonl" not in path.name:
        yield path.read_text(encoding="utf-8")
        return
    opener: Callable = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if not sources or row.get("source") in sources:
                yield row["text"] if "text" in row else row["document"]
