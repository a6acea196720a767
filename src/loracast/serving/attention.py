"""Attention of one engine step: every token of a flat batch sees the tokens before it in its own row.

transformers calls `attend_rows` in place of its own attention while `row_attention` lasts, for every model that takes
its attention from transformers' registry. The batch is one sequence [1, tokens] of the tokens of all rows: first one
token of each row in a slot, then runs of tokens of rows with tensors of their own (a piece of a prompt, or one token
of a long row). Grouped-query heads are folded into the query's tokens, so that no key is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from loracast.serving.kv_cache import Layer, OwnCache, SlotCache

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


@dataclass
class RowBatch:
    """The rows of one step."""

    slots: SlotCache
    lengths: Sequence[int]
    """Tokens before this step's, of the rows in the slots 0, 1, 2, ..."""
    runs: Sequence[Run]
    _masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n_batched, self.alone = _split(self.lengths)
        """The longest number of tokens that the batched call sees, and the slots whose rows are longer."""
        self._positions = torch.tensor(self.lengths)
        self._slots = torch.arange(len(self.lengths))

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Store keys and values [kv heads, tokens, size] and attend with queries [heads, tokens, size].

        Args:
            window: tokens that are seen at most, the token itself included; None for all.
            softcap: scores are squashed to at most this (Gemma 2).

        Returns:
            [tokens, heads, size].
        """
        heads, n_tokens, size = query.shape
        n_kv = key.shape[0]
        out = query.new_empty(n_tokens, heads, value.shape[-1])
        if n := len(self.lengths):
            slots, at = self._slots.to(key.device), self._positions.to(key.device)
            keys, values = self.slots.layer(layer)
            keys[slots, :, at] = key[:, :n].transpose(0, 1)
            values[slots, :, at] = value[:, :n].transpose(0, 1)
            grouped = query[:, :n].transpose(0, 1).reshape(n, n_kv, heads // n_kv, size)
            end = self.n_batched
            if len(self.alone) < n:
                mask = self._slot_mask(window, query)
                given = _attention(grouped, (keys[:n, :, :end], values[:n, :, :end]), mask, scale, softcap)
                out[:n] = given.reshape(n, heads, -1)
            for slot in self.alone:
                end = self.lengths[slot] + 1
                begin = 0 if window is None else max(0, end - window)
                row = keys[slot : slot + 1, :, begin:end], values[slot : slot + 1, :, begin:end]
                out[slot] = _attention(grouped[slot : slot + 1], row, None, scale, softcap).reshape(heads, -1)
        for run in self.runs:
            keys, values = run.cache.write(layer, run.start, key[:, run.tokens], value[:, run.tokens])
            begin = 0 if window is None else max(0, run.start + 1 - window)
            seen = self._run_mask(run, begin, window, heads // n_kv, query)
            grouped = query[:, run.tokens].reshape(1, n_kv, heads // n_kv * run.n_tokens, size)
            given = _attention(grouped, (keys[None, :, begin:], values[None, :, begin:]), seen, scale, softcap)
            out[run.tokens] = given.reshape(heads, run.n_tokens, -1).transpose(0, 1)
        return out

    def _slot_mask(self, window: int | None, like: Tensor) -> Tensor:
        """What the rows in slots see [slots, 1, 1, tokens], 0 or -inf."""
        key = ("slots", window, like.device)
        if key not in self._masks:
            at, last = torch.arange(self.n_batched), self._positions[:, None]
            is_seen = at <= last if window is None else (at <= last) & (at > last - window)
            is_seen[:, 0] |= ~is_seen.any(1)  # rows that are attended to alone: any number will do
            self._masks[key] = _additive(is_seen[:, None, None], like)
        return self._masks[key]

    def _run_mask(self, run: Run, begin: int, window: int | None, n_groups: int, like: Tensor) -> Tensor | None:
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


def _split(lengths: Sequence[int]) -> tuple[int, list[int]]:
    """How rows of several lengths are attended to fastest: the tokens of one batched call, and the rows left out of it.

    The batched call takes the time of its longest row for each row; a long row beside many short ones is cheaper alone.
    """
    order = sorted(range(len(lengths)), key=lambda slot: -lengths[slot])
    best_cost, best, paid = float("inf"), 0, 0
    for n_alone in range(len(order) + 1):
        longest = lengths[order[n_alone]] + 1 if n_alone < len(order) else 0
        cost = paid + len(order) * longest
        if cost < best_cost:
            best_cost, best = cost, n_alone
        if n_alone < len(order):
            paid += longest + _CALL_COST
    return lengths[order[best]] + 1 if best < len(order) else 0, order[:best]


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
    """The attention function that transformers calls: [1, heads, tokens, size] -> [1, tokens, heads, size]."""
    return rows.attend(module.layer_idx, query[0], key[0], value[0], scaling, sliding_window, softcap)[None], None


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
