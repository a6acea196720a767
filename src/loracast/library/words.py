"""The words of questions and sentences, as the word vectors know them: stems, and what numbers and names are.

In a sentence each word has a position, in which commas, tabs and "and" are steps of their own, so that what they part
stands further apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple
from unicodedata import normalize

from loracast.library.relevance import stem_words

_WORD = re.compile(r"[£$€]?\d(?:[\d,.:]*\d)?|[^\W\d_]+(?:['’][^\W\d_]+)?|%")
_PART = re.compile(rf"({_WORD.pattern})|[,;:()|=\t\n–—]|\s-\s")
_PARTING = frozenset(["and", "but", "or", "whereas", "while"])
_STEPS_OF_A_MARK = 2
_TIME = re.compile(r"\d{1,2}[:.]\d\d")
_YEAR = re.compile(r"(?:1[5-9]|20)\d\d")
_CURRENCIES = "£$€"
_ASKING = frozenset(["at", "by", "for", "from", "how", "in", "of", "on", "to", "until", "what", "which"])
"""Words that make one word with the next one: "how long", "what time"."""
_DAY = re.compile(r"(?:mon|tues|wednes|thurs|fri|satur|sun)day", re.IGNORECASE)
_MONTH = re.compile(
    r"january|february|march|april|may|june|july|august|september|october|november|december", re.IGNORECASE
)
MOST_NAMES = 2
"""What one word of a text is called at most: its kind and its stem, or two kinds."""


class PlacedWord(NamedTuple):
    """A word of a sentence."""

    position: int
    names: tuple[str, ...]
    """Its kinds and its stem, as the word vectors know it; none for a word without either."""
    start: int
    """Its first character in the sentence in normal form (NFC)."""
    end: int


def words_of_sentence(text: str) -> list[PlacedWord]:
    """The words of a sentence with their positions."""
    position, words = 0, list[tuple[int, re.Match[str]]]()
    for part in _PART.finditer(normalize("NFC", text)):
        if part[1] is None:
            position += _STEPS_OF_A_MARK
        else:
            words.append((position, part))
            position += 2 if part[1].lower() in _PARTING else 1
    named = _names([part[1] for _, part in words])
    return [PlacedWord(at, names, *part.span()) for (at, part), names in zip(words, named, strict=True)]


def words_of_question(text: str) -> list[str]:
    """The stems of a question, what its numbers and names are, and pairs such as "how long"."""
    words = _WORD.findall(normalize("NFC", text))
    pairs = pairwise(word.lower() for word in words)
    names = [name for names in _names(words) for name in names]
    return names + [f"{one}_{other}" for one, other in pairs if one in _ASKING]


def _names(words: Sequence[str]) -> list[tuple[str, ...]]:
    stems = stem_words([word.lower() for word in words])
    return [_named(word, stem, i == 0) for i, (word, stem) in enumerate(zip(words, stems, strict=True))]


def _named(word: str, stem: str, is_first: bool) -> tuple[str, ...]:
    if word[0] in _CURRENCIES:
        return ("<money>",)
    if word[0].isdigit():
        kind = "<time>" if _TIME.fullmatch(word) else "<year>" if _YEAR.fullmatch(word) else ""
        return (kind, "<number>") if kind else ("<number>",)
    kinds = {
        "<day>": _DAY.fullmatch(word),
        "<month>": _MONTH.fullmatch(word),
        "<name>": not is_first and word[0].isupper(),
    }
    return (*[kind for kind, fits in kinds.items() if fits][:1], *[stem] * bool(stem))
