"""Routing: which chunks and sentences of a document a question gets, by how well they match it (matching.py).

The sum of hundreds of LoRAs drowns each one; a question needs the few chunks that speak of it. A row of an associative
memory belongs to a token, so to a sentence, and is weighted by how well that sentence matches.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loracast.errors import AdapterError
from loracast.library.adapter import Adapter, SentenceWeights
from loracast.library.index import Index, read_sentences
from loracast.reading.matching import Candidate, Matches, matches
from loracast.reading.relevance import THRESHOLD, about
from loracast.reading.search import search

DEFAULT_ROUTE = 2
"""Chunks that a question is given by default (measured: docs/notebook)."""

_IMPERSONAL_THRESHOLD = 0.8
"""Least probability that a question is about a memory if no word in it stands for its speaker (chosen on dev chats).
"What time is it?" shares its words with much that people say of themselves."""
_SPEAKER = re.compile(r"\b(?:i|i'm|i've|i'd|me|my|mine|myself|we|we're|we've|us|our|ours)\b", re.I)
_LEAST_SENTENCE_WEIGHT = 0.05
_NEGLIGIBLE = 0.02  # rows of a smaller weight are left out
SHARPNESS = 8
"""A chunk picked from many weighs (score / best score) to this power."""
_MIN_CHUNK_WEIGHT = 0.3  # of a chunk of a document that is given whole


@dataclass(frozen=True)
class Route:
    """What of a document a question gets: the chunks, best first, the weights of their sentences, and why."""

    chunks: tuple[int, ...] | None = None
    """None: all of them, merged."""
    scores: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    """What each chunk's LoRA is multiplied with: 1 for the best one."""
    sentences: tuple[tuple[float, ...], ...] | None = None
    """Of each picked chunk, the weights of its sentences; None: all rows weigh like their chunk."""
    reason: str = "all chunks"
    about: float | None = None
    """The probability that the document speaks of what is asked; None where nobody looked."""
    candidates: tuple[Candidate, ...] = ()
    """What the answer may begin with, if it is a text of the document."""
    nowhere: float | None = None
    """The probability that the answer stands nowhere in the document, by its words; None where nobody looked."""

    @property
    def is_empty(self) -> bool:
        """Whether the question gets nothing of the document."""
        return self.chunks == ()

    @property
    def picked(self) -> dict[int, float] | None:
        """The weight of each picked chunk; None: all of them, merged."""
        return None if self.chunks is None else dict(zip(self.chunks, self.weights, strict=True))

    @property
    def sentence_weights(self) -> SentenceWeights | None:
        """The weights of the sentences by chunk; None: all rows weigh like their chunk."""
        if self.sentences is None:
            return None
        return dict(
            zip(range(len(self.sentences)) if self.chunks is None else self.chunks, self.sentences, strict=True)
        )


def sentence_weights(index: Index, question: str) -> list[float] | None:
    """The weight of each sentence of a document for a question, 1 for the best; None where none matches."""
    by_chunk = matches(index, question, None).sentences
    return None if by_chunk is None else [_weight(score) for scores in by_chunk.values() for score in scores]


def route_adapter(
    adapter: Adapter, question: str, k: int | None = DEFAULT_ROUTE, threshold: float = THRESHOLD, name: str = ""
) -> Route:
    """What a question gets of an adapter: some chunks and sentences of a document, and all of anything else.

    A memory gives nothing where no word of the question was ever said: a short document is given whole, but a memory
    holds something else in every sentence.

        from loracast.reading.routing import route_adapter
        manual = model.adapter("manual")
        route = route_adapter(manual, "How long is the warranty?")
        lora = manual.lora(route.picked, route.sentence_weights)

    Args:
        k: the most chunks it gets of a longer document; None for all chunks, merged.
        threshold: the least probability that the question is about the document; below it, it gets nothing.
        name: of the document, where a question may find it by that.
    """
    if adapter.manifest.kind != "document":
        return Route(reason=f"{adapter.manifest.kind}: always whole")
    if adapter.manifest.is_memory and threshold > 0:
        if not search(adapter.open_index, question, 1):
            return Route((), reason="no word of the question was ever said")
        if not _SPEAKER.search(question):
            threshold = _IMPERSONAL_THRESHOLD
        name = ""
    return route_question(adapter.open_index, adapter.manifest.n_chunks, question, k, threshold, name)


