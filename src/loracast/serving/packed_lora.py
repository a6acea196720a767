"""LoRAs of the rows of a batch, another one for every row: packed as the engine keeps them, applied to a flat batch.

A LoRA as the engine keeps it: what it shares with others apart, ready to be copied into a batch.

All documents of a hypernetwork have a static LoRA in common (`LoRA.static`). A batch reads it once and applies it to
all rows together. The rows of B of an associative memory are the same in all of its layers, and are kept once too.

The factors of the LoRAs in use lie stacked, module by module, and a LoRA is copied into its place when its first row
comes, not at every step: decoding reads each factor once a step and copies none. LoRAs of the same ranks are in one
group. Tokens that are decoded go through a group in two batched matrix products a module; a piece of a prompt in two
plain ones. What all LoRAs share is applied to all tokens at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from threading import Lock
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from loracast.lora.algebra import LoRA
from loracast.lora.factors import Factors
from loracast.lora.inject import equal_factors


@dataclass(frozen=True)
class Pair:
    """Factors of one module with B's columns as rows: A [r, in], B [r, out]."""

    a: Tensor
    b: Tensor


class SharedLoRA:
    """A static LoRA, on the base's device and in its type."""

    def __init__(self, factors: Mapping[str, Factors], device: torch.device, dtype: torch.dtype):
        self.factors = factors
        """As they came."""
        pairs = {name: _pair(pair) for name, pair in factors.items()}
        self.pairs = {name: Pair(pair.a.to(device, dtype), pair.b.to(device, dtype)) for name, pair in pairs.items()}

    def is_of(self, factors: Mapping[str, Factors]) -> bool:
        is_same = self.factors.keys() == factors.keys()
        return is_same and all(equal_factors(pair, factors[name]) for name, pair in self.factors.items())


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
    def n_bytes(self) -> int:
        """Of what is not shared."""
        tensors = [pair.a for pair in self.own.values()] + list(self.dense.values())
        tensors += [self.own[name].b for name in set(self.same_b.values())]
        return sum(t.numel() * t.element_size() for t in tensors)


class SharedParts:
    """Finds the static LoRAs that LoRAs have in common. Thread-safe."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        """
        Args:
            device, dtype: of the base.
        """
        self._device, self._dtype = device, dtype
        self._lock = Lock()
        self._known: WeakSet[SharedLoRA] = WeakSet()

    def pack(self, lora: LoRA) -> PackedLoRA:
        """Split a LoRA into what it shares and its own."""
        pairs = {name: _pair(factors) for name, factors in lora.factors.items() if name not in lora.static}
        own = {name: pair for name, pair in pairs.items() if len(pair.a)}
        static = {name: lora.factors[name] for name in lora.factors if name in lora.static}
        with self._lock:
            shared = next((one for one in self._known if one.is_of(static)), None)
            if shared is None and static:
                shared = SharedLoRA(static, self._device, self._dtype)
                self._known.add(shared)
        return PackedLoRA(own, shared, dict(lora.dense), _equal_sides(own))


def _pair(factors: Factors) -> Pair:
    """The factors of a module with B's columns as rows, without components that are zero."""
    pair = Pair(factors.a.cpu(), factors.b.mT.contiguous().cpu())
    counts = (pair.b != 0).any(1)
    return pair if counts.all() else Pair(pair.a[counts], pair.b[counts])


def _equal_sides(own: Mapping[str, Pair]) -> dict[str, str]:
    """By module, the first module whose B is equal."""
    firsts: dict[torch.Size, str] = {}
    found = {}
    for name, pair in own.items():
        first = firsts.setdefault(pair.b.shape, name)
        found[name] = first if torch.equal(own[first].b, pair.b) else name
    return found


_GroupKey = tuple[tuple[tuple[str, int], ...], tuple[tuple[str, str], ...]]
"""Of the LoRAs of a group: the rounded rank of each module, and the first module with the same B."""
Where = slice | Tensor
"""Tokens of the flat batch, each once."""


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

    def apply(self, name: str, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """A forward hook that adds the deltas of a module to its output [1, tokens, out]."""
        x, out = inputs[0][0], output[0]
        for where, shared in self.shared:
            if (pair := shared.pairs.get(name)) is not None:
                out[where] += (x[where] @ pair.a.mT) @ pair.b
        for decoded in self.decoded:
            if name in decoded.group.ranks:
                decoded.apply(name, x, out)
        for where, place in self.runs:
            if name in place.group.ranks:
                group, index = place.group, place.index
                out[where] += (x[where] @ group.a[name][index].mT) @ group.b[group.same_b[name]][index]
        for where, place in self.dense:
            if (delta := place.dense.get(name)) is not None:
                out[where] += x[where] @ delta.mT


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
            ranks = {name: _rounded(len(pair.a)) for name, pair in packed.own.items()}
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
        packed = [place.packed for place in self._places.values()]
        names = {name for one in packed for name in (*one.own, *one.dense, *(one.shared.pairs if one.shared else ()))}
        handles = [self._model.get_submodule(name).register_forward_hook(partial(step.apply, name)) for name in names]
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
        targets = torch.tensor([*chain(*of_places)], device=self._device)
        sources = [index * width + i for index, tokens in enumerate(of_places) for i in range(len(tokens))]
        at = torch.zeros(n * width, dtype=torch.long, device=self._device)
        at[sources] = targets
        return _Decoded(group, width, at, targets, torch.tensor(sources, device=self._device))


def _rounded(rank: int) -> int:
    """The rank of the stack that a LoRA goes into: at most half as much again, so that few stacks serve many ranks."""
    power = 1 << max(rank - 1, 3).bit_length()
    return next(size for size in (power // 2, power * 3 // 4, power) if size >= rank)
