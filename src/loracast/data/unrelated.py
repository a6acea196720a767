"""Questions that have nothing to do with any document, for training to leave them alone: JSONL rows with a `question`, and `choices` with the
index of the right one in `answer`, or an `answer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loracast.data.jsonl import each_row
from loracast.errors import ConfigError


def read_unrelated(paths: Sequence[str]) -> list[tuple[str, str]]:
    """(question, answer) of all rows; where a row has choices, once with and once without a list of them.

    Raises:
        ConfigError: a file is not there, or a row is of another shape.
    """
    pairs: list[tuple[str, str]] = []

    def take(row: dict[str, Any]) -> None:
        asked = row["question"]
        if "choices" in row:
            answer = row["choices"][row["answer"]]
            listed = "\n".join(f"- {choice}" for choice in row["choices"])
            pairs.extend([(asked, answer), (f"{asked}\n{listed}", answer)])
        else:
            pairs.append((asked, str(row["answer"])))

    for path in map(Path, paths):
        if not path.is_file():
            raise ConfigError(f"no such file of questions: {path}")
        each_row(path, take)
    return pairs
