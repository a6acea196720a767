"""Which of two rows of a list or table has more: "Which is cheaper, the blue handle or the brown handle?"."""

from __future__ import annotations

import re
from collections.abc import Sequence

from loracast.library.relevance import telling_stems
from loracast.library.rows import Rows, cells_of
from loracast.library.terms import has_digit

_LESS = r"cheaper|cheapest|earlier|fewer|first|less|lower|quicker|shorter|smaller|sooner|younger"
_MORE = r"bigger|dearer|expensive|greater|higher|heavier|larger|last|later|longer|more|older"
_COMPARING = re.compile(rf"\b(?:(?P<less>{_LESS}|lighter)|(?P<more>{_MORE}))\b", re.IGNORECASE)
_TIME_ASKED = re.compile(r"\b(?:earlier|first|last|later|sooner)\b", re.IGNORECASE)
_PRICE_ASKED = re.compile(r"\b(?:cheaper|charge[ds]?|costs?|dearer|expensive|fees?|pay|price[ds]?)\b", re.IGNORECASE)
_OR = re.compile(r"(?:.*[,:?]|.*?\b(?:at|between|for|in|of)\b)?\s*(.+?),? or (.+?)\s*\?\s*$", re.IGNORECASE | re.DOTALL)
_LEADING = re.compile(r"(?:(?:that|the ones?|those) )?(?:at|for|from|in|of|to) ", re.IGNORECASE)
_AMOUNT = re.compile(
    r"(?P<money>[£$€]) ?(?P<price>\d[\d,]*(?:\.\d+)?)|(?P<hour>\d{1,2})[:.](?P<minute>\d\d)(?P<half> ?[ap]\.?m)?\b"
    r"|(?P<number>\d[\d,]*(?:\.\d+)?)\s*(?P<unit>[^\W\d]+|%|°)?",
    re.IGNORECASE,
)


def asks_to_compare(question: str) -> bool:
    """Whether a question asks which of two has more of something."""
    either = _OR.match(question)
    return either is not None and _COMPARING.search(question, 0, either.start(1)) is not None


def compared(question: str, lists: Sequence[Rows]) -> str | None:
    """The one of two rows that has what is asked, in the question's words; None where that cannot be told."""
    if not (either := _OR.match(question)) or not (comparing := _COMPARING.search(question, 0, either.start(1))):
        return None
    asked = question[: either.start(1)]
    named = [side[leading.end() :] if (leading := _LEADING.match(side)) else side for side in either.groups()]
    stems = [telling_stems(side) for side in named]
    for one in lists:
        rows = [_row_of(side, one.rows) for side in stems]
        (left, left_unit), (right, right_unit) = (_amount(row, asked, one.header) for row in rows)
        if rows[0] != rows[1] and left is not None and right is not None and left != right and left_unit == right_unit:
            return named[(left < right) != (comparing["less"] is not None)]
    return None


def _row_of(side: frozenset[str], rows: Sequence[str]) -> str | None:
    """The one row with a cell whose words are those of a side."""
    found = [row for row in rows if any(_words(cell) == side for cell in cells_of(row))]
    return found[0] if side and len(found) == 1 else None


def _words(cell: str) -> frozenset[str]:
    return frozenset(stem for stem in telling_stems(cell) if not has_digit(stem))


def _amount(row: str | None, asked: str, header: str) -> tuple[float | None, str]:
    """The number of a row that a question compares, with its unit; no number where it may mean several.

    Args:
        asked: what the question says before it names the rows.
    """
    cells, columns = cells_of(row or ""), cells_of(header)
    amounts = []
    for i, cell in enumerate(cells):
        column = telling_stems(columns[i]) if len(columns) == len(cells) else frozenset()
        amounts += [(amount, column | telling_stems(cell)) for amount in _AMOUNT.finditer(cell)]
    if _TIME_ASKED.search(asked):
        amounts = [(amount, about) for amount, about in amounts if amount["hour"]]
    elif _PRICE_ASKED.search(asked):
        amounts = [(amount, about) for amount, about in amounts if amount["money"] or amount["unit"] == "p"]
    if len(amounts) > 1:
        amounts = [(amount, about) for amount, about in amounts if about & telling_stems(asked)]
    if len(amounts) != 1:
        return None, ""
    amount, _ = amounts[0]
    if amount["hour"]:
        half = (amount["half"] or "").lower()
        return int(amount["hour"]) % (12 if half else 24) + 12 * ("p" in half) + int(amount["minute"]) / 60, "h"
    return float((amount["price"] or amount["number"]).replace(",", "")), amount["money"] or amount["unit"] or ""
