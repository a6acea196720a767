"""A LoRA as the engine keeps it: what it shares with others apart, ready to be copied into a batch.

All documents of a hypernetwork have a static LoRA in common. `SharedParts` finds it by comparing LoRAs number by
number, so that a batch reads it once and applies it to all rows together. The rows of B of an associative memory are
the same in all of its layers, and are kept once too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from loracast.lora.algebra import Factors, LoRA

_MAX_BLOCKS = 4
"""Shared parts of one module that are remembered."""
_PROBE = 4
"""Numbers of a row of A that are compared before the whole row is."""


@dataclass(frozen=True)
class Pair:
    """Factors of one module with B's columns as rows: A [r, in], B [r, out]."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def some(self, which: Tensor) -> Pair:
        return Pair(self.a[which], self.b[which])


class SharedLoRA:
    """What many LoRAs have in common, by module, on the base's device and in its type."""

    def __init__(self, pairs: Mapping[str, Pair], device: torch.device, dtype: torch.dtype):
        self.blocks = pairs
        """As they were found, which keeps their identity."""
        self.pairs = {name: Pair(*(side.to(device, dtype) for side in (p.a, p.b))) for name, p in pairs.items()}


@dataclass(frozen=True)
class PackedLoRA:
    """A LoRA by module: the sum of its own pair, a shared one and a dense delta, as far as they are there."""

    own: Mapping[str, Pair]
    shared: SharedLoRA | None
    """The same object in all LoRAs that share the same."""
    dense: Mapping[str, Tensor]  # [out, in]
    same_b: Mapping[str, str]
    """By module, the first module whose own B is equal, which may be itself."""

    @property
    def names(self) -> frozenset[str]:
        return frozenset((*self.own, *(self.shared.pairs if self.shared else ()), *self.dense))

    @property
    def n_bytes(self) -> int:
        """Of what is not shared."""
        tensors = [pair.a for pair in self.own.values()] + list(self.dense.values())
        tensors += [self.own[name].b for name in set(self.same_b.values())]
        return sum(t.numel() * t.element_size() for t in tensors)


class SharedParts:
    """Finds the components that LoRAs have in common. Thread-safe.

    A part becomes known when two LoRAs have it in common; the first of them keeps it as its own.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        """
        Args:
            device, dtype: of the base.
        """
        self._device, self._dtype = device, dtype
        self._lock = Lock()
        self._interned: WeakValueDictionary[tuple[int, ...], SharedLoRA] = WeakValueDictionary()
        self._blocks: dict[str, list[Pair]] = {}
        self._seen: dict[str, Pair] = {}

    def pack(self, lora: LoRA) -> PackedLoRA:
        """Split a LoRA into what it shares and its own."""
        own: dict[str, Pair] = {}
        blocks: dict[str, Pair] = {}
        with self._lock:
            for name, factors in lora.factors.items():
                rest, block = self._split(name, _pair(factors))
                if rest.rank:
                    own[name] = rest
                if block is not None:
                    blocks[name] = block
            shared = self._intern(blocks) if blocks else None
        return PackedLoRA(own, shared, dict(lora.dense), _equal_sides(own))

    def _intern(self, blocks: Mapping[str, Pair]) -> SharedLoRA:
        key = tuple(id(block) for block in blocks.values())  # of one module each: an id says the module too
        if (known := self._interned.get(key)) is None:
            known = self._interned[key] = SharedLoRA(blocks, self._device, self._dtype)
        return known

    def _split(self, name: str, pair: Pair) -> tuple[Pair, Pair | None]:
        """A module's pair without the largest known block that it contains, and that block."""
        blocks = self._blocks.setdefault(name, [])
        found = [(block, where) for block in blocks if (where := _find(pair, block)) is not None]
        if not found and (before := self._seen.get(name)) is not None:
            common = _common(pair, before)
            if len(common):
                blocks.insert(0, Pair(pair.a[common].clone(), pair.b[common].clone()))
                del blocks[_MAX_BLOCKS:]
                found = [(blocks[0], common)]
        if not found:
            self._seen[name] = pair
            return pair, None
        block, where = max(found, key=lambda one: one[0].rank)
        is_own = torch.ones(pair.rank, dtype=torch.bool)
        is_own[where] = False
        return pair.some(is_own), block


def _pair(factors: Factors) -> Pair:
    """The factors of a module with B's columns as rows, without components that are zero."""
    pair = Pair(factors.a.cpu(), factors.b.mT.contiguous().cpu())
    counts = (pair.b != 0).any(1)
    return pair if counts.all() else pair.some(counts)


def _matches(one: Pair, other: Pair) -> Tensor:
    """Which components of two pairs are equal [r of one, r of other]."""
    if one.a.shape[1:] != other.a.shape[1:] or one.b.shape[1:] != other.b.shape[1:]:
        return torch.zeros(one.rank, other.rank, dtype=torch.bool)
    same = (one.a[:, None, :_PROBE] == other.a[None, :, :_PROBE]).all(-1)
    for i, j in same.nonzero().tolist():
        same[i, j] = torch.equal(one.a[i], other.a[j]) and torch.equal(one.b[i], other.b[j])
    return same


def _common(one: Pair, other: Pair) -> Tensor:
    """The components of one pair that another has too."""
    return _matches(one, other).any(1).nonzero()[:, 0]


def _find(pair: Pair, block: Pair) -> Tensor | None:
    """Where a pair has the components of a block; None unless it has all of them, each in another place."""
    if block.rank > pair.rank:
        return None
    same = _matches(block, pair)
    if not same.any(1).all():
        return None
    places = same.int().argmax(1)
    return places if len(places.unique()) == block.rank else None


def _equal_sides(own: Mapping[str, Pair]) -> dict[str, str]:
    """By module, the first module whose B is equal."""
    firsts: dict[tuple[int, ...], list[str]] = {}
    found = {}
    for name, pair in own.items():
        known = firsts.setdefault(tuple(pair.b.shape), [])
        equal = (one for one in known[:1] if torch.equal(own[one].b, pair.b))
        found[name] = next(equal, name)
        if found[name] == name:
            known.append(name)
    return found
