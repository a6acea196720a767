"""How many rows a list or table has: "How many courses are on offer?"."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from loracast.library.relevance import stem_words, telling_stems
from loracast.library.rows import Rows
from loracast.library.terms import has_digit, terms

_COUNTED = re.compile(
    r"\bhow many ((?:(?!(?:are|at|can|come|did|do|does|for|go|had|has|have|in|is|may|must|of|on|should|was|were|will"
    r"|with)\b)[\w'’-]+(?:\s+|(?=\?))){1,3})",
    re.IGNORECASE,
)
_UNITS = frozenset(
    re.findall(
        r"\w+",
        """
    centimetres cents cm crowns days degrees dollars euros feet francs grams gb hours inches kg kilograms kilometres km
    litres mb metres miles millimetres minutes mm months ounces pence percent points pounds seconds times
    tonnes volts watts weeks yards years
    """,
    )
)
"""What a number stands before: how many of them there are is written somewhere, and is no number of rows."""
_LISTING = """
    according altogether available bill bought brochure buy card choose come contain contains different directory
    display displayed divide divided document exist explain explained give given gives go guide include includes item
    items kind kinds leaflet letter line list listed measure mention mentioned menu name named need notice offer
    offered ordered overview page plan programme report serve sheet show shown table their there timetable total up
    way
"""
_NUMBERS = frozenset(
    re.findall(
        r"\w+",
        """
    two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
    nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand
    """,
    )
)
_SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n")


def asks_for_a_number(question: str) -> bool:
    """Whether a question asks how many there are of something."""
    return _COUNTED.search(question) is not None


def counted(question: str, text: str, lists: Sequence[Rows]) -> int | None:
    """The number of rows of the list that a question asks for; None where it may ask for something else.

    It does where the text states a number of what is counted, where the question names one of the rows, and where it
    fits no list or several: the line above, the header or each row must name what is counted, or the question must ask
    for nothing but what the only list has.
    """
    if not (asking := _COUNTED.search(question)):
        return None
    words = [word.lower() for word in terms(asking[1])]
    noun = telling_stems(asking[1]) or frozenset(stem_words(words))
    asked = telling_stems(question)
    if len(words) == 1 and words[0] in _UNITS:
        return None
    others = set(_SENTENCE.split(text)).difference(*((*one.rows, one.header, one.above) for one in lists))
    if any(_has_number(other) and not noun.isdisjoint(stem_words(terms(other))) for other in others):
        return None
    some = [one for one in lists if one.has_columns] or lists  # lists of bare sentences are no data, beside a table
    fits = [(_fit(asked, noun, words, one), len(one.rows)) for one in some]
    best = max((fit for fit, _ in fits), default=0)
    numbers = [number for fit, number in fits if fit == best]
    is_told = best == 2 or (best == 1 and len(some) == 1 and numbers[0] > 2)
    return numbers[0] if is_told and len(numbers) == 1 else None


def _fit(asked: frozenset[str], noun: frozenset[str], words: Sequence[str], one: Rows) -> int:
    """How surely a question asks for the number of a list's rows: 2 by its words, 1 as the only list, 0 not at all."""
    rows = [telling_stems(row) for row in one.rows]
    counts = Counter(stem for row in rows for stem in row)
    if any(0 < counts[stem] <= len(rows) / 2 for stem in asked - noun):
        return 0  # of one row alone
    if any(re.search(rf"\d\s+{re.escape(word)}", row.lower()) for row in one.rows for word in words):
        return 0
    in_all = frozenset(stem for stem, n in counts.items() if n == len(rows))
    n_named = sum(not noun.isdisjoint(row) for row in rows)
    if sum(noun <= row for row in rows) == 1:
        return 0
    above = telling_stems(f"{one.above} {one.header}")
    if n_named == len(rows) or noun <= above or (noun & above and not n_named):
        return 2
    return 0 if asked - noun - above - in_all - telling_stems(_LISTING) else 1


def _has_number(text: str) -> bool:
    return has_digit(text) or not _NUMBERS.isdisjoint(text.lower().split())
