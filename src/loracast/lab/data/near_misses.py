"""Make questions that a document nearly answers: for another name, a sentence that was taken out, or its other part.

Everything is made from a document with questions that it answers: an everyday one, a table, a correction, or one about
which people asked (`as_everyday`). What is called not said is certainly not: neither the answer nor, of several words,
one that is a name or a number stands in the text, and none of the words of a swapped name does. People's answers
without a name or number may be said in other words, so the sentences with these are not taken for their only ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal, NamedTuple

from loracast.answering.answers import NOT_SAID
from loracast.documents.tables import ROW, take_marks
from loracast.documents.units import sentence_spans
from loracast.lab.data.everyday import EverydayDocument, EverydayFact
from loracast.lab.data.questions import STOP_WORDS, find_answer
from loracast.lab.data.rows import QuestionedDocument
from loracast.text import terms_of

Why = Literal["other name", "taken out", "other part"]
"""Why a question is not answered: the first words of its fact's attribute."""

MAX_SWAPPED = 4  # questions of a document with another name
MAX_TAKEN_OUT = 3  # questions whose answers are taken out of one text
MAX_UNITS = 3  # an answer that more units than this hold is not taken out
MIN_UNITS = 2  # of what is left of a text
N_OTHERS = 12  # documents from which names are taken
N_TRIES = 20  # draws for a name that a text does not hold

_NAME = re.compile(r"(?<=[\w,;:\"'(] )[\"']?(?P<name>[A-Z][\w'’-]*[a-z]\w*(?: [A-Z][\w'’-]*[a-z]\w*)*)")
_NUMBER = re.compile(r"(?<!\S)[\"'(]?(?P<name>[A-Za-z]{0,4}[-/]?\d(?:[\w.,:/-]*\w)?)")

_IS_NAMED = re.compile(r"\d| [A-Z]|^[A-Z]\S*$")  # an answer that is, or has, a name or a number


def as_everyday(document: QuestionedDocument) -> EverydayDocument:
    """A document about which people asked, with the questions whose answers stand in it."""
    facts = []
    for asked in document.spans:
        if found := find_answer(document.text, asked.question, asked.answers):
            fact = EverydayFact("span", "", "", asked.question, found.value, found.statement, found.value_at)
            facts.append(replace(fact, also_right=asked.answers))
    return EverydayDocument(document.source, document.title, document.text, tuple(facts))


def make_near_misses(
    rng: random.Random, document: EverydayDocument, others: Sequence[EverydayDocument]
) -> list[EverydayDocument]:
    """The document with questions for other names, without some sentences, and a part of it: those that can be made.

    Each has the questions that it still answers beside those that it does not.

    Args:
        others: documents of the same kind and split; names are taken from the questions of some.
    """
    made = (swap_names(rng, document, others), take_out(rng, document), keep_part(rng, document))
    return [one for one in made if one is not None]


def swap_names(
    rng: random.Random, document: EverydayDocument, others: Sequence[EverydayDocument]
) -> EverydayDocument | None:
    """The document with some questions asked anew for a name or number of another one; None if none can be."""
    known = terms_of(_whole(document))
    some = rng.sample(others, min(N_OTHERS, len(others)))
    names = {name for other in some for fact in other.facts for name in _names(fact, other)}
    swapped: list[EverydayFact] = []
    for fact in rng.sample(spans := _spans(document), len(spans)):
        found = list(_names(fact, document))
        if not found or len(swapped) == MAX_SWAPPED:
            continue
        before, name, shape = rng.choice(sorted(found))
        alike = sorted(one for its_before, one, its_shape in names if (its_before, its_shape) == (before, shape))
        for other in rng.sample(alike, min(N_TRIES, len(alike))):
            question = other.join(re.split(rf"(?<!\w){re.escape(name)}(?!\w)", fact.question))
            if not terms_of(other) & known and all(question != one.question for one in swapped):
                swapped.append(_not_said(replace(fact, subject=other, question=question), "other name"))
                break
    return replace(document, facts=(*document.facts, *swapped)) if swapped else None


def take_out(rng: random.Random, document: EverydayDocument) -> EverydayDocument | None:
    """The document without the sentences or rows that answer some of its questions; None if none can be taken out."""
    units = sentence_spans(document.text, document.rows)
    pieces = [_Piece.of(document.text[slice(*unit)]) for unit in units]
    dropped: set[int] = set()
    for fact in rng.sample(spans := _spans(document), min(rng.randint(1, MAX_TAKEN_OUT), len(spans))):
        holding = {i for i, piece in enumerate(pieces) if _may_answer(piece, fact)}
        dropped |= holding if len(holding) <= MAX_UNITS else set()
    return _left(document, [i for i in range(len(units)) if i not in dropped], units, "taken out")


