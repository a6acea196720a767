"""Rows of JSONL files, gzipped or not."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loracast.errors import ConfigError


def each_row(path: Path, take: Callable[[dict[str, Any]], None]) -> None:
    """Hand every row of a JSONL file, gzipped or not, to `take`.

    Raises:
        ConfigError: the file cannot be read, or `take` cannot take a row, which is named by its line.
    """
    opener: Callable = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                number += 1
                take(json.loads(line))
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
