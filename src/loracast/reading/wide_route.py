"""Routing over a whole library: the documents that a question is about, and what of each it gets.

The register ranks the chunks of all documents at once (`Register.best_chunks`). The documents that own the best of them
share the places of a route, so that a question gets no more chunks of many documents than of one, and each document
then picks its own chunks and sentences as if it had been named. A document whose best chunk matches worse than the best
one's weighs less, by the rule of chunks in one document.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from loracast.documents.units import find_headings
from loracast.errors import AdapterError, NoSuchAdapterError
from loracast.library.adapter import Adapter, first_with_static
from loracast.library.index import read_chunks, read_sentences
from loracast.library.library import Library
from loracast.library.register import Match
from loracast.reading.matching import Candidate
from loracast.reading.relevance import THRESHOLD, THRESHOLD_OF_MANY, threshold_for
from loracast.reading.routing import SHARPNESS, Route, route_adapter
from loracast.reading.search import phrases

if TYPE_CHECKING:
    from loracast.documents import Chunk
    from loracast.lora.algebra import LoRA


Document = TypeVar("Document")
"""An adapter of a document, or a document in memory."""
_MIN_DOCUMENT_WEIGHT = 0.1
"""Weight of another document beside the best one from which on it gets a place (dev: level from 0 to 0.3)."""


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
    always: bool = False,
    strict: bool = False,
) -> list[tuple[Adapter, Route]]:
    """What a question gets of each adapter that is named, and of the documents that patterns and a tag stand for.

    Args:
        chosen: adapters, their names, or patterns of documents' names, among which the question chooses.
        k: chunks of each named document, and of all others together.
        tag: only documents with this tag are chosen among; "" for any. Without a pattern, all of them.
        open_named: opens a name or a version `name@hash`.
        always: do not look whether the question is about a document.
        strict: the answer is given only where the model is sure of it.

    Raises:
        AdapterError: there is no such adapter, no document fits, or a library is to be given as a whole (k is None).
    """
    chosen = list(chosen)
    patterns = patterns_in(chosen, tag)
    opened = [open_named(one) if isinstance(one, str) else one for one in chosen if one not in patterns]
    versions: dict[str, Adapter] = {}  # two names of one document count once
    for adapter in opened:
        versions.setdefault(adapter.manifest.version, adapter)
    n_documents = sum(adapter.manifest.kind == "document" for adapter in versions.values())
    threshold = 0.0 if always else THRESHOLD_OF_MANY if patterns else threshold_for(n_documents, strict)
    routed = [(adapter, route_adapter(adapter, question, k, threshold)) for adapter in versions.values()]
    if patterns:
        if k is None:
            raise AdapterError("of many documents a question gets some chunks: give a number (--route 2), not all")
        check_patterns(library, patterns, tag)
        with library.reading() as register:
            others = register.best_chunks(phrases(question), k, patterns, tag, versions.keys())
        routed += share_out(others, question, k, threshold, lambda match: open_named(match.reference), route_adapter)
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


def share_out(
    matches: Sequence[Match],
    question: str,
    k: int,
    threshold: float,
    open_document: Callable[[Match], Document],
    route_document: Callable[[Document, str, int | None, float, str], Route],
) -> list[tuple[Document, Route]]:
    """What a question gets of each document that owns one of the best chunks of a library, the best one first.

    A document's weight is its best chunk's score beside the best one of all, raised as in one document (routing.py).

    Args:
        matches: those chunks, best first.
        k: the places of the route; the best document gets those of chunks that match too little, and those left over.
        threshold: least probability that the question is about a document; others are left out. That of one named
            document is enough where the question has a word of its name.
        open_document: gives the document of a match.
        route_document: what the question gets of one document, as `route_adapter` says it.
    """
    weights = {match: (match.score / matches[0].score) ** SHARPNESS for match in matches}
    close = [match for match in matches if weights[match] >= _MIN_DOCUMENT_WEIGHT]
    routed: list[tuple[Document, Route]] = []
    best = 1.0
    for version in dict.fromkeys(match.version for match in close):
        own = [match for match in close if match.version == version]
        document, n_places = open_document(own[0]), len(own) + (0 if routed else k - len(close))
        # A word of the adapter's name, which the document itself need not hold.
        is_called = not set(re.split(r"[-._]+", own[0].name)).isdisjoint(word for word, _ in phrases(question))
        name = own[0].name if is_called else ""
        least = min(threshold, THRESHOLD) if name else threshold
        route = route_document(document, question, n_places, least, name)
        if route.is_empty:
            continue
        if route.chunks is None and own[0].n_chunks > n_places:
            chunks = tuple(range(n_places))
            route = Route(chunks, weights=(1.0,) * n_places, reason="only the document's name matches: its beginning")
        best = best if routed else weights[own[0]]
        weight = weights[own[0]] / best
        routed.append((document, route if weight == 1.0 else _weighed(route, own[0].n_chunks, weight)))
    return routed


def _weighed(route: Route, n_chunks: int, weight: float) -> Route:
    """The route of an adapter of so many chunks, with all weights multiplied."""
    chunks = tuple(range(n_chunks)) if route.chunks is None else route.chunks
    weights = tuple(weight * one for one in route.weights or (1.0,) * len(chunks))
    sentences = route.sentences and tuple(tuple(weight * one for one in of_chunk) for of_chunk in route.sentences)
    return replace(route, chunks=chunks, weights=weights, sentences=sentences)


def scaled(picked: Iterable[tuple[Adapter, Route]], scales: Mapping[str, float]) -> list[tuple[Adapter, Route]]:
    """What was picked, with the weights of adapters multiplied by factors, which go by their versions' hashes.

    A factor of 0 takes an adapter out. The static LoRA of documents keeps its weight of 1, as in combinations.
    """
    weighed = []
    for adapter, route in picked:
        scale = scales.get(adapter.manifest.version, 1.0)
        if scale == 0:
            route = Route((), reason="its scale is 0", about=route.about)
        elif scale != 1 and not route.is_empty:
            route = _weighed(route, adapter.manifest.n_chunks, scale)
            share = min(scale, 1.0) if scale > 0 else 0.0
            candidates = tuple(Candidate(text, p * share) for text, p in route.candidates) if share else ()
            route = replace(route, candidates=candidates)
        weighed.append((adapter, route))
    return weighed


def sources(picked: Iterable[tuple[Adapter, Route]]) -> tuple[Source, ...]:
    """The chunks that were picked from documents, those with most weight first; none of documents taken as a whole."""
    of_chunks = []
    for adapter, route in picked:
        manifest = adapter.manifest
        chunks = (0,) if route.chunks is None and manifest.n_chunks == 1 else route.chunks
        if manifest.kind != "document" or not chunks:
            continue
        starts: dict[int, list[int]] = defaultdict(list)
        for place in read_sentences(adapter.index, chunks) if route.sentences else ():
            starts[place.chunk].append(place.start)
        for n, (number, chunk) in enumerate(zip(chunks, read_chunks(adapter.index, chunks), strict=True)):
            heading = chunk.heading
            if route.sentences and number in starts:
                weights = route.sentences[n]
                heading = _heading(chunk, starts[number][weights.index(max(weights))])
            weight = route.weights[n] if route.weights else 1.0
            span = (chunk.start, chunk.end)
            of_chunks.append(Source(adapter.name, manifest.title, heading, number, *span, weight, manifest.version))
    return tuple(sorted(of_chunks, key=lambda source: -source.weight))


def _heading(chunk: Chunk, at: int) -> str:
    """The heading above a place in a chunk's prompt: the last one in the chunk's text, or else the chunk's own."""
    above = [one for one in find_headings(chunk.text) if one.start <= at - (len(chunk.prompt) - len(chunk.text))]
    if not above:
        return chunk.heading
    title = chunk.heading.partition(" / ")[0]
    section = " ".join(above[-1].title.split())
    return section if section == title or not title else f"{title} / {section}"


# ---- the LoRA of what was picked


def loras_together(picked: Sequence[tuple[Adapter, Route]]) -> list[LoRA]:
    """The LoRAs of adapters to be added up, each of what was picked, if anything; a static LoRA comes in once."""
    picked = [(adapter, route) for adapter, route in picked if not route.is_empty]
    brings_static = [True] if len(picked) == 1 else first_with_static([adapter for adapter, _ in picked])
    return [
        adapter.lora(route.picked, route.sentence_weights, static=is_first)
        for (adapter, route), is_first in zip(picked, brings_static, strict=True)
    ]


def routing_key(picked: Sequence[tuple[Adapter, Route]]) -> str | None:
    """Names the LoRA of `loras_together`: versions, chunks and all weights. None where nothing was picked."""
    parts = [
        (adapter.manifest.version, route.chunks, route.weights, route.sentences)
        for adapter, route in picked
        if not route.is_empty
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest() if parts else None
