"""Tells which sentences speak of another subject than the one that a question names.

"Under opening time, what is noted for Cafe Burmbi?" has more words in common with "Opening time of Cafe Nidetsu: 11:15"
than with "Do not ring the bell of Cafe Burmbi before 19:10". BM25 counts words; a name is not one word among others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from loracast.library.terms import is_name, is_value, plain, terms, terms_asked, terms_of

_LONGEST_HEADING = 8  # words
_ENDS = tuple('.!?:;,"”’)')
# First words of a sentence that goes on about what the one before has named.
_CONTINUING = frozenset(("he", "she", "it", "they", "this", "these", "his", "her", "its", "their", "there"))


def names_in(question: str) -> list[frozenset[str]]:
    """The names in a question, each with its words: "Node FH55". A number alone is none."""
    words = terms_asked(question)
    runs = [[(i, term) for i, term in run] for is_one, run in groupby(words, lambda x: is_value(x[1], x[0])) if is_one]
    return [frozenset(plain(term) for _, term in run) for run in runs if any(is_name(term, i) for i, term in run)]


def of_others(question: str, chunks: Sequence[tuple[str, Sequence[str]]]) -> list[list[bool]]:
    """Whether each sentence is about something else than what the question names.

    So is one that has a name, but none of the question's names, in itself or in the heading above it, and what goes on
    from such a one ("It costs 9 euros."). Where no sentence has a name of the question, none is.

    Args:
        chunks: of each, the heading and the sentences.
    """
    if not (asked := names_in(question)):
        return [[False] * len(sentences) for _, sentences in chunks]
    known = terms_of(question)
    found: list[list[bool]] = []
    is_named = False
    for heading, sentences in chunks:
        above = of_chunk = terms_of(heading)
        found.append([])
        for sentence in map(_read, sentences):
            if sentence.is_heading:
                above = of_chunk | sentence.words
            has_one = any(name <= sentence.words | above for name in asked)
            is_named |= has_one
            is_other = not (sentence.names <= known or has_one or sentence.is_heading)
            found[-1].append(found[-1][-1] if sentence.goes_on and found[-1] and not has_one else is_other)
    return found if is_named else [[False] * len(sentences) for _, sentences in chunks]


class _Sentence(NamedTuple):
    """What tells whom a sentence is about."""

    words: frozenset[str]
    names: frozenset[str]
    goes_on: bool
    """Whether it goes on about what the one before has named."""
    is_heading: bool


@lru_cache(2_000)
def _read(sentence: str) -> _Sentence:
    """Kept for the next question about the same document."""
    words = terms(sentence)
    names = frozenset(plain(term) for i, term in enumerate(words) if is_name(term, i))
    goes_on = bool(words) and words[0].lower() in _CONTINUING
    is_heading = not sentence.endswith(_ENDS) and len(words) <= _LONGEST_HEADING
    return _Sentence(frozenset(map(plain, words)), names, goes_on, is_heading)
