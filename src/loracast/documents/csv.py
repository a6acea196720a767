"""Reads CSV and TSV: each row becomes a line in which each cell follows its column's name."""

from __future__ import annotations

import csv
import io
import re
from itertools import islice

from loracast.documents.document import Parsed
from loracast.documents.tables import looks_like_header, named_row
from loracast.errors import DocumentError

DELIMITERS = ",;\t|"
_NAMED_DELIMITER = re.compile(r"sep=([^\w\s\"]|\t)\r?\n", re.I)


def parse_csv(text: str, label: str, delimiter: str | None = None) -> Parsed:
    """The first row names the columns unless it holds a number that is no year. A line "sep=;" before it, which Excel
    reads, names the delimiter. Raises DocumentError where there is no row of data.
    """
    named = _NAMED_DELIMITER.match(text)
    delimiter = named[1] if named else delimiter or find_delimiter(text)
    lines: list[str] = []
    header: list[str] | None = None
    # Strict, since a quotation mark that is never closed would swallow all further rows into one cell.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        for raw in islice(reader, 1 if named else 0, None):
            row = [" ".join(cell.split()) for cell in raw]
            if not any(row):
                continue
            if header is None:
                header = row if looks_like_header(row) else []
                if header:
                    continue
            lines.append(named_row(header, row))
    except csv.Error as error:
        raise DocumentError(
            f"{label} breaks off at line {reader.line_num} ({error}): "
            "is a quotation mark never closed, or not doubled in a cell?"
        ) from None
    if not lines:
        raise DocumentError(f"{label} has a header but no row below it: export it again with its rows")
    return Parsed("\n".join(lines))


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
