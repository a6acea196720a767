"""Keys and values of the rows of a batch: slots that the whole batch shares, and blocks of memory of a row's own.

Rows that are decoded and whose request fits into a slot lie side by side, so that one call computes the attention of
all of them. A prompt that is being read, and a request that is longer than a slot, have a block of their own.

Each row's keys and values of all layers lie in one block, which comes from the system and goes back to it as a whole: a
tensor for each layer would leave holes in the heap. What no token has been written to takes no physical memory.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

Layer = tuple[Tensor, Tensor]
"""Keys and values of one layer."""


class OwnCache:
    """Keys and values of one row; allocated when the first token is written."""

    def __init__(self, n_layers: int, capacity: int):
        self.n_layers, self.capacity = n_layers, capacity
        self.sides: Sequence[Tensor] = ()
        """Keys and values, [layers, kv heads, capacity, head size] each."""

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> Layer:
        """Put tokens [kv heads, n, head size] behind the first `start`; the layer's keys and values up to the last."""
        if not self.sides:
            shapes = [(self.n_layers, side.shape[0], self.capacity, side.shape[2]) for side in (keys, values)]
            self.sides = _split(keys.new_empty(sum(map(prod, shapes))), shapes)
        end = start + keys.shape[1]
        for side, new in zip(self.sides, (keys, values), strict=True):
            side[layer, :, start:end] = new
        all_keys, all_values = self.sides
        return all_keys[layer, :, :end], all_values[layer, :, :end]

    def copy(self, n_tokens: int, capacity: int) -> OwnCache:
        """The first tokens in a block of another capacity."""
        return _copied(self.sides, n_tokens, capacity)

    @property
    def n_bytes(self) -> int:
        return sum(side.numel() * side.element_size() for side in self.sides)


class SlotCache:
    """Keys and values of many rows; allocated when the first row comes."""

    def __init__(self, n_slots: int, capacity: int):
        self.n_slots, self.capacity = n_slots, capacity
        self._sides: Sequence[Tensor] = ()
        """Keys and values, [slots, layers, kv heads, capacity, head size] each."""
        self._memory: mmap.mmap | None = None
        self._slot_bytes = 0

    def layer(self, layer: int) -> Layer:
        """Keys and values of a layer, [slots, kv heads, capacity, head size] each."""
        keys, values = self._sides
        return keys[:, layer], values[:, layer]

    def adopt(self, slot: int, row: OwnCache, n_tokens: int) -> None:
        """Copy a row's tokens into a slot."""
        if not self._sides:
            self._allocate(row.sides)
        for slots, side in zip(self._sides, row.sides, strict=True):
            slots[slot, :, :, :n_tokens] = side[:, :, :n_tokens]

    def move(self, source: int, target: int, n_tokens: int) -> None:
        """Copy the tokens of one slot into a free one, and free the first."""
        for slots in self._sides:
            slots[target, :, :, :n_tokens] = slots[source, :, :, :n_tokens]
        self.free(source, n_tokens)

    def free(self, slot: int, n_tokens: int) -> None:
        """Forget a slot's tokens, and give their memory back on Linux.

        The numbers are zero afterwards: attention multiplies masked ones by zero, which must give zero, and what
        overflowed would not.
        """
        if sys.platform == "linux" and self._memory is not None:
            self._memory.madvise(mmap.MADV_DONTNEED, slot * self._slot_bytes, self._slot_bytes)
            return
        for slots in self._sides:
            slots[slot, :, :, :n_tokens] = 0

    def copy(self, slot: int, n_tokens: int) -> OwnCache:
        """The tokens of a slot in a block of their own."""
        return _copied([slots[slot] for slots in self._sides], n_tokens, n_tokens)

    def _allocate(self, sides: Sequence[Tensor]) -> None:
        """Zeros for all slots, each in pages of its own."""
        like = sides[0]
        shapes = [(len(side), side.shape[1], self.capacity, side.shape[3]) for side in sides]
        n = sum(map(prod, shapes))
        if like.device.type != "cpu":
            self._sides = _split(like.new_zeros(self.n_slots, n), shapes)
            return
        self._slot_bytes = -(-n * like.element_size() // mmap.PAGESIZE) * mmap.PAGESIZE
        n_bytes = self.n_slots * self._slot_bytes
        # Memory that is shared with child processes, mmap's default, would not be given back.
        if sys.platform == "win32":
            self._memory = mmap.mmap(-1, n_bytes)
        else:
            self._memory = mmap.mmap(-1, n_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block = torch.frombuffer(self._memory, dtype=like.dtype).view(self.n_slots, -1)
        self._sides = _split(block[:, :n], shapes)


def _split(block: Tensor, shapes: Sequence[tuple[int, ...]]) -> Sequence[Tensor]:
    """Views [..., *shape] of a block [..., n], one after the other."""
    parts = block.split([prod(shape) for shape in shapes], -1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def _copied(sides: Sequence[Tensor], n_tokens: int, capacity: int) -> OwnCache:
    """The first tokens of keys and values [layers, kv heads, tokens, head size] in a block of their own."""
    made = OwnCache(len(sides[0]), capacity)
    for layer, (keys, values) in enumerate(zip(*sides, strict=True)):
        made.write(layer, 0, keys[:, :n_tokens], values[:, :n_tokens])
    return made
