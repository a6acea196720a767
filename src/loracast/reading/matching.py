"""How well the chunks and sentences of a document match a question: by BM25, and by the meaning of their words.

A chunk or a sentence counts by the better of the two. BM25 alone finds "How long is the warranty?" in "The warranty
lasts two years", but not "Until when is it repaired for nothing?"; word vectors alone know no names.

Sentences about another subject than the one that a question names weigh less: "Under opening time, what is noted for
Cafe Burmbi?" has more words in common with "Opening time of Cafe Nidetsu: 11:15" than with "Do not ring the bell of
Cafe Burmbi before 19:10".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import normalize

from loracast.library.index import Index, open_index
from loracast.reading.search import phrases, search, sentence_scores
from loracast.reading.word_vectors import Likelihoods, ReadIndex, read_index, shipped_vectors
from loracast.text import is_name, plain, terms, terms_asked, terms_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


_HEADING_WORDS = 8
_ENDS = tuple('.!?:;,"”’)')
# First words of a sentence that goes on about what the one before has named.
_CONTINUING = frozenset(("he", "she", "it", "they", "this", "these", "his", "her", "its", "their", "there"))


def names_in(question: str) -> list[frozenset[str]]:
    """The names in a question, each with its words: "Node FH55". A number alone is none."""
    words = [(term, is_name(term, i)) for i, term in terms_asked(question)]
    runs = groupby(words, lambda word: word[1] or any(map(str.isdigit, word[0])))
    values = [list(run) for is_value, run in runs if is_value]  # names and numbers that stand together
    return [frozenset(plain(term) for term, _ in run) for run in values if any(is_one for _, is_one in run)]


def about_others(question: str, chunks: Sequence[tuple[str, Sequence[str]]]) -> list[list[bool]]:
    """Whether each sentence is about something else than what the question names.

    So is one that has a name, but none of the question's names, in itself or in the heading above it, and what goes on
    from such a one ("It costs 9 euros."). Where no sentence has a name of the question, none is.

    Args:
        chunks: of each, the heading and the sentences.
    """
    if not (names := names_in(question)):
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
            has_one = any(name <= sentence.words | above for name in names)
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
CANDIDATES_KEPT = 64
MIN_PROBABILITY = 0.001  # of a candidate; those below change no answer (base/copying.py)
_CANDIDATE_CHARACTERS = 48
"""Of a text: answers from the words of a document are short."""


class Candidate(NamedTuple):
    """A text of a document with which the answer to a question may begin; it goes on beyond the answer's end."""

    text: str
    """At most to the end of its sentence, in normal form (NFC)."""
    probability: float


@dataclass(frozen=True)
class Matches:
    """How well a document matches a question, 1 for the best."""

    chunks: dict[int, float]
    """Those that match, the best first."""
    sentences: Mapping[int, tuple[float, ...]] | None
    """By chunk, its sentences, 0 where nothing matches. None where none does."""
    candidates: tuple[tuple[int, Candidate], ...] = ()
    """With what the answer may begin, each with its chunk, the most probable first."""
    nowhere: float | None = None
    """The probability that the answer stands nowhere in the document."""
    about: float | None = None
    """How likely the document answers, 0.5 where the reader begins to refuse; None where no reader looked."""
    is_foreign: bool = False
    """Whether the question is meant for no document, such as a greeting."""


