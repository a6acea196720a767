"""Lists and tables in a text: runs of lines of the same form, with what stands above them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby

from loracast.library.terms import has_digit

_SEPARATOR = re.compile(r"\t|\||\.{3,}|[(),:;] |[()]| [–—/=-] |  +")
_BULLET = re.compile(r"\s*(?:[-*+•·–—]|\(?\w{1,2}[.)]|§ ?\d+)\s+")
_BULLET_ONLY = ("bullet",)
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
    return found


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
