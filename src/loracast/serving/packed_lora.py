"""LoRAs of the rows of a batch, another one for every row: packed as the engine keeps them, applied to a flat batch.

A LoRA as the engine keeps it: what it shares with others apart, ready to be copied into a batch.

All documents of a hypernetwork have a static LoRA in common. `SharedParts` finds it by comparing LoRAs number by
number, so that a batch reads it once and applies it to all rows together. The rows of B of an associative memory are
the same in all of its layers, and are kept once too.

The factors of the LoRAs in use lie stacked, module by module, and a LoRA is copied into its place when its first row
comes, not at every step: decoding reads each factor once a step and copies none. LoRAs of the same ranks are in one
group. Tokens that are decoded go through a group in two batched matrix products a module; a piece of a prompt in two
plain ones. What all LoRAs share is applied to all tokens at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from loracast.lora.algebra import LoRA
from loracast.lora.factors import Factors

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


_GroupKey = tuple[tuple[tuple[str, int], ...], tuple[tuple[str, str], ...]]
"""Of the LoRAs of a group: the rounded rank of each module, and the first module with the same B."""
Where = slice | Tensor
"""Tokens of the flat batch."""


@dataclass
class Place:
    """Where a LoRA lies in the stacks, and how many rows use it."""

    packed: PackedLoRA
    group: Group
    index: int
    dense: Mapping[str, Tensor]
    n_rows: int = 0


class Group:
    """Stacked factors of LoRAs whose modules have the same (rounded) ranks: A [places, r, in], B [places, r, out].

    All stacks lie in one block of memory, which the system takes back when the group's last LoRA leaves, and of which
    only the places that were used take physical memory; a tensor for each stack would leave holes in the heap.
    """

    def __init__(self, key: _GroupKey, n_places: int):
        self.key, self.n_places = key, n_places
        self.ranks, self.same_b = dict(key[0]), dict(key[1])
        self.places: list[Place] = []
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}

    def add(self, place: Place, device: torch.device, dtype: torch.dtype) -> None:
        index = place.index = len(self.places)
        self.places.append(place)
        sides = [(self.a, name, pair.a) for name, pair in place.packed.own.items()]
        sides += [(self.b, name, place.packed.own[name].b) for name in set(self.same_b.values())]
        if sides and not self.a:
            sizes = [self.n_places * self.ranks[name] * side.shape[1] for _, name, side in sides]
            block = torch.empty(sum(sizes), device=device, dtype=dtype)
            for (stacks, name, _), part in zip(sides, block.split(sizes), strict=True):
                stacks[name] = part.view(self.n_places, self.ranks[name], -1)
        for stacks, name, side in sides:
            stacks[name][index, : len(side)] = side
            stacks[name][index, len(side) :] = 0

    def remove(self, place: Place) -> None:
        """Take a LoRA out; the last one takes its place."""
        last = self.places.pop()
        if last is not place:
            for stack in (*self.a.values(), *self.b.values()):
                stack[place.index] = stack[last.index]
            self.places[place.index] = last
            last.index = place.index

    def pair(self, name: str, index: int) -> tuple[Tensor, Tensor]:
        return self.a[name][index], self.b[self.same_b[name]][index]


@dataclass(frozen=True)
class _Decoded:
    """The decoded tokens of a group: `width` tokens for each place, some of which may be idle."""

    group: Group
    width: int
    tokens: Where
    """The token that stands at each place, [places * width]."""
    targets: Tensor | None
    """The tokens that get something, and ..."""
    sources: Tensor | None
    """... the places it comes from; both None where each place has the token of `tokens`."""

    def apply(self, name: str, x: Tensor, out: Tensor) -> None:
        group, n = self.group, len(self.group.places)
        a, b = group.a[name][:n], group.b[group.same_b[name]][:n]
        rows = x[self.tokens].view(n, self.width, -1)
        inner = torch.bmm(rows, a.mT)  # [places, width, r]
        if self.targets is None:
            out[self.tokens].unsqueeze(1).baddbmm_(inner, b)
        else:
            out.index_add_(0, self.targets, torch.bmm(inner, b).flatten(0, 1)[self.sources])


@dataclass
class _Step:
    """What is applied to the tokens of one step, and where."""

    decoded: list[_Decoded] = field(default_factory=list)
    runs: list[tuple[Where, Place]] = field(default_factory=list)
    shared: list[tuple[Where, SharedLoRA]] = field(default_factory=list)
    dense: list[tuple[Where, Place]] = field(default_factory=list)

    def apply(self, name: str, x: Tensor, out: Tensor) -> None:
        """Add the deltas of a module to its output [tokens, out], from its input [tokens, in]."""
        for where, shared in self.shared:
            if (pair := shared.pairs.get(name)) is not None:
                _add(out, where, (x[where] @ pair.a.mT) @ pair.b)
        for decoded in self.decoded:
            if name in decoded.group.ranks:
                decoded.apply(name, x, out)
        for where, place in self.runs:
            if name in place.group.ranks:
                a, b = place.group.pair(name, place.index)
                _add(out, where, (x[where] @ a.mT) @ b)
        for where, place in self.dense:
            if (delta := place.dense.get(name)) is not None:
                _add(out, where, x[where] @ delta.mT)


def _add(out: Tensor, where: Where, what: Tensor) -> None:
    if isinstance(where, slice):
        out[where] += what
    else:
        out.index_add_(0, where, what)


class LoRABatcher:
    """The LoRAs of the rows that an engine runs."""

    def __init__(self, model: Any, n_places: int):
        self._model, self._n_places = model, n_places
        self._device, self._dtype = model.device, model.dtype
        self._groups: dict[_GroupKey, Group] = {}
        self._places: dict[int, Place] = {}

    def add(self, packed: PackedLoRA) -> Place:
        """Note that one more row uses a LoRA."""
        if (place := self._places.get(id(packed))) is None:
            ranks = {name: _rounded(pair.rank) for name, pair in packed.own.items()}
            key = (tuple(ranks.items()), tuple(packed.same_b.items()))  # LoRAs of one group have equal keys
            group = self._groups.setdefault(key, Group(key, self._n_places))
            dense = {name: delta.to(self._device, self._dtype) for name, delta in packed.dense.items()}
            place = self._places[id(packed)] = Place(packed, group, 0, dense)
            group.add(place, self._device, self._dtype)
        place.n_rows += 1
        return place

    def remove(self, place: Place) -> None:
        """Note that one row less uses a LoRA."""
        place.n_rows -= 1
        if not place.n_rows:
            del self._places[id(place.packed)]
            place.group.remove(place)
            if not place.group.places:
                del self._groups[place.group.key]

    @contextmanager
    def applied(self, decoded: Sequence[Place | None], runs: Sequence[tuple[slice, Place | None]]) -> Iterator[None]:
        """Apply LoRAs to the forward pass of one step.

        Args:
            decoded: the LoRAs of the first tokens, each of another row; None for none.
            runs: tokens after those that belong to one row, with its LoRA.
        """
        step = self._step(decoded, runs)
        names = {name for place in self._places.values() for name in place.packed.names}
        handles = [self._model.get_submodule(name).register_forward_hook(_hook(name, step)) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _step(self, decoded: Sequence[Place | None], runs: Sequence[tuple[slice, Place | None]]) -> _Step:
        step = _Step()
        by_place: dict[int, list[int]] = {}
        for token, place in enumerate(decoded):
            if place is not None:
                by_place.setdefault(id(place), []).append(token)
        for group in {id(p.group): p.group for p in decoded if p is not None}.values():
            if group.ranks:
                step.decoded.append(self._decoded(group, [by_place.get(id(p), []) for p in group.places]))
        step.runs = [(where, place) for where, place in runs if place is not None and place.group.ranks]
        spans = [*((slice(i, i + 1), place) for i, place in enumerate(decoded)), *runs]
        n_tokens = spans[-1][0].stop
        of_shared: dict[SharedLoRA, list[int]] = {}
        for where, place in spans:
            if place is not None and (shared := place.packed.shared) is not None:
                of_shared.setdefault(shared, []).extend(range(where.start, where.stop))
        step.shared = [(self._where(tokens, n_tokens), shared) for shared, tokens in of_shared.items()]
        step.dense = [(where, place) for where, place in spans if place is not None and place.dense]
        return step

    def _where(self, tokens: Sequence[int], n_tokens: int) -> Where:
        """Tokens as a slice where they are all, or as their numbers."""
        return slice(0, n_tokens) if len(tokens) == n_tokens else torch.tensor(tokens, device=self._device)

    def _decoded(self, group: Group, of_places: Sequence[Sequence[int]]) -> _Decoded:
        """How the decoded tokens of a group go through its stacks, from the tokens of each place."""
        n, width = len(of_places), max(map(len, of_places))
        first = of_places[0][0] if of_places[0] else 0
        if width == 1 and [list(tokens) for tokens in of_places] == [[i] for i in range(first, first + n)]:
            return _Decoded(group, 1, slice(first, first + n), None, None)
        at, targets, sources = [0] * (n * width), [], []
        for index, tokens in enumerate(of_places):
            for i, token in enumerate(tokens):
                at[index * width + i] = token
                targets.append(token)
                sources.append(index * width + i)
        return _Decoded(
            group, width, *(torch.tensor(numbers, device=self._device) for numbers in (at, targets, sources))
        )


def _rounded(rank: int) -> int:
    """The rank of the stack that a LoRA goes into: at most half as much again, so that few stacks serve many ranks."""
    power = 1 << max(rank - 1, 3).bit_length()
    return next(size for size in (power // 2, power * 3 // 4, power) if size >= rank)


def _hook(name: str, step: _Step) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
    def add(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        step.apply(name, inputs[0][0], output[0])

    return add
