"""How well the chunks and sentences of a document match a question: by BM25, and by the meaning of their words.

A chunk or a sentence counts by the better of the two. BM25 alone finds "How long is the warranty?" in "The warranty
lasts two years", but not "Until when is it repaired for nothing?"; word vectors alone know no names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from sqlite3 import Connection
from typing import TYPE_CHECKING, Any

from loracast.library.bm25 import phrases, search, sentence_scores
from loracast.library.index import Index, open_index, read_chunks
from loracast.library.subjects import of_others
from loracast.library.word_vectors import read_index, shipped_vectors

if TYPE_CHECKING:
    from numpy.typing import NDArray

_OTHER_SHARE = 0.3  # of the score of a sentence about another subject than the one that the question names
_HEADING_SHARE = 0.3  # of the score of a heading, whose words say what the sentences below it are about
_MOST_CHUNKS = 16
"""Chunks, the best ones, whose sentences are told apart by subject, which takes most of the time."""


@dataclass(frozen=True)
class Matches:
    """How well a document matches a question, 1 for the best."""

    chunks: Mapping[int, float]
    """Those that match, the best first."""
    sentences: Mapping[int, tuple[float, ...]] | None
    """By chunk, its sentences, 0 where nothing matches. None where none does."""


def matches(index: Index, question: str, n_chunks: int, n_wanted: int = 0) -> Matches:
    """Match a question with a document; an index without sentences is matched by the words of its chunks alone.

    Args:
        n_wanted: chunks that must be among those whose sentences are matched, as far as they match.
    """
    with open_index(index) as database:
        found = search(database, question, n_chunks)
        by_words = {chunk: score / found[0][1] for chunk, score in found}
        read = read_index(index)
        if read is None:
            return Matches(by_words, None)
        scores = sentence_scores(database, question)
        vectors = shipped_vectors()
        alike = vectors.match(question, read.words)
        if scores is None and not (phrases(question) and alike.any()):  # nothing to go by
            return Matches(by_words, None)
        top = max(scores or [1.0])
        both = alike + [vectors.bm25 * score / top for score in scores] if scores else alike
        best_of = {chunk: float(both[first:last].max()) for chunk, (first, last) in read.chunks.items()}
        n_most = max(_MOST_CHUNKS, n_wanted)
        chosen = sorted({*sorted(best_of, key=lambda chunk: -best_of[chunk])[:n_most], *list(by_words)[:n_most]})
        adjusted = _adjusted(database, question, chosen, read.chunks, scores or [0.0] * len(alike))
        top = max((score for of_chunk in adjusted for score in of_chunk), default=0.0) or 1.0
        words = {chunk: [score / top for score in of_chunk] for chunk, of_chunk in zip(chosen, adjusted, strict=True)}
        meant = {
            chunk: alike[slice(*read.chunks[chunk])] + [vectors.bm25 * x for x in words[chunk]] for chunk in chosen
        }
        return _better(by_words, words, meant)


def _better(
    by_words: Mapping[int, float], words: Mapping[int, Sequence[float]], logits: Mapping[int, NDArray[Any]]
) -> Matches:
    import numpy as np

    highest = max(float(some.max()) for some in logits.values())
    meaning = {chunk: np.exp(some - highest) for chunk, some in logits.items()}
    chunks = {chunk: max(by_words.get(chunk, 0.0), float(some.max())) for chunk, some in meaning.items()}
    ordered = dict(sorted(chunks.items(), key=lambda pair: (-pair[1], pair[0])))
    return Matches(ordered, {c: tuple(np.maximum(words[c], some).tolist()) for c, some in meaning.items()})


def _adjusted(
    database: Connection,
    question: str,
    chunks: Sequence[int],
    ranges: Mapping[int, tuple[int, int]],
    scores: Sequence[float],
) -> list[tuple[float, ...]]:
    """The scores of some chunks' sentences, chunk by chunk, lower for headings and where another subject is meant.

    Args:
        ranges: the first sentence of each chunk, and that behind its last.
        scores: of all sentences of the document.
    """
    of_chunk = "SELECT start, stop FROM sentence_places WHERE chunk = ? ORDER BY sentence"
    places = [database.execute(of_chunk, (chunk,)).fetchall() for chunk in chunks]
    texts = [(chunk.heading, chunk.prompt) for chunk in read_chunks(database, chunks)]
    pairs = zip(texts, places, strict=True)
    others = of_others(question, [(head, [text[start:end] for start, end in rows]) for (head, text), rows in pairs])
    return [
        tuple(
            score * (_HEADING_SHARE if end <= len(heading) else _OTHER_SHARE if is_other else 1.0)
            for (_, end), is_other, score in zip(rows, of_subject, scores[slice(*ranges[chunk])], strict=True)
        )
        for chunk, (heading, _), rows, of_subject in zip(chunks, texts, places, others, strict=True)
    ]
