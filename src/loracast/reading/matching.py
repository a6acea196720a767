"""How well the units of a document match a question: what the reader finds (questions.py), or BM25 where none is.

A base of one's own may have no reader beside its hypernetwork; then the words that a question shares with a document
choose its chunks and sentences, nothing is copied, and a question is refused only where it shares no word at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from loracast.library.index import Index, open_index, read_sentences
from loracast.reading.search import search, sentence_scores

CANDIDATES_KEPT = 64
MIN_PROBABILITY = 0.001  # of a candidate; those below change no answer (base/copying.py)
_CANDIDATE_CHARACTERS = 48
"""Of a text: answers from the words of a document are short."""


class Candidate(NamedTuple):
    """A text of a document with which the answer to a question may begin; it goes on beyond the answer's end."""

    text: str
    """At most to the end of its sentence, in normal form (NFC)."""
    probability: float
    chunk: int = 0
    """Of its document."""


@dataclass(frozen=True)
class Matches:
    """How well a document matches a question, 1 for the best."""

    chunks: dict[int, float]
    """Those that match, the best first."""
    sentences: Mapping[int, tuple[float, ...]] | None
    """By chunk, its sentences, 0 where nothing matches. None where none does."""
    candidates: tuple[Candidate, ...] = ()
    """With what the answer may begin, the most probable first."""
    nowhere: float | None = None
    """The probability that the answer stands nowhere in the document."""
    about: float | None = None
    """How likely the document answers, 0.5 where the reader begins to refuse; None where no reader looked."""
    is_foreign: bool = False
    """Whether the question is meant for no document, such as a greeting."""


def match_words(index: Index, question: str) -> Matches:
    """Match a question with a document by BM25 alone."""
    with open_index(index) as database:
        found = search(database, question)
        scores = sentence_scores(database, question)
        places = read_sentences(database) if scores else []
    of_chunks, best = defaultdict[int, list[float]](list), max(scores or [1.0])
    for place, score in zip(places, scores or (), strict=True):
        of_chunks[place.chunk].append(score / best)
    sentences = {chunk: tuple(some) for chunk, some in of_chunks.items()}
    return Matches({chunk: score / found[0][1] for chunk, score in found}, sentences or None)


def shortened(text: str) -> str:
    """A text with which an answer may begin, cut at a word where it is longer than answers are."""
    if len(text) <= _CANDIDATE_CHARACTERS:
        return text
    cut = text[:_CANDIDATE_CHARACTERS]
    return cut.rpartition(" ")[0] or cut


def candidates_together(of_each: Sequence[tuple[float, Sequence[Candidate]]]) -> tuple[Candidate, ...]:
    """What an answer from several documents may begin with, each document's candidates with its weight."""
    total = sum(weight for weight, some in of_each if some)
    return tuple(one._replace(probability=one.probability * weight / total) for weight, some in of_each for one in some)
