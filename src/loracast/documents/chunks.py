"""Splits a text into chunks: contiguous pieces that each fit a number of tokens and end where a reader would pause.

The text is encoded once, in blocks, for an estimate; a shortest path over the possible seams then trades the number of
chunks, their evenness and the seams' costs against each other; each chunk is encoded once more for its exact count.
Takes time linear in the text, even for one line of megabytes. Knows no tokenizer: `encode` is handed in.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from loracast.documents.units import INSIDE, WORD, Seam, SeamFinder, sentence_spans

Encode = Callable[[str], tuple[list[int], list[tuple[int, int]]]]

MIN_TOKENS = 16
DEFAULT_CHUNK_TOKENS = 192  # longest chunk by default (measured: docs/notebook)
_HEADING_TOKENS = 24
_BLOCK = 16_384  # characters handed to the tokenizer at once
_SLACK = 2  # tokens: a word at the start of a chunk has lost the space before it, and may be encoded otherwise
_SEAMS_PER_CHUNK = 16  # how finely the search looks; one seam, the best, is kept for each of these stretches
_SPACE = re.compile(r"\s")
_NOT_SPACE = re.compile(r"\S")


@dataclass(frozen=True)
class Chunk:
    """A contiguous piece of a document that is cast at once."""

    text: str  # exactly the document's text[start:end], without white space at its ends
    start: int  # in characters
    end: int
    heading: str  # the document's title and the nearest heading at or above `start`, as in "Manual X / Warranty", or ""
    n_tokens: int  # of `prompt`, without special tokens
    rows: tuple[int, ...] = ()  # the characters of `text` at which lines begin that are rows of tables

    @property
    def prompt(self) -> str:
        """What the encoder reads."""
        return f"{self.heading}\n{self.text}" if self.heading else self.text

    @property
    def units(self) -> list[tuple[int, int]]:
        """The (start, end) characters of the prompt's sentences and rows of tables."""
        prompt = self.prompt
        return sentence_spans(prompt, [len(prompt) - len(self.text) + row for row in self.rows])


def split_text(
    text: str, encode: Encode, *, max_tokens: int = DEFAULT_CHUNK_TOKENS, title: str = "", rows: Sequence[int] = ()
) -> list[Chunk]:
    """Split a text into chunks that cover it in order without overlap, with at most white space between two of them.

    `encode` gives the token ids of a string, without special tokens, and the (start, end) characters of each. No
    chunk's prompt has more than `max_tokens`. Rows of tables begin at the characters `rows` (as in `Document`). Raises
    ValueError for fewer than 16 tokens, or where one character needs more.
    """
    if max_tokens < MIN_TOKENS:
        raise ValueError(f"a chunk needs at least {MIN_TOKENS} tokens, not {max_tokens}")
    if not text.strip():
        return []
    splitter = _Splitter(text, encode, max_tokens, title, rows)
    return [chunk for start, end in pairwise(splitter.cuts()) for chunk in splitter.fit(start, end)]


