"""How well the units of a document match a question: what the reader finds (questions.py), or BM25 where none is.

A base of one's own may have no reader beside its hypernetwork; then the words that a question shares with a document
choose its chunks and sentences, nothing is copied, and a question is refused only where it shares no word at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from loracast.library.adapter import SentenceWeights
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
class Route:
    """What of a document a question gets: the chunks, best first, the weights of their sentences, and why."""

    chunks: tuple[int, ...] | None = None
    """None: all of them, merged."""
    weights: tuple[float, ...] = ()
    """What each chunk's LoRA is multiplied with: 1 for the best one, less the worse a chunk matches."""
    sentences: tuple[tuple[float, ...], ...] | None = None
    """Of each picked chunk, the weights of its sentences; None: all rows weigh like their chunk."""
    reason: str = "all chunks"
    about: float | None = None
    """The probability that the document speaks of what is asked; None where nobody looked."""
    candidates: tuple[Candidate, ...] = ()
    """What the answer may begin with, if it is a text of the document."""
    nowhere: float | None = None
    """The probability that the answer stands nowhere in the document; None where nobody looked."""
    is_foreign: bool = False
    """Whether the question is meant for no document, such as a greeting: the plain base answers it."""

    @property
    def is_empty(self) -> bool:
        """Whether the question gets nothing of the document."""
        return self.chunks == ()

    @property
    def chunk_weights(self) -> dict[int, float] | None:
        """The weight of each picked chunk; None: all of them, merged."""
        return None if self.chunks is None else dict(zip(self.chunks, self.weights, strict=True))

    @property
    def sentence_weights(self) -> SentenceWeights | None:
        """The weights of the sentences by chunk; None: all rows weigh like their chunk."""
        if self.sentences is None:
            return None
        chunks = range(len(self.sentences)) if self.chunks is None else self.chunks
        return dict(zip(chunks, self.sentences, strict=True))

    def scaled(self, n_chunks: int, scale: float) -> Route:
        """The route of a document of so many chunks, with all weights multiplied."""
        chunks = tuple(range(n_chunks)) if self.chunks is None else self.chunks
        weights = tuple(scale * weight for weight in self.weights or (1.0,) * len(chunks))
        sentences = self.sentences and tuple(tuple(scale * weight for weight in chunk) for chunk in self.sentences)
        return replace(self, chunks=chunks, weights=weights, sentences=sentences)

    def first(self, k: int) -> Route:
        """The route with its best k chunks alone."""
        if self.chunks is None:
            return self
        chunks, sentences = self.chunks[:k], self.sentences and self.sentences[:k]
        sentences = sentences if any(map(any, sentences or ())) else None  # a heading may be all that matches
        candidates = tuple(one for one in self.candidates if one.chunk in chunks)
        return replace(self, chunks=chunks, weights=self.weights[:k], sentences=sentences, candidates=candidates)


def match_words(index: Index, question: str) -> Route:
    """Match a question with a document by BM25 alone: all chunks that share a word with it, best first."""
    with open_index(index) as database:
        found = search(database, question)
        scores = sentence_scores(database, question)
        places = read_sentences(database) if scores else []
    of_chunks, best = defaultdict[int, list[float]](list), max(scores or [1.0])
    for place, score in zip(places, scores or (), strict=True):
        of_chunks[place.chunk].append(score / best)
    weights = tuple(score / found[0][1] for _, score in found)
    sentences = tuple(tuple(of_chunks[chunk]) for chunk, _ in found) if scores else None
    return Route(tuple(chunk for chunk, _ in found), weights, sentences)


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
