"""Read questions that are unrelated to any document: training holds their answers to those of the plain base.

A JSONL row has a `question` and an `answer`; or `choices`, with the index of the right one in `answer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loracast.data.rows import each_row


def read_unrelated(paths: Sequence[str]) -> list[tuple[str, str]]:
    """The (question, answer) pairs of all rows; a row with choices gives two, one of which lists them.

    Raises:
        ConfigError: a file does not exist, or a row is malformed.
    """
    pairs: list[tuple[str, str]] = []

    def take(row: dict[str, Any]) -> None:
        question = row["question"]
        if "choices" in row:
            answer = row["choices"][row["answer"]]
            listed = "\n".join(f"- {choice}" for choice in row["choices"])
            pairs.extend([(question, answer), (f"{question}\n{listed}", answer)])
        else:
            pairs.append((question, str(row["answer"])))

    for path in paths:
        each_row(Path(path), take, "questions")
    return pairs