class _Splitter:
    def __init__(self, text: str, encode: Encode, max_tokens: int, title: str, rows: Sequence[int]) -> None:
        self.text, self.encode, self.max_tokens, self.rows = text, encode, max_tokens, rows
        self.title = " ".join(title.split())
        self.finder = SeamFinder(text)
        self.cache: dict[str, tuple[str, int]] = {}  # section title -> heading, its number of tokens with the newline

    def cuts(self) -> list[int]:
        """The offsets of a cheapest path from the start of the text to its end."""
        starts = self._token_starts()
        seams = [Seam(0, 0.0), *self._seams(starts), Seam(len(self.text), 0.0)]
        counts = [bisect_left(starts, seam.offset) for seam in seams]  # tokens that begin before the seam
        counts[-1] = len(starts)
        room = [self.max_tokens - _SLACK - self._heading(seam.offset)[1] for seam in seams]
        best = [0.0] * len(seams)
        came_from = [0] * len(seams)
        for j in range(1, len(seams)):
            lowest, source = float("inf"), j - 1  # a stretch that fits nowhere is left to fit()
            count = counts[j]
            for i in range(j - 1, -1, -1):
                n = count - counts[i]
                if n > self.max_tokens:
                    break
                if n > room[i]:
                    continue
                unused = 1.0 - n / room[i]
                cost = best[i] + 1.0 + unused * unused  # the square makes neighbours alike
                if cost < lowest:
                    lowest, source = cost, i
            best[j] = (lowest if lowest < float("inf") else best[source] + INSIDE) + seams[j].cost
            came_from[j] = source
        path = [len(seams) - 1]
        while path[-1]:
            path.append(came_from[path[-1]])
        return [seams[i].offset for i in reversed(path)]

    def fit(self, start: int, end: int) -> Iterator[Chunk]:
        """The chunk of text[start:end]; where the estimate was too low and it does not fit, its parts."""
        piece = self.text[start:end]
        bare = piece.strip()
        if not bare:
            return
        start += len(piece) - len(piece.lstrip())
        end = start + len(bare)
        heading = self._heading(start)[0]
        n_tokens = len(self.encode(f"{heading}\n{bare}" if heading else bare)[0])
        if n_tokens <= self.max_tokens:
            yield Chunk(bare, start, end, heading, n_tokens, self._rows_in(start, end))
            return
        if end - start < 2:
            raise ValueError(f"the character {bare!r} alone has {n_tokens} tokens, more than a chunk may have")
        middle, quarter = (start + end) // 2, (end - start) // 4
        seam = self.finder.best(middle - quarter, middle + quarter, (middle,))
        cut = seam.offset if seam and start < seam.offset < end else middle
        yield from self.fit(start, cut)  # each part has at most three quarters, so the recursion is not deep
        yield from self.fit(cut, end)

    def _rows_in(self, start: int, end: int) -> tuple[int, ...]:
        """The rows of a chunk; one that began in the chunk before goes on at its start."""
        first = bisect_left(self.rows, start)
        if first and self.text.find("\n", self.rows[first - 1], start) < 0:
            first -= 1
        return tuple(max(0, row - start) for row in self.rows[first : bisect_left(self.rows, end)])

    def _token_starts(self) -> array[int]:
        """The offset of each token. Blocks end before white space where there is any."""
        starts = array("q")
        low = 0
        while low < len(self.text):
            high = min(low + _BLOCK, len(self.text))
            if high < len(self.text):
                marks = (self.text.rfind(mark, low + _BLOCK // 2, high) for mark in ("\n\n", "\n", " "))
                high = next((mark for mark in marks if mark > low), high)
            starts.extend(low + start for start, _ in self.encode(self.text[low:high])[1])
            low = high
        return starts

    def _seams(self, starts: array[int]) -> list[Seam]:
        """The best seam of each stretch, and those around a word that is longer than a stretch."""
        step = max(1, (self.max_tokens - self._heading(0)[1]) // _SEAMS_PER_CHUNK)
        seams: set[Seam] = set()
        was_inside = False
        previous_low = low = 0
        for first in range(0, len(starts), step):
            high = starts[first + step] if first + step < len(starts) else len(self.text) - 1
            if high <= low:
                continue
            best = self.finder.best(low, high, starts[first : first + step])
            is_inside = best is None or best.cost >= INSIDE
            if is_inside and not was_inside:
                before = (self.text.rfind(mark, previous_low, low + 1) for mark in (" ", "\n"))
                seams.add(Seam(max(before), WORD))
            if was_inside and not is_inside and (space := _SPACE.search(self.text, low, high + 1)):
                seams.add(Seam(space.start(), WORD))
            if best is not None:
                seams.add(best)
            was_inside = is_inside
            previous_low, low = low, high
        return sorted(seam for seam in seams if 0 < seam.offset < len(self.text))

    def _heading(self, offset: int) -> tuple[str, int]:
        """The heading of a chunk that starts at `offset`, and the tokens that it and its newline take."""
        # Bounded: behind a seam stand a few blanks, or else millions, where the heading matters little.
        found = _NOT_SPACE.search(self.text, offset, offset + 200)
        i = bisect_right(self.finder.heading_starts, found.start() if found else offset) - 1
        section = " ".join(self.finder.headings[i].title.split()) if i >= 0 else ""
        if section not in self.cache:
            heading = self._compose(section)
            self.cache[section] = heading, len(self.encode(heading + "\n")[0]) if heading else 0
        return self.cache[section]

    def _compose(self, section: str) -> str:
        n = min(_HEADING_TOKENS, self.max_tokens // 4)
        if not section or section.casefold() == self.title.casefold():
            return self._clip(self.title, n)
        if not self.title:
            return self._clip(section, n)
        title = self._clip(self.title, max(n // 2, n - len(self.encode(f" / {section}")[0])))
        return self._clip(f"{title} / {section}", n)

    def _clip(self, line: str, n: int) -> str:
        """`line` cut at a word end to at most `n` tokens."""
        while line:
            offsets = self.encode(line)[1]
            if len(offsets) <= n:
                return line
            cut = line[: min(offsets[n][0], len(line) - 1)]
            line = (cut.rpartition(" ")[0] or cut).rstrip(" /")
        return line
