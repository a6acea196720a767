"""Routing: BM25 picks the chunks of a document that a question is about, over the chunks' full-text index (index.py).

The sum of hundreds of LoRAs drowns each one; a question needs the few chunks that speak of it. The scores are
SQLite's own `bm25` (Porter stemming, k1 = 1.2, b = 0.75), since the index is SQLite's anyway. Only a word's rarity is
weighed here: SQLite gives no weight to a word in half of the chunks, as most words of a short manual are.
Neighbouring words of the question count once more where a chunk has them side by side (Metzler and Croft, A Markov
random field model for term dependencies, 2005).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from loracast.errors import AdapterError
from loracast.library.index import Index, open_index

if TYPE_CHECKING:
    from loracast.library.adapter import Adapter

DEFAULT_ROUTE = 2
"""Chunks that a question is given by default (measured: docs/experiments.md)."""

_WORD = re.compile(r"\w+")
_LEAST_IDF = 1e-6  # SQLite's own floor, a factor of its scores
_PAIR_WEIGHT = 0.5
_SHARPNESS = 8  # of the weights of chunks picked from many
_LEAST_WEIGHT = 0.3  # of a chunk of a document that is given whole

# Words of nearly every question that do not tell where its answer is. FTS5 has no stop list of its own, and in a
# document of a few chunks even "what" and "the" are rare enough to decide.
_STOP = frozenset(
    _WORD.findall("""
    a about an and any are as at be been by can could did do does for from give had has have he her his how i in is
    it its me my of on or please she so some tell that the their them then there these they this those to was we
    were what when where which who whom whose why will with would you your
    """)
)


@dataclass(frozen=True)
class Route:
    """The chunks picked for a question, best first, and why."""

    chunks: tuple[int, ...] | None
    """None: all of them, merged."""
    scores: tuple[float, ...]
    weights: tuple[float, ...]
    """What each chunk's LoRA is multiplied with: 1 for the best one."""
    reason: str

    @property
    def picked(self) -> dict[int, float] | None:
        """The weight of each picked chunk; None: all of them, merged."""
        return None if self.chunks is None else dict(zip(self.chunks, self.weights, strict=True))


def search(index: Index, question: str, k: int) -> list[tuple[int, float]]:
    """The k chunks that match a question best, as (chunk, score), higher scores first; fewer where fewer match."""
    scores: dict[int, float] = {}
    with open_index(index) as database:
        (n_chunks,) = database.execute("SELECT count(*) FROM places").fetchone()
        for phrase, weight in _phrases(question):
            rows = database.execute(
                "SELECT rowid, -bm25(chunks, 0.5, 1.0) FROM chunks WHERE chunks MATCH ?", (f'"{phrase}"',)
            ).fetchall()
            odds = (n_chunks - len(rows) + 0.5) / (len(rows) + 0.5)
            theirs, ours = max(math.log(odds), _LEAST_IDF), math.log(1 + odds)
            for chunk, score in rows:
                scores[chunk] = scores.get(chunk, 0.0) + weight * ours / theirs * score
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))[:k]


def _phrases(question: str) -> list[tuple[str, float]]:
    """The question's telling words and the pairs of them that are neighbours, each with its weight."""
    words = [word.lower() for word in _WORD.findall(question)]
    telling = [word for word in dict.fromkeys(words) if word not in _STOP]
    pairs = [(one, other) for one, other in dict.fromkeys(pairwise(words)) if _STOP.isdisjoint((one, other))]
    return [(word, 1.0) for word in telling] + [(f"{one} {other}", _PAIR_WEIGHT) for one, other in pairs]


def route(adapter: Adapter, question: str, k: int | None = DEFAULT_ROUTE) -> Route:
    """Pick the chunks of an adapter for a question, as `pick` does."""
    return pick(adapter.index, adapter.manifest.n_chunks, question, k)


def pick(index: Index, n_chunks: int, question: str, k: int | None = DEFAULT_ROUTE) -> Route:
    """Pick the chunks for a question: at most `k` of the document's `n_chunks`, or all (None).

    The lower a chunk's score beside the best one's, the less it weighs, so that a poor match does not drown a good
    one (measured: docs/experiments.md). A document of k chunks or fewer is given whole, and each of its chunks keeps
    a least weight. Where no word of the question occurs in the document, all chunks are merged. Raises AdapterError
    for k < 1.
    """
    if k is not None and k < 1:
        raise AdapterError(f"a route needs at least one chunk, not {k}; give a number from 1 on, or 'all'")
    if k is None or n_chunks == 1:
        return Route(None, (), (), "all chunks" if k is None else "the document has only one chunk")
    found = search(index, question, k)
    if not found:
        return Route(None, (), (), "no word of the question occurs in the document: all chunks")
    if n_chunks > k:
        weights: Sequence[float] = [(score / found[0][1]) ** _SHARPNESS for _, score in found]
        reason = f"best {len(found)} by BM25"
    else:
        matching = dict(found)
        found += [(chunk, 0.0) for chunk in range(n_chunks) if chunk not in matching]
        weights = [max(_LEAST_WEIGHT, score / found[0][1]) for _, score in found]
        reason = f"all {n_chunks} chunks, weighed by BM25"
    chunks, scores = zip(*found, strict=True)
    return Route(chunks, scores, tuple(weights), reason)
