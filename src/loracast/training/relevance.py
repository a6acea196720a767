"""Fit library/relevance.py: a table of common word stems, and a regression on pairs of question and document.

The result is data/content/relevance.toml. It depends on the files and this code alone.
"""

from __future__ import annotations

import random
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracast.data.qa import QuestionedDocument
from loracast.data.rows import read_content, read_unrelated
from loracast.documents.chunks import split_text
from loracast.errors import TrainingError
from loracast.files import write_atomically
from loracast.library.index import write_index
from loracast.library.relevance import FEATURES, N_FUNCTION, THRESHOLD, WordTable, features, shipped_words
from loracast.training.relevance_pairs import SHARES, Asked, Pair, Split, draw_asked

_N_STEMS = 7000
_LEAST_SOURCES = 3  # of texts or questions that use a stem: the names of one source are no common words
_REPEATED = 0.45  # where fewer of the answering texts repeat a stem of their questions, it is a word of asking
_PRIOR, _N_PRIOR = 0.7, 2  # share of texts that repeat a stem, and how many texts that counts
_LEAST_ASKED = 5
_CHUNK_WORDS = 150
_RIDGE = 1e-3
_STEPS = 30  # of Newton's method; ten are enough

_ANSWERABLE = ("sheet", "everyday", "text")
_WRONG = ("unrelated", "another sheet")
_TOKEN = re.compile(r"\w+|[^\w\s]")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """The parameters of library/relevance.py."""

    table: WordTable
    bias: float
    coefficients: tuple[float, ...]

    def probabilities(self, x: Floats) -> Floats:
        """Features [n, f] -> probabilities [n]."""
        return 1 / (1 + np.exp(-(self.bias + x @ np.array(self.coefficients))))

    def write(self, path: Path) -> None:
        """Write the parameters as TOML."""
        lines = [
            "# How library/relevance.py tells what a question is about: written by `loracast train relevance`.",
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
            found = Counter(stem for _, stem in _stems_of(some))
            n_sources.update(found.keys())
            counts.update(found)
        shares.update({stem: count / counts.total() for stem, count in counts.items()})
    common = (stem for stem, n in n_sources.items() if n >= _LEAST_SOURCES and not stem.isdigit())
    stems = sorted(common, key=lambda stem: (-shares[stem], stem))[:_N_STEMS]
    return WordTable({stem: rank for rank, stem in enumerate(stems)}, _asking(documents) & set(stems[N_FUNCTION:]))


def _asking(documents: Sequence[QuestionedDocument]) -> frozenset[str]:
    """The stems that questions use and the texts with the answers seldom repeat."""
    there: dict[int, set[str]] = defaultdict(set)
    asked: dict[int, set[str]] = defaultdict(set)
    for i, stem in _stems_of([document.text for document in documents]):
        there[i].add(stem)
    for i, stem in _stems_of([" ".join(q.question for q in document.questions) for document in documents]):
        asked[i].add(stem)
    n_asked, n_repeated = Counter[str](), Counter[str]()
    sources = defaultdict(set)
    for i, document in enumerate(documents):
        n_asked.update(asked[i])
        n_repeated.update(asked[i] & there[i])
        for stem in asked[i]:
            sources[stem].add(document.source)
    return frozenset(
        stem
        for stem, n in n_asked.items()
        if n >= _LEAST_ASKED
        and len(sources[stem]) >= _LEAST_SOURCES
        and (n_repeated[stem] + _N_PRIOR * _PRIOR) / (n + _N_PRIOR) < _REPEATED
    )


def _stems_of(texts: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Every word of the texts as (number of the text, stem), stemmed as in the index of a document."""
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE VIRTUAL TABLE texts USING fts5(text, tokenize = 'porter unicode61')")
        database.execute("CREATE VIRTUAL TABLE stems USING fts5vocab(texts, 'instance')")
        database.executemany("INSERT INTO texts (rowid, text) VALUES (?, ?)", enumerate(texts))
        yield from database.execute("SELECT doc, term FROM stems")


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
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-z @ theta))
        gradient = z.T @ (weights * (p - y)) + ridge @ theta
        theta -= np.linalg.solve((z * (weights * p * (1 - p))[:, None]).T @ z + ridge, gradient)
    coefficients = theta[1:] / scale
    return float(theta[0] - coefficients @ mean), tuple(map(float, coefficients))


def shipped_fit() -> Fit:
    """The parameters of data/content/relevance.toml, with which `loracast ask` decides."""
    fitted = read_content("relevance")
    return Fit(shipped_words(), fitted["bias"], tuple(fitted["coefficients"][name] for name in FEATURES))


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
