"""Make questions and answers about passages, and filter out the bad ones.

A writer is asked twice: for questions that a passage answers, and then for harder, different ones. A question is kept
if the same writer repeats its answer when shown the passage, and does not give it without the passage. Rule-made
questions need no writer.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loracast.base.chat import Message
from loracast.data.answer_metrics import token_f1
from loracast.data.questions.answers import find_answer
from loracast.data.questions.cloze import make_clozes
from loracast.data.questions.writers import Writer
from loracast.documents import Document
from loracast.errors import ConfigError

_LINE = re.compile(
    r"^\W*(?:\d+[.)]\s*)?(?:q(?:uestion)?\s*\d*\s*[:.][\s*]*)?(?P<question>[^?\n]{8,200}\?)(?P<rest>.*)$", re.IGNORECASE
)
_ANSWER = re.compile(r"^\W*(?:a(?:nswer)?\s*\d*\s*[:.][\s*]*)?(?P<answer>.+)$", re.IGNORECASE)
_EXAMPLE = (
    "The Hartwell Bridge was opened in 1897 and is 312 metres long. "
    "It was designed by Clara Menzies, who had built two lighthouses before.",
    "Q: When was the Hartwell Bridge opened?\nA: 1897\nQ: Who designed the bridge?\nA: Clara Menzies",
)
_AGREES = 0.6  # token F1 from which two answers count as the same; "24 miles" and "30 miles" have 0.5
_SAME_QUESTION = 0.7  # share of common words from which two questions count as the same
_LONGEST_ANSWER_WORDS = 20
_TOKENS_OF_A_PAIR = 40


@dataclass(frozen=True)
class MakeConfig:
    """Settings of `loracast make-questions`."""

    per_passage: int = 5
    """Most questions of each level about one passage."""
    levels: int = 2
    """1 asks for questions that the passage answers; 2 then also for harder, different ones."""
    seed: int = 0
    """Seed of rule-made questions."""

    def __post_init__(self) -> None:
        if self.per_passage < 1 or self.levels not in (1, 2):
            raise ConfigError("per_passage must be at least 1, and levels 1 or 2")


@dataclass(frozen=True)
class Made:
    """A question that is kept."""

    question: str
    answers: tuple[str, ...]
    span: bool
    level: int


@dataclass
class Tally:
    """Counts of the questions that were kept and dropped."""

    kept: int = 0
    repeated: int = 0  # another question asks the same
    not_answerable: int = 0  # the writer, shown the passage, gives another answer
    known_anyway: int = 0  # the writer gives the same answer without the passage


@dataclass(frozen=True)
class Passage:
    """A piece of a file to ask about."""

    doc_id: str
    title: str
    text: str


def passages_of(document: Document, split: Callable[[str], Sequence[str]]) -> list[Passage]:
    """A document's passages, with ids from its file name and their text, so a changed passage gets new questions."""
    name = document.file_name or "document"
    return [
        Passage(f"{name}#{hashlib.sha256(text.encode()).hexdigest()[:12]}", document.title, text)
        for text in split(document.text)
    ]


