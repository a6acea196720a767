"""Documents with questions about them: JSONL rows of `document` and `questions`, to train and measure on.

A row has `document`, `questions` (each with `question`, `answers`, and optionally `span` and `choices`), and optionally `doc_id`, `source`,
`title` and `split`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracast.errors import ConfigError


@dataclass(frozen=True)
class DocumentQuestion:
    """A question about a document, with all answers that count as right, the preferred one first."""

    question: str
    answers: tuple[str, ...]
    is_span: bool = False
    """Whether an answer stands in the document, whatever its case."""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuestionedDocument:
    """A text and what is asked about it."""

    doc_id: str
    text: str
    questions: tuple[DocumentQuestion, ...]
    title: str = ""
    source: str = ""


def read_questioned(
    paths: Sequence[str], sources: Sequence[str] = (), split: str | None = None
) -> list[QuestionedDocument]:
    """The documents of files that have questions.

    Args:
        sources: of rows with a `source` take only these, all if empty.
        split: of rows with a `split` take only this one.

    Raises:
        ConfigError: a file is not there, a row is not of this shape, or nothing is left.
    """
    documents = [document for path in paths for document in _read(Path(path), sources, split)]
    if not documents:
        of_which = f" of the sources {', '.join(sources)}" if sources else ""
        raise ConfigError(f"no document with questions{of_which} in {', '.join(map(str, paths)) or 'no file'}")
    return documents


def _read(path: Path, sources: Sequence[str], split: str | None) -> Iterator[QuestionedDocument]:
    if not path.is_file():
        raise ConfigError(f"no such file of documents with questions: {path}")
    opener: Callable = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if (sources and row.get("source") not in sources) or (split and row.get("split", split) != split):
                    continue
                document = _document(row, f"{path.name}:{number}")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{path}, line {number}: not a row with `document` and `questions` ({error!r}); each question "
                    "has `question` and `answers`"
                ) from error
            if document.questions:
                yield document


def _document(row: Mapping[str, Any], default_id: str) -> QuestionedDocument:
    questions = tuple(
        DocumentQuestion(
            asked["question"], tuple(asked["answers"]), bool(asked.get("span")), tuple(asked.get("choices") or ())
        )
        for asked in row["questions"]
        if asked["answers"]
    )
    return QuestionedDocument(
        str(row.get("doc_id", default_id)), row["document"], questions, row.get("title") or "", row.get("source") or ""
    )
