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
_UNSEEN = ("head", "script", "style", "template", "noscript", "svg", "annotation", "iframe", "object", "canvas",
           "select", "textarea", "del", "s", "strike")  # fmt: skip
_INVISIBLE_STYLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.I)
_INLINE = re.compile(
    "a|abbr|acronym|b|bdi|bdo|big|cite|code|data|dfn|em|font|i|img|input|ins|kbd|label|mark|math|mi|mn|mo|mrow|ms|"
    "mtext|nobr|q|rp|rt|ruby|samp|small|span|strong|sub|sup|time|tt|u|var|wbr"
)
_LINES = {"div", "p", "li", "ol", "ul", "section", "figure"}
_PREFIXES = {f"h{level}": "#" * level + " " for level in range(1, 7)} | {"li": "- "}
_MAX_SPANS = {"colspan": 1000, "rowspan": 65534}  # where browsers stop as well
_LONGEST_CELL = 200  # characters, of a table of data with paragraphs in its cells


def parse(data: bytes, label: str, limits: Limits) -> Parsed:
    """The visible text of a page, and the content of its <title>."""
    declared = _CHARSET.search(data[:4096])
    charset = declared[1].decode() if declared else ""
    source = decode(data, label, charset if _KNOWN_CHARSETS.match(charset) else None)
    parser = etree.HTMLParser(encoding="utf-8", no_network=True, remove_comments=True, remove_pis=True, huge_tree=True)
    try:
        root = etree.fromstring(source.replace("\0", "").encode(), parser)
    except etree.XMLSyntaxError as error:  # the parser forgives every fault of a page but these two
        if "empty" not in str(error):
            raise MemoryError from None
        root = None
    if any(entry.level_name == "FATAL" for entry in parser.error_log):  # it stopped, and would have lost the rest
        raise RecursionError
    root = etree.Element("html") if root is None else root
    title = root.findtext(".//title") or root.findtext(".//h1") or ""
    for element in root.iter():
        if element.get("hidden") is not None or _INVISIBLE_STYLE.search(element.get("style") or ""):
            element.tag = "del"
    etree.strip_elements(root, *_UNSEEN, with_tail=False)
    text = normalise(join_blocks(prefix + block for prefix, block in _Writer(root).blocks))
    if root.tag == "del" or not text.strip():
        raise DocumentError(f"{label} holds no visible text: save the page from a browser after its scripts have run")
    return Parsed(text, title)


