"""`loracast eval everyday`: e-mails, contracts, recipes, price lists and others, with questions that a reader has.

Layouts, wordings and entities are those of a split that no training sees. An answer is right where it contains the
right one: an answer to choose from is the first of its options that is named, and a question that the document does
not answer is answered right by saying so. A document is cast once, and all baselines answer all of its questions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from loracast.answering.model import Model
from loracast.lab.data.answer_metrics import find_value, has_value
from loracast.lab.data.everyday import KINDS, EverydayDocument, EverydayFact, load_genres, make_document
from loracast.lab.evaluation.documents import DocumentCase
from loracast.lab.evaluation.report import (
    Progress,
    Report,
    ReportWriter,
    columns,
    mean_if_any,
    mean_with_interval,
    no_progress,
)
from loracast.lab.evaluation.runner import Answered, InMemoryAdapter, check_positive, grouped
from loracast.lab.evaluation.synthetic import ANSWER_COLUMNS, Series, SyntheticConfig, evaluate_sizes

_DOCUMENTS_PER_GROUP = 8  # whose questions are answered together
_NOT_SAID = ("not say", "not said", "not mention", "not state", "not specif", "no information", "not give")
_COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

COLUMNS = (
    *columns(document_tokens=("tokens", 0), chunks=("chunks", 1)),
    *ANSWER_COLUMNS[:2],
    *columns(right=("right %", "%"), cluster_low=("95 % by document", "interval")),
    *columns(**{kind: (f"{kind} %", "%") for kind in KINDS}),
    *columns(exact=("exact %", "%")),
    *ANSWER_COLUMNS[5:],
)


@dataclass(frozen=True)
class EverydayConfig(SyntheticConfig):
    """What `loracast eval everyday` measures."""

    documents: int = 60
    """Documents, of all genres alike."""
    questions: int = 8
    """Most questions about one document, drawn from all that its genre has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "documents", "questions")


@dataclass(frozen=True, eq=False)
class EverydayCase(DocumentCase):
    """One question about an everyday document."""

    fact: EverydayFact = field(kw_only=True)


def evaluate_everyday(model: Model, config: EverydayConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Run the evaluation; the tables and answers are in `out` at the end."""
    writer = ReportWriter(out, "everyday", COLUMNS, config, model.base, model.documents.id)
    series = [_series(model, config)]
    return evaluate_sizes(model, config, writer, "documents", series, _figures, progress, _line)


def _series(model: Model, config: EverydayConfig) -> Series[EverydayDocument]:
    """The documents of all genres in turn, each with some of its questions."""
    genres = list(load_genres(config.split))

    def make(i: int) -> tuple[EverydayDocument, InMemoryAdapter]:
        rng = random.Random(f"{config.seed}/everyday/{i}")
        drawn = make_document(rng, split=config.split, genre=genres[i % len(genres)])
        facts = rng.sample(drawn.facts, min(config.questions, len(drawn.facts)))
        return replace(drawn, facts=tuple(facts)), config.adapter(model, drawn.text, drawn.title)

    def cases(drawn: EverydayDocument, document: InMemoryAdapter, other: InMemoryAdapter) -> list[DocumentCase]:
        made: list[DocumentCase] = []
        for fact in drawn.facts:
            chunk = None if fact.value_at is None else document.chunk_of(fact.statement, fact.value_at)
            made.append(EverydayCase(document, other, fact.question, (fact.answer,), chunk, fact=fact))
        return made

    return Series(config.documents, config.documents, _DOCUMENTS_PER_GROUP, make, cases)


def says_not_said(answer: str) -> bool:
    """Whether an answer says, in any of several ways, that the document does not say it."""
    return any(phrase in answer.lower().replace("n't", " not") for phrase in _NOT_SAID)


def is_right(answer: str, fact: EverydayFact) -> bool:
    """Whether an answer contains the right one.

    Of the options of a question the first one that the answer names counts; a count may be a word; where a question
    asks how many, the number is enough; and that the document does not say can be said in several ways.
    """
    if fact.kind == "not said":
        return says_not_said(answer)
    if fact.kind == "count":
        return has_value(answer, fact.answer) or has_value(answer, _COUNTS[int(fact.answer)])
    if fact.options:
        places = {option: place for option in fact.options if (place := find_value(answer, option)) is not None}
        return bool(places) and min(places, key=lambda option: places[option]) == fact.answer
    if "how many" in fact.question.lower():
        return has_value(answer, fact.answer.split()[0])
    return has_value(answer, fact.answer)


def _fact(a: Answered[DocumentCase]) -> EverydayFact:
    return cast(EverydayCase, a.case).fact


def _figures(answered: Sequence[Answered[DocumentCase]]) -> dict[str, Any]:
    """The share of right answers with its interval over documents, and by kind of question."""
    documents = grouped(answered, lambda a: a.case.document).values()
    right, low, high = mean_with_interval([[float(is_right(a.text, _fact(a))) for a in some] for some in documents])
    figures: dict[str, Any] = {"documents": len(documents), "right": right, "cluster_low": low, "cluster_high": high}
    for kind in KINDS:
        some = [is_right(a.text, _fact(a)) for a in answered if _fact(a).kind == kind]
        figures |= {kind: mean_if_any(some), f"n {kind}": len(some)}
    return figures


def _line(a: Answered[DocumentCase]) -> dict[str, Any]:
    """What a line of answers.jsonl says besides question and answer."""
    return {"kind": _fact(a).kind, "right": is_right(a.text, _fact(a))}
