"""Parses PDF into markdown-like text with pypdf: pages become lines, and lines paragraphs and headings.

What speaks for a new paragraph: a wider gap than usual, another letter size, a bullet, a last line that stops short.
Running headers and page numbers are taken out first, since they stand between the two halves of a sentence.
"""

from __future__ import annotations

import io
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import chain, pairwise
from math import hypot
from typing import Any, NamedTuple

import pypdf
from pypdf.errors import DependencyError, LimitReachedError
from pypdf.generic import ArrayObject, DictionaryObject

from loracast.documents.clean import brief, normalise, sensible_title
from loracast.documents.file_types import Limits, Parsed
from loracast.documents.tables import ROW
from loracast.errors import DocumentError


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
    lines = [line._replace(text=_LEADER.sub(" ...", line.text)) for line in _without_running_lines(lines)]
    lines = _with_their_bullets(lines)
    if not lines:
        return ""
    width = sorted(len(line.text) for line in lines)[int(0.9 * (len(lines) - 1))]
    usual_gap = _usual_gap(lines)
    words = Counter(re.findall(r"\w+(?:-\w+)*", "\n".join(line.text for line in lines).lower()))

    out: list[str] = []
    above: Line | None = None
    above_level = 0
    for line, level in zip(lines, _heading_levels(lines), strict=True):
        bullet = None if level else _BULLET.match(line.text)
        text = "- " + line.text[bullet.end() :] if bullet else line.text
        separator = "\n\n"
        if above and (level or above_level):
            gap = _gap(above, line)
            if level == above_level and (gap is None or -1 <= gap <= _GAP * (usual_gap * 1.5)):
                separator = ""  # a heading of two lines; upwards would be the next column
        elif above:
            separator = _separator(above, line, usual_gap, width)
        if above and not separator:
            _extend(out, text, words)
        else:
            out += [separator, "#" * level + " " + text if level else text]
        above, above_level = line, level
    return "\n\n".join(_with_marks(block, width) for block in "".join(out[1:]).split("\n\n"))


def _with_marks(block: str, width: int) -> str:
    """A block with marks before its lines where these are rows of a table: several short ones, none of them an item."""
    lines = block.split("\n")
    are_rows = len(lines) > 1 and not any(len(line) > width or _ITEM.match(line) or line[:2] == "- " for line in lines)
    return "\n".join(ROW + line for line in lines) if are_rows else block


def _main_size(lines: Sequence[Line]) -> float:
    """The size in which most letters are set."""
    weights: Counter[float] = Counter()
    for line in lines:
        weights[line.size] += len(line.text)
    return max(weights, key=weights.__getitem__, default=0.0)


def _without_running_lines(lines: Sequence[Line]) -> list[Line]:
    """Drop page numbers, and all but the first of a header or footer that most pages repeat.

    A line runs if it is the outermost of its page, or next to one that runs: anything further in is text, however often
    it comes, and so is whatever is set larger than the body.
    """
    pages: dict[int, list[Line]] = defaultdict(list)
    for line in lines:
        pages[line.page].append(line)
    body = _main_size(lines)
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
    alike: dict[str, list[Line]] = defaultdict(list)
    for line in outer:
        alike[re.sub(r"\d+", "#", line.text.lower())].append(line)
    found: dict[int, str] = {}
    for key, lines in alike.items():
        is_bare = bool(PAGE_NUMBER.fullmatch(lines[0].text))
        # For each line, which of its numbers it is and how much it is ahead of the page.
        leads = [{(i, int(n) - line.page) for i, n in enumerate(_NUMBER.findall(line.text))} for line in lines]
        counts = Counter(chain.from_iterable(leads))
        if not counts or not (is_bare or any(c.isalpha() for c in key)):
            continue
        usual, n_usual = counts.most_common(1)[0]
        numbered = [line for line, own in zip(lines, leads, strict=True) if usual in own]
        is_counted = is_top and not is_bare and len(key.split()) == 2 and numbered[0].page + usual[1] == 1
        if n_usual >= max(min(3, len(lines)), len(lines) / 2) and not is_counted:
            found |= {id(line): key for line in numbered}
    return found


