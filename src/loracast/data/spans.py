"""Where a training document says what: the tokens of its values, and whose they are. Known, since the documents are made.

A hypernetwork with an associative memory is told with these what to write, which it would otherwise have to find out from answers
alone. Knows texts and offsets; no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

SAY, BEGIN, STOP = range(3)
"""The gates of an associative memory: the token is said, begins an answer, ends one."""


class FactSpan(NamedTuple):
    """A statement in a document, verbatim, with what it is about ("" if nothing) and the value that answers its question."""

    statement: str
    owner: str
    value: str
    value_at: int | None = None
    """Where in the statement the value stands; None for its last place that is not inside the owner's name."""


class TokenLabel(NamedTuple):
    """A token that matters."""

    chunk: int
    token: int
    gate: int
    owner: int
    """The token that ends the name of what the value belongs to; -1 if there is none."""
    place: int
    """Which token of the answer it is."""
    end: int
    """The token that ends the statement."""
    statement: int
    """Which of the document's statements it belongs to."""


def label_tokens(
    chunk: int, text: str, offsets: Sequence[tuple[int, int]], stated: Iterable[FactSpan]
) -> list[TokenLabel]:
    """The marks of one chunk's text; a statement that is not whole in it has none.

    The first token of a value begins the answer, the others are said after it, and the token after the last one ends it.
    """
    marks: list[TokenLabel] = []
    for number, (statement, owner, value, known_at) in enumerate(stated):
        start = text.find(statement)
        if start < 0:
            continue
        owner_at = find_owner(statement, owner)
        value_at = _find_value(statement, value, owner_at) if known_at is None else known_at
        if value_at < 0:
            continue
        owner_tokens = [] if owner_at is None else _tokens(offsets, start + owner_at[0], start + owner_at[1])
        owner_token = owner_tokens[-1] if owner_tokens else -1
        value_tokens = _tokens(offsets, start + value_at, start + value_at + len(value))
        end = _tokens(offsets, start, start + len(statement))[-1]
        for place, token in enumerate(value_tokens):
            marks.append(TokenLabel(chunk, token, SAY if place else BEGIN, owner_token, place, end, number))
        if value_tokens and value_tokens[-1] + 1 < len(offsets):
            marks.append(
                TokenLabel(chunk, value_tokens[-1] + 1, STOP, owner_token, len(value_tokens), end, number),
            )
    return marks


def find_owner(statement: str, owner: str) -> tuple[int, int] | None:
    """Where a statement names its owner, whatever the case of its first letter; without its article if need be."""
    lowered = statement.lower()
    for name in (owner.lower(), owner.lower().removeprefix("the ")):
        if name and (at := lowered.find(name)) >= 0:
            return at, at + len(name)
    return None


def _find_value(statement: str, value: str, owner_at: tuple[int, int] | None) -> int:
    """Where a statement says its value: the last place, if that is not inside the owner's name."""
    last = statement.rfind(value)
    is_inside = owner_at is not None and owner_at[0] <= last < owner_at[1]
    return statement.find(value) if is_inside else last


def _tokens(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """The tokens that have a character in start..end."""
    return [i for i, (low, high) in enumerate(offsets) if low < end and high > start and high > low]
