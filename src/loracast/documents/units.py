"""Where a text may be cut: headings, the seams between its parts and what each cut costs, and the units of routing.

Routing weighs units one against another: sentences, rows of tables, items, headings.

Finds where a text may be cut into chunks, and what each cut costs.

A seam is an offset and a cost. The costs are in chunks: one more chunk costs 1 (chunks.py). So two sections are torn
(0.8 for a sentence's end) where that saves a chunk, a sentence (10) only where none ends within reach, and a word (100)
only where it fills a whole chunk.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})")  # "```x```" is code within a line
_ATX = re.compile(r" {0,3}(#{1,6})[ \t]+(\S.*)")
_UNDERLINE = re.compile(r" {0,3}(=+|-{3,})")
_BLOCK_START = re.compile(r"\s|[-*+>|#]|\d+[.)] |$")  # lines that an underline does not turn into a heading


class Heading(NamedTuple):
    start: int  # offset of its line
    end: int  # offset after its last line, before the newline
    level: int  # 1..6
    title: str  # without marks


def find_headings(text: str) -> list[Heading]:
    """Every heading in order. A text without markdown gives an empty list."""
    headings: list[Heading] = []
    fence = ""
    previous, previous_start, is_first = "", 0, True  # is_first: the line before it is blank, so it opens a paragraph
    offset = 0
    for line in text.split("\n"):
        if len(line) > 1000:  # no heading; spares the patterns a line of megabytes
            previous, offset = " ", offset + len(line) + 1
            continue
        was_code, fence = bool(fence), fence_after(line, fence)
        if was_code or fence:
            previous = ""
        elif atx := _ATX.fullmatch(line):
            title = re.sub(r"(^|[ \t])#+$", "", atx[2].rstrip()).strip(" \t*_")
            if title:
                headings.append(Heading(offset, offset + len(line), len(atx[1]), title))
            previous = ""
        elif is_first and (under := _UNDERLINE.fullmatch(line.rstrip())) and not _BLOCK_START.match(previous):
            level = 1 if under[1][0] == "=" else 2
            headings.append(Heading(previous_start, offset + len(line), level, previous.strip(" \t*_")))
            previous = ""
        else:
            is_first = not previous
            previous, previous_start = line, offset
        offset += len(line) + 1
    return headings


def fence_after(line: str, fence: str) -> str:
    """The marks that began the block of code that goes on below a line, "" outside of code; `fence` those above it."""
    mark = _FENCE.match(line)
    if not fence:
        return mark[1] if mark else ""
    return "" if mark and mark[1].startswith(fence) and line.strip() == mark[1] else fence


_FRONT_MATTER_TITLE = re.compile(r"^title:[ \t]*(.+)$", re.M)


def markdown_title(text: str) -> str:
    """The title of the front matter, else the first heading, else ""."""
    end = text.find("\n---", 4) if text.startswith("---\n") else -1
    if end > 0 and (found := _FRONT_MATTER_TITLE.search(text, 4, end)):
        return found[1].strip().strip("\"'")
    return next((heading.title for heading in find_headings(text)), "")


HEADING, PARAGRAPH, LINE, SENTENCE = 0.0, 0.1, 0.3, 0.8
CLAUSE, WORD, IDEOGRAPH, INSIDE = 8.0, 10.0, 12.0, 100.0
DANGLING = 11.0  # between a heading and what it heads

_PARAGRAPH = re.compile(r"\n[ \t\r]*\n")
_NEWLINE = re.compile("\n")
_SENTENCE_END = re.compile(r"""(?P<stop>(?<![.!?…])[.!?…]++)["'”’»)\]]*(?=\s)|[。！？]+[」』”’]*(?=\S)""")
_CLAUSE = re.compile(r"[;:,–—](?=\s)")
_SPACE = re.compile(r"\s")
_WORD_BEFORE = re.compile(r"[\w.]*$")
_NEXT_LETTER = re.compile(r"\w")
_ITEM = re.compile(r"[ \t]*([-*+•|>#]|\(?(\d{1,3}|[a-zA-Z])[.)][ \t])")
_LABEL = re.compile(r"[^:;.\n]{1,60}: ")
_LONGEST_CLUSTER = 32  # a letter with its accents, an emoji with its joiners
_SHORT_LINE = 45  # characters; running text is wrapped at more than that
# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, Chinese and Japanese.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u9fff\uff00-\uffef]{2}")

_ABBREVIATION = re.compile(
    r"(mrs?|ms|dr|prof|rev|hon|gen|col|lt|sgt|capt|st|mt|[sj]r|messrs|vs|e\.?g|i\.?e|cf|viz|approx|ca|incl|excl|resp|"
    r"dept|est|inc|ltd|co|corp|univ|assn|bros|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|tel|ext|"
    r"z\.b|d\.h|u\.a|s\.o|bzw|ggf|evtl|inkl|zzgl|hr|fr|vgl|p\.ex)",
    re.I,
)
_BEFORE_NUMBER = re.compile(r"([a-z]|nos?|nr|figs?|abb|pp|vol|bd|ch|chap|kap|sect?|art|eqs?|tab|ref|max|min)", re.I)


class Seam(NamedTuple):
    offset: int  # of the white space at the seam, or of the next character where there is none
    cost: float


