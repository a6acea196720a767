"""Read rows of JSONL files, gzipped or not, on this machine or at a URL, and the package's content.

Read documents with questions about them, to train and evaluate on: JSONL rows of `document` and `questions`.

A question has `question`, `answers`, and optionally `span`. A row may also have `doc_id`, `source`,
`title` and `split`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from loracast.errors import ConfigError
from loracast.files import cache_dir


@cache
def read_content(name: str) -> dict[str, Any]:
    """Read a TOML file of data/content, once."""
    return tomllib.loads((files("loracast.lab.data") / "content" / f"{name}.toml").read_text(encoding="utf-8"))


def local_file(name: str) -> Path:
    """The file of that name, or a copy of the one at a URL that fsspec knows: s3://, https://, hf://datasets/, ...

    A copy is kept in the cache, and fetched anew where the file has changed. Raises ConfigError if the URL cannot be
    read.
    """
    if "://" not in name:
        return Path(name)
    import fsspec

    try:
        system, place = fsspec.core.url_to_fs(name)
        version = hashlib.sha256(f"{name} {system.info(place)}".encode()).hexdigest()[:16]
        copy = cache_dir("fetched") / version / PurePosixPath(urlsplit(name).path).name
        if not copy.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            part = copy.with_name(f"{copy.name}.{os.getpid()}.part")  # other processes fetch it at the same time
            system.get_file(place, str(part))
            os.replace(part, copy)
        return copy
    except Exception as error:  # each of these services has errors of its own
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"{name} cannot be read: {said[0]}") from error


def read_rows(path: Path, read: Callable[[dict[str, Any]], Any] = lambda row: row, what: str = "rows") -> list[Any]:
    """What `read` makes of every row of a JSONL file, gzipped or not.

    Raises ConfigError if the file does not exist or cannot be read, or `read` fails on a row (named by its line); the
    message says `what` the file should hold.
    """
    if not path.is_file():
        raise ConfigError(f"no such file of {what}: {path}")
    opener: Callable = gzip.open if path.suffix == ".gz" else open
    found: list[Any] = []
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                number += 1
                found.append(read(json.loads(line)))
        return found
    except KeyError as error:
        raise ConfigError(f"{path}, line {number}: the row needs {error.args[0]!r} (a file of {what})") from error
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}, line {number}: {type(error).__name__}: {error}") from error


def read_texts(paths: Sequence[str], sources: Sequence[str] = ()) -> list[str]:
    """Read natural texts: `text` or `document` of JSONL rows (from `sources`, if any are given), or whole plain files.

    Raises ConfigError if no file is given, one does not exist, a row is malformed, or none is from the sources.
    """
    if not paths:
        raise ConfigError("prose is needed for needles to hide in: give at least one file (--texts FILE)")
    texts: list[str] = []

    def take(row: dict[str, Any]) -> None:
        if not sources or row.get("source") in sources:
            texts.append(row["text"] if "text" in row else row["document"])

    for path in map(local_file, paths):
        if path.is_file() and ".jsonl" not in path.name:
            texts.append(path.read_text(encoding="utf-8"))
        else:
            read_rows(path, take, "texts (JSONL or plain text)")
    if sources and not texts:
        raise ConfigError(
            f"no row of {', '.join(paths)} is of the sources that are asked for ({', '.join(sources)}); an empty list "
            "takes all rows: --set 'data.text_sources=[]'"
        )
    return texts


def read_unrelated(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Read questions that are unrelated to any document: training holds their answers to those of the plain base.

    A row has a `question` and an `answer`; or `choices`, with the index of the right one in `answer`: then it gives two
    (question, answer) pairs, one of which lists the choices. Raises ConfigError as `read_rows`.
    """

    def read(row: dict[str, Any]) -> list[tuple[str, str]]:
        question = row["question"]
        if "choices" not in row:
            return [(question, str(row["answer"]))]
        answer = row["choices"][row["answer"]]
        listed = "\n".join(f"- {choice}" for choice in row["choices"])
        return [(question, answer), (f"{question}\n{listed}", answer)]

    return [pair for path in paths for pairs in read_rows(local_file(path), read, "questions") for pair in pairs]


@dataclass(frozen=True)
class DocumentQuestion:
    """A question about a document, with all answers that count as right, the preferred one first."""

    question: str
    answers: tuple[str, ...]
    is_span: bool = False  # whether an answer stands in the document, ignoring case


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

        read_rows(path, take, "documents with questions")
    if not documents:
        of_which = f" of the sources {', '.join(sources)}" if sources else ""
        raise ConfigError(f"no document with questions{of_which} in {', '.join(map(str, paths)) or 'no file'}")
    return documents


def _document(row: Mapping[str, Any], default_id: str) -> QuestionedDocument:
    questions = tuple(
        DocumentQuestion(given["question"], tuple(given["answers"]), bool(given.get("span")))
        for given in row["questions"]
        if given["answers"]
    )
    return QuestionedDocument(
        str(row.get("doc_id", default_id)), row["document"], questions, row.get("title") or "", row.get("source") or ""
    )