def route_question(
    index: Index, n_chunks: int, question: str, k: int | None, threshold: float, name: str = ""
) -> Route:
    """What a question gets of a document: what `pick` gives, or nothing where it is not about the document at all.

    Args:
        threshold: the least probability that it is; 0 for questions that get something whatever they ask.
        name: of the document, where a question may find it by that.
    """
    if threshold <= 0:
        return pick(index, n_chunks, question, k)
    probability = about(index, question, name)
    if probability >= threshold:
        return replace(pick(index, n_chunks, question, k), about=probability)
    reason = f"the question is not about the document (probability {probability:.2f})"
    return Route((), reason=reason, about=probability)


def route_set(index: Index, n_chunks: int, questions: Sequence[str], k: int | None = DEFAULT_ROUTE) -> Route:
    """What a fixed set of questions gets of a document: each chunk and sentence at the highest weight of any question.

    So one LoRA, merged or exported, serves them all; the fewer they are, the less it holds of what none of them asks.
    """
    routes = [pick(index, n_chunks, question, k) for question in questions]
    if any(route.chunks is None and route.sentences is None for route in routes):
        return Route(reason="a question gets all chunks")
    counts = Counter(place.chunk for place in read_sentences(index))
    chunks: dict[int, float] = {}
    sentences: dict[int, list[float]] = {}
    for route in routes:
        of_sentences = route.sentence_weights
        for chunk, weight in (route.picked or dict.fromkeys(range(n_chunks), 1.0)).items():
            chunks[chunk] = max(weight, chunks.get(chunk, 0.0))
            new = of_sentences[chunk] if of_sentences else [weight] * counts[chunk]
            sentences[chunk] = list(map(max, new, sentences.get(chunk, new)))
    of_chunks = tuple(tuple(sentences[chunk]) for chunk in chunks) if counts else None
    return Route(tuple(chunks), (), tuple(chunks.values()), of_chunks, f"what {len(questions)} questions get")


def pick(index: Index, n_chunks: int, question: str, k: int | None = DEFAULT_ROUTE) -> Route:
    """Pick what a question gets: at most `k` of the document's `n_chunks`, or all (None), and in them the sentences.

    The lower a chunk's score beside the best one's, the less it weighs, so that a poor match does not drown a good
    one (measured: docs/notebook). A document of k chunks or fewer is given whole, and each of its chunks keeps
    a least weight. Where no word of the question occurs in the document, all chunks are merged. Raises AdapterError
    for k < 1.
    """
    if k is None:
        return Route()
    if k < 1:
        raise AdapterError(f"a route needs at least one chunk, not {k}; give a number from 1 on, or 'all'")
    matched = matches(index, question, k)
    if n_chunks == 1:
        route = Route(sentences=_weighed(matched, [0], [1.0]), reason="the document has only one chunk")
    elif not matched.chunks:
        return Route(reason="no word of the question occurs in the document: all chunks")
    else:
        if n_chunks > k:
            chunks, scores = zip(*[*matched.chunks.items()][:k], strict=True)
            weights = tuple(score**SHARPNESS for score in scores)
            reason = f"best {len(chunks)} by BM25 and word vectors"
        else:
            unmatched = (chunk for chunk in range(n_chunks) if chunk not in matched.chunks)
            chunks, scores = zip(*(matched.chunks | dict.fromkeys(unmatched, 0.0)).items(), strict=True)
            weights = tuple(max(_MIN_CHUNK_WEIGHT, score) for score in scores)
            reason = f"all {n_chunks} chunks, weighed by BM25 and word vectors"
        route = Route(chunks, scores, weights, _weighed(matched, chunks, weights), reason)
    candidates = tuple(one for chunk, one in matched.candidates if route.chunks is None or chunk in route.chunks)
    return replace(route, candidates=candidates, nowhere=matched.nowhere)


def _weighed(matched: Matches, chunks: Sequence[int], weights: Sequence[float]) -> tuple[tuple[float, ...], ...] | None:
    """The weights of the sentences of some weighed chunks, 1 for the best of them; None where no sentence matches."""
    scores = [matched.sentences[chunk] for chunk in chunks] if matched.sentences is not None else []
    best = max((score for of_chunk in scores for score in of_chunk), default=0.0)
    if best <= 0:
        return None
    return tuple(
        tuple(_weight(score / best, weight) for score in of_chunk)
        for of_chunk, weight in zip(scores, weights, strict=True)
    )


def _weight(score: float, of_chunk: float = 1.0) -> float:
    """The weight of a sentence by its score, 1 for the best, in a chunk of a weight of its own.

    A sentence that does not match keeps a little, since it may say in other words what is asked.
    """
    least = _LEAST_SENTENCE_WEIGHT * of_chunk
    weight = least + (1 - least) * score
    return weight if weight >= _NEGLIGIBLE else 0.0