class SeamFinder:
    """Finds the best seam in a stretch of one text. Each call looks at its stretch only, so a pass is linear."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.headings = find_headings(text)
        self.heading_starts = [heading.start for heading in self.headings]
        self.heading_ends = {heading.end for heading in self.headings}
        # A heading right below another one (chapter, section) is no place to cut: the first would end a chunk.
        self.section_starts = self.heading_starts[:1] + [
            below.start for above, below in pairwise(self.headings) if text[above.end : below.start].strip()
        ]

    def best(self, low: int, high: int, fallbacks: Sequence[int] = ()) -> Seam | None:
        """The cheapest seam with low < offset <= high, the last of equals; `fallbacks` are offsets of token starts."""
        i = bisect_right(self.section_starts, high) - 1
        if i >= 0 and self.section_starts[i] > low:
            return Seam(self.section_starts[i], HEADING)
        spaces = [Seam(self.text.rfind(mark, low, high + 1), WORD) for mark in " \n"]
        found = [seam for seam in (*self.seams(low, high), *spaces) if low < seam.offset <= high]
        if not found and (space := _SPACE.search(self.text, low + 1, high + 1)):  # a tab, a space of Unicode's
            found = [Seam(space.start(), WORD)]
        found = found or [seam for seam in map(self._inside, fallbacks) if low < seam.offset <= high]
        return min(reversed(found), key=lambda seam: seam.cost, default=None)

    def seams(self, low: int, high: int) -> Iterator[Seam]:
        """The ends of paragraphs, lines, sentences and clauses from `low` to `high`, kind after kind."""
        text = self.text
        for match in _PARAGRAPH.finditer(text, low, high + 2):
            yield Seam(match.start(), DANGLING if match.start() in self.heading_ends else PARAGRAPH)
        for match in _NEWLINE.finditer(text, low, high + 1):
            yield Seam(match.start(), self._line_cost(match.start()))
        for match in _SENTENCE_END.finditer(text, low, high + 1):
            if match["stop"] is None or ends_sentence(text, match.start("stop"), match.end()):
                yield Seam(match.end(), SENTENCE)
        for match in _CLAUSE.finditer(text, low, high + 1):
            yield Seam(match.end(), CLAUSE)

    def _line_cost(self, newline: int) -> float:
        """What a single newline is worth: the end of an item or a row, or merely the wrapping of a sentence."""
        text = self.text
        if newline in self.heading_ends:
            return DANGLING
        line = text[text.rfind("\n", max(0, newline - 2000), newline) + 1 : newline].rstrip()
        below = text[newline + 1 : newline + 80]
        if _ITEM.match(below) or line.endswith((".", "!", "?", ":", ";", "|", "…")):
            return LINE
        label = _LABEL.match(below)
        if label and (not below[0].islower() or line.startswith(label[0])):
            return LINE  # "Weight: 3 kg", and the rows of a table
        is_wrapped = not line or len(line) > _SHORT_LINE or below[:1].islower()
        return CLAUSE if is_wrapped else LINE

    def _inside(self, offset: int) -> Seam:
        text = self.text
        end = min(len(text), offset + _LONGEST_CLUSTER)
        while 0 < offset < end and (
            unicodedata.combining(text[offset]) or text[offset] in "\u200d\ufe0f" or text[offset - 1] == "\u200d"
        ):
            offset += 1  # a letter keeps its accents
        return Seam(offset, IDEOGRAPH if _UNSPACED.match(text, max(0, offset - 1)) else INSIDE)


def ends_sentence(text: str, dot: int, end: int) -> bool:
    """Whether the marks at `dot`, which white space follows at `end`, end a sentence rather than an abbreviation."""
    after = _NEXT_LETTER.search(text, end, end + 20)
    if after and after[0].islower():
        return False
    if text[dot] != "." or text[dot : dot + 2] == "..":
        return True
    before = _WORD_BEFORE.search(text[max(0, dot - 20) : dot])
    word = before[0] if before else ""
    is_degree = text[max(0, dot - 2) : dot - 1] == "°"  # "8 °C."
    if _ABBREVIATION.fullmatch(word) or (len(word) == 1 and word.isupper() and not is_degree):
        return False  # "Dr.", "e.g.", the initial in "J. Smith"
    if re.fullmatch(r"[A-Za-z](\.[A-Za-z])+", word):
        return False  # "U.S."
    if _BEFORE_NUMBER.fullmatch(word) and after and after[0].isdigit():
        return False  # "No. 5", "(r. 1402-1424)"
    is_first = text[max(0, dot - len(word) - 1) : dot - len(word)] in ("", "\n")
    return not (word.isdigit() and is_first)  # "1." opens an item


_SEMICOLON = re.compile(r";(?=\s)")
_LONGEST_PARENTHESIS = 300  # characters; so that a long line takes no time for each of its semicolons


def sentence_spans(text: str, rows: Sequence[int] = ()) -> list[tuple[int, int]]:
    """The units of a text as (start, end) characters, in order, without the blanks between them.

    A semicolon outside parentheses ends a sentence, and so does a line that is more than wrapped prose: a heading, an
    item. The row of a table is one unit, whatever stands in it.

    Args:
        rows: where lines begin that are rows of tables, in order.
    """
    ends = [len(text) if (end := text.find("\n", start)) < 0 else end for start in rows]
    found = [seam.offset for seam in SeamFinder(text).seams(0, len(text)) if seam.cost != CLAUSE]
    found += [match.end() for match in _SEMICOLON.finditer(text) if not _is_in_parentheses(text, match.start())]
    kept = (cut for cut in found if (i := bisect_left(rows, cut) - 1) < 0 or cut >= ends[i])
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
