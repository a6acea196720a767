"""HTML to markdown-like text: headings, lists, tables, paragraphs. No link, image, style or frame is ever followed."""

from __future__ import annotations

import re
from itertools import zip_longest
from typing import Any

from lxml import etree

from loracast.documents.clean import decode, join_blocks, normalise, superscript
from loracast.documents.file_types import Limits, Parsed
from loracast.documents.tables import rows_to_lines
from loracast.errors import DocumentError

# A declared encoding is believed only if it is a plain character set: "utf-7" and the like are tricks.
_CHARSET = re.compile(rb"""<(?:meta|\?xml)\b[^>]*?\b(?:charset|encoding)\s*=\s*["']?\s*([\w-]+)""", re.I)
_KNOWN_CHARSETS = re.compile(
    r"(windows-12\d\d|iso-8859-\d+|latin-?\d|us-ascii|koi8-[ru]|shift_jis|euc-(jp|kr)|gb(k|2312|18030)|big5|macintosh)$",
    re.I,
)
_UNSEEN = re.compile("script|style|template|noscript|svg|annotation|iframe|object|canvas|select|textarea|del|s|strike")
_INVISIBLE_STYLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.I)
_INLINE = re.compile(
    "a|abbr|acronym|b|bdi|bdo|big|cite|code|data|del|dfn|em|font|i|img|input|ins|kbd|label|mark|math|mi|mn|mo|mrow|ms|"
    "mtext|nobr|q|rp|rt|ruby|s|samp|small|span|strike|strong|sub|sup|time|tt|u|var|wbr|"  # no tag: a comment
)
_LINES = {"div", "p", "li", "ol", "ul", "section", "figure"}
_MAX_COLSPAN, _MAX_ROWSPAN = 1000, 65534  # where browsers stop as well
_LONGEST_CELL = 200  # characters, of a table of data with paragraphs in its cells
_HEADINGS = {f"h{level}": level for level in range(1, 7)}


def parse(data: bytes, label: str, limits: Limits) -> Parsed:
    """The visible text of a page, and the content of its <title>."""
    declared = _CHARSET.search(data[:4096])
    charset = declared[1].decode() if declared else None
    source = decode(data, label, charset if charset and _KNOWN_CHARSETS.match(charset) else None)
    parser = etree.HTMLParser(encoding="utf-8", no_network=True, remove_comments=True, remove_pis=True, huge_tree=True)
    try:
        root = etree.fromstring(source.replace("\0", "").encode(), parser)
    except etree.XMLSyntaxError as error:  # the parser forgives every fault of a page but these two
        if "empty" not in str(error):
            raise MemoryError from None
        root = None
    if any(entry.level_name == "FATAL" for entry in parser.error_log):  # it stopped, and would have lost the rest
        raise RecursionError
    writer = _Writer()
    if root is not None:
        writer.walk(root)
    text = normalise(join_blocks(writer.blocks))
    if root is None or not text.strip():
        raise DocumentError(f"{label} holds no visible text: save the page from a browser after its scripts have run")
    return Parsed(text, root.findtext(".//title") or root.findtext(".//h1") or "")


