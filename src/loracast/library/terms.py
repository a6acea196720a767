"""The words, numbers and names of a text, in the form in which a question and a sentence are compared."""

from __future__ import annotations

import re
from functools import lru_cache
from unicodedata import normalize

_TERM = re.compile(r"\w+(?:[.:,/'’-]\w+)*")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_UNIT = re.compile(r"(?<=\d)(?=[^\W\d_])")


@lru_cache(2_000)
def terms(text: str) -> tuple[str, ...]:
    """The words and numbers of a text in order, as they are written; a number stands apart from its unit."""
    return tuple(_TERM.findall(_UNIT.sub(" ", _THOUSANDS.sub("", normalize("NFC", text)))))


def terms_of(text: str) -> frozenset[str]:
    """The words and numbers of a text, in their plain form."""
    return frozenset(map(plain, terms(text)))


@lru_cache(10_000)
def plain(term: str) -> str:
    """A term without capitals, a plural or a genitive: "Mondays", "Anna's"."""
    return term.lower().replace("’", "'").removesuffix("'s").removesuffix("s")


def is_value(term: str, place: int) -> bool:
    """Whether the term at a place of a sentence is a number or a name."""
    return has_digit(term) or is_name(term, place)


def is_name(term: str, place: int) -> bool:
    """Whether the term at a place of a sentence is written as an English name, with a capital letter inside of it."""
    return place > 0 and term[0].isupper() and term != "I"


def has_digit(term: str) -> bool:
    """Whether it is a number, or has one in it."""
    return any(c.isdigit() for c in term)
