"""Read documents with questions about them, to train and evaluate on: JSONL rows of `document` and `questions`.

A question has `question`, `answers`, and optionally `span` and `choices`. A row may also have `doc_id`, `source`,
`title` and `split`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from loracast.data.rows import each_row, local_file
from loracast.errors import ConfigError


@dataclass(frozen=True)
class DocumentQuestion:
    """A question about a document, with all answers that count as right, the preferred one first."""

    question: str
    answers: tuple[str, ...]
    is_span: bool = False  # whether an answer stands in the document, ignoring case
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuestionedDocument:
    """A text with questions about it."""

    doc_id: str
    text: str
    questions: tuple[DocumentQuestion, ...]
    title: str = ""
    source: str = ""

    @property
    def full_text(self) -> str:
        """The text under its title."""
        return f"{self.title}\n\n{self.text}" if self.title else self.text

    @property
    def spans(self) -> list[DocumentQuestion]:
        """The questions whose answers stand in the document."""
        return [question for question in self.questions if question.is_span]


def read_questioned(
    paths: Sequence[str], sources: Sequence[str] = (), split: str | None = None
) -> list[QuestionedDocument]:
    """Read the documents of files that have questions, of rows with a `source` or `split` only the ones asked for.

    Raises ConfigError if a file does not exist, a row is malformed, or nothing is left.
    """
    documents: list[QuestionedDocument] = []
    for path in map(local_file, paths):
        ids = map(f"{path.name}:{{}}".format, count(1))

        def take(row: dict[str, Any], ids: Iterator[str] = ids) -> None:
            default_id = next(ids)
            if (not sources or row.get("source") in sources) and (not split or row.get("split", split) == split):
                document = _document(row, default_id)
                documents.extend([document] if document.questions else [])

        each_row(path, take, "documents with questions")
    if not documents:
        of_which = f" of the sources {', '.join(sources)}" if sources else ""
        raise ConfigError(f"no document with questions{of_which} in {', '.join(map(str, paths)) or 'no file'}")
    return documents


def _document(row: Mapping[str, Any], default_id: str) -> QuestionedDocument:
    questions = tuple(
        DocumentQuestion(
            given["question"], tuple(given["answers"]), bool(given.get("span")), tuple(given.get("choices") or ())
        )
        for given in row["questions"]
        if given["answers"]
    )
    return QuestionedDocument(
        str(row.get("doc_id", default_id)), row["document"], questions, row.get("title") or "", row.get("source") or ""
    )
