"""Keys and values of prompts and answers that were read before, for prompts that begin with the same tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from loracast.serving.kv_cache import OwnCache

_Ids = tuple[int, ...]


class PrefixCache:
    """Keys and values under a budget of bytes, the least recently used leaving first; for one thread.

    Those of a LoRA serve only prompts with the same LoRA, which the key names.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.n_bytes = self.n_hits = self.n_misses = 0
        self._held: OrderedDict[tuple[str, _Ids], OwnCache] = OrderedDict()
        self._by_key: dict[str, set[_Ids]] = {}

    def find(self, key: str, ids: Sequence[int], most: int) -> tuple[int, OwnCache | None]:
        """The number of tokens of `ids` that some entry begins with, `most` at most, and the entry; or 0 and None."""
        wanted = tuple(ids)
        n, best = 0, None
        for held in self._by_key.get(key, ()):
            common = min(most, _n_common(held, wanted))
            if common > n:
                n, best = common, held
        if best is None:
            self.n_misses += 1
            return 0, None
        self.n_hits += 1
        self._held.move_to_end((key, best))
        return n, self._held[key, best]

    def put(self, key: str, ids: Sequence[int], cache: OwnCache) -> None:
        """Keep the keys and values of tokens, in place of those of their beginnings."""
        if cache.n_bytes > self.max_bytes:
            return
        new = tuple(ids)
        for held in [held for held in self._by_key.get(key, ()) if held == new[: len(held)]]:
            self._drop(key, held)
        self._held[key, new] = cache
        self._by_key.setdefault(key, set()).add(new)
        self.n_bytes += cache.n_bytes
        while self.n_bytes > self.max_bytes:
            self._drop(*next(iter(self._held)))

    def _drop(self, key: str, ids: _Ids) -> None:
        self.n_bytes -= self._held.pop((key, ids)).n_bytes
        self._by_key[key].remove(ids)
        if not self._by_key[key]:
            del self._by_key[key]


def _n_common(one: _Ids, other: _Ids) -> int:
    """The number of tokens that both begin with."""
    n = min(len(one), len(other))
    return next((i for i in range(n) if one[i] != other[i]), n)
