"""What the answer to a question may begin with, by the words of documents (word_vectors.py), for base/copying.py."""

from __future__ import annotations

from collections.abc import Container, Sequence
from sqlite3 import Connection
from typing import NamedTuple
from unicodedata import normalize

from loracast.library.index import SentencePlace, read_chunks, read_sentences
from loracast.library.matching import Place

_MOST_CHARACTERS = 48
"""Of a text: answers from the words of a document are short."""


class Likely(NamedTuple):
    """A text of a document with which the answer to a question may begin; it goes on beyond the answer's end."""

    text: str
    probability: float


def likely_answers(database: Connection, places: Sequence[Place], chunks: Container[int]) -> tuple[Likely, ...]:
    """The texts from some places on, each to the end of its sentence at most.

    Args:
        chunks: places of other chunks are left out.
    """
    places = [place for place in places if place.chunk in chunks]
    if not places:
        return ()
    wanted = sorted({place.chunk for place in places})
    prompts = {chunk: one.prompt for chunk, one in zip(wanted, read_chunks(database, wanted), strict=True)}
    spans: dict[int, list[SentencePlace]] = {chunk: [] for chunk in wanted}
    for span in read_sentences(database, wanted):
        spans[span.chunk].append(span)
    found = list[Likely]()
    for place in places:
        _, start, end = spans[place.chunk][place.sentence]
        text = normalize("NFC", prompts[place.chunk][start:end])[place.start :].rstrip()
        if len(text) > _MOST_CHARACTERS:
            text = text[:_MOST_CHARACTERS].rpartition(" ")[0] or text[:_MOST_CHARACTERS]
        found.append(Likely(text, place.probability))
    return tuple(found)


def likely_together(of_each: Sequence[Sequence[Likely]]) -> tuple[Likely, ...]:
    """What an answer from several documents may begin with, each as likely to hold it as the others."""
    some = [likely for likely in of_each if likely]
    return tuple(Likely(text, p / len(some)) for likely in some for text, p in likely)
