"""What a document says to a question for yes or no, from the sentences that match the question best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from sqlite3 import Connection

from loracast.library.denial import denied
from loracast.library.index import read_chunks
from loracast.library.relevance import telling_stems
from loracast.library.rows import lists_in
from loracast.library.terms import terms_of
from loracast.library.yes_or_no import answer_of, claims_in

_MOST = 0.7


@dataclass(frozen=True)
class Statement:
    """A sentence that states something, with its chunk's heading and text."""

    text: str
    heading: str
    chunk: str


def verdict(database: Connection, question: str, scores: Sequence[float]) -> bool | None:
    """Whether a document says yes to a question for yes or no; None where that cannot be told.

    The statement that matches best decides; of a row of a list or table, all rows beside it.

    Args:
        scores: how well each sentence of the document matches, 0 where it does not.
    """
    best_first = sorted((i for i, score in enumerate(scores) if score > 0), key=lambda i: -scores[i])
    for _, alike in groupby(best_first, scores.__getitem__):
        if stated := [found for i in alike if (found := _statement(database, i))]:
            said = {_verdict_of(one, question) for one in stated}
            return True if True in said else False if said == {False} else None
    return None


def _verdict_of(statement: Statement, question: str) -> bool | None:
    by_rows = _verdict_of_rows(statement, question)
    return answer_of(statement.text, question, terms_of(statement.heading)) if by_rows is None else by_rows


def _verdict_of_rows(statement: Statement, question: str) -> bool | None:
    """What the rows of a list or table say: yes where one of them has all that is asked, no where it takes two.

    "Is there soup on Tuesday?" has no answer in the row "Monday | soup" alone. None where the statement is no row.
    """
    claims = claims_in(question)
    lists = (one for one in lists_in(statement.chunk) if one.has_columns)
    found = next((one for one in lists if any(_is_in(row, statement) for row in (*one.rows, one.header))), None)
    if found is None or not claims <= terms_of("\n".join([*found.rows, statement.heading])):
        return None
    rows, known = found.rows, telling_stems(f"{statement.heading} {found.header}")
    asked, claimed = telling_stems(question) - known, telling_stems(" ".join(claims))
    stems_of = [telling_stems(row) & asked for row in rows]
    counts = Counter(stem for stems in stems_of for stem in stems)
    told = frozenset(stem for stem, n in counts.items() if n <= max(1, len(rows) // 2))  # what tells the rows apart
    if len(told) < 2:
        return None
    for row, stems in zip(rows, stems_of, strict=True):
        if told <= stems:
            is_denied = denied(row, question)
            return None if is_denied is None else not is_denied
    if denied("", question) or any(_has_most(stems, told, claimed) for stems in stems_of):
        return None  # the rest may be said in other words
    return False if any(_has_most(one | other, told, claimed) for one, other in combinations(stems_of, 2)) else None


def _is_in(row: str, statement: Statement) -> bool:
    return bool(row) and row.strip() in statement.text


def _has_most(stems: frozenset[str], told: frozenset[str], claimed: frozenset[str]) -> bool:
    return claimed & told <= stems and len(stems & told) > _MOST * len(told)


def _statement(database: Connection, sentence: int) -> Statement | None:
    """A sentence that states something; None for a heading or a question."""
    place = "SELECT chunk, start, stop FROM sentence_places WHERE sentence = ?"
    number, start, end = database.execute(place, (sentence,)).fetchone()
    (chunk,) = read_chunks(database, [number])
    text = chunk.prompt[start:end].rstrip()
    is_heading = start < len(chunk.prompt) - len(chunk.text)
    return None if is_heading or text.endswith("?") else Statement(text, chunk.heading, chunk.text)
