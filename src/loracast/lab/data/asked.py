"""Draw documents with questions for the reader: where each answer begins, that it stands nowhere, or small talk.

Sources are people's questions about texts (files of `read_questioned`), everyday documents, sheets of facts,
tables, corrections and near misses. What a document does not say is asked for, too: by the generated documents' own
questions, and by questions in which a name or a number is swapped for one that the document does not have.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from loracast.documents import Document
from loracast.lab.data.chats import make_chat
from loracast.lab.data.corrections import make_correction
from loracast.lab.data.everyday import EverydayDocument, EverydayFact, load_genres, make_document
from loracast.lab.data.facts import Split, make_sheet
from loracast.lab.data.near_misses import make_near_misses
from loracast.lab.data.questions import find_answer
from loracast.lab.data.rows import QuestionedDocument, read_content
from loracast.lab.data.tables import FORMS, make_table

MAX_QUESTIONS = 12
"""About one document."""
_MAX_CHARACTERS = 9000  # of a text
_P_SWAPPED = 0.35  # of an answered question: a swapped one comes along
_P_LOWER = 0.15  # of a question: it is written in lower case, as many people write
_MAX_OTHERS = 12  # documents from which names and values of near misses come

_CAPITAL = r"[A-Z][\w'’.-]*\w"
_NAME = re.compile(rf"(?<=[\w,] ){_CAPITAL}(?: (?:of |the |and |de )*{_CAPITAL})*")
_NUMBER = re.compile(r"\b\d[\d.,:-]*\b")


@dataclass(frozen=True)
class AskedQuestion:
    """A question put to a document."""

    text: str
    place: tuple[int, int] | None = None
    """The characters in the document's text of the answer, or of the statement that decides it; None: nowhere."""
    is_copied: bool = True
    """Whether the answer begins with the first character of `place`; else the place only says which unit decides it."""


@dataclass(frozen=True)
class AskedDocument:
    """A document and the questions put to it."""

    source: str
    group: str
    """Documents of one group are about the same: paragraphs of an article, sections of a story."""
    document: Document
    questions: tuple[AskedQuestion, ...]


def small_talk(split: Split, n: int = 0, seed: int = 0) -> list[str]:
    """What people say to an assistant that is meant for no document.

    Args:
        n: as many more are made from patterns; only for "train".
    """
    talk, rng = read_content("small_talk"), random.Random(f"{seed}/talk")
    made = set[str]()
    while len(made) < n:
        pattern = rng.choice(talk["train_patterns"])
        said = re.sub(r"{(\w+)}", lambda slot: rng.choice(talk["words"][slot[1]]), pattern)
        made.add(said.lower() if rng.random() < _P_LOWER else said)
    return [*talk[split], *sorted(made)]


def draw_people(documents: Sequence[QuestionedDocument], seed: int) -> Iterator[AskedDocument]:
    """People's questions about texts, those whose answers stand in the text word for word."""
    rng = random.Random(f"{seed}/people")
    for given in documents:
        document = Document.from_text(given.text[:_MAX_CHARACTERS], "")
        asked = [question for question in given.questions if question.is_span]
        found = list[AskedQuestion]()
        for one in rng.sample(asked, min(MAX_QUESTIONS, len(asked))):
            if place := _find(document, one.question, one.answers):
                found.append(AskedQuestion(one.question, place))
        if found:
            yield AskedDocument(given.source, given.title or given.doc_id, document, tuple(found))


def _find(document: Document, question: str, answers: Sequence[str]) -> tuple[int, int] | None:
    found = find_answer(document.text, question, answers)
    if found is None:
        return None
    start = document.text.index(found.value, document.text.index(found.statement) + (found.value_at or 0))
    return start, start + len(found.value)


def _everyday(rng: random.Random, split: Split, number: int) -> EverydayDocument:
    genres = list(load_genres(split))
    return make_document(rng, split=split, genre=genres[number % len(genres)])


def _sheet(rng: random.Random, split: Split, number: int) -> EverydayDocument:
    sheet = make_sheet(rng, rng.choice((5, 10, 20)), split=split)
    facts = [
        EverydayFact(
            "span", fact.subject, fact.attribute, fact.question, fact.answer, fact.statement,
            fact.statement.index(fact.answer),
        )
        for fact in sheet.facts
    ]  # fmt: skip
    return EverydayDocument("sheet", sheet.title, sheet.text, tuple(facts))


def _table(rng: random.Random, split: Split, number: int) -> EverydayDocument:
    """A table in a form whose rows are read as rows."""
    return make_table(rng, split, rng.choice((5, 8, 12, 20, 30)) if split == "train" else 20, form=rng.choice(FORMS))


