"""What the answer to a question may begin with, by the words of documents (word_vectors.py), for base/copying.py."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

from loracast.library.matching import Place

_MOST_CHARACTERS = 48
"""Of a text: answers from the words of a document are short."""


class Likely(NamedTuple):
    """A text of a document with which the answer to a question may begin; it goes on beyond the answer's end."""

    text: str
    probability: float


def likely_answers(places: Sequence[Place], chunks: Container[int]) -> tuple[Likely, ...]:
    """The texts from some places on, each to the end of its sentence at most; places of other chunks are left out."""
    return tuple(
        Likely(_shortened(place.text.rstrip()), place.probability) for place in places if place.chunk in chunks
    )


def _shortened(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    return text[:_MOST_CHARACTERS].rpartition(" ")[0] or text[:_MOST_CHARACTERS]


def likely_together(of_each: Sequence[Sequence[Likely]]) -> tuple[Likely, ...]:
    """What an answer from several documents may begin with, each as likely to hold it as the others."""
    some = [likely for likely in of_each if likely]
    return tuple(Likely(text, p / len(some)) for likely in some for text, p in likely)
