"""How well the chunks and sentences of a document match a question: by BM25, and by the meaning of their words.

A chunk or a sentence counts by the better of the two. BM25 alone finds "How long is the warranty?" in "The warranty
lasts two years", but not "Until when is it repaired for nothing?"; word vectors alone know no names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import normalize

from loracast.library.bm25 import phrases, search, sentence_scores
from loracast.library.index import Index, open_index
from loracast.library.subjects import of_others
from loracast.library.word_vectors import Likelihoods, ReadIndex, read_index, shipped_vectors

if TYPE_CHECKING:
    from numpy.typing import NDArray

_OTHER_SHARE = 0.3  # of the score of a sentence about another subject than the one that the question names
_HEADING_SHARE = 0.3  # of the score of a heading, whose words say what the sentences below it are about
_MOST_CHUNKS = 16
"""Chunks, the best ones, whose sentences are told apart by subject, which takes most of the time."""
_MOST_PLACES = 64
_LEAST_PROBABILITY = 0.001  # of a place; those below change no answer (base/copying.py)


@dataclass(frozen=True)
class Matches:
    """How well a document matches a question, 1 for the best."""

    chunks: Mapping[int, float]
    """Those that match, the best first."""
    sentences: Mapping[int, tuple[float, ...]] | None
    """By chunk, its sentences, 0 where nothing matches. None where none does."""
    places: tuple[Place, ...] = ()
    """Where the answer may begin, the likeliest first."""
    nowhere: float | None = None
    """The probability that it stands nowhere."""


class Place(NamedTuple):
    """A word of a document at which the answer to a question may begin."""

    chunk: int
    text: str
    """From the word to the end of its sentence, in normal form (NFC)."""
    probability: float


def matches(index: Index, question: str, n_chunks: int, n_wanted: int = 0) -> Matches:
    """Match a question with a document; an index without sentences is matched by the words of its chunks alone.

    Args:
        n_wanted: chunks that must be among those whose sentences are matched, as far as they match.
    """
    import numpy as np

    with open_index(index) as database:
        found = search(database, question, n_chunks)
        by_words = {chunk: score / found[0][1] for chunk, score in found}
        read = read_index(index)
        if read is None:
            return Matches(by_words, None)
        scores = sentence_scores(database, question)
        vectors = shipped_vectors()
        likely = vectors.places(question, read.text)
        if scores is None and (likely is None or not phrases(question)):  # nothing to go by
            return Matches(by_words, None)
        alike: NDArray[Any] = np.zeros(len(read.text.starts)) if likely is None else likely.sentences
        top = max(scores or [1.0])
        both: NDArray[Any] = alike + [vectors.bm25 * score / top for score in scores] if scores else alike
        best_of = {chunk: float(both[first:last].max()) for chunk, (first, last) in read.chunks.items()}
        n_most = max(_MOST_CHUNKS, n_wanted)
        chosen = sorted({*sorted(best_of, key=lambda chunk: -best_of[chunk])[:n_most], *list(by_words)[:n_most]})
        adjusted = _adjusted(question, read, chosen, scores or [0.0] * len(alike))
        top = max((score for of_chunk in adjusted for score in of_chunk), default=0.0) or 1.0
        words = {chunk: [score / top for score in of_chunk] for chunk, of_chunk in zip(chosen, adjusted, strict=True)}
        by_bm25 = {chunk: [vectors.bm25 * x for x in of_chunk] for chunk, of_chunk in words.items()}
        meant = {chunk: alike[slice(*read.chunks[chunk])] + of_chunk for chunk, of_chunk in by_bm25.items()}
        better = _better(by_words, words, meant)
        return better if likely is None else _with_places(better, likely, read, by_bm25)


def _with_places(found: Matches, likely: Likelihoods, read: ReadIndex, added: Mapping[int, Sequence[float]]) -> Matches:
    """The matches with the likeliest places of the answer among those of some chunks.

    Args:
        likely: at which words of the document the answer begins.
        added: by chunk, what is added to the logits of the words of each of its sentences.
    """
    import numpy as np

    text, plus = read.text, np.full(len(likely.sentences), -np.inf)
    for chunk, of_chunk in added.items():
        plus[slice(*read.chunks[chunk])] = of_chunk
    words = np.flatnonzero(plus[text.sentences] > -np.inf)
    sentences = text.sentences[words]
    logits = np.append(likely.words[words] + plus[sentences], likely.nowhere)
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    places = list[Place]()
    for i in np.argsort(-shares[:-1], kind="stable")[:_MOST_PLACES]:
        if shares[i] >= _LEAST_PROBABILITY:
            chunk, start, end = read.places[sentences[i]]
            sentence = normalize("NFC", read.prompts[chunk][start:end])
            places.append(Place(chunk, sentence[text.characters[words[i]] :], float(shares[i])))
    return replace(found, places=tuple(places), nowhere=float(shares[-1]))


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
    question: str, read: ReadIndex, chunks: Sequence[int], scores: Sequence[float]
) -> list[tuple[float, ...]]:
    """The scores of some chunks' sentences, chunk by chunk, lower for headings and where another subject is meant.

    Args:
        scores: of all sentences of the document.
    """
    others = of_others(question, [(read.headings[chunk], read.sentences(chunk)) for chunk in chunks])
    found = list[tuple[float, ...]]()
    for chunk, of_subject in zip(chunks, others, strict=True):
        sentences, heading = slice(*read.chunks[chunk]), len(read.headings[chunk])
        found.append(
            tuple(
                score * (_HEADING_SHARE if end <= heading else _OTHER_SHARE if is_other else 1.0)
                for (_, _, end), is_other, score in zip(
                    read.places[sentences], of_subject, scores[sentences], strict=True
                )
            )
        )
    return found
