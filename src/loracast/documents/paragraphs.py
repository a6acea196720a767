"""Joins the lines of PDF pages, which know no paragraphs, to paragraphs and headings.

What speaks for a new paragraph: a wider gap than usual, another letter size, a bullet, a last line that stops short.
Running headers and page numbers are taken out first, since they stand between the two halves of a sentence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import NamedTuple

from loracast.documents.tables import ROW


class Line(NamedTuple):
    text: str
    size: float  # of its letters in points; 0 where unknown
    height: float | None  # of its base line above the foot of the page
    page: int
    is_bold: bool = False


PAGE_NUMBER = re.compile(
    r"[-–—| ]*(page|seite|blatt|sheet|p[áa]gina|sida|side|strona|p\.|pg\.?)?\s*(\d{1,4}|[ivxlc]{1,6})"
    r"(\s*(of|von|de|/)\s*\d{1,4})?[-–—| ]*",
    re.I,
)
"""A line that only counts pages."""
_ENDS_IN_NUMBER = re.compile(r"^\d{1,4}\s|\s\d{1,4}$")  # as a header of every other page or of a chapter does
_NUMBER = re.compile(r"(?<!\d)\d{1,4}(?!\d)")
_LEADER = re.compile(r"(\s?\.){4,}")  # the dots of a table of contents
_BULLETS = r"[\x7f\uf0b7\uf0a7\uf0d8\uf0fc\uf076•‣▪●○◦■□]"  # \x7f and \uf0..: those of symbol fonts
_BULLET = re.compile(rf"({_BULLETS}|[–*·-](?=\s))\s*(?=\S)")  # "-5" is a number
_ITEM = re.compile(r"\(?(\d{1,3}[.)]|[a-z][.)]|[A-Z]\))\s+\S")  # "J. Smith" is a name
_MARK = re.compile(rf"{_BULLETS}|[–*·-]|\(?(\d{{1,3}}|[a-zA-Z])[.)]")
_CJK = re.compile("[\u3000-\u9fff\uff00-\uffef]")
_END = (".", "!", "?", ":", ";", "。", "！", "？", "”", '"')
_SUSPENDED = {"and", "or", "to", "und", "oder", "bis", "et", "ou", "y", "o"}  # "odd- and even-numbered"
_HEADING_SCALE = 1.12  # a heading is this much larger than the body
_MAX_HEADING = 150  # characters
_SHORT = 0.7  # of the width of a full line: where a paragraph may have stopped
_GAP = 1.3  # of the usual distance between two lines


def join_lines(lines: Sequence[Line]) -> str:
    """Paragraphs between blank lines, headings as markdown; items of lists and rows of tables on lines of their own."""
    lines = [line._replace(text=_LEADER.sub(" ...", line.text)) for line in drop_running_lines(lines)]
    lines = _with_their_bullets(lines)
    if not lines:
        return ""
    body = _body_size(lines)
    n_letters = sum(len(line.text) for line in lines)
    bold_share = sum(len(line.text) for line in lines if line.is_bold) / n_letters
    levels = _heading_levels(lines, body, may_be_bold=bold_share < 0.3)
    width = sorted(len(line.text) for line in lines)[int(0.9 * (len(lines) - 1))]
    usual_gap = _usual_gap(lines)
    words = Counter(re.findall(r"\w+(?:-\w+)*", "\n".join(line.text for line in lines).lower()))

    out: list[str] = []
    previous: Line | None = None
    previous_level = 0
    for line, level in zip(lines, levels, strict=True):
        bullet = _BULLET.match(line.text)
        text = "- " + line.text[bullet.end() :] if bullet and not level else line.text
        if previous is None:
            out.append("#" * level + " " + text if level else text)
        elif level or previous_level:
            if level == previous_level and not _is_gap(previous, line, usual_gap * 1.5):
                _extend(out, text, words)  # a heading of two lines
            else:
                out += ["\n\n", "#" * level + " " + text if level else text]
        elif separator := _separator(previous, line, usual_gap, width):
            out += [separator, text]
        else:
            _extend(out, text, words)
        previous, previous_level = line, level
    return "\n\n".join(_with_marks(block, width) for block in "".join(out).split("\n\n"))


def _with_marks(block: str, width: int) -> str:
    """A block with marks before its lines where these are rows of a table: several short ones, none of them an item."""
    lines = block.split("\n")
    are_rows = len(lines) > 1 and not any(len(line) > width or _ITEM.match(line) or line[:2] == "- " for line in lines)
    return "\n".join(ROW + line for line in lines) if are_rows else block


def _body_size(lines: Sequence[Line]) -> float:
    """The size in which most letters are set."""
    weights: Counter[float] = Counter()
    for line in lines:
        weights[line.size] += len(line.text)
    return weights.most_common(1)[0][0] if weights else 0.0


def drop_running_lines(lines: Sequence[Line]) -> list[Line]:
    """Drop page numbers, and all but the first of a header or footer that most pages repeat.

    A line runs if it is the outermost of its page, or next to one that runs: anything further in is text, however often
    it comes, and so is whatever is set larger than the body.
    """
    pages: dict[int, list[Line]] = {}
    for line in lines:
        pages.setdefault(line.page, []).append(line)
    body = _body_size(lines)
    dropped: set[int] = set()  # ids, since equal lines stand on many pages
    for go_down in (True, False):
        orders = [_by_height(own, go_down) for own in pages.values()]
        for depth in range(2):
            orders = [order for order in orders if len(order) > depth]
            numbers = _page_numbers([order[depth] for order in orders], is_top=go_down)
            # What the same line has in common on all pages: its text, or what is around its page number.
            names = [numbers.get(id(order[depth]), order[depth].text.lower()) for order in orders]
            seen = Counter(names)
            done: set[str] = set()
            orders_left = []
            for order, name in zip(orders, names, strict=True):
                line = order[depth]
                is_large = line.size >= _HEADING_SCALE * body > 0
                kind = "" if is_large else _runs(line, id(line) in numbers, seen[name], len(pages))
                if kind:
                    orders_left.append(order)
                if kind == "number" or (kind == "text" and name in done):
                    dropped.add(id(line))
                done.add(name)
            orders = orders_left
    return [line for line in lines if id(line) not in dropped]


def _by_height(lines: Sequence[Line], go_down: bool) -> list[Line]:
    if any(line.height is None for line in lines):
        return list(lines) if go_down else list(lines)[::-1]
    return sorted(lines, key=lambda line: line.height or 0.0, reverse=go_down)


def _page_numbers(outer: Sequence[Line], *, is_top: bool) -> dict[int, str]:
    """Line ids -> the text around their numbers, for those of the outermost lines that hold the number of their page.

    Lines that are alike but for a number do, where that grows by one from page to page in most of them. A row of
    numbers does not, nor does a heading such as "Day 1", "Day 2" at the top of each page.
    """
    alike: dict[str, list[Line]] = {}
    for line in outer:
        alike.setdefault(re.sub(r"\d+", "#", line.text.lower()), []).append(line)
    found: dict[int, str] = {}
    for key, lines in alike.items():
        is_bare = bool(PAGE_NUMBER.fullmatch(lines[0].text))
        if not is_bare and not any(c.isalpha() for c in key):
            continue
        # For each line, which of its numbers it is and how much it is ahead of the page.
        leads = [{(i, int(n) - line.page) for i, n in enumerate(_NUMBER.findall(line.text))} for line in lines]
        usual, n_usual = Counter(chain.from_iterable(leads)).most_common(1)[0] if any(leads) else ((0, 0), 0)
        numbered = [line for line, own in zip(lines, leads, strict=True) if usual in own]
        is_counted = is_top and not is_bare and len(key.split()) == 2 and numbered and numbered[0].page + usual[1] == 1
        if n_usual >= max(min(3, len(lines)), len(lines) / 2) and not is_counted:
            found |= {id(line): key for line in numbered}
    return found


def _runs(line: Line, has_page_number: bool, n_seen: int, n_pages: int) -> str:
    """ "number" for a page number or a header with one, "text" for another running line, "" for the document's text."""
    is_on_most = 2 * n_seen > n_pages
    is_bare = has_page_number and PAGE_NUMBER.fullmatch(line.text)
    if is_bare and is_on_most and (n_pages > 1 or "page" in line.text.lower()):
        return "number"
    if has_page_number and n_seen >= 3 and _ENDS_IN_NUMBER.search(line.text):  # on every other page, or of a chapter
        return "number"
    return "text" if n_seen >= 3 and is_on_most else ""