def _runs(line: Line, has_page_number: bool, n_seen: int, n_pages: int) -> str:
    """ "number" for a page number or a header with one, "text" for another running line, "" for the document's text."""
    is_on_most = 2 * n_seen > n_pages
    is_bare = PAGE_NUMBER.fullmatch(line.text) and is_on_most and (n_pages > 1 or "page" in line.text.lower())
    # Those of every other page or of a chapter are not on most pages.
    if has_page_number and (is_bare or (n_seen >= 3 and _ENDS_IN_NUMBER.search(line.text))):
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


def _heading_levels(lines: Sequence[Line]) -> list[int]:
    """For each line 1 (the largest letters) to 6, or 0 for the body."""
    body = _main_size(lines)
    n_bold, n_all = (sum(len(line.text) for line in some) for some in ([x for x in lines if x.is_bold], lines))
    candidates = {line for line in lines if len(line.text) <= _MAX_HEADING and sum(c.isalpha() for c in line.text) >= 2}
    large = sorted({line.size for line in candidates if line.size >= _HEADING_SCALE * body > 0}, reverse=True)
    rank = {size: min(i, 5) for i, size in enumerate(large, 1)}

    def level_of(line: Line) -> int:
        if line not in candidates:
            return 0
        is_bold = n_bold < 0.3 * n_all and line.is_bold and line.size >= body and len(line.text) <= 80
        is_heading = is_bold and not line.text.endswith(_END) and not _BULLET.match(line.text)
        return rank.get(line.size) or (min(len(rank), 5) + 1) * is_heading

    return [level_of(line) for line in lines]


