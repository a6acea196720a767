"""Words of a text: whether it is Unicode at all, its terms in the form in which they are compared, and word stems."""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Sequence
from functools import lru_cache
from unicodedata import normalize

_TERM = re.compile(r"\w+(?:[.:,/'’-]\w+)*")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_UNIT = re.compile(r"(?<=\d)(?=[^\W\d_])")
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)+")
_ABBREVIATION = re.compile(r"[^\W\d_](?:\.[^\W\d_])+")
_SHORT_DATES = {
    "Mon": "monday", "Tue": "tuesday", "Tues": "tuesday", "Wed": "wednesday", "Thu": "thursday", "Thur": "thursday",
    "Thurs": "thursday", "Fri": "friday", "Sat": "saturday", "Sun": "sunday", "Jan": "january", "Feb": "february",
    "Mar": "march", "Apr": "april", "Jun": "june", "Jul": "july", "Aug": "august", "Sep": "september",
    "Sept": "september", "Oct": "october", "Nov": "november", "Dec": "december",
}  # fmt: skip


def is_unicode(text: str) -> bool:
    """Whether a text holds no surrogate, which is left of bytes in another encoding, or of half an emoji in JSON."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def terms(text: str) -> list[str]:
    """The words and numbers of a text in order, as they are written; a number stands apart from its unit."""
    return _TERM.findall(_UNIT.sub(" ", _THOUSANDS.sub("", normalize("NFC", text))))


def terms_of(text: str) -> frozenset[str]:
    """The words and numbers of a text, in their plain form."""
    return frozenset(map(plain, terms(text)))


@lru_cache(10_000)
def plain(term: str) -> str:
    """A term as it is compared: without capitals, plural and genitive ("Mondays", "Anna's"), a number in one way.

    "11:00" and "11.00" are 11, "9.30" is 9:30, "p.m." is PM, and "Sept" is September.
    """
    if _NUMBER.fullmatch(term):
        return re.sub("[.,]", ":", term).removesuffix(":00")
    if term in _SHORT_DATES:
        return _SHORT_DATES[term]
    if _ABBREVIATION.fullmatch(term):
        term = term.replace(".", "")
    return term.lower().replace("’", "'").removesuffix("'s").removesuffix("s")


class _Stemmer(threading.local):
    """A full-text index in memory for each thread, which takes six times as long to make as to use."""

    def __init__(self) -> None:
        self.database = sqlite3.connect(":memory:", isolation_level=None)
        self.database.execute("CREATE VIRTUAL TABLE words USING fts5(word, tokenize = 'porter unicode61')")
        self.database.execute("CREATE VIRTUAL TABLE stems USING fts5vocab(words, 'instance')")


_STEMMER = _Stemmer()
_STEMS: dict[str, str] = {}
"""Stems of the words of before, since questions and documents have most words in common."""
_MOST_STEMS = 50_000


def stem_words(words: Sequence[str]) -> list[str]:
    """The stems of words as the index has them; "" for what it does not take for a word."""
    stems = {word: stem for word in set(words) if (stem := _STEMS.get(word)) is not None}
    new = [word for word in dict.fromkeys(words) if word not in stems]
    if new:
        stems |= zip(new, _stemmed(new), strict=True)
        if len(_STEMS) > _MOST_STEMS:
            _STEMS.clear()
        _STEMS.update((word, stems[word]) for word in new)
    return [stems[word] for word in words]


def _stemmed(words: Sequence[str]) -> list[str]:
    database = _STEMMER.database
    try:
        database.execute("BEGIN")
        database.executemany("INSERT INTO words (rowid, word) VALUES (?, ?)", enumerate(words))
        by_number = dict(database.execute("SELECT doc, term FROM stems").fetchall())
    finally:
        database.rollback()  # no word stays for the next call, also after Ctrl-C
    return [by_number.get(i, "") for i in range(len(words))]
