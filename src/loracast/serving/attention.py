"""Keys and values of the rows of a batch, those that were read before, and the attention of one engine step to them.

Rows that are decoded and whose request fits into a slot lie side by side, so that one call computes the attention of
all of them. A prompt that is being read, and a request that is longer than a slot, have a block of their own.

Each row's keys and values of all layers lie in one block, which comes from the system and goes back to it as a whole: a
tensor for each layer would leave holes in the heap. What no token has been written to takes no physical memory.

Attention of one engine step: every token of a flat batch sees the tokens before it in its own row.

transformers calls `attend_rows` in place of its own attention while `row_attention` lasts, for every model that takes
its attention from transformers' registry. The batch is one sequence [1, tokens] of the tokens of all rows: first one
token of each row in a slot, then runs of tokens of rows with tensors of their own (a piece of a prompt, or one token
of a long row). Grouped-query heads are folded into the query's tokens, so that no key is copied.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor
from torch.nn import functional

Layer = tuple[Tensor, Tensor]
"""Keys and values of one layer."""


class OwnCache:
    """Keys and values of one row; allocated when the first token is written."""

    def __init__(self, n_layers: int, capacity: int, sides: Sequence[Tensor] = ()):
        self.n_layers, self.capacity, self.sides = n_layers, capacity, sides
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

    def copy(self, n_tokens: int, capacity: int | None = None) -> OwnCache:
        """The first tokens in a block of their own, of another capacity than they need if there is one."""
        made = OwnCache(self.n_layers, capacity or n_tokens)
        for layer, (keys, values) in enumerate(zip(*self.sides, strict=True)):
            made.write(layer, 0, keys[:, :n_tokens], values[:, :n_tokens])
        return made

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

    def row(self, slot: int) -> OwnCache:
        """The keys and values of one slot, which are not copied."""
        sides = [slots[slot] for slots in self._sides]
        return OwnCache(len(sides[0]), self.capacity, sides)

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


_Ids = tuple[int, ...]


class PrefixCache:
    """Keys and values under a budget of bytes, the least recently used leaving first; for one thread.

    Those of a LoRA serve only prompts with the same LoRA, which the key names.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.n_hits = self.n_misses = 0
        self._held: LRUCache[tuple[str, _Ids], OwnCache] = LRUCache(max_bytes, lambda cache: cache.n_bytes)

    @property
    def n_bytes(self) -> int:
        return int(self._held.currsize)

    def find(self, key: str, ids: Sequence[int], most: int) -> tuple[int, OwnCache | None]:
        """The number of tokens of `ids` that some entry begins with, `most` at most, and the entry; or 0 and None."""
        wanted = tuple(ids)
        commons = {held: min(most, _n_common(held, wanted)) for held in self._of(key)}
        best = max(commons, key=commons.__getitem__, default=None)
        if best is None or not commons[best]:
            self.n_misses += 1
            return 0, None
        self.n_hits += 1
        return commons[best], self._held[key, best]

    def put(self, key: str, ids: Sequence[int], cache: OwnCache) -> None:
        """Keep the keys and values of tokens, in place of those of their beginnings."""
        if cache.n_bytes > self.max_bytes:
            return
        new = tuple(ids)
        for held in self._of(key):
            if held == new[: len(held)]:
                del self._held[key, held]
        self._held[key, new] = cache

    def _of(self, key: str) -> list[_Ids]:
        """The tokens of the entries with a key."""
        return [ids for of, ids in self._held if of == key]


def _n_common(one: _Ids, other: _Ids) -> int:
    """The number of tokens that both begin with."""
    n = min(len(one), len(other))
    return next((i for i in range(n) if one[i] != other[i]), n)


