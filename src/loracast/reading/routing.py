"""Routing: which documents, chunks and sentences a question gets, by what the reader finds in them (questions.py).

The sum of hundreds of LoRAs drowns each one; a question needs the few chunks that speak of it. A row of an associative
memory belongs to a token, so to a sentence, and is weighted by how well that sentence matches.

In a whole library the register ranks the chunks of all documents at once (`Register.best_chunks`), and the reader looks
into the documents that own the best of them. They share the places of a route, so that a question gets no more chunks
of many documents than of one. A document weighs by its best chunk's BM25 and by the odds that its text answers.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from loracast.documents.units import find_headings
from loracast.errors import AdapterError, NoSuchAdapterError
from loracast.library.adapter import Adapter, first_with_static
from loracast.library.index import Index, read_chunks, read_sentences
from loracast.library.library import Library
from loracast.library.register import Match
from loracast.reading.matching import Route, match_words
from loracast.reading.search import phrases

if TYPE_CHECKING:
    from loracast.documents import Chunk
    from loracast.lora.algebra import LoRA
    from loracast.reading.questions import QuestionReader

DEFAULT_ROUTE = 2
"""Chunks that a question is given by default (measured: docs/notebook)."""

_REFUSED = 0.5  # `Matches.about` below which the document does not say what is asked


def route_adapter(
    adapter: Adapter,
    question: str,
    k: int | None = DEFAULT_ROUTE,
    reader: QuestionReader | None = None,
    always: bool = False,
) -> Route:
    """What a question gets of an adapter: some chunks and sentences of a document, and all of anything else.

        from loracast.reading.routing import route_adapter
        manual = model.adapter("manual")
        route = route_adapter(manual, "How long is the warranty?", reader=model.reader)
        lora = manual.lora(route.chunk_weights, route.sentence_weights)

    Args:
        k: the most chunks it gets of a longer document; None for all chunks, merged.
        reader: finds the units that answer, or that none does; without one, words that both share.
        always: the question gets something, whatever it asks.
    """
    index, manifest = adapter.open_index, adapter.manifest
    if manifest.kind != "document":
        return Route(reason=f"{manifest.kind}: always whole")
    return route_document(index, question, k, reader, always)


def route_document(
    index: Index,
    question: str,
    k: int | None = DEFAULT_ROUTE,
    reader: QuestionReader | None = None,
    always: bool = False,
) -> Route:
    """`route_adapter` for the index of a document. Raises AdapterError for k < 1.

    The worse a chunk matches beside the best one, the less it weighs, so that a poor match does not drown a good one.
    """
    if k is None:
        return Route()
    if k < 1:
        raise AdapterError(f"a route needs at least one chunk, not {k}; give a number from 1 on, or 'all'")
    matched, by = None if reader is None else reader.match(index, question), "the reader"
    if matched is None:
        matched, by = match_words(index, question), "BM25"
        if not always and matched.is_empty and phrases(question):
            return Route((), reason="no word of the question stands in the document")
    elif not always and (matched.is_foreign or (matched.about is not None and matched.about < _REFUSED)):
        reason = "the question is meant for no document" if matched.is_foreign else "the document does not say"
        return replace(matched.first(0), reason=reason)
    if matched.is_empty:
        return Route(reason="no word of the question occurs in the document: all chunks")
    route = matched.first(k)
    return replace(route, reason=f"best {len(route.weights)} by {by}")


def route_set(
    index: Index, n_chunks: int, questions: Sequence[str], k: int = DEFAULT_ROUTE, reader: QuestionReader | None = None
) -> Route:
    """What a fixed set of questions gets of a document: each chunk and sentence at the highest weight of any question.

    So one LoRA, merged or exported, serves them all; the fewer they are, the less it holds of what none of them asks.
    """
    routes = [route_document(index, question, k, reader, always=True) for question in questions]
    if any(route.chunks is None and route.sentences is None for route in routes):
        return Route(reason="a question gets all chunks")
    counts = Counter(place.chunk for place in read_sentences(index))
    chunks: dict[int, float] = {}
    sentences: dict[int, list[float]] = {}
    for route in routes:
        of_sentences = route.sentence_weights
        for chunk, weight in (route.chunk_weights or dict.fromkeys(range(n_chunks), 1.0)).items():
            chunks[chunk] = max(weight, chunks.get(chunk, 0.0))
            new = of_sentences[chunk] if of_sentences else [weight] * counts[chunk]
            sentences[chunk] = list(map(max, new, sentences.get(chunk, new)))
    of_chunks = tuple(tuple(sentences[chunk]) for chunk in chunks) if counts else None
    return Route(tuple(chunks), tuple(chunks.values()), of_chunks, f"what {len(questions)} questions get")


# ---- routing among several documents, or over a whole library

CHUNKS_RANKED, DOCUMENTS_READ = 32, 8  # of a library: the best chunks by BM25, and those of their documents
_LEAST = 1e-6  # probability that a document does not answer
_SHARPNESS = 4  # a document weighs (its best chunk's BM25 / the best of all) to this power, times the root of its odds


def patterns_in(chosen: Iterable[object], tag: str = "") -> list[str]:
    """Those of the chosen adapters that are patterns of names, as in a shell; all documents for a tag without one."""
    patterns = [one for one in chosen if isinstance(one, str) and any(sign in one for sign in "*?[")]
    return patterns or ["*"] * bool(tag)


def route_adapters(
    library: Library,
    question: str,
    chosen: Iterable[Adapter | str],
    k: int | None,
    tag: str,
    open_named: Callable[[str], Adapter],
    reader: QuestionReader | None = None,
    always: bool = False,
) -> list[tuple[Adapter, Route]]:
    """What a question gets of each adapter that is named, and of the documents that patterns and a tag stand for.

    Args:
        chosen: adapters, their names, or patterns of documents' names, among which the question chooses.
        k: chunks of each named document, and of all others together.
        tag: only documents with this tag are chosen among; "" for any. Without a pattern, all of them.
        open_named: opens a name or a version `name@hash`.
        reader, always: as in `route_adapter`.

    Raises:
        AdapterError: there is no such adapter, no document fits, or a library is to be given as a whole (k is None).
    """
    chosen = list(chosen)
    patterns = patterns_in(chosen, tag)
    versions: dict[str, Adapter] = {}  # two names of one document count once
    for one in chosen:
        if one not in patterns:
            adapter = open_named(one) if isinstance(one, str) else one
            versions.setdefault(adapter.manifest.version, adapter)
    routed = [(adapter, route_adapter(adapter, question, k, reader, always)) for adapter in versions.values()]
    if patterns:
        if k is None:
            raise AdapterError("of many documents a question gets some chunks: give a number (--route 2), not all")
        check_patterns(library, patterns, tag)
        with library.reading() as register:
            others = register.best_chunks(phrases(question), CHUNKS_RANKED, patterns, tag, versions.keys())
        routed += share_out(weigh_documents(others, question, k, open_named, reader, always), k)
    return routed


def routes_of_documents(routed: Iterable[tuple[Adapter, Route]]) -> list[Route]:
    """What a question gets of those adapters that are documents."""
    return [route for adapter, route in routed if adapter.manifest.kind == "document"]


def check_patterns(library: Library, patterns: Sequence[str], tag: str = "") -> None:
    """Raise NoSuchAdapterError where patterns and a tag stand for no document."""
    with library.reading() as register:
        if not register.has_documents(patterns, tag):
            called = "" if "*" in patterns else f" called {' or '.join(patterns)}"
            tagged = f" with the tag {tag!r}" if tag else ""
            raise NoSuchAdapterError(
                f"there is no document{called}{tagged} in {library}; `loracast list` shows what there is"
            )


def weigh_documents(
    matches: Sequence[Match],
    question: str,
    k: int,
    open_named: Callable[[str], Adapter],
    reader: QuestionReader | None = None,
    always: bool = False,
) -> list[tuple[float, Adapter, Route]]:
    """The weight and route of each document that owns one of the best chunks of a library, most weight first.

    A document weighs by its best chunk's BM25 and by the reader's odds that the answer stands in it.

    Args:
        matches: those chunks, best first.
        k: the most chunks that the question gets of one.
        open_named: opens a version `name@hash`.
        reader, always: as in `route_adapter`; a document that does not answer is left out.
    """
    firsts, found = {match.version: match for match in reversed(matches)}, list[tuple[float, Adapter, Route]]()
    for version in islice(dict.fromkeys(match.version for match in matches), DOCUMENTS_READ):
        first = firsts[version]
        document = open_named(first.reference)
        route = route_adapter(document, question, k, reader, always)
        if route.chunks is None and first.n_chunks > k:
            route = Route(tuple(range(k)), (1.0,) * k, reason="only the document's name matches: its beginning")
        odds = 1.0 if route.about is None else route.about / max(1 - route.about, _LEAST)
        if not route.is_empty:
            found.append((odds**0.5 * (first.score / matches[0].score) ** _SHARPNESS, document, route))
    return sorted(found, key=lambda one: -one[0])


def share_out(weighed: Sequence[tuple[float, Adapter, Route]], k: int) -> list[tuple[Adapter, Route]]:
    """What a question gets of documents, as of `weigh_documents`: the k of their chunks that weigh most."""
    best = weighed[0][0] if weighed else 1.0
    routed = [
        (document, route if weight == best else route.scaled(document.manifest.n_chunks, weight / best))
        for weight, document, route in weighed
    ]
    places = [(-weight, i) for i, (_, route) in enumerate(routed) for weight in route.weights or (1.0,)]
    counts = Counter(number for _, number in sorted(places)[:k])
    return [(document, route.first(counts[i])) for i, (document, route) in enumerate(routed) if counts[i]]


def scaled(routed: Iterable[tuple[Adapter, Route]], scales: Mapping[str, float]) -> list[tuple[Adapter, Route]]:
    """What a question gets, with the weights of adapters multiplied by factors, which go by their versions' hashes.

    A factor of 0 takes an adapter out. The static LoRA of documents keeps its weight of 1, as in combinations.
    """
    weighed = []
    for adapter, route in routed:
        scale = scales.get(adapter.manifest.version, 1.0)
        if scale == 0:
            route = Route((), reason="its scale is 0", about=route.about)
        elif scale != 1 and not route.is_empty:
            share = max(0.0, min(scale, 1.0))
            candidates = tuple(one._replace(probability=share * one.probability) for one in route.candidates if share)
            route = replace(route.scaled(adapter.manifest.n_chunks, scale), candidates=candidates)
        weighed.append((adapter, route))
    return weighed


@dataclass(frozen=True)
class Source:
    """A chunk that an answer came from, or a document as a whole, and where it stands in the document."""

    adapter: str
    title: str
    heading: str
    chunk: int | None
    """None where the outline of the whole document gave the answer."""
    start: int
    """Its first character in the document's text."""
    end: int
    weight: float
    """What its LoRA was multiplied with; 1 for an outline."""
    version: str = ""
    """Of the adapter, since a question may be asked of several versions of a name."""

    def __str__(self) -> str:
        where = self.heading or self.title
        chunk = "" if self.chunk is None else f", chunk {self.chunk}"
        return f"{self.adapter}{chunk}" + (f": {where}" if where else "")


