"""Span supervision: which tokens of a generated document are a fact's value, and which name its owner.

A hypernetwork with an associative memory learns from these labels what to write; from answers alone it would have to
find out. This module knows texts and character offsets, no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

INSIDE, BEGIN, AFTER = range(3)
"""Gates of an associative memory: a token continues a value, begins one, or follows its end."""


class FactSpan(NamedTuple):
    """A statement in a document, its subject's name ("" if none) and the value that answers its question."""

    statement: str
    owner: str
    value: str
    value_at: int | None = None  # offset in the statement; None: its last occurrence outside the owner's name


class TokenLabel(NamedTuple):
    """A labelled token of a chunk."""

    chunk: int
    token: int
    gate: int  # INSIDE, BEGIN or AFTER
    owner: int  # the last token of the owner's name; -1 if there is none
    place: int  # index of the token in the answer
    end: int  # the last token of the statement; -1 if unknown
    statement: int  # index of the statement in the document, which is its question's; -1 if no question asks for it


def label_tokens(
    chunk: int, text: str, offsets: Sequence[tuple[int, int]], facts: Iterable[FactSpan]
) -> list[TokenLabel]:
    """Label the tokens of one chunk's text; a statement that is not whole in it gets no labels.

    The first token of a value is labelled BEGIN, its other tokens INSIDE, and the token after the last one AFTER.
    """
    labels: list[TokenLabel] = []
    for number, (statement, owner, value, known_at) in enumerate(facts):
        start = text.find(statement)
        if start < 0:
            continue
        owner_at = find_owner(statement, owner)
        value_at = _find_value(statement, value, owner_at) if known_at is None else known_at
        if value_at < 0:
            continue
        owner_tokens = [] if owner_at is None else tokens_between(offsets, start + owner_at[0], start + owner_at[1])
        owner_token = owner_tokens[-1] if owner_tokens else -1
        value_tokens = tokens_between(offsets, start + value_at, start + value_at + len(value))
        end = tokens_between(offsets, start, start + len(statement))[-1]
        for place, token in enumerate(value_tokens):
            labels.append(TokenLabel(chunk, token, INSIDE if place else BEGIN, owner_token, place, end, number))
        if value_tokens and value_tokens[-1] + 1 < len(offsets):
            place = len(value_tokens)
            labels.append(TokenLabel(chunk, value_tokens[-1] + 1, AFTER, owner_token, place, end, number))
    return labels


def find_owner(statement: str, owner: str) -> tuple[int, int] | None:
    """Where a statement names its owner, ignoring case and, if need be, a leading "the"."""
    lowered = statement.lower()
    for name in (owner.lower(), owner.lower().removeprefix("the ")):
        if name and (at := lowered.find(name)) >= 0:
            return at, at + len(name)
    return None


def _find_value(statement: str, value: str, owner_at: tuple[int, int] | None) -> int:
    """Offset of the last occurrence of the value, or of the first one if the last is inside the owner's name."""
    last = statement.rfind(value)
    is_inside = owner_at is not None and owner_at[0] <= last < owner_at[1]
    return statement.find(value) if is_inside else last


def tokens_between(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """The tokens that have a character in start..end."""
    return [i for i, (low, high) in enumerate(offsets) if low < end and high > start and high > low]