_NAME = "loracast_rows"
_CALL_COST = 80
"""What a call of attention for one row costs, in tokens of a row that is attended to (measured on a CPU)."""


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of one row in the flat batch."""

    first: int
    """Of the tokens in the batch."""
    n_tokens: int
    start: int
    """Tokens of the row before these."""
    cache: OwnCache

    @property
    def tokens(self) -> slice:
        return slice(self.first, self.first + self.n_tokens)


class RowBatch:
    """The rows of one step."""

    def __init__(self, slots: SlotCache, lengths: Sequence[int], runs: Sequence[Run]):
        """
        Args:
            lengths: tokens before this step's, of the rows in the slots 0, 1, 2, ...
        """
        self.slots, self.lengths, self.positions = slots, lengths, torch.tensor(lengths)
        self.n_batched, alone = _split_rows(lengths)
        """The longest number of tokens that the batched call sees."""
        self.runs = [*runs, *(Run(slot, 1, lengths[slot], slots.row(slot)) for slot in alone)]
        self._masks: dict[tuple[Any, ...], Tensor] = {}

    def slot_mask(self, window: int | None, like: Tensor) -> Tensor:
        """What the rows in slots see [slots, 1, 1, tokens], 0 or -inf."""
        key = ("slots", window, like.device)
        if key not in self._masks:
            at, last = torch.arange(self.n_batched), self.positions[:, None]
            is_seen = at <= last if window is None else (at <= last) & (at > last - window)
            is_seen[:, 0] |= ~is_seen.any(1)  # rows that are attended to alone: any number will do
            self._masks[key] = _additive(is_seen[:, None, None], like)
        return self._masks[key]

    def run_mask(self, run: Run, begin: int, window: int | None, n_groups: int, like: Tensor) -> Tensor | None:
        """What the tokens of a run see [1, 1, groups * tokens, tokens], 0 or -inf; None for all."""
        if run.n_tokens == 1:
            return None
        key = (run.first, begin, window, n_groups, like.device)
        if key not in self._masks:
            end = run.start + run.n_tokens
            at, last = torch.arange(begin, end), torch.arange(run.start, end)[:, None]
            is_seen = at <= last if window is None else (at <= last) & (at > last - window)
            self._masks[key] = _additive(is_seen.repeat(n_groups, 1)[None, None], like)
        return self._masks[key]


def _additive(is_seen: Tensor, like: Tensor) -> Tensor:
    mask = torch.zeros(is_seen.shape, dtype=like.dtype).masked_fill_(~is_seen, float("-inf"))
    return mask.to(like.device)


def _split_rows(lengths: Sequence[int]) -> tuple[int, list[int]]:
    """How rows of several lengths are attended to fastest: the tokens of one batched call, and the rows left out of it.

    The batched call takes the time of its longest row for each row; a long row beside many short ones is cheaper alone.
    """
    order = sorted(range(len(lengths)), key=lambda slot: -lengths[slot])
    spans = [*(lengths[slot] + 1 for slot in order), 0]  # tokens of the call, by the number of rows left out
    paid = [0, *accumulate(span + _CALL_COST for span in spans[:-1])]
    best = min(range(len(spans)), key=lambda n_alone: paid[n_alone] + len(order) * spans[n_alone])
    return spans[best], order[:best]


def _attention(query: Tensor, row: Layer, mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Attention of queries [rows, kv heads, n, size] over keys and values [rows, kv heads, tokens, size]."""
    keys, values = row
    if softcap is None:
        if mask is not None:
            mask = mask.expand(-1, -1, query.shape[2], -1)
        return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    scores = torch.tanh(query @ keys.mT * (scale / softcap)) * softcap
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values


def _attend_rows(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    rows: RowBatch,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: stores keys and values, and attends with the queries.

    Args:
        query, key, value: [1, heads or kv heads, tokens, size].
        sliding_window: tokens that are seen at most, the token itself included; None for all.
        softcap: scores are squashed to at most this (Gemma 2).

    Returns:
        [1, tokens, heads, size], and no weights.
    """
    query, key, value = query[0], key[0], value[0]
    heads, n_tokens, size = query.shape
    n_kv = key.shape[0]
    out = query.new_empty(n_tokens, heads, value.shape[-1])
    if n := len(rows.lengths):
        slots, at = torch.arange(n, device=key.device), rows.positions.to(key.device)
        keys, values = rows.slots.layer(module.layer_idx)
        keys[slots, :, at] = key[:, :n].transpose(0, 1)
        values[slots, :, at] = value[:, :n].transpose(0, 1)
        if end := rows.n_batched:
            grouped = query[:, :n].transpose(0, 1).reshape(n, n_kv, heads // n_kv, size)
            mask = rows.slot_mask(sliding_window, query)
            given = _attention(grouped, (keys[:n, :, :end], values[:n, :, :end]), mask, scaling, softcap)
            out[:n] = given.reshape(n, heads, -1)
    for run in rows.runs:
        keys, values = run.cache.write(module.layer_idx, run.start, key[:, run.tokens], value[:, run.tokens])
        begin = 0 if sliding_window is None else max(0, run.start + 1 - sliding_window)
        seen = rows.run_mask(run, begin, sliding_window, heads // n_kv, query)
        grouped = query[:, run.tokens].reshape(1, n_kv, heads // n_kv * run.n_tokens, size)
        given = _attention(grouped, (keys[None, :, begin:], values[None, :, begin:]), seen, scaling, softcap)
        out[run.tokens] = given.reshape(heads, run.n_tokens, -1).transpose(0, 1)
    return out[None], None


@contextmanager
def row_attention(model: Any) -> Iterator[None]:
    """Let a model's forward passes, which are given `rows=RowBatch`, use the attention of this module."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attend_rows)
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
