"""Answers that the rows of a document's lists and tables give by themselves: how many there are, which has more.

The rows of a memory add up, so that it can neither count nor compare; the text that an adapter keeps can be counted.
"""

from __future__ import annotations

from sqlite3 import Connection

from loracast.library.comparing import asks_to_compare, compared
from loracast.library.counting import asks_for_a_number, counted
from loracast.library.index import read_chunks
from loracast.library.rows import lists_in
from loracast.library.terms import last_line

_MOST_CHUNKS = 64
"""Of a longer document no list is looked for: it would take longer than the model."""


def row_answer(database: Connection, question: str, n_chunks: int) -> str | None:
    """The answer to a question that asks how many rows a list or table has, or which of two rows has more of something.

    None for any other question, and where the rows do not tell for sure.
    """
    asked = last_line(question)
    if n_chunks > _MOST_CHUNKS or not (asks_for_a_number(asked) or asks_to_compare(asked)):
        return None
    text = _text(database)
    lists = lists_in(text)
    number = counted(asked, text, lists)
    return compared(asked, lists) if number is None else str(number)


def _text(database: Connection) -> str:
    """The text of a document with its headings, each once."""
    parts, heading = list[str](), ""
    for chunk in read_chunks(database):
        parts.append(chunk.text if chunk.heading == heading else chunk.prompt)
        heading = chunk.heading
    return "\n".join(parts)