_MAKERS: Mapping[str, Callable[[random.Random, Split, int], EverydayDocument]] = {
    "everyday": _everyday,
    "sheet": _sheet,
    "correction": lambda rng, split, number: make_correction(rng, split),
    "table": _table,
    "chat": lambda rng, split, number: make_chat(rng, split),
}
KINDS = tuple(_MAKERS)
"""Of generated documents."""


def draw_made(kind: str, n: int, seed: int, split: Split) -> Iterator[AskedDocument]:
    """Generated documents of one of KINDS, with questions, some of them for what they do not say."""
    for i in range(n):
        rng = random.Random(f"{seed}/{kind}/{i}")
        yield from of_facts(kind, i, _MAKERS[kind](rng, split, i), rng)


def draw_near_misses(n: int, seed: int, split: Split) -> Iterator[AskedDocument]:
    """Everyday documents and tables that lack what is asked for; `n` of the former, a quarter as many tables."""
    kinds = ["everyday"] * n + ["table"] * (n // 4)
    whole = [_MAKERS[kind](random.Random(f"{seed}/near/{i}"), split, i) for i, kind in enumerate(kinds)]
    by_genre = defaultdict[str, list[EverydayDocument]](list)
    for one in whole:
        by_genre[one.genre].append(one)
    for i, one in enumerate(whole):
        rng = random.Random(f"{seed}/nearq/{i}")
        others = [other for other in by_genre[one.genre] if other is not one][:_MAX_OTHERS]
        for j, near in enumerate(make_near_misses(rng, one, others)):
            # A group of its own: another one of the same document may say what this one lacks.
            yield from of_facts("near", 3 * i + j, near, rng)


def of_facts(source: str, number: int, drawn: EverydayDocument, rng: random.Random) -> Iterator[AskedDocument]:
    """A generated document with at most MAX_QUESTIONS questions for its facts, if it has any."""
    document, found = drawn.as_document(), list[AskedQuestion]()
    for fact in rng.sample(drawn.facts, min(MAX_QUESTIONS, len(drawn.facts))):
        if fact.kind == "not said":
            found.append(AskedQuestion(fact.question))
        elif (statement := fact.statement or fact.rule) and (at := document.text.find(statement)) >= 0:
            is_copied = fact.kind == "span"
            start = at + (fact.value_at or 0) if is_copied else at
            end = start + len(fact.answer if is_copied else statement)
            found.append(AskedQuestion(fact.question, (start, end), is_copied))
    if found:
        yield AskedDocument(source, f"{source}/{number}", document, tuple(found))


def with_near_misses(drawn: Iterable[AskedDocument], seed: int) -> Iterator[AskedDocument]:
    """Add questions with a name or number swapped, and write some in lower case.

    The new name is one of a question to another document of the source, and stands nowhere in this one.
    """
    rng, seen = random.Random(f"{seed}/swapped"), defaultdict[tuple[str, bool], list[str]](list)
    for one in drawn:
        more = list[AskedQuestion]()
        for question in one.questions:
            if question.place is not None and rng.random() < _P_SWAPPED:
                pools = [seen[one.source, is_number] for is_number in (False, True)]
                text = swapped(rng, question.text, one.document.text, pools)
                more += [AskedQuestion(text)] if text else []
        for question in one.questions:
            for is_number, pattern in enumerate((_NAME, _NUMBER)):
                seen[one.source, bool(is_number)] += pattern.findall(question.text)
        questions = [
            AskedQuestion(q.text.lower(), q.place, q.is_copied) if rng.random() < _P_LOWER else q
            for q in (*one.questions, *more)
        ]
        yield AskedDocument(one.source, one.group, one.document, tuple(questions))


def swapped(rng: random.Random, question: str, text: str, pools: Sequence[Sequence[str]]) -> str | None:
    """A question with one of its names or numbers swapped for one that the text does not have; None where it cannot be.

    Args:
        pools: the names to choose from, and the numbers.
    """
    found = [
        (match, bool(kind)) for kind, pattern in enumerate((_NAME, _NUMBER)) for match in pattern.finditer(question)
    ]
    if not found:
        return None
    match, is_number = rng.choice(found)
    others = pools[is_number]
    for other in rng.choices(others, k=8) if others else []:
        if not set(re.findall(r"\w+", other.lower())) & set(re.findall(r"\w+", text.lower())):
            return question[: match.start()] + other + question[match.end() :]
    return None
