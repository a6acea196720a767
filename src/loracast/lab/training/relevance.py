"""Fit reading/relevance.py: a table of common word stems, and a regression on pairs of question and document.

Draw documents with questions about them and with questions about something else, to fit reading/relevance.py.

Documents are fact sheets, everyday documents, prose with needles, and real texts, alone or many in one. Questions that
are not about them are unrelated questions, small talk, questions about other texts, and near misses: those about
another product's sheet, another needle, or another part of the same article.

The result is reading/relevance.toml. It depends on the files and this code alone.
"""

from __future__ import annotations

import random
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loracast.documents.chunks import split_text
from loracast.errors import TrainingError
from loracast.files import write_atomically
from loracast.lab.data.everyday import EverydayDocument, make_document
from loracast.lab.data.facts import FactSheet, Split, make_sheet
from loracast.lab.data.needles import hide, make_needles, sentences
from loracast.lab.data.rows import QuestionedDocument, read_content, read_unrelated
from loracast.library.index import write_index
from loracast.reading import relevance
from loracast.reading.relevance import FEATURES, N_FUNCTION, THRESHOLD, WordTable, features

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
_MAX_TEXTS_OF_SOURCE = 2000  # of one source
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
    rng: random.Random, documents: Sequence[QuestionedDocument], unrelated: Mapping[str, Sequence[str]], split: Split
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
            for i, pair in enumerate(pairs):
                if split == "train" and rng.random() < _P_LOWER:
                    pairs[i] = pair._replace(question=pair.question.lower())
            yield replace(asked, pairs=tuple(pairs))


def _sheets(rng: random.Random, split: Split) -> Iterator[Asked]:
    draw = partial(make_sheet, rng, split=split)
    sheets = [draw(rng.randint(5, 22) if split == "train" else 20) for _ in range(_N_SHEETS[split])]
    sheets += [draw(rng.randint(5, 10), n_subjects=1) for _ in range(_N_SINGLE[split])]
    by_domain: dict[frozenset[str], list[FactSheet]] = defaultdict(list)
    for sheet in sheets:
        by_domain[_domains(sheet)].append(sheet)
    for sheet in sheets:
        facts = rng.sample(sheet.facts, min(4, len(sheet.facts)))
        pairs = [Pair(fact.question, "sheet") for fact in facts]
        subjects = {fact.subject for fact in sheet.facts}
        if len(subjects) == 1:
            named = [fact for fact in facts if fact.subject in fact.question]
            pairs += [Pair(fact.question.replace(fact.subject, "it"), "unnamed") for fact in named[:2]]
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
        for start in rng.sample(range(len(texts)), min(_MAX_TEXTS_OF_SOURCE, len(texts))):
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


_N_STEMS = 7000
_MIN_SOURCES = 3  # of texts or questions that use a stem: the names of one source are no common words
_REPEATED = 0.45  # where fewer of the answering texts repeat a stem of their questions, it is a word of asking
_PRIOR, _N_PRIOR = 0.7, 2  # share of texts that repeat a stem, and how many texts that counts
_MIN_ASKED = 5
_CHUNK_WORDS = 150
_RIDGE = 1e-3
_N_STEPS = 30  # of Newton's method; ten are enough

_ANSWERABLE = ("sheet", "everyday", "text")
_WRONG = ("unrelated", "another sheet")
_TOKEN = re.compile(r"\w+|[^\w\s]")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """The parameters of reading/relevance.py."""

    table: WordTable
    bias: float
    coefficients: tuple[float, ...]

    def probabilities(self, x: Floats) -> Floats:
        """Features [n, f] -> probabilities [n]."""
        return 1 / (1 + np.exp(-(self.bias + x @ np.array(self.coefficients))))

    def write(self, path: Path) -> None:
        """Write the parameters as TOML."""
        lines = [
            "# How reading/relevance.py tells what a question is about: written by `loracast train relevance`.",
            f"bias = {self.bias:.4f}",
            "",
            "# Common stems of English words, the commonest first.",
            f"stems = '''\n{fill(' '.join(self.table.ranks), 120)}'''",
            "",
            "# Those that questions use and the texts with the answers seldom repeat.",
            f"asking = '''\n{fill(' '.join(sorted(self.table.asking)), 120)}'''",
            "",
            "[coefficients]",
            *(f"{name} = {value:.4f}" for name, value in zip(FEATURES, self.coefficients, strict=True)),
        ]
        write_atomically(path, ("\n".join(lines) + "\n").encode())


