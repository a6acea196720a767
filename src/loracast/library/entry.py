"""What the register of a library says: of a name, of a place in the text, of a name's state that machines share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A name with one of its versions."""

    name: str
    version: str  # content hash
    kind: str
    title: str
    source: str | None
    source_sha256: str
    base: str
    hypernetwork: str
    ranks: dict[str, int]
    n_chunks: int
    n_tokens: int
    n_bytes: int
    created: str  # when the adapter was made; UTC, ISO 8601
    added: str  # when the name was given to it
    n_versions: int  # that the name has
    owner: str
    note: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Hit:
    """A chunk that holds the words of a search."""

    name: str
    version: str
    chunk: int
    heading: str
    snippet: str  # the surroundings of the words, each word between [ and ]


@dataclass(frozen=True)
class Match:
    """A chunk of a document that shares words with a question."""

    name: str
    version: str
    n_chunks: int  # of the document
    chunk: int
    score: float  # BM25, on one scale for the whole library


@dataclass(frozen=True)
class NameState:
    """All that is known of a name, as machines that share a library tell each other."""

    versions: tuple[tuple[str, str], ...] = ()
    """Content hash, and when it was added, of each version; the newest last. A name without versions is deleted."""
    owner: str = ""
    note: str = ""
    tags: tuple[str, ...] = ()
