"""Tell whether a question is about a document at all, from the words that both share: a probability.

Logistic regression on counts from the document's full-text index (index.py): how much of the question stands in one
place of the document, and what of it, names above all, is absent. A word weighs by how rare it is in English, which a
table of common word stems says: a short document cannot tell its own rare words from its common ones. The table and
the coefficients are in relevance.toml; `loracast train relevance` writes them.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from itertools import pairwise
from typing import Any
from unicodedata import normalize

from loracast.library.index import Index, open_index
from loracast.text import stem_words

THRESHOLD = 0.2
"""Probability from which on a question is taken to be about a document (chosen on dev: docs/training.md)."""
THRESHOLD_OF_MANY = 0.5
"""The same where several documents are asked at once, each of which may pass by chance."""


THRESHOLD_STRICT = 0.1
"""The same for a strict answer from one document, which the model has to be sure of besides."""


def threshold_for(n_documents: int, strict: bool = False) -> float:
    """The threshold where a question is asked of so many documents at once."""
    return THRESHOLD_OF_MANY if n_documents != 1 else THRESHOLD_STRICT if strict else THRESHOLD


FEATURES = ("share", "window", "absent", "missing_name", "neighbours", "refers", "empty", "length")
"""What the regression sees of a question and a document, in the order of `features`."""

N_FUNCTION = 50
"""The commonest stems, function words, have no weight: nearly every text has them."""
_WINDOW = 25  # words that count as standing together: about a sentence
_N_WINDOWED = 8  # chunks, the best ones, in which the best window is looked for
_DIGIT = math.log(10)  # weight of a digit: a short number is met by chance
_ABSENT_ASKING = 0.3  # evidence in the absence of a word that only asks or refers; 1 for the commonest other word
_WORD = re.compile(r"[^\W_]+")
_SENTENCE_START = re.compile(r"[.?!:\n\"“]")  # a capital letter behind it makes no name

# Stems by which a question refers to what both sides know: pronouns of the third person, and the document itself.
_REFERRING = frozenset(
    _WORD.findall("""
    he she it thei hi her hers its their him them
    document text passag page chapter section articl stori author narrat speaker writer review report paragraph manual
    summari summar summaris
    """)
)


@dataclass(frozen=True, eq=False)
class WordTable:
    """How rare word stems are in English."""

    ranks: Mapping[str, int]
    """The common stems' places in the order of their frequency, from 0."""
    asking: frozenset[str]
    """Stems that questions use and the text with the answer seldom repeats: "why", "kind", "purpose"."""

    def weight(self, stem: str) -> float:
        """The rarity of a stem, 0 for function words: by Zipf's law, frequency falls as the rank rises."""
        rank = self.ranks.get(stem, 2 * len(self.ranks)) if stem else 0
        return math.log(rank / N_FUNCTION) if rank > N_FUNCTION else 0.0


@cache
def shipped_regression() -> dict[str, Any]:
    """The stems, asking words and coefficients of relevance.toml beside this module."""
    return tomllib.loads((files("loracast.reading") / "relevance.toml").read_text(encoding="utf-8"))


@cache
def shipped_words() -> WordTable:
    """The table of relevance.toml."""
    fitted = shipped_regression()
    return WordTable({stem: i for i, stem in enumerate(fitted["stems"].split())}, frozenset(fitted["asking"].split()))


@dataclass(frozen=True)
class Word:
    """A word of a question."""

    stem: str
    weight: float
    """How rare the stem is in English: 0 for a function word."""
    is_name: bool
    """Whether it is written as a name (a capital letter inside a sentence, an underscore) or has a digit."""


def about(index: Index, question: str, name: str = "") -> float:
    """The probability, 0 to 1, that the document of this index answers a question or speaks of what it asks.

    Args:
        name: of the document; its words count as if they stood in every heading.

    Raises AdapterError for a damaged index.
    """
    fitted = shipped_regression()
    found = zip(FEATURES, features(index, question, shipped_words(), name), strict=True)
    logit = fitted["bias"] + sum(fitted["coefficients"][name] * value for name, value in found)
    return (1 + math.tanh(logit / 2)) / 2  # the logistic function, which does not overflow