def _usual_gap(lines: Sequence[Line]) -> float:
    """The distance of neighbouring lines in letter sizes: the lower quartile, since wider ones part paragraphs."""
    found = (_gap(above, below) for above, below in pairwise(lines) if above.size == below.size)
    gaps = sorted(gap for gap in found if gap is not None and 0 < gap < 3)
    return gaps[len(gaps) // 4] if gaps else 1.5


def _gap(above: Line, below: Line) -> float | None:
    if above.page != below.page or above.height is None or below.height is None or not above.size:
        return None
    return (above.height - below.height) / above.size


def _separator(above: Line, below: Line, usual_gap: float, width: int) -> str:
    """What stands between two lines of the body: "" joins them to one paragraph."""
    above_is_item, below_is_item = (bool(_BULLET.match(x.text) or _ITEM.match(x.text)) for x in (above, below))
    if below_is_item:
        return "\n" if above_is_item or above.text.endswith(":") else "\n\n"
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
    are_pieces = abs(gap) < 0.2  # of one line
    return "\n" if is_short and not goes_on and not are_pieces else ""


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


_LIGATURES = str.maketrans({"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"})
_TAIL = 2048  # bytes at the end in which the end mark must stand; a truncated file may have one further up


def parse(data: bytes, label: str, limits: Limits) -> Parsed:
    """The text of a PDF, its metadata's title or else its largest heading on the first page, and its page count."""
    if b"%%EOF" not in data.rstrip(b"\0\r\n\t ")[-_TAIL:]:
        raise DocumentError(f"{label} is a truncated PDF (its end is missing): copy or download it again")
    remedy = "remove its password with `qpdf --password=... --decrypt in.pdf out.pdf` and read out.pdf"
    encrypted = DocumentError(f"{label} is encrypted: {remedy}")
    # pypdf repairs what it can and only logs it; what it logs may be missing text, which the caller must hear of.
    complaints = io.StringIO()
    logger = logging.getLogger("pypdf")
    logger.addHandler(logging.StreamHandler(complaints))
    logger.propagate = False
    lines: list[Line] = []
    scans: list[int] = []
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise encrypted
        n_pages = len(reader.pages)
        if n_pages > limits.max_pages:
            raise DocumentError(
                f"{label} has {n_pages:,} pages, more than {limits.max_pages:,}: split it with "
                "`qpdf --split-pages=100 in.pdf out.pdf`, or raise Limits.max_pages"
            )
        metadata = reader.metadata
        title = sensible_title(metadata.get("/Title") if metadata else None)
        for number in range(1, n_pages + 1):
            page = reader.pages[number - 1]
            own = _page_lines(page, number) + _filled_in(page, number)
            lines += own
            if not own and _has_image(page):
                scans.append(number)
    except DependencyError:  # AES needs a library that loracast does not ask for
        raise encrypted from None
    except LimitReachedError as error:
        raise DocumentError(
            f"{label} goes beyond a safety limit of the PDF parser ({brief(error)}): if you trust it, "
            "print it to a new PDF, e.g. with `gs -o out.pdf -sDEVICE=pdfwrite in.pdf`"
        ) from None

    usual = Counter(" ".join(line.split())[:120] for line in complaints.getvalue().splitlines()).most_common(5)
    warnings = [f"damaged in places: {message}" for message, _ in usual]
    if not lines:
        scan = "; ".join(["a scan?", *warnings[:1]])
        raise DocumentError(
            f"{label} has no text layer ({scan}): recognise its text with `ocrmypdf in.pdf out.pdf` and read out.pdf"
        )
    # Pairs of surrogates are joined; lone halves cannot be written.
    text = normalise(join_lines(lines).encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    n_unknown = text.count("\ufffd") + sum("\ue000" <= c <= "\uf8ff" for c in text)
    if n_unknown > len(text) // 5:
        raise DocumentError(
            f"{label} has fonts that do not map to characters: use `ocrmypdf --force-ocr in.pdf out.pdf`"
        )
    if scans:
        shown = ", ".join(map(str, scans[:10])) + (" ..." if len(scans) > 10 else "")
        warnings.append(
            f"only pictures on {len(scans)} of {n_pages} pages ({shown}): `ocrmypdf --skip-text` reads scans"
        )
    if not title:  # the largest letters, if they stand on the first page with text
        title = next((block[2:] for block in text.split("\n\n")[:3] if block.startswith("# ")), "")
    return Parsed(text, title, n_pages, tuple(warnings))


def _page_lines(page: Any, number: int) -> list[Line]:
    """The lines of a page in pypdf's order, each with its size in points and its height on the page."""
    lines: list[list[Line]] = [[]]  # of each, the pieces that are set alike

    def visit(text: str, cm: list[float], tm: list[float], font: Any, font_size: float) -> None:
        size = round(2 * abs(font_size) * hypot(tm[2], tm[3]) * hypot(cm[2], cm[3])) / 2
        name = str(font.get("/BaseFont", "")) if font else ""
        is_bold = any(word in name for word in ("Bold", "Black", "Heavy"))
        height = tm[4] * cm[1] + tm[5] * cm[3] + cm[5]
        first, *others = [Line(piece, size, height, number, is_bold) for piece in text.split("\n")]
        lines[-1].append(first)
        lines.extend([piece] for piece in others)

    page.extract_text(visitor_text=visit)
    joined = []
    for pieces in lines:
        text = " ".join("".join(piece.text for piece in pieces).translate(_LIGATURES).split())
        seen = [piece for piece in pieces if piece.text.strip()]
        if text:
            n_bold = sum(len(piece.text) for piece in seen if piece.is_bold)
            joined.append(Line(text, _main_size(seen), seen[0].height, number, 2 * n_bold > len(text)))
    return joined


def _filled_in(page: Any, number: int) -> list[Line]:
    """What was filled into the fields of a form, and written on the page as notes: a line each."""
    lines: list[Line] = []
    annotations = _entry(page, "/Annots")
    for annotation in annotations if isinstance(annotations, ArrayObject) else ():
        field = annotation.get_object()
        group = _entry(field, "/Parent")
        kind, name, value, what = (_entry(field, key) or _entry(group, key) for key in ("/FT", "/TU", "/V", "/Subtype"))
        name = name or _entry(field, "/T") or _entry(group, "/T")
        said: Any = _entry(field, "/Contents") if what == "/FreeText" else None
        if what == "/Widget" and name and kind == "/Btn":
            said = None if value in (None, "/Off") else f"{name}: yes"
        elif what == "/Widget" and name and isinstance(value, str) and value.strip():
            said = f"{name}: {value}"
        if isinstance(said, str) and said.strip():
            lines.append(Line(f"- {' '.join(said.split())}", 0.0, None, number))
    return lines


def _entry(holder: Any, key: str) -> Any:
    """The entry of a dictionary, None where there is none; [] follows references, which `get` does not."""
    return holder[key] if isinstance(holder, DictionaryObject) and key in holder else None


def _has_image(page: Any) -> bool:
    objects = _entry(_entry(page, "/Resources"), "/XObject") or {}
    return any(objects[name].get("/Subtype") == "/Image" for name in objects)  # by name: [] follows references