def sources(routed: Iterable[tuple[Adapter, Route]]) -> tuple[Source, ...]:
    """The chunks that a question gets of documents, those with most weight first; none of documents given whole."""
    found = []
    for adapter, route in routed:
        index, manifest = adapter.open_index, adapter.manifest
        if manifest.kind != "document" or not route.chunks:
            continue
        for i, (number, chunk) in enumerate(zip(route.chunks, read_chunks(index, route.chunks), strict=True)):
            heading, of_sentences = chunk.heading, route.sentences[i] if route.sentences else ()
            if of_sentences and (places := read_sentences(index, [number])):
                heading = _heading(chunk, places[of_sentences.index(max(of_sentences))].start)
            weight = route.weights[i] if route.weights else 1.0
            span = (chunk.start, chunk.end)
            found.append(Source(adapter.name, manifest.title, heading, number, *span, weight, manifest.version))
    return tuple(sorted(found, key=lambda source: -source.weight))


def _heading(chunk: Chunk, at: int) -> str:
    """The heading above a place in a chunk's prompt: the last one in the chunk's text, or else the chunk's own."""
    above = [one for one in find_headings(chunk.text) if one.start <= at - (len(chunk.prompt) - len(chunk.text))]
    if not above:
        return chunk.heading
    title = chunk.heading.partition(" / ")[0]
    section = " ".join(above[-1].title.split())
    return section if section == title or not title else f"{title} / {section}"


# ---- the LoRA of a routed question


def loras_together(routed: Sequence[tuple[Adapter, Route]]) -> list[LoRA]:
    """The LoRAs of adapters to be added up, each of what a question gets, if anything; a static LoRA comes in once."""
    routed = [(adapter, route) for adapter, route in routed if not route.is_empty]
    brings_static = [True] if len(routed) == 1 else first_with_static([adapter for adapter, _ in routed])
    return [
        adapter.lora(route.chunk_weights, route.sentence_weights, static=is_first)
        for (adapter, route), is_first in zip(routed, brings_static, strict=True)
    ]


def routing_key(routed: Iterable[tuple[Adapter, Route]]) -> str | None:
    """Names the LoRA of `loras_together`: versions, chunks and all weights. None where the question gets nothing."""
    given = [(adapter.manifest.version, route) for adapter, route in routed if not route.is_empty]
    parts = [(version, route.chunks, route.weights, route.sentences) for version, route in given]
    return hashlib.sha256(repr(parts).encode()).hexdigest() if parts else None