def keep_part(rng: random.Random, document: EverydayDocument) -> EverydayDocument | None:
    """The first or the last part of the document; None if every question that it does not answer might be answered."""
    units = sentence_spans(document.text, document.rows)
    cut = rng.randint(len(units) // 4, len(units) * 3 // 4)
    is_first = rng.random() < 0.5
    return _left(document, range(cut) if is_first else range(cut, len(units)), units, "other part")


def _left(
    document: EverydayDocument, kept: Sequence[int], units: Sequence[tuple[int, int]], why: Why
) -> EverydayDocument | None:
    """What is left of a document: some of its units with the blanks between them, and the questions for them."""
    if not MIN_UNITS <= len(kept) < len(units):
        return None
    text, end, last = document.text, 0, -1
    pieces: list[str] = []
    for i in kept:
        blanks = [text[units[j - 1][1] if j else 0 : units[j][0]] for j in range(last + 1, i + 1)]
        start, end = units[i]
        pieces += [max(blanks, key=len) if pieces else "", ROW if start in document.rows else "", text[start:end]]
        last = i
    left, rows = take_marks("".join(pieces))
    said = [_Piece.of(one) for one in (document.title, *(left[slice(*unit)] for unit in sentence_spans(left, rows)))]
    facts = [fact for fact in document.facts if fact.kind == "not said"]
    missed: list[EverydayFact] = []
    for fact in _spans(document):
        if left.count(fact.statement) == 1:
            facts.append(fact)
        elif (not fact.also_right or _IS_NAMED.search(fact.answer)) and not any(
            _may_answer(piece, fact) for piece in said
        ):
            missed.append(_not_said(fact, why))
    shorter = replace(document, text=left, rows=rows, facts=(*missed, *facts), unasked=())
    return shorter if missed else None


def _spans(document: EverydayDocument) -> list[EverydayFact]:
    return [fact for fact in document.facts if fact.kind == "span"]


def _whole(document: EverydayDocument) -> str:
    return f"{document.title}\n\n{document.text}"


def _not_said(fact: EverydayFact, why: Why) -> EverydayFact:
    attribute = f"{why}: {fact.attribute}"
    return EverydayFact("not said", fact.subject, attribute, fact.question, NOT_SAID)


class _Piece(NamedTuple):
    """A piece of a text in small letters, and its words."""

    lowered: str
    words: frozenset[str]

    @classmethod
    def of(cls, text: str) -> _Piece:
        return cls(text.lower(), terms_of(text))


def _may_answer(piece: _Piece, fact: EverydayFact) -> bool:
    """Whether a piece of a text might answer: it has all words of a right or an older answer, or a name of it."""
    return any(
        answer.lower() in piece.lowered or _words(answer) <= piece.words or _telling(answer) & piece.words
        for answer in (fact.answer, *fact.also_right, *fact.options)
    )


@lru_cache(1_000)
def _words(answer: str) -> frozenset[str]:
    return terms_of(answer) - STOP_WORDS or terms_of(answer)


@lru_cache(1_000)
def _telling(answer: str) -> frozenset[str]:
    """The words of an answer that are names or numbers."""
    return terms_of(" ".join(re.findall(r"\b[A-Z]\S*|\S*\d\S*", answer))) - STOP_WORDS


def _names(fact: EverydayFact, document: EverydayDocument) -> Iterator[tuple[str, str, str]]:
    """The names and numbers of a question that stand in its document: the word or digit before it, it, and its shape.

    The shape of a name is how many words it has, of a number its letters and digits. A word that the document also has
    in small letters is no name, nor is that of a column, which other documents may call otherwise.
    """
    text, question = _whole(document), fact.question
    for pattern in (_NAME, _NUMBER):
        for found in pattern.finditer(question):
            name = found["name"].removesuffix("'s").removesuffix("’s")
            shape = re.sub(r"\d", "0", re.sub(r"[A-Za-z]", "A", name)) if pattern is _NUMBER else f"{name.count(' ')}"
            is_name = pattern is _NUMBER or not (_has_word(text, name.lower()) or name in fact.attribute)
            if name in text and is_name:
                before = re.findall(r"[^\W\d]+|\d", question[: found.start("name")])[-1:]
                yield re.sub(r"\d", "0", "".join(before)).lower(), name, shape


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None