def matches(index: Index, question: str, n_wanted: int | None) -> Matches:
    """Match a question with a document; an index without sentences is matched by the words of its chunks alone.

    Args:
        n_wanted: chunks that must be among those whose sentences are matched, as far as they match; None for all.
    """
    import numpy as np

    with open_index(index) as database:
        by_words = search(database, question)
        chunk_scores = {chunk: score / by_words[0][1] for chunk, score in by_words}
        read = read_index(index)
        scores_by_words = sentence_scores(database, question)
    if read is None:
        return Matches(chunk_scores, None)
    vectors = shipped_vectors()
    answer = vectors.places(question, read.text)
    if scores_by_words is None and (answer is None or not phrases(question)):  # nothing to go by
        return Matches(chunk_scores, None)
    n_sentences = len(read.places)
    scores = np.zeros(n_sentences) if scores_by_words is None else np.array(scores_by_words)
    meanings = np.zeros(n_sentences) if answer is None else answer.sentences
    both = meanings + vectors.bm25 * scores / (scores.max() or 1.0)
    best_of = {chunk: float(both[first:last].max()) for chunk, (first, last) in read.spans.items()}
    n_most = None if n_wanted is None else max(_CHUNKS_COMPARED, n_wanted)
    chosen = sorted({*sorted(best_of, key=lambda chunk: -best_of[chunk])[:n_most], *list(chunk_scores)[:n_most]})
    shares = np.zeros(n_sentences)  # of the scores by words; 0 in chunks that are not chosen
    others = about_others(question, [(read.chunks[chunk].heading, read.sentences(chunk)) for chunk in chosen])
    for chunk, of_others in zip(chosen, others, strict=True):
        sentences = slice(*read.spans[chunk])
        is_heading = [place.end <= len(read.chunks[chunk].heading) for place in read.places[sentences]]
        shares[sentences] = np.where(is_heading, _HEADING_SHARE, np.where(of_others, _OTHER_SHARE, 1.0))
    scores *= shares
    scores /= scores.max() or 1.0
    added = np.where(shares > 0, vectors.bm25 * scores, -np.inf)
    logits = meanings + added
    likelihoods = np.exp(logits - logits.max())
    better = np.maximum(scores, likelihoods)
    for chunk in chosen:
        best = float(likelihoods[slice(*read.spans[chunk])].max())
        chunk_scores[chunk] = max(chunk_scores.get(chunk, 0.0), best)
    chunks = sorted(((chunk, chunk_scores[chunk]) for chunk in chosen), key=lambda pair: (-pair[1], pair[0]))
    of_sentences = {chunk: tuple(better[slice(*read.spans[chunk])].tolist()) for chunk in chosen}
    candidates, nowhere = ((), None) if answer is None else _candidates(answer, read, added)
    return Matches(dict(chunks), of_sentences, candidates, nowhere)


def _candidates(
    answer: Likelihoods, read: ReadIndex, added: NDArray[Any]
) -> tuple[tuple[tuple[int, Candidate], ...], float]:
    """The most probable beginnings of an answer, each with its chunk, and the probability that it stands nowhere.

    Args:
        answer: at which words of the document it begins.
        added: to the logits of the words of each sentence; minus infinity where none of them counts.
    """
    import numpy as np

    text = read.text
    words = np.flatnonzero(added[text.sentences] > -np.inf)
    sentences = text.sentences[words]
    logits = np.append(answer.words[words] + added[sentences], answer.nowhere)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    candidates = list[tuple[int, Candidate]]()
    for i in np.argsort(-probabilities[:-1], kind="stable")[:CANDIDATES_KEPT]:
        if probabilities[i] >= MIN_PROBABILITY:
            chunk, start, end = read.places[sentences[i]]
            sentence = normalize("NFC", read.chunks[chunk].prompt[start:end])
            beginning = shortened(sentence[text.characters[words[i]] :].rstrip())
            candidates.append((chunk, Candidate(beginning, float(probabilities[i]))))
    return tuple(candidates), float(probabilities[-1])


def shortened(text: str) -> str:
    """A text with which an answer may begin, cut at a word where it is longer than answers are."""
    if len(text) <= _CANDIDATE_CHARACTERS:
        return text
    cut = text[:_CANDIDATE_CHARACTERS]
    return cut.rpartition(" ")[0] or cut


def candidates_together(of_each: Sequence[Sequence[Candidate]]) -> tuple[Candidate, ...]:
    """What an answer from several documents may begin with, each as likely to hold it as the others."""
    some = [candidates for candidates in of_each if candidates]
    return tuple(Candidate(text, p / len(some)) for candidates in some for text, p in candidates)
