"""Keys and values of the rows of a batch: slots in tensors that the whole batch shares, and tensors of a row's own.

Rows that are decoded and whose request fits into a slot lie side by side, so that one call computes the attention of
all of them. A prompt that is being read, and a request that is longer than a slot, have tensors of their own. What no
token has been written to takes no physical memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

Layer = tuple[Tensor, Tensor]
"""Keys and values of one layer."""


@dataclass
class OwnCache:
    """Keys and values of one row, [kv heads, capacity, head size] a layer; a layer is allocated when it is written."""

    capacity: int
    layers: dict[int, Layer] = field(default_factory=dict)

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> Layer:
        """Put tokens [kv heads, n, head size] behind the first `start`; the layer's keys and values up to the last."""
        if layer not in self.layers:
            self.layers[layer] = tuple(  # type: ignore[assignment]
                side.new_empty(side.shape[0], self.capacity, side.shape[2]) for side in (keys, values)
            )
        end = start + keys.shape[1]
        held = self.layers[layer]
        for side, new in zip(held, (keys, values), strict=True):
            side[:, start:end] = new
        return held[0][:, :end], held[1][:, :end]

    def copy(self, n_tokens: int, capacity: int) -> OwnCache:
        """The first tokens in tensors of another capacity."""
        made = OwnCache(capacity)
        for layer, (keys, values) in self.layers.items():
            made.write(layer, 0, keys[:, :n_tokens], values[:, :n_tokens])
        return made

    @property
    def n_bytes(self) -> int:
        return sum(side.numel() * side.element_size() for layer in self.layers.values() for side in layer)


class SlotCache:
    """Keys and values of many rows, [slots, kv heads, capacity, head size] a layer."""

    def __init__(self, n_slots: int, capacity: int):
        self.n_slots, self.capacity = n_slots, capacity
        self.layers: dict[int, Layer] = {}

    def adopt(self, slot: int, row: OwnCache, n_tokens: int) -> None:
        """Copy a row's tokens into a slot."""
        for layer, sides in row.layers.items():
            if layer not in self.layers:
                self.layers[layer] = tuple(  # type: ignore[assignment]
                    _lazy_zeros((self.n_slots, side.shape[0], self.capacity, side.shape[2]), side) for side in sides
                )
            for slots, side in zip(self.layers[layer], sides, strict=True):
                slots[slot, :, :n_tokens] = side[:, :n_tokens]

    def move(self, source: int, target: int, n_tokens: int) -> None:
        """Copy the tokens of one slot into another."""
        for sides in self.layers.values():
            for slots in sides:
                slots[target, :, :n_tokens] = slots[source, :, :n_tokens]

    def clear(self, slot: int, n_tokens: int) -> None:
        """Forget tokens whose numbers are not finite: masked ones are multiplied by zero, which must give zero."""
        for sides in self.layers.values():
            for slots in sides:
                slots[slot, :, :n_tokens] = 0

    def copy(self, slot: int, n_tokens: int) -> OwnCache:
        """The tokens of a slot in tensors of their own."""
        made = OwnCache(n_tokens)
        for layer, (keys, values) in self.layers.items():
            made.write(layer, 0, keys[slot, :, :n_tokens], values[slot, :, :n_tokens])
        return made


def _lazy_zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros, on a CPU in memory that the system provides when it is first written to."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    n_bytes = int(np.prod(shape)) * like.element_size()
    return torch.from_numpy(np.zeros(n_bytes, np.uint8)).view(like.dtype).view(shape)
