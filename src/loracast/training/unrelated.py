"""Questions that have nothing to do with any document, for training to leave them alone: JSONL rows with a `question`, and `choices` with the
index of the right one in `answer`, or an `answer`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from loracast.errors import ConfigError


def read_unrelated(paths: Sequence[str]) -> list[tuple[str, str]]:
    """(question, answer) of all rows; where a row has choices, once with and once without a list of them.

    Raises:
        ConfigError: a file is not there, or a row is of another shape.
    """
    pairs: list[tuple[str, str]] = []
    for path in map(Path, paths):
        if not path.is_file():
            raise ConfigError(f"no such file of questions: {path}")
        opener: Callable = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line)
                    asked = row["question"]
                    if "choices" in row:
                        answer = row["choices"][row["answer"]]
                        listed = "\n".join(f"- {choice}" for choice in row["choices"])
                        pairs += [(asked, answer), (f"{asked}\n{listed}", answer)]
                    else:
                        pairs.append((asked, str(row["answer"])))
                except (ValueError, KeyError, TypeError, IndexError) as error:
                    raise ConfigError(
                        f"{path}, line {number}: not a row with `question` and `answer` ({error!r})"
                    ) from error
    return pairs