def _with_their_bullets(lines: Sequence[Line]) -> list[Line]:
    """A bullet or number that was drawn by itself is put in front of the line beside it."""
    out: list[Line] = []
    for line in lines:
        above = out[-1] if out else None
        if above and _MARK.fullmatch(above.text) and abs(_gap(above, line) or 0.0) < 0.5 and above.page == line.page:
            out[-1] = line._replace(text=f"{above.text} {line.text}")
        else:
            out.append(line)
    return out


def _heading_levels(lines: Sequence[Line], body: float, *, may_be_bold: bool) -> list[int]:
    """For each line 1 (the largest letters) to 6, or 0 for the body."""

    def is_candidate(line: Line) -> bool:
        return len(line.text) <= _MAX_HEADING and sum(c.isalpha() for c in line.text) >= 2

    large = {line.size for line in lines if line.size >= _HEADING_SCALE * body > 0 and is_candidate(line)}
    rank = {size: min(i, 5) for i, size in enumerate(sorted(large, reverse=True), 1)}
    levels = []
    for line in lines:
        level = rank.get(line.size, 0) if is_candidate(line) else 0
        is_bold = may_be_bold and line.is_bold and line.size >= body and len(line.text) <= 80
        if (
            not level
            and is_bold
            and is_candidate(line)
            and not line.text.endswith(_END)
            and not _BULLET.match(line.text)
        ):
            level = len(set(rank.values())) + 1
        levels.append(min(level, 6))
    return levels


