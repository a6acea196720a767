"""Turns table rows into lines that name their columns, since a chunk may hold a row without the header."""

from __future__ import annotations

import re
from collections.abc import Sequence

_YEAR = re.compile(r"(19|20)\d\d")


def rows_to_lines(rows: Sequence[Sequence[str]], has_header: bool | None = None) -> list[str]:
    """Turn each row into a line "header: value; header: value", without empty cells.

    `has_header` None lets the cells decide. Two columns without a known header are names and values: "name: value".
    First rows with nothing beside their first cell are titles, each a line.
    """
    cells = [row for row in ([" ".join(cell.split()) for cell in row] for row in rows) if any(row)]
    if not cells:
        return []
    width = max(map(len, cells))
    n_titles = next((i for i, row in enumerate(cells) if any(row[1:])), 0)
    titles, cells = [row[0] for row in cells[:n_titles]], cells[n_titles:]
    if has_header is None:
        has_header = width > 2 and len(cells) > 1 and looks_like_header(cells[0])
    if has_header and len(cells) > 1:
        return titles + [named_row(cells[0], row) for row in cells[1:]]
    if width == 2:
        return titles + [": ".join(filter(None, row)) for row in cells]
    return titles + [" | ".join(filter(None, row)) for row in cells]


def looks_like_header(row: Sequence[str]) -> bool:
    """Distinct names, none of which is a number or a date; but several years may follow a name."""
    names = [cell for cell in row if cell]
    numbers = [name for name in names if re.match(r"[-+€$£]?[\d.,]", name)]
    are_years = len(numbers) > 1 and row[0] not in numbers and all(map(_YEAR.fullmatch, numbers))
    return bool(names) and len(set(names)) == len(names) and (not numbers or are_years)


def named_row(header: Sequence[str], row: Sequence[str]) -> str:
    """The row's cells with their column's name; a column without one is called "column 3"."""
    names = [name or f"column {i + 1}" for i, name in enumerate(header)]
    names += [f"column {i + 1}" for i in range(len(names), len(row))]
    return "; ".join(f"{name}: {cell}" for name, cell in zip(names, row, strict=False) if cell)
