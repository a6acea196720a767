"""Splits a text into units, which routing weighs one against another: sentences, rows of tables, items, headings."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

from loracast.documents.seams import CLAUSE, SENTENCE_END, SeamFinder, ends_sentence

_BREAK = re.compile(rf"(?P<semicolon>;)(?=\s)|(?P<lines>(?<!\s)\s*\n\s*)|{SENTENCE_END.pattern}")
_LONGEST_PARENTHESIS = 300  # characters; so that a long line takes no time for each of its semicolons
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")


def sentence_spans(text: str, rows: Sequence[int] = ()) -> list[tuple[int, int]]:
    """The units of a text as (start, end) characters, in order, without the blanks between them.

    A semicolon outside parentheses ends a sentence, and so does a line that is more than wrapped prose: a heading, an
    item. The row of a table is one unit, whatever stands in it.

    Args:
        rows: where lines begin that are rows of tables, in order.
    """
    ends = [len(text) if (end := text.find("\n", start)) < 0 else end for start in rows]
    kept = (cut for cut in _cuts(text) if (i := bisect_left(rows, cut) - 1) < 0 or cut >= ends[i])
    cuts = sorted({0, *rows, *ends, *kept, len(text)})
    spans = []
    for start, end in pairwise(cuts):
        piece = text[start:end]
        if stripped := piece.strip():
            first = start + piece.index(stripped[0])
            spans.append((first, first + len(stripped)))
    return spans


def token_sentences(spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """For each token, given by its (start, end) characters, the index of the sentence that it belongs to."""
    starts = [start for start, _ in spans]
    return [max(0, bisect_right(starts, max(start, end - 1)) - 1) for start, end in offsets]


def _is_in_parentheses(text: str, at: int) -> bool:
    """Whether a parenthesis of the same line is open there."""
    before = text[max(0, at - _LONGEST_PARENTHESIS) : at]
    line = before[before.rfind("\n") + 1 :]
    return line.rfind("(") > line.rfind(")")


def _cuts(text: str) -> Iterator[int]:
    finder = SeamFinder(text)
    for match in _BREAK.finditer(text):
        if match["semicolon"]:
            if not _is_in_parentheses(text, match.start()):
                yield match.end()
        elif lines := match["lines"]:
            newline = match.start() + lines.index("\n")
            if _BLANK_LINE.search(lines) or finder.line_cost(newline) != CLAUSE:
                yield match.end()
        elif match["stop"] is None or ends_sentence(text, match.start("stop"), match.end()):
            yield match.end()
