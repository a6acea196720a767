"""Finds the chunks of vector stores' files that match a query, and filters files by their attributes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from loracast.library.index import read_chunks
from loracast.library.library import Library
from loracast.reading.relevance import about
from loracast.reading.search import phrases
from loracast.serving.vector_stores import Attributes, StoreFile

Value = bool | int | float | Annotated[str, Field(max_length=512)]
_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
    "in": lambda value, wanted: value in wanted,
    "nin": lambda value, wanted: value not in wanted,
}


class Comparison(BaseModel):
    """Compares an attribute of a file with a value. A file without the attribute differs from every value."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["eq", "ne", "gt", "gte", "lt", "lte", "in", "nin"]
    key: str = Field(max_length=64)
    value: Value | Annotated[list[Value], Field(max_length=100)]

    def fits(self, attributes: Attributes) -> bool:
        if self.key not in attributes:
            return self.type in ("ne", "nin")
        value = attributes[self.key]
        if self.type in ("in", "nin"):
            wanted = self.value if isinstance(self.value, list) else [self.value]
            return _COMPARE[self.type](value, wanted)
        are_alike = isinstance(value, str) == isinstance(self.value, str) and not isinstance(self.value, list)
        return _COMPARE[self.type](value, self.value) if are_alike else self.type == "ne"


class Compound(BaseModel):
    """All or any of several filters."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["and", "or"]
    filters: list[Comparison | Compound] = Field(min_length=1, max_length=32)

    def fits(self, attributes: Attributes) -> bool:
        fit = (one.fits(attributes) for one in self.filters)
        return all(fit) if self.type == "and" else any(fit)


Filter = Comparison | Compound


@dataclass(frozen=True)
class Found:
    """A chunk of a file that matches a query."""

    file: StoreFile
    chunk: int
    text: str
    score: float
    """0 to 1: the probability that the file is about the query, times the chunk's BM25 beside the best one's."""


def search(
    library: Library,
    files: Sequence[StoreFile],
    queries: Sequence[str],
    limit: int,
    filters: Filter | None = None,
    threshold: float = 0.0,
) -> list[Found]:
    """The chunks of files that match one of the queries best, best first; each chunk once.

    Args:
        files: that have been cast.
        threshold: least score.
    """
    by_name = {file.adapter: file for file in files if filters is None or filters.fits(file.attributes)}
    best: dict[tuple[str, int], float] = {}
    if not by_name:
        return []
    with library.reading() as register:
        for query in queries:
            matches = register.best_chunks(phrases(query), limit, tuple(by_name))
            for match in matches:
                score = match.score / matches[0].score * about(library.open(match.reference).index, query)
                place = match.name, match.chunk
                best[place] = max(score, best.get(place, 0.0))
    chosen = sorted((place for place in best if best[place] >= threshold), key=lambda place: -best[place])[:limit]
    found = []
    for name, chunk in chosen:
        adapter = library.open(f"{name}@{by_name[name].version}")
        text = read_chunks(adapter.index, [chunk])[0].text
        found.append(Found(by_name[name], chunk, text, best[name, chunk]))
    return found


def among(files: Sequence[StoreFile]) -> list[str]:
    """Patterns of the names of files' adapters: a question chooses among them, and gets no chunks of each."""
    return [f"[{file.adapter[0]}]{file.adapter[1:]}" for file in files]
