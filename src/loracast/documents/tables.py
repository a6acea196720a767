"""Turns rows of tables into lines that name their columns, as a chunk may hold a row without the header; reads CSV.

Parsers put a mark before each such line. The mark never reaches a document's text: `take_marks` turns the marks into
the places of rows, and a row is one unit wherever sentences are told apart (units.py).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from itertools import groupby, islice

from loracast.documents.file_types import Parsed
from loracast.documents.units import fence_after
from loracast.errors import DocumentError

ROW = "\ufdd0"
"""The mark at the beginning of a line that is a row: a noncharacter, which Unicode keeps for use inside programs."""
_MARK = re.compile(f"(^)?{ROW}", re.MULTILINE)
_CELL_END = re.compile(r"(?<!\\)\|")
_DELIMITERS = re.compile(r"\|?(?: *:?-+:? *\|)+(?: *:?-+:?)?")
_LONGEST_DELIMITERS = 1000  # characters
_WIDEST = 400  # characters of a line of aligned columns
_RECORD = re.compile(r"([^\s:][^:]{0,39}): +(\S.*)")
_LONGEST_SUBJECT = 80  # characters of a row's first cell, which is repeated
_YEAR = re.compile(r"(19|20)\d\d")


def rows_to_lines(rows: Sequence[Sequence[str]], has_header: bool | None = None) -> list[str]:
    """Turn each row into a line of `named_row`; the first row names the columns where it is a header.

    `has_header` None lets the cells decide; two columns without a known header are names and values. First rows with
    nothing beside their first cell are titles, each a line without a mark.
    """
    cells = [row for row in ([" ".join(cell.split()) for cell in row] for row in rows) if any(row)]
    if not cells:
        return []
    width = max(map(len, cells))
    n_titles = next((i for i, row in enumerate(cells) if any(row[1:])), 0)
    titles, cells = [row[0] for row in cells[:n_titles]], cells[n_titles:]
    if has_header is None:
        has_header = width > 2 and len(cells) > 1 and looks_like_header(cells[0])
    header = cells.pop(0) if has_header and len(cells) > 1 else []
    return titles + [named_row(header, row) for row in cells]


def looks_like_header(row: Sequence[str]) -> bool:
    """Distinct names, none of which is a number or a date; but several years may follow a name."""
    names = [cell for cell in row if cell]
    numbers = [name for name in names if re.match(r"[-+€$£]?[\d.,]", name)]
    are_years = len(numbers) > 1 and row[0] not in numbers and all(map(_YEAR.fullmatch, numbers))
    return bool(names) and len(set(names)) == len(names) and (not numbers or are_years)


def named_row(header: Sequence[str], row: Sequence[str]) -> str:
    """A row as a line behind the mark `ROW`: a statement for each cell, which begins with the row's first cell.

    "Name Ada, Room: B2. Name Ada, Phone: 4711." answers more questions about its cells than "Name: Ada; Room: B2;
    Phone: 4711" (docs/notebook/2026-12-02.md). Without a header "Ada: B2. Ada: 4711."; empty cells are left out.
    """
    names = [*header, *[""] * (len(row) - len(header))]
    told = [(name, cell) for name, cell in zip(names, row, strict=False) if cell]
    if row[0] and len(told) > 1:
        about = " ".join(filter(None, told[0])).lstrip("# ")[:_LONGEST_SUBJECT]  # "#" would make a heading of it
        parts = [f"{about}, {name}: {cell}" if name else f"{about}: {cell}" for name, cell in told[1:]]
    else:
        parts = [f"{name}: {cell}" if name else cell for name, cell in told]
    return ROW + " ".join(part if part.endswith((".", "!", "?")) else f"{part}." for part in parts)


def take_marks(text: str) -> tuple[str, tuple[int, ...]]:
    """The text without marks, and the characters in it at which its rows begin; each ends with its line."""
    parts, rows, n, at = list[str](), list[int](), 0, 0
    for mark in _MARK.finditer(text):
        parts.append(text[at : mark.start()])
        n += mark.start() - at
        at = mark.end()
        rows += [n] if mark[1] is not None else []
    return "".join([*parts, text[at:]]), tuple(rows)


def name_rows(text: str) -> str:
    """A plain text with the rows of its tables as lines of `named_row`.

    Tables are those of Markdown (GitHub's form: a row of dashes below the header), three or more columns that spaces
    align, and records: paragraphs of lines "Name: value" that all begin with the same name. Code between fences stays
    as it is.
    """
    return _in_paragraphs(_in_markdown(text))


def _in_markdown(text: str) -> str:
    lines, found, fence, i = text.split("\n"), list[str](), "", 0
    if not any(map(_is_delimiters, lines)):
        return text
    while i < len(lines):
        fence = fence_after(lines[i], fence)
        if fence or "|" not in lines[i] or i + 1 == len(lines) or not _is_delimiters(lines[i + 1]):
            found.append(lines[i])
            i += 1
            continue
        end = next((j for j in range(i + 2, len(lines)) if "|" not in lines[j]), len(lines))
        header, *rows = (_cells(lines[j]) for j in (i, *range(i + 2, end)))
        found += [named_row(header, row) for row in rows if any(row)] or lines[i:end]
        i = end
    return "\n".join(found)


def _in_paragraphs(text: str) -> str:
    """A text with columns that spaces align, and with records, as lines of `named_row`."""
    groups = [[*group] for _, group in groupby(text.split("\n"), key=lambda line: not line.strip())]
    fence, named, aligned = "", dict[int, list[re.Match[str]]](), dict[int, list[list[str]]]()
    for i, lines in enumerate(groups):
        fences = [fence]
        for line in lines:
            fences.append(fence := fence_after(line, fence))
        if not any(fences):
            pairs = [pair for line in lines if (pair := _RECORD.fullmatch(line.strip()))]
            if 1 < len(pairs) == len(lines):
                named[i] = pairs
            elif rows := _aligned(lines):
                aligned[i] = rows
    # Between two paragraphs stands a group of blank lines.
    records = {i: pairs for i, pairs in named.items() if _is_like(pairs, named.get(i - 2), named.get(i + 2))}
    found = list[str]()
    for i, lines in enumerate(groups):
        if i in records:
            lines = [named_row([pair[1] for pair in records[i]], [pair[2] for pair in records[i]])]
        found += rows_to_lines(aligned[i]) if i in aligned else lines
    return "\n".join(found)


def _is_like(pairs: list[re.Match[str]], *others: list[re.Match[str]] | None) -> bool:
    """Whether lines "Name: value" begin with the same name as the ones before or behind them."""
    return any(other and other[0][1] == pairs[0][1] for other in others)


def _aligned(lines: Sequence[str]) -> list[list[str]]:
    """The cells of lines in three or more columns that two or more spaces part in all of them; none otherwise."""
    width = max(map(len, lines))
    if len(lines) < 3 or width > _WIDEST:
        return []
    is_blank = [all(line[i : i + 1] in ("", " ") for line in lines) for i in range(width)]
    columns = [(m.start(), m.end()) for m in re.finditer("x+(?: x+)*", "".join(" x"[not blank] for blank in is_blank))]
    return [[line[a:b].strip() for a, b in columns] for line in lines] if len(columns) > 2 else []


def _is_delimiters(line: str) -> bool:
    """Whether a line is the one of dashes below the header of a table in Markdown."""
    return "|" in line and len(line) < _LONGEST_DELIMITERS and _DELIMITERS.fullmatch(line.strip()) is not None


def _cells(line: str) -> list[str]:
    return [
        cell.strip().replace("\\|", "|") for cell in _CELL_END.split(line.strip().removeprefix("|").removesuffix("|"))
    ]


DELIMITERS = ",;\t|"
_NAMED_DELIMITER = re.compile(r"sep=([^\w\s\"]|\t)\r?\n", re.I)


def parse_csv(text: str, label: str, delimiter: str | None = None) -> Parsed:
    """The first row names the columns unless it holds a number that is no year. A line "sep=;" before it, which Excel
    reads, names the delimiter. Raises DocumentError where there is no row of data.
    """
    named = _NAMED_DELIMITER.match(text)
    delimiter = named[1] if named else delimiter or find_delimiter(text)
    # Strict, since a quotation mark that is never closed would swallow all further rows into one cell.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        read = ([" ".join(cell.split()) for cell in row] for row in islice(reader, 1 if named else 0, None))
        rows = [row for row in read if any(row)]
    except csv.Error as error:
        raise DocumentError(
            f"{label} breaks off at line {reader.line_num} ({error}): "
            "is a quotation mark never closed, or not doubled in a cell?"
        ) from None
    header = rows.pop(0) if rows and looks_like_header(rows[0]) else []
    if not rows:
        raise DocumentError(f"{label} has a header but no row below it: export it again with its rows")
    return Parsed("\n".join(named_row(header, row) for row in rows))


def find_delimiter(text: str) -> str:
    """The delimiter under which most of the first rows are as wide as the first one; a comma where none splits."""
    start = text[:65_536]

    def score(delimiter: str) -> tuple[float, int]:
        sample = islice(csv.reader(io.StringIO(start, newline=""), delimiter=delimiter, skipinitialspace=True), 50)
        try:
            widths = [len(row) for row in sample if row]
        except csv.Error:
            return 0.0, 0
        if not widths or widths[0] < 2:
            return 0.0, 0
        return widths.count(widths[0]) / len(widths), widths[0]

    return max(DELIMITERS, key=score)
