"""Caches that drop what was used least recently: how many requests they answer, simulated and by formula.

Documents are requested independently of each other, each at a rate of its own. A cache keeps whatever was requested
last, as far as its bytes go, so it holds a document just then when all that was requested since, and the document
itself, fit into its memory. One pass over the requests (Mattson's stack distances, in bytes) therefore tells the hits
of every size of memory. Memory smaller than a document is outside this model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
Shares = NDArray[np.float64]


def request_rates(n: int, n_hot: int, hot_share: float, exponent: float) -> Shares:
    """The rate of each of `n` documents: Zipf's law over the hot ones, the others alike; they add up to 1."""
    zipf = np.arange(1, n_hot + 1, dtype=float) ** -exponent
    if n == n_hot:
        return zipf / zipf.sum()
    return np.concatenate([hot_share * zipf / zipf.sum(), np.full(n - n_hot, (1 - hot_share) / (n - n_hot))])


def draw_requests(rng: np.random.Generator, rates: Shares, n: int) -> Numbers:
    """Draw `n` documents in proportion to their rates."""
    ends = np.cumsum(rates)
    return np.minimum(np.searchsorted(ends, rng.random(n) * ends[-1], side="right"), len(rates) - 1)


def requests_before(rng: np.random.Generator, rates: Shares, n_bytes: Numbers, max_bytes: float) -> Numbers:
    """The last requests to a cache that has been in use for ever, the oldest first: so nothing has to warm up.

    The time since a document was last requested is exponential with its rate, so the order of these times is drawn. No
    more documents are given than `max_bytes` can hold.
    """
    latest = np.argsort(rng.exponential(size=len(rates)) / rates)
    n_held = np.searchsorted(np.cumsum(n_bytes[latest]), max_bytes, side="right")
    return latest[:n_held][::-1]


def bytes_between(requests: Numbers, n_bytes: Numbers) -> Shares:
    """Bytes of all documents requested since this one's last request, with its own: [requests, k].

    A cache of at least so many bytes has a hit. Infinite at a document's first request.

    Args:
        requests: documents in the order of their requests.
        n_bytes: bytes of each document, in k kinds of storage: [documents, k].
    """
    by_document = np.argsort(requests, kind="stable")
    last = np.full(len(requests), -1)  # the place of the request before, for the same document
    is_same = requests[by_document][1:] == requests[by_document][:-1]
    last[by_document[1:][is_same]] = by_document[:-1][is_same]
    sizes = n_bytes[requests].astype(float)
    # A document that was requested in between counts once: at its first request there, the one whose own last request
    # lies further back. All requests up to `last` have that too, so they are subtracted.
    apart = _sums_of_earlier(np.argsort(last, kind="stable"), sizes) - np.cumsum(sizes, axis=0)[last] + sizes
    apart[last < 0] = np.inf
    return apart


def _sums_of_earlier(order: Numbers, sizes: Shares) -> Shares:
    """For each place, the sizes [n, k] of the smaller places that stand before it in a permutation `order`: [n, k].

    The places are sorted bit by bit from the highest down, as in a wavelet tree. Two places first differ by one
    bit; then the place that has it gets the sizes of those that stand before it in their block and have it not.
    """
    n, k = sizes.shape
    sums, before, n_zeros = np.zeros((n, k)), np.zeros((n + 1, k)), np.zeros(n + 1, dtype=np.int32)
    places, carried, at = order.astype(np.int32), sizes[order], np.arange(n, dtype=np.int32)
    for bit in reversed(range(n.bit_length())):
        has_bit = (places >> bit & 1).astype(bool)
        ones = np.flatnonzero(has_bit)
        begin = places >> (bit + 1) << (bit + 1)  # of the block, whose places are the numbers from there on
        of_zeros = carried.copy()
        of_zeros[ones] = 0
        np.cumsum(of_zeros, axis=0, out=before[1:])
        sums[places[ones]] += before[ones] - before[begin[ones]]
        np.cumsum(~has_bit, out=n_zeros[1:])
        n_before = n_zeros[:-1] - n_zeros[begin]
        moved = np.where(has_bit, at - n_before + (1 << bit), begin + n_before)
        after, sizes_after = np.empty_like(places), np.empty_like(carried)
        after[moved], sizes_after[moved] = places, carried
        places, carried = after, sizes_after
    return sums


def hit_rates(apart: Shares, memories: Sequence[float]) -> Shares:
    """The share of requests that a cache of each size answers: [memories, k]."""
    return np.stack([(apart <= memory).mean(axis=0) for memory in memories])


def che_hit_rates(rates: Shares, n_bytes: Numbers, memories: Sequence[float]) -> Shares:
    """The same by Che's approximation, for one kind of storage: [memories].

    A document is in the cache if it was requested within the last T requests, which has the probability
    1 - exp(-rate T); T is such that the bytes expected in the cache are its memory (Che, Tung and Wang, "Hierarchical
    Web caching systems", IEEE JSAC 20(7), 2002).
    """
    alike, of = np.unique(rates, return_inverse=True)  # documents of one rate are taken together
    requested, held = np.bincount(of, rates), np.bincount(of, n_bytes)
    found = []
    for memory in memories:
        low, high = 0.0, 50 / alike[0]
        for _ in range(60):
            middle = (low + high) / 2
            is_less = held @ -np.expm1(-alike * middle) < memory
            low, high = (middle, high) if is_less else (low, middle)
        found.append(requested @ -np.expm1(-alike * low) / requested.sum())
    return np.array(found)