def train_relevance(
    documents: Sequence[QuestionedDocument], unrelated: Mapping[str, Sequence[str]], seed: int = 0
) -> Fit:
    """Make the table of stems and fit the regression; `unrelated` has the unrelated questions by their file."""
    table = make_table(documents, unrelated)
    x, pairs = observe(draw_asked(random.Random(seed), documents, unrelated, "train"), table)
    return Fit(table, *fit_logistic(x, np.array([pair.is_about for pair in pairs]), pair_weights(pairs)))


def make_table(documents: Sequence[QuestionedDocument], unrelated: Mapping[str, Sequence[str]]) -> WordTable:
    """The commonest stems of the texts and the questions, both counting the same, and the words of asking."""
    texts: dict[str, list[str]] = defaultdict(list)
    questions: dict[str, list[str]] = defaultdict(list)
    for document in documents:
        texts[document.source].append(document.text)
        questions[document.source] += [question.question for question in document.questions]
    questions |= {f"unrelated {file}": list(some) for file, some in unrelated.items()}
    n_sources: Counter[str] = Counter()
    shares: Counter[str] = Counter()
    for group in (texts, questions):
        counts: Counter[str] = Counter()
        for some in group.values():
            found: Counter[str] = Counter()
            for of_text in _stems_of(some):
                found.update(of_text)
            n_sources.update(found.keys())
            counts.update(found)
        shares.update({stem: count / counts.total() for stem, count in counts.items()})
    common = (stem for stem, n in n_sources.items() if n >= _MIN_SOURCES and not stem.isdigit())
    stems = sorted(common, key=lambda stem: (-shares[stem], stem))[:_N_STEMS]
    return WordTable({stem: rank for rank, stem in enumerate(stems)}, _asking(documents) & set(stems[N_FUNCTION:]))


def _asking(documents: Sequence[QuestionedDocument]) -> frozenset[str]:
    """The stems that questions use and the texts with the answers seldom repeat."""
    there = _stems_of([document.text for document in documents])
    asked = _stems_of([" ".join(q.question for q in document.questions) for document in documents])
    n_asked, n_repeated = Counter[str](), Counter[str]()
    sources = defaultdict(set)
    for document, of_text, of_questions in zip(documents, there, asked, strict=True):
        n_asked.update(of_questions.keys())
        n_repeated.update(of_questions.keys() & of_text.keys())
        for stem in of_questions:
            sources[stem].add(document.source)
    return frozenset(
        stem
        for stem, n in n_asked.items()
        if n >= _MIN_ASKED
        and len(sources[stem]) >= _MIN_SOURCES
        and (n_repeated[stem] + _N_PRIOR * _PRIOR) / (n + _N_PRIOR) < _REPEATED
    )


def _stems_of(texts: Sequence[str]) -> list[Counter[str]]:
    """How often each stem occurs in each text, stemmed as in the index of a document."""
    counts = [Counter[str]() for _ in texts]
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE VIRTUAL TABLE texts USING fts5(text, tokenize = 'porter unicode61')")
        database.execute("CREATE VIRTUAL TABLE stems USING fts5vocab(texts, 'instance')")
        database.executemany("INSERT INTO texts (rowid, text) VALUES (?, ?)", enumerate(texts))
        for i, stem in database.execute("SELECT doc, term FROM stems"):
            counts[i][stem] += 1
    return counts


def observe(drawn: Iterable[Asked], table: WordTable) -> tuple[Floats, list[Pair]]:
    """Index documents in memory and give the features [n, f] of all pairs, and the pairs."""
    rows: list[tuple[float, ...]] = []
    pairs: list[Pair] = []
    for asked in drawn:
        with closing(sqlite3.connect(":memory:")) as database:
            write_index(database, split_text(asked.text, _words_as_tokens, max_tokens=_CHUNK_WORDS, title=asked.title))
            rows += [features(database, pair.question, table) for pair in asked.pairs]
        pairs += asked.pairs
    return np.array(rows), pairs