def make_questions(
    passages: Sequence[Passage],
    out: Path,
    writer: Writer | None,
    config: MakeConfig = MakeConfig(),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tally:
    """Append a row of questions for each passage to a JSONL file; passages that it has already are skipped.

    The writer writes and answers the questions; without one they are made by rule.
    """
    known = {row["doc_id"] for row in _rows(out)}
    tally = Tally()
    todo = [passage for passage in passages if passage.doc_id not in known]
    with open(out, "a", encoding="utf-8") as file:
        for done, passage in enumerate(todo, start=1):
            made = _by_rule(passage, config, tally) if writer is None else _written(passage, writer, config, tally)
            row = {
                "doc_id": passage.doc_id,
                "source": "self-made",
                "title": passage.title,
                "document": passage.text,
                "made_by": "rule" if writer is None else writer.name,
                "questions": [asdict(one) for one in made],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            progress(done, len(todo))
    return tally


def _rows(out: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; an incomplete last line, which a killed run leaves, is removed from it."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        return
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        out.write_bytes(whole)
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            row["doc_id"], row["questions"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{out}, line {number}, is not a row of questions ({error!r}); give another --out"
            ) from error
        yield row


def _by_rule(passage: Passage, config: MakeConfig, tally: Tally) -> list[Made]:
    rng = random.Random(f"{config.seed}/{passage.doc_id}")
    clozes = make_clozes(rng, passage.text, config.per_passage)
    tally.kept += len(clozes)
    return [Made(cloze.question, (cloze.answer,), True, 0) for cloze in clozes]


def _written(passage: Passage, writer: Writer, config: MakeConfig, tally: Tally) -> list[Made]:
    kept: list[Made] = []
    for level in range(1, config.levels + 1):
        order = _ask_for(passage.text, config.per_passage, kept if level == 2 else ())
        for question, answer in parse(writer.write(order, config.per_passage * _TOKENS_OF_A_PAIR))[
            : config.per_passage
        ]:
            if any(_alike(question, other.question) for other in kept):
                tally.repeated += 1
            elif token_f1(writer.write(_answer_with(passage.text, question), _TOKENS_OF_A_PAIR), answer) < _AGREES:
                tally.not_answerable += 1
            elif token_f1(writer.write(_answer_with(None, question), _TOKENS_OF_A_PAIR), answer) >= _AGREES:
                tally.known_anyway += 1
            else:
                is_span = find_answer(passage.text, question, (answer,)) is not None
                kept.append(Made(question, (answer,), is_span, level))
                tally.kept += 1
    return kept


def _ask_for(text: str, n: int, known: Sequence[Made]) -> list[Message]:
    """The conversation that asks for questions, with an example, which small models follow better than instructions."""
    first = "Write {} questions that the text answers, each with its short answer."
    order = first.format(n)
    if known:
        listed = "\n".join(f"- {one.question}" for one in known)
        order = (
            f"Write {n} harder questions about the text, each with its short answer. "
            f"They must ask for something else than these:\n{listed}"
        )
    example, answered = _EXAMPLE
    return [
        {"role": "user", "content": f"{example}\n\n{first.format(2)}"},
        {"role": "assistant", "content": answered},
        {"role": "user", "content": f"{text}\n\n{order}"},
    ]


def _answer_with(text: str | None, question: str) -> list[Message]:
    """The conversation that asks a question, with the passage or without it."""
    example, _ = _EXAMPLE
    shown, before = (f"{text}\n\n", f"{example}\n\n") if text is not None else ("", "")
    return [
        {"role": "user", "content": f"{before}Question: Who designed the Hartwell Bridge?\nShort answer:"},
        {"role": "assistant", "content": "Clara Menzies"},
        {"role": "user", "content": f"{shown}Question: {question}\nShort answer:"},
    ]


def parse(text: str) -> list[tuple[str, str]]:
    """Parse a writer's text into (question, answer) pairs; an answer follows its question, perhaps on the next line."""
    pairs: list[tuple[str, str]] = []
    waiting: str | None = None
    for line in filter(None, map(str.strip, text.splitlines())):
        asked = _LINE.match(line)
        if asked:
            waiting, line = asked["question"].strip(), asked["rest"].strip()
        answered = _ANSWER.match(line) if line else None
        if waiting is not None and answered:
            answer = answered["answer"].strip().rstrip(".")
            if answer and len(answer.split()) <= _LONGEST_ANSWER_WORDS:
                pairs.append((waiting, answer))
            waiting = None
    return pairs


def _alike(one: str, other: str) -> bool:
    a, b = (set(re.findall(r"\w+", text.lower())) for text in (one, other))
    return len(a & b) >= _SAME_QUESTION * min(len(a), len(b))