def features(index: Index, question: str, table: WordTable, name: str = "") -> tuple[float, ...]:
    """What the regression sees, each about 0 to 2, as in FEATURES:

    - share: the fraction of the question words' weight that the best chunk, with its heading, covers;
    - window: the weight that stands within a sentence's length of the best chunks, 1 for ten units;
    - absent: how much the words that occur nowhere speak against the document;
    - missing_name: the weight of the rarest name or number that occurs nowhere;
    - neighbours: of the pairs of neighbouring words of the question, the share that are neighbours here too;
    - refers: whether it refers to something known ("it", "the author"), the less the more other words it has;
    - empty: whether it has only function words;
    - length: the logarithm of the document's length, since a long document has many words by chance.
    """
    words = read_question(question, table)
    weights = {word.stem: word.weight for word in words if word.weight > 0}
    places, headings, n_tokens = _places(index, list(weights))
    if named := weights.keys() & _stems_of_name(name):
        for chunk in places.keys() | headings.keys() or {0}:
            headings[chunk] |= named
    by_chunk = {
        chunk: headings[chunk] | {stem for _, stem in places[chunk]} for chunk in places.keys() | headings.keys()
    }
    masses = {chunk: sum(weights[stem] for stem in sorted(found)) for chunk, found in by_chunk.items()}
    best = sorted(masses, key=lambda chunk: (-masses[chunk], chunk))[:_N_WINDOWED]
    missing = weights.keys() - set().union(*by_chunk.values())
    names = {word.stem for word in words if word.is_name}
    asking = table.asking | _REFERRING
    return (
        max(masses.values(), default=0.0) / (sum(weights.values()) or 1),
        max((_window(places[chunk], headings[chunk], weights) for chunk in best), default=0.0) / 10,
        sum(_ABSENT_ASKING if stem in asking else 1 + weights[stem] / 3 for stem in sorted(missing)) / 10,
        max((weights[stem] for stem in missing & names), default=0.0) / 5,
        _neighbours(words, places),
        float(any(word.stem in _REFERRING for word in words)) / (1 + len(weights.keys() - asking)),
        float(not weights),
        math.log(1 + n_tokens) / 5,
    )


def _places(index: Index, stems: Sequence[str]) -> tuple[dict[int, list[tuple[int, str]]], dict[int, set[str]], int]:
    """Where stems stand: by chunk, (number of the word, stem) in its text, and stems in its heading; and all tokens."""
    places: dict[int, list[tuple[int, str]]] = defaultdict(list)
    headings: dict[int, set[str]] = defaultdict(set)
    with open_index(index) as database:
        database.execute("CREATE VIRTUAL TABLE IF NOT EXISTS temp.stands USING fts5vocab('main', 'chunks', 'instance')")
        (n_tokens,) = database.execute("SELECT sum(n_tokens) FROM places").fetchone()
        for stem in stems:
            rows = database.execute("SELECT doc, col, offset FROM temp.stands WHERE term = ?", (stem,))
            for chunk, column, offset in rows:
                if column == "heading":
                    headings[chunk].add(stem)
                else:
                    places[chunk].append((offset, stem))
    return places, headings, n_tokens or 0


def _window(places: list[tuple[int, str]], heading: set[str], weights: Mapping[str, float]) -> float:
    """The largest weight of different stems within _WINDOW words of a chunk, with those of its heading."""
    best = mass = sum(weights[stem] for stem in heading)
    places = sorted(place for place in places if place[1] not in heading)
    inside: Counter[str] = Counter()
    first = 0
    for offset, stem in places:
        mass += 0 if inside[stem] else weights[stem]
        inside[stem] += 1
        while places[first][0] <= offset - _WINDOW:
            left = places[first][1]
            inside[left] -= 1
            mass -= 0 if inside[left] else weights[left]
            first += 1
        best = max(best, mass)
    return best


def _neighbours(words: Sequence[Word], places: Mapping[int, list[tuple[int, str]]]) -> float:
    """Of the pairs of neighbours among a question's words with weight, the share that stand side by side."""
    pairs = {
        (one.stem, other.stem)
        for one, other in pairwise(words)
        if one.weight > 0 and other.weight > 0 and one.stem != other.stem
    }
    found = {
        (one, other) for chunk in places.values() for (i, one), (j, other) in pairwise(sorted(chunk)) if j == i + 1
    }
    return len(pairs & found) / (len(pairs) or 1)


# ---- the words of a question


@lru_cache(32)  # one question is asked of many documents; not more, since each may have tens of thousands of words
def read_question(question: str, table: WordTable) -> tuple[Word, ...]:
    """The words of a question in order, with their stems and weights."""
    question = normalize("NFC", question)  # as documents are
    matches = list(_WORD.finditer(question))
    words: list[Word] = []
    end = 0
    for match, stem in zip(matches, stem_words([match[0] for match in matches]), strict=True):
        word = match[0]
        is_first = not words or _SENTENCE_START.search(question, end, match.start()) is not None
        is_capital = word[0].isupper() and not is_first
        is_name = is_capital or any(c.isdigit() for c in word) or "_" in question[end : match.end() + 1]
        weight = table.weight(stem)
        words.append(Word(stem, min(weight, _DIGIT * len(word)) if word.isdigit() else weight, is_name))
        end = match.end()
    return tuple(words)


@lru_cache(32)
def _stems_of_name(name: str) -> frozenset[str]:
    return frozenset(stem_words(_WORD.findall(name)))
