"""Lists and tables in a text: runs of lines of the same form, with what stands above them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby

from loracast.library.relevance import shipped_words, stem_words
from loracast.library.terms import has_digit

_SEPARATOR = re.compile(r"\t|\||\.{3,}|[(),:;] |[()]| [–—/=-] |  +")
_BULLET = re.compile(r"\s*(?:[-*+•·–—]|\(?\w{1,2}[.)]|§ ?\d+)\s+")
_BULLET_ONLY = ("bullet",)
_LEAST_SENTENCES, _LEAST_FORM = 3, 5  # how many of one form make a list, and how many signs such a form has
_PAIRING = frozenset({"and", "while", "whereas", "but", "or"})  # one sentence may hold two rows
_SENTENCE = re.compile(r"(?<=[.!?;])\s+")
_PART = re.compile(r"[\w'’]+|[^\w\s]")
_SENTENCE_ENDS = (".", "!", "?", ";")


@dataclass(frozen=True)
class Rows:
    """A list or table."""

    rows: tuple[str, ...]
    header: str
    """The row that names the columns, "" without one."""
    above: str
    """The line before it."""
    has_columns: bool
    """Whether its rows have several parts."""


def lists_in(text: str) -> list[Rows]:
    """The lists and tables of a text: two lines or more of the same form, none of which is a sentence."""
    found = []
    lines = [line for line in text.splitlines() if line.strip()]
    at = 0
    for shape, run in groupby(lines, _shape_of):
        rows = tuple(run)
        if shape and len(rows) > 1:
            has_header = "bullet" not in shape and not has_digit(rows[0]) and all(map(has_digit, rows[1:]))
            above = lines[at - 1] if at else ""
            found.append(Rows(rows[has_header:], rows[0] if has_header else "", above, shape != _BULLET_ONLY))
        at += len(rows)
    return found + [one for line in lines for one in _in_prose(line)]


def _in_prose(line: str) -> list[Rows]:
    """The lists that sentences of one form make: "At 5 pm: the Ants, in tent 3. At 6 pm: the Bees, in tent 1. ..."."""
    sentences = _SENTENCE.split(line)
    if len(sentences) < _LEAST_SENTENCES:
        return []
    runs = ((form, tuple(run)) for form, run in groupby(sentences, _form_of))
    return [
        Rows(run, "", "", True)
        for form, run in runs
        if len(form) >= _LEAST_FORM and len(run) >= _LEAST_SENTENCES and _PAIRING.isdisjoint(form)
    ]


def _form_of(sentence: str) -> tuple[str, ...]:
    """The function words, numbers and marks of a sentence, with one sign for the words between them."""
    table = shipped_words()
    parts = _PART.findall(sentence)
    stems = stem_words([part.lower() for part in parts])
    signs = [
        "#" if has_digit(part) else part.lower() if not stem or table.weight(stem) == 0 else "_"
        for part, stem in zip(parts, stems, strict=True)
    ]
    return tuple(sign for sign, _ in groupby(signs))


def cells_of(row: str) -> list[str]:
    """The parts of a row between its separators, without its bullet."""
    row = row[bullet.end() :] if (bullet := _BULLET.match(row)) else row
    return [cell for part in _SEPARATOR.split(row) if (cell := part.strip(" ."))]


def _shape_of(line: str) -> tuple[str, ...]:
    """The bullet and the separators of a line; empty for a sentence, and for a line with neither."""
    line = line.strip().strip("|")
    if line.endswith(_SENTENCE_ENDS) and not line.endswith("..."):
        return ()
    bullet = _BULLET.match(line)
    separators = tuple(found.strip()[:1] for found in _SEPARATOR.findall(line[bullet.end() :] if bullet else line))
    return (*_BULLET_ONLY, *separators) if bullet else separators
