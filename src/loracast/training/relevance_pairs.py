"""Draw documents with questions about them and with questions about something else, to fit library/relevance.py.

Documents are fact sheets, everyday documents, prose with needles, and real texts, alone or many in one. Questions that
are not about them are unrelated questions, small talk, questions about other texts, and near misses: those about
another product's sheet, another needle, or another part of the same article.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from loracast.data.everyday import EverydayDocument, make_document
from loracast.data.facts import FactSheet, make_sheet
from loracast.data.needles import hide, make_needles, sentences
from loracast.data.qa import QuestionedDocument
from loracast.data.rows import read_content

Split = Literal["train", "dev", "test"]

SHARES = {
    "sheet": 0.1,
    "everyday": 0.1,
    "needle": 0.04,
    "text": 0.23,
    "unnamed": 0.03,
    "any document": 0.01,
    "unrelated": 0.2,
    "another sheet": 0.1,
    "another everyday": 0.02,
    "another needle": 0.03,
    "another text": 0.1,
    "same article": 0.05,
}
"""Groups of questions, and what each counts in the fit."""
ABOUT = frozenset({"sheet", "everyday", "needle", "text", "unnamed", "any document"})
"""The groups of questions that are about their document."""

_N_SHEETS = {"train": 1000, "dev": 250, "test": 250}
_N_SINGLE = {"train": 300, "dev": 100, "test": 100}  # sheets about one subject, which a question need not name
_N_EVERYDAY = {"train": 1000, "dev": 250, "test": 250}
_N_NEEDLES = {"train": 500, "dev": 120, "test": 120}
_MOST_TEXTS = 2000  # of one source
_LENGTHS = (1,) * 12 + (4,) * 6 + (16,) * 4 + (64,) * 2 + (256,)  # texts in one document
_P_LOWER = 0.3  # of training questions in lower case, as many people write


class Pair(NamedTuple):
    """A question put to a document: its group (a key of SHARES) and, where it says more, which source it is from."""

    question: str
    group: str
    source: str = ""

    @property
    def is_about(self) -> bool:
        """Whether the question is about the document."""
        return self.group in ABOUT


@dataclass(frozen=True)
class Asked:
    """A document with questions."""

    text: str
    title: str
    pairs: tuple[Pair, ...]


def draw_asked(
    rng: random.Random,
    documents: Sequence[QuestionedDocument],
    unrelated: Mapping[str, Sequence[str]],
    split: Split,
) -> Iterator[Asked]:
    """Draw documents, each with questions of several groups; `unrelated` has the unrelated questions by their file."""
    talk = read_content("small_talk")
    files = sorted(unrelated)
    for drawn in (_sheets(rng, split), _everyday(rng, split), _needles(rng, documents, split), _texts(rng, documents)):
        for asked in drawn:
            drawn_files = rng.choices(files, k=2)
            pairs = [Pair(rng.choice(unrelated[file]), "unrelated", file) for file in drawn_files]
            pairs.append(Pair(rng.choice(talk[split]), "unrelated", "small talk"))
            if rng.random() < 0.2:
                pairs.append(Pair(rng.choice(talk[f"any_document_{split}"]), "any document"))
            pairs = [*asked.pairs, *pairs]
            if split == "train":
                pairs = [
                    pair._replace(question=pair.question.lower()) if rng.random() < _P_LOWER else pair for pair in pairs
                ]
            yield replace(asked, pairs=tuple(pairs))


def _sheets(rng: random.Random, split: Split) -> Iterator[Asked]:
    def draw(n_facts: int, n_subjects: int | None = None) -> FactSheet:
        return make_sheet(rng, n_facts, split=split, n_subjects=n_subjects)

    sheets = [draw(rng.randint(5, 22) if split == "train" else 20) for _ in range(_N_SHEETS[split])]
    sheets += [draw(rng.randint(5, 10), 1) for _ in range(_N_SINGLE[split])]
    by_domain: dict[frozenset[str], list[FactSheet]] = defaultdict(list)
    for sheet in sheets:
        by_domain[_domains(sheet)].append(sheet)
    for sheet in sheets:
        facts = rng.sample(sheet.facts, min(4, len(sheet.facts)))
        pairs = [Pair(fact.question, "sheet") for fact in facts]
        subjects = {fact.subject for fact in sheet.facts}
        if len(subjects) == 1:
            unnamed = [fact.question.replace(fact.subject, "it") for fact in facts if fact.subject in fact.question]
            pairs += [Pair(question, "unnamed") for question in unnamed[:2]]
        other = rng.choice(by_domain[_domains(sheet)])
        if subjects.isdisjoint(fact.subject for fact in other.facts):
            near = rng.sample(other.facts, min(4, len(other.facts)))
            pairs += [Pair(fact.question, "another sheet") for fact in near]
        other = rng.choice(sheets)
        if _domains(sheet).isdisjoint(_domains(other)):
            pairs += [Pair(fact.question, "another text", "sheet") for fact in rng.sample(other.facts, 2)]
        yield Asked(sheet.text, sheet.title, tuple(pairs))


def _domains(sheet: FactSheet) -> frozenset[str]:
    return frozenset(fact.attribute.split(".")[0] for fact in sheet.facts)


def _everyday(rng: random.Random, split: Split) -> Iterator[Asked]:
    documents = [make_document(rng, split=split) for _ in range(_N_EVERYDAY[split])]
    by_genre: dict[str, list[EverydayDocument]] = defaultdict(list)
    for document in documents:
        by_genre[document.genre].append(document)
    for document in documents:
        answered = [fact for fact in document.facts if fact.kind != "not said"]
        pairs = [Pair(fact.question, "everyday") for fact in rng.sample(answered, min(4, len(answered)))]
        others = [fact for fact in rng.choice(by_genre[document.genre]).facts if fact.kind in ("span", "yes/no")]
        named = [fact for fact in others if fact.subject.lower() in fact.question.lower()]
        near = [fact for fact in named if fact.subject.lower() not in document.text.lower()]
        pairs += [Pair(fact.question, "another everyday") for fact in rng.sample(near, min(2, len(near)))]
        other = rng.choice(documents)
        if other.genre != document.genre:
            pairs.append(Pair(rng.choice(other.facts).question, "another text", "everyday"))
        yield Asked(document.text, document.title, tuple(pairs))


def _needles(rng: random.Random, documents: Sequence[QuestionedDocument], split: Split) -> Iterator[Asked]:
    prose = [pieces for document in documents if len(pieces := sentences(document.text)) >= 3]
    for _ in range(_N_NEEDLES[split]):
        needles = make_needles(rng, rng.randint(3, 6), split=split)
        there, absent = needles[2:], needles[:2]
        around = [sentence for _ in range(rng.choice((1, 3, 8, 20))) for sentence in rng.choice(prose)]
        text = " ".join(hide([needle.statement for needle in there], around, [rng.random() for _ in there]))
        pairs = [Pair(needle.question, "needle") for needle in there]
        yield Asked(text, "", (*pairs, *(Pair(needle.question, "another needle") for needle in absent)))


def _texts(rng: random.Random, documents: Sequence[QuestionedDocument]) -> Iterator[Asked]:
    by_source: dict[str, list[QuestionedDocument]] = defaultdict(list)
    for document in documents:
        by_source[document.source].append(document)
    for source, texts in sorted(by_source.items()):
        for start in rng.sample(range(len(texts)), min(_MOST_TEXTS, len(texts))):
            yield _joined(rng, source, texts, start, rng.choice(_LENGTHS))


def _joined(rng: random.Random, source: str, texts: Sequence[QuestionedDocument], start: int, n: int) -> Asked:
    """`n` texts of a source, from `start` on, as one document."""
    own = texts[start : start + n]
    text, titles = "\n\n".join(one.text for one in own), {one.title for one in own}
    kind = f"{source}{f', {n} texts' if n > 1 else ''}"
    pairs = []
    for one in rng.sample(own, min(3, len(own))):
        questions = rng.sample(one.questions, min(3, len(one.questions)))
        pairs += [Pair(question.question, "text", kind) for question in questions]
    for other in rng.sample(texts, min(3, len(texts))):
        if other.title not in titles - {""} and other.text not in text:
            question = rng.choice(other.questions).question
            pairs.append(Pair(question, "another text", kind))
    siblings = [one for one in texts if one.title and one.title in titles and one.text not in text]
    for other in rng.sample(siblings, min(2, len(siblings))):
        asked = rng.choice(other.questions)
        if not any(answer.lower() in text.lower() for answer in asked.answers):
            pairs.append(Pair(asked.question, "same article", kind))
    title = own[0].title if len(titles) == 1 and rng.random() < 0.5 else ""
    return Asked(text, title, tuple(pairs))