def _usual_gap(lines: Sequence[Line]) -> float:
    """The distance of neighbouring lines in letter sizes: the lower quartile, since wider ones part paragraphs."""
    gaps = []
    for above, below in pairwise(lines):
        gap = _gap(above, below)
        if gap is not None and above.size == below.size and 0 < gap < 3:
            gaps.append(gap)
    return sorted(gaps)[len(gaps) // 4] if gaps else 1.5


def _gap(above: Line, below: Line) -> float | None:
    if above.page != below.page or above.height is None or below.height is None or not above.size:
        return None
    return (above.height - below.height) / above.size


def _is_gap(above: Line, below: Line, usual: float) -> bool:
    gap = _gap(above, below)
    return gap is not None and (gap > _GAP * usual or gap < -1)  # upwards: the next column


def _separator(above: Line, below: Line, usual_gap: float, width: int) -> str:
    """What stands between two lines of the body: "" joins them to one paragraph."""
    if _BULLET.match(below.text) or _ITEM.match(below.text):
        return "\n" if _BULLET.match(above.text) or _ITEM.match(above.text) or above.text.endswith(":") else "\n\n"
    if re.search(r" \.\.\. *\w+$", above.text):  # an entry of a table of contents
        return "\n"
    if above.text.endswith("-") and below.text[0].islower():
        return ""
    is_cut_off = not above.text.endswith(_END)
    is_short = len(above.text) < _SHORT * width
    goes_on = below.text[0].islower() or (is_cut_off and not is_short)
    gap = _gap(above, below)
    if gap is None or gap < -1:  # the next page or column: the language must tell
        return "" if is_cut_off and goes_on else "\n\n"
    if gap > _GAP * usual_gap:
        return "\n\n"
    if abs(gap) < 0.2:  # two pieces of one line
        return ""
    return "\n" if is_short and not goes_on else ""


def _extend(out: list[str], below: str, words: Counter[str]) -> None:
    """Adds a line to the paragraph that `out` ends in."""
    above = out[-1]
    hyphenated = re.search(r"(\w+)-$", above[-80:])
    tail = re.match(r"\w+", below)
    separator = "" if _CJK.match(above[-1]) and _CJK.match(below[0]) else " "
    if hyphenated and tail and tail[0] not in _SUSPENDED:
        separator = ""
        # A hyphen that only the line end called for goes; one that the word has elsewhere as well stays.
        halves = hyphenated[1].lower(), tail[0].lower()
        is_part = words["-".join(halves)] > words["".join(halves)]
        if below[0].islower() and hyphenated[1][-1].isalpha() and not is_part:
            out[-1] = above[:-1]
    out += [separator, below]