class _Writer:
    """Collects blocks. The walk is a loop, not a recursion: pages nested 10,000 deep exist."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.line: list[str] = []
        self.prefix = ""
        self.n_pre = 0

    def flush(self) -> None:
        """Ends a block: what was collected becomes one paragraph."""
        joined = "".join(self.line)
        if not self.n_pre:
            lines = (" ".join(line.split()) for line in joined.split("\n"))
            joined = "\n".join(filter(None, lines))
        if self.n_pre and joined.strip() and not self.prefix.startswith("#"):
            # As code in markdown, where a line that starts with # is no heading.
            ticks = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", joined))])
            self.blocks.append(f"{ticks}\n{joined.strip(chr(10))}\n{ticks}")
        elif joined.strip():
            self.blocks.append(self.prefix + joined.strip())
            self.prefix = ""
        self.line = []

    def add(self, text: str | None) -> None:
        if text:  # in running text a newline is a space; only <br> breaks a line
            self.line.append(text if self.n_pre else re.sub(r"\s+", " ", text))

    def walk(self, root: Any) -> None:
        events = etree.iterwalk(root, events=("start", "end"))
        for event, element in events:
            tag = element.tag if isinstance(element.tag, str) else ""
            if event == "start":
                if tag == "sup" and not _is_unseen(element, tag):
                    self.add(_raised(element, self.line))
                    events.skip_subtree()
                    continue
                if tag == "head" or _is_unseen(element, tag) or (tag == "table" and self._write_table(element)):
                    events.skip_subtree()
                    continue
                self._open(element, tag)
                self.add(element.text)
            else:
                self._close(element, tag)
                self.add(element.tail)
        self.flush()

    def _open(self, element: Any, tag: str) -> None:
        if tag == "br":
            self.line.append("\n")
        elif self.n_pre and tag in _LINES:  # of code, each in a block of its own
            self._end_line()
        elif not _INLINE.fullmatch(tag):
            self.flush()
            self.n_pre += tag == "pre"
            if tag in _HEADINGS:
                self.prefix = "#" * _HEADINGS[tag] + " "
            elif tag == "li":
                self.prefix = "- "

    def _close(self, element: Any, tag: str) -> None:
        # The end of a skipped element comes by here as well, with nothing collected.
        if _INLINE.fullmatch(tag) or tag in ("br", "head") or _is_unseen(element, tag):
            return
        if self.n_pre and tag in _LINES:
            self._end_line()
            return
        if tag in _HEADINGS:
            self.line = [" ".join("".join(self.line).split())]
        self.flush()
        self.prefix = ""
        self.n_pre -= tag == "pre"

    def _end_line(self) -> None:
        if self.line and not self.line[-1].endswith("\n"):
            self.line.append("\n")

    def _write_table(self, table: Any) -> bool:
        """Writes a table of data; False for one that lays a page out, whose cells are blocks of their own."""
        if any(element is not table for element in table.iter("table", "h1", "h2", "h3", "ul", "ol", "pre")):
            return False
        if table.find(".//p") is not None and not _holds_short_cells(table):
            return False
        self.flush()
        rows, heads = _grid(table)
        first = next((i for i, row in enumerate(rows) if any(row[1:])), 0)  # below titles of one cell
        while heads[first : first + 2] == [True, True] and len(set(rows[first])) < len(rows[first]):
            # Names over several columns, and the names of these columns below them.
            pairs = zip_longest(rows[first], rows.pop(first + 1), fillvalue="")
            rows[first] = [" ".join(dict.fromkeys(filter(None, pair))) for pair in pairs]
            del heads[first]
        has_header = any(heads[first : first + 1]) and any(rows[first][1:])
        caption = table.find(".//caption")
        if caption is not None:
            self.blocks.append(_cell_text(caption))
        lines = rows_to_lines(rows, has_header or None)
        if lines:
            self.blocks.append("\n".join(lines))
        return True


def _holds_short_cells(table: Any) -> bool:
    """Whether a table whose cells hold paragraphs is one of data all the same, as Word and Outlook write it."""
    rows = [[cell for cell in row if cell.tag in ("td", "th")] for row in table.iter("tr")]
    cells = [cell for row in rows for cell in row]
    is_grid = len(rows) > 1 and all(len(row) > 1 for row in rows)
    return is_grid and all(len(cell.findall(".//p")) < 2 and len(_cell_text(cell)) <= _LONGEST_CELL for cell in cells)


def _is_unseen(element: Any, tag: str) -> bool:
    is_hidden = element.get("hidden") is not None or _INVISIBLE_STYLE.search(element.get("style") or "")
    return bool(is_hidden or _UNSEEN.fullmatch(tag))


def _grid(table: Any) -> tuple[list[list[str]], list[bool]]:
    """The texts of the rows, all in their columns, and whether each row is one of names (<th>).

    A cell that spans rows holds for each of them. One that spans columns stands in the first of them; a name beside
    other names stands in each.
    """
    rows: list[list[str]] = []
    heads: list[bool] = []
    above: dict[int, tuple[str, int]] = {}  # column -> what spans it from above, and how many rows more
    group = None
    for row in table.iter("tr"):
        if row.getparent() is not group:  # <thead>, <tbody>: no cell reaches beyond its own
            group, above = row.getparent(), {}
        own = [cell for cell in row if cell.tag in ("td", "th")]
        heads.append(bool(own) and all(cell.tag == "th" for cell in own))
        is_alone = len(own) == 1
        below: dict[int, tuple[str, int]] = {}
        texts: list[str] = []
        width = max(above, default=-1) + 1
        while own or len(texts) < width:
            if len(texts) in above:
                text, n_rows = above[len(texts)]
                spanned = [text]
            elif own:
                cell = own.pop(0)
                text, n_rows = _cell_text(cell), _span(cell, "rowspan", _MAX_ROWSPAN)
                n_more = _span(cell, "colspan", _MAX_COLSPAN) - 1
                spanned = [text] + [text if cell.tag == "th" and not is_alone else ""] * n_more
            else:
                spanned, n_rows = [""], 1
            if n_rows > 1:
                below |= {len(texts) + i: (text, n_rows - 1) for i, text in enumerate(spanned)}
            texts += spanned
        rows.append(texts)
        above = below
    return rows, heads


def _span(cell: Any, name: str, most: int) -> int:
    found = re.match(r"\s*([0-9]{1,9})", cell.get(name) or "")
    if not found:
        return 1
    return min(int(found[1]), most) or (most if name == "rowspan" else 1)  # rowspan=0: to the end of the group


def _cell_text(cell: Any) -> str:
    parts: list[str] = []
    events = etree.iterwalk(cell, events=("start", "end"))
    for event, element in events:
        tag = element.tag if isinstance(element.tag, str) else ""
        if event == "start":
            if _is_unseen(element, tag):
                events.skip_subtree()
                continue
            if tag == "sup" and element is not cell:
                parts.append(_raised(element, parts))
                events.skip_subtree()
                continue
            parts += ["" if _INLINE.fullmatch(tag) else " ", element.text or ""]
        elif element is not cell:
            parts.append(element.tail or "")
    return " ".join("".join(parts).split())


def _raised(element: Any, before: list[str]) -> str:
    """The text of a <sup>: behind "^", or in brackets where it is a link, as the mark of a note is."""
    text = _cell_text(element)
    end = " " if "".join(element.itertext())[-1:].isspace() else ""
    parent = element.getparent()
    is_link = parent.tag == "a" and len(parent) == 1 and not (parent.text or element.tail or "").strip()
    if text and (is_link or element.find(".//a") is not None):
        return f"[{text.strip('[]()')}]{end}"
    return superscript(next(filter(None, reversed(before)), ""), text + end)
