"""How well the chunks and sentences of a document match a question: by BM25, and by the meaning of their words.

A chunk or a sentence counts by the better of the two. BM25 alone finds "How long is the warranty?" in "The warranty
lasts two years", but not "Until when is it repaired for nothing?"; word vectors alone know no names.

Sentences about another subject than the one that a question names weigh less: "Under opening time, what is noted for
Cafe Burmbi?" has more words in common with "Opening time of Cafe Nidetsu: 11:15" than with "Do not ring the bell of
Cafe Burmbi before 19:10".
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import normalize

from loracast.library.index import Index, open_index
from loracast.reading.search import phrases, search, sentence_scores
from loracast.reading.word_vectors import Likelihoods, ReadIndex, read_index, shipped_vectors
from loracast.text import is_name, is_value, plain, terms, terms_asked, terms_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


_HEADING_WORDS = 8
_ENDS = tuple('.!?:;,"”’)')
# First words of a sentence that goes on about what the one before has named.
_CONTINUING = frozenset(("he", "she", "it", "they", "this", "these", "his", "her", "its", "their", "there"))


def names_in(question: str) -> list[frozenset[str]]:
    """The names in a question, each with its words: "Node FH55". A number alone is none."""
    words = terms_asked(question)
    runs = [[(i, term) for i, term in run] for is_one, run in groupby(words, lambda x: is_value(x[1], x[0])) if is_one]
    return [frozenset(plain(term) for _, term in run) for run in runs if any(is_name(term, i) for i, term in run)]


def about_others(question: str, chunks: Sequence[tuple[str, Sequence[str]]]) -> list[list[bool]]:
    """Whether each sentence is about something else than what the question names.

    So is one that has a name, but none of the question's names, in itself or in the heading above it, and what goes on
    from such a one ("It costs 9 euros."). Where no sentence has a name of the question, none is.

    Args:
        chunks: of each, the heading and the sentences.
    """
    if not (asked := names_in(question)):
        return [[False] * len(sentences) for _, sentences in chunks]
    question_terms = terms_of(question)
    flags: list[list[bool]] = []
    is_named = False
    for heading, sentences in chunks:
        above = of_chunk = terms_of(heading)
        flags.append([])
        for sentence in map(_read, sentences):
            if sentence.is_heading:
                above = of_chunk | sentence.words
            has_one = any(name <= sentence.words | above for name in asked)
            is_named |= has_one
            is_other = not (sentence.names <= question_terms or has_one or sentence.is_heading)
            flags[-1].append(flags[-1][-1] if sentence.goes_on and flags[-1] and not has_one else is_other)
    return flags if is_named else [[False] * len(sentences) for _, sentences in chunks]


class _Sentence(NamedTuple):
    """What tells whom a sentence is about."""

    words: frozenset[str]
    names: frozenset[str]
    goes_on: bool
    """Whether it goes on about what the one before has named."""
    is_heading: bool


@lru_cache(2_000)
def _read(sentence: str) -> _Sentence:
    """Kept for the next question about the same document."""
    words = terms(sentence)
    names = frozenset(plain(term) for i, term in enumerate(words) if is_name(term, i))
    goes_on = bool(words) and words[0].lower() in _CONTINUING
    is_heading = not sentence.endswith(_ENDS) and len(words) <= _HEADING_WORDS
    return _Sentence(frozenset(map(plain, words)), names, goes_on, is_heading)


_OTHER_SHARE = 0.3  # of the score of a sentence about another subject than the one that the question names
_HEADING_SHARE = 0.3  # of the score of a heading, whose words say what the sentences below it are about
_CHUNKS_COMPARED = 16
"""Chunks, the best ones, whose sentences are told apart by subject, which takes most of the time."""
_PLACES_KEPT = 64
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
        answer_places = vectors.places(question, read.text)
        if scores is None and (answer_places is None or not phrases(question)):  # nothing to go by
            return Matches(by_words, None)
        alike: NDArray[Any] = np.zeros(len(read.text.starts)) if answer_places is None else answer_places.sentences
        top = max(scores or [1.0])
        both: NDArray[Any] = alike + [vectors.bm25 * score / top for score in scores] if scores else alike
        best_of = {chunk: float(both[first:last].max()) for chunk, (first, last) in read.chunks.items()}
        n_most = max(_CHUNKS_COMPARED, n_wanted)
        chosen = sorted({*sorted(best_of, key=lambda chunk: -best_of[chunk])[:n_most], *list(by_words)[:n_most]})
        adjusted = _adjusted(question, read, chosen, scores or [0.0] * len(alike))
        top = max((score for of_chunk in adjusted for score in of_chunk), default=0.0) or 1.0
        words = {chunk: [score / top for score in of_chunk] for chunk, of_chunk in zip(chosen, adjusted, strict=True)}
        by_bm25 = {chunk: [vectors.bm25 * x for x in of_chunk] for chunk, of_chunk in words.items()}
        meant = {chunk: alike[slice(*read.chunks[chunk])] + of_chunk for chunk, of_chunk in by_bm25.items()}
        better = _better(by_words, words, meant)
        return better if answer_places is None else _with_places(better, answer_places, read, by_bm25)


def _with_places(
    matched: Matches, answer: Likelihoods, read: ReadIndex, added: Mapping[int, Sequence[float]]
) -> Matches:
    """The matches with the likeliest places of the answer among those of some chunks.

    Args:
        answer: at which words of the document it begins.
        added: by chunk, what is added to the logits of the words of each of its sentences.
    """
    import numpy as np

    text, plus = read.text, np.full(len(answer.sentences), -np.inf)
    for chunk, of_chunk in added.items():
        plus[slice(*read.chunks[chunk])] = of_chunk
    words = np.flatnonzero(plus[text.sentences] > -np.inf)
    sentences = text.sentences[words]
    logits = np.append(answer.words[words] + plus[sentences], answer.nowhere)
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    places = list[Place]()
    for i in np.argsort(-shares[:-1], kind="stable")[:_PLACES_KEPT]:
        if shares[i] >= _LEAST_PROBABILITY:
            chunk, start, end = read.places[sentences[i]]
            sentence = normalize("NFC", read.prompts[chunk][start:end])
            places.append(Place(chunk, sentence[text.characters[words[i]] :], float(shares[i])))
    return replace(matched, places=tuple(places), nowhere=float(shares[-1]))


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
    others = about_others(question, [(read.headings[chunk], read.sentences(chunk)) for chunk in chunks])
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


_CANDIDATE_CHARACTERS = 48
"""Of a text: answers from the words of a document are short."""


class Candidate(NamedTuple):
    """A text of a document with which the answer to a question may begin; it goes on beyond the answer's end."""

    text: str
    probability: float


def answer_candidates(places: Sequence[Place], chunks: Container[int]) -> tuple[Candidate, ...]:
    """The texts from some places on, each to the end of its sentence at most; places of other chunks are left out."""
    return tuple(
        Candidate(_shortened(place.text.rstrip()), place.probability) for place in places if place.chunk in chunks
    )


def _shortened(text: str) -> str:
    if len(text) <= _CANDIDATE_CHARACTERS:
        return text
    return text[:_CANDIDATE_CHARACTERS].rpartition(" ")[0] or text[:_CANDIDATE_CHARACTERS]


def candidates_together(of_each: Sequence[Sequence[Candidate]]) -> tuple[Candidate, ...]:
    """What an answer from several documents may begin with, each as likely to hold it as the others."""
    some = [candidates for candidates in of_each if candidates]
    return tuple(Candidate(text, p / len(some)) for candidates in some for text, p in candidates)