def _words_as_tokens(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    spans = [match.span() for match in _TOKEN.finditer(text)]
    return [0] * len(spans), spans


def pair_weights(pairs: Sequence[Pair]) -> Floats:
    """What each pair counts, so that its group has its share; 1 on average."""
    sizes = Counter(pair.group for pair in pairs)
    weights = np.array([SHARES[pair.group] / sizes[pair.group] for pair in pairs])
    return weights / weights.mean()


def fit_logistic(x: Floats, y: NDArray[np.bool_], weights: Floats) -> tuple[float, tuple[float, ...]]:
    """Weighted logistic regression by Newton's method, with a small ridge on the coefficients of scaled features.

    Features [n, f], labels [n] and weights [n] give the bias and the coefficients of the unscaled features. Raises
    TrainingError where all labels are the same.
    """
    if y.all() or not y.any():
        raise TrainingError("the questions are all about their documents, or none is; give both kinds")
    mean, scale = x.mean(0), x.std(0) + 1e-9
    z = np.c_[np.ones(len(x)), (x - mean) / scale]
    ridge = np.diag(np.r_[0, np.full(x.shape[1], _RIDGE)]) * weights.sum()
    theta = np.zeros(z.shape[1])
    for _ in range(_N_STEPS):
        p = 1 / (1 + np.exp(-z @ theta))
        gradient = z.T @ (weights * (p - y)) + ridge @ theta
        theta -= np.linalg.solve((z * (weights * p * (1 - p))[:, None]).T @ z + ridge, gradient)
    coefficients = theta[1:] / scale
    return float(theta[0] - coefficients @ mean), tuple(map(float, coefficients))


def shipped_fit() -> Fit:
    """The parameters of reading/relevance.toml, with which `loracast ask` decides."""
    fitted = relevance.shipped_regression()
    return Fit(relevance.shipped_words(), fitted["bias"], tuple(fitted["coefficients"][name] for name in FEATURES))


def measure(
    fit: Fit,
    documents: Sequence[QuestionedDocument],
    unrelated: Mapping[str, Sequence[str]],
    seed: int = 1,
    split: Split = "dev",
) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """Put questions of a split, and those of its files whose answers stand in their documents, to documents.

    Gives a row for each kind of question, with the share at or over THRESHOLD, and a row for each share of answerable
    questions (sheets, everyday documents and texts, each a third) that may be refused, with the threshold for it and
    the shares of wrong questions that pass.
    """
    spans = [replace(document, questions=tuple(document.spans)) for document in documents if document.spans]
    x, pairs = observe(draw_asked(random.Random(seed), spans, unrelated, split), fit.table)
    by_kind: dict[tuple[bool, str, str], list[float]] = defaultdict(list)
    by_group: dict[str, list[float]] = defaultdict(list)
    for pair, probability in zip(pairs, fit.probabilities(x), strict=True):
        by_kind[not pair.is_about, pair.group, pair.source].append(probability)
        by_group[pair.group].append(probability)
    kinds = [
        {"group": group, "source": source, "is_about": not is_not, "n": len(some), "passed": _passed(some, THRESHOLD)}
        for (is_not, group, source), some in sorted(by_kind.items())
    ]
    answerable = np.concatenate([by_group[group] for group in _ANSWERABLE])
    weights = np.concatenate([np.full(len(by_group[group]), 1 / len(by_group[group])) for group in _ANSWERABLE])
    order = np.argsort(answerable)
    refused = np.cumsum(weights[order]) / weights.sum()  # [n]: the share below the next threshold
    points = []
    for share in (0.01, 0.02, 0.03, 0.05):
        threshold = float(answerable[order][np.searchsorted(refused, share)])
        passed = {group: _passed(by_group[group], threshold) for group in _WRONG}
        points.append({"refused": share, "threshold": threshold, **passed})
    return kinds, points


def _passed(probabilities: Sequence[float], threshold: float) -> float:
    return float(np.mean(np.array(probabilities) >= threshold))


def read_unrelated_files(paths: Sequence[str]) -> dict[str, list[str]]:
    """The questions of each file, without their answers, by the file's name."""
    return {Path(path).name.partition(".")[0]: [q for q, _ in read_unrelated([path])] for path in paths}