class _Writer:
    """Collects the blocks of an element, each with its prefix. No recursion: pages nested 10,000 deep exist."""

    def __init__(self, root: Any) -> None:
        self.blocks: list[tuple[str, str]] = []
        self.line: list[str] = []
        self.prefix = ""
        self.n_pre = 0
        events = etree.iterwalk(root, events=("start", "end"))
        for event, element in events:
            is_inner = element is not root
            if event == "end":
                self._close(element.tag)
                self._add(element.tail if is_inner else None)
            elif element.tag == "sup" and is_inner:
                self._add(_raised(element, self.line))
                events.skip_subtree()
            elif element.tag == "table" and is_inner and _is_data(element):
                self._flush()
                self._write_table(element)
                events.skip_subtree()
            else:
                self._open(element.tag)
                self._add(element.text)
        self._flush()

    def text(self) -> str:
        """All blocks on one line, without their prefixes."""
        return " ".join(" ".join(block for _, block in self.blocks).split())

    def _flush(self) -> None:
        """Ends a block: what was collected becomes one paragraph."""
        joined = "".join(self.line)
        if not self.n_pre:
            joined = "\n".join(filter(None, (" ".join(line.split()) for line in joined.split("\n"))))
        if self.n_pre and joined.strip() and not self.prefix.startswith("#"):
            # As code in markdown, where a line that starts with # is no heading.
            ticks = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", joined))])
            self.blocks.append(("", f"{ticks}\n{joined.strip(chr(10))}\n{ticks}"))
        elif joined.strip():
            self.blocks.append((self.prefix, joined.strip()))
            self.prefix = ""
        self.line = []

    def _add(self, text: str | None) -> None:
        if text:  # in running text a newline is a space; only <br> breaks a line
            self.line.append(text if self.n_pre else re.sub(r"\s+", " ", text))

    def _open(self, tag: str) -> None:
        if tag == "br":
            self.line.append("\n")
        elif self.n_pre and tag in _LINES:
            self._end_line()
        elif not _INLINE.fullmatch(tag):
            self._flush()
            self.n_pre += tag == "pre"
            self.prefix = _PREFIXES.get(tag, self.prefix)

    def _close(self, tag: str) -> None:
        if self.n_pre and tag in _LINES:
            self._end_line()
        elif not _INLINE.fullmatch(tag) and tag != "br":
            if tag.startswith("h") and tag in _PREFIXES:
                self.line = [" ".join("".join(self.line).split())]
            self._flush()
            self.prefix = ""
            self.n_pre -= tag == "pre"

    def _end_line(self) -> None:
        """Ends a line of code, each of which some pages put in a block of its own."""
        if self.line and not self.line[-1].endswith("\n"):
            self.line.append("\n")

    def _write_table(self, table: Any) -> None:
        rows, heads = _grid(table)
        first = next((i for i, row in enumerate(rows) if any(row[1:])), 0)  # below titles of one cell
        while heads[first : first + 2] == [True, True] and len(set(rows[first])) < len(rows[first]):
            # Names over several columns, and the names of these columns below them.
            pairs = zip_longest(rows[first], rows.pop(first + 1), fillvalue="")
            rows[first] = [" ".join(dict.fromkeys(filter(None, pair))) for pair in pairs]
            del heads[first]
        has_header = any(heads[first : first + 1]) and any(rows[first][1:])
        captions = [_Writer(caption).text() for caption in table.findall(".//caption")[:1]]
        self.blocks += [("", block) for block in (*captions, "\n".join(rows_to_lines(rows, has_header or None)))]


def _is_data(table: Any) -> bool:
    """Whether a table is one of data; another one lays a page out, and its cells are blocks of their own.

    One whose cells hold paragraphs is one of data where they are short, as Word and Outlook write it.
    """
    if any(element is not table for element in table.iter("table", "h1", "h2", "h3", "ul", "ol", "pre")):
        return False
    if table.find(".//p") is None:
        return True
    rows = [row.findall("td") + row.findall("th") for row in table.iter("tr")]
    cells = [cell for row in rows for cell in row]
    is_grid = len(rows) > 1 and all(len(row) > 1 for row in rows)
    return is_grid and all(
        len(cell.findall(".//p")) < 2 and len(_Writer(cell).text()) <= _LONGEST_CELL for cell in cells
    )


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
            spanned, n_rows = [""], 1
            if len(texts) in above:
                text, n_rows = above[len(texts)]
                spanned = [text]
            elif own:
                cell = own.pop(0)
                text, n_rows = _Writer(cell).text(), _span(cell, "rowspan")
                n_more = _span(cell, "colspan") - 1
                spanned = [text] + [text if cell.tag == "th" and not is_alone else ""] * n_more
            if n_rows > 1:
                below |= {len(texts) + i: (text, n_rows - 1) for i, text in enumerate(spanned)}
            texts += spanned
        rows.append(texts)
        above = below
    return rows, heads


def _span(cell: Any, name: str) -> int:
    found = re.match(r"\s*([0-9]{1,9})", cell.get(name) or "")
    n = min(int(found[1]), _MAX_SPANS[name]) if found else 1
    return n or (_MAX_SPANS[name] if name == "rowspan" else 1)  # rowspan=0: to the end of the group


def _raised(element: Any, before: list[str]) -> str:
    """The text of a <sup>: behind "^", or in brackets where it is a link, as the mark of a note is."""
    text = _Writer(element).text()
    end = " " if "".join(element.itertext())[-1:].isspace() else ""
    parent = element.getparent()
    is_link = parent.tag == "a" and len(parent) == 1 and not (parent.text or element.tail or "").strip()
    if text and (is_link or element.find(".//a") is not None):
        return f"[{text.strip('[]()')}]{end}"
    return superscript(next(filter(None, reversed(before)), ""), text + end)
