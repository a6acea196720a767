"""Floating point operations of a query, from a base's shapes alone (docs/evaluation.md has the formula).

They are counted as torch's own counter does: two for each multiply-add of a matmul, attention as full squares, nothing
for norms and activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loracast.lora.algebra import LoRA
from loracast.lora.target import layer_shapes, text_config


@dataclass(frozen=True)
class QueryFlops:
    """Operations of the forward passes of one base."""

    n_layers: int
    layer_weights: int
    """Numbers in the linear modules of one layer."""
    attention_width: int
    """Query heads times their width."""
    kv_width: int
    """Key and value heads times their width, of keys and values together."""
    head_weights: int
    """Numbers in the output head."""

    @classmethod
    def of(cls, config: Any) -> QueryFlops:
        """From a transformers config."""
        text, shapes = text_config(config), layer_shapes(config)
        return cls(
            n_layers=text.num_hidden_layers,
            layer_weights=sum(d_in * d_out for d_in, d_out in shapes.values()),
            attention_width=shapes["q_proj"][1],
            kv_width=shapes["k_proj"][1] + shapes["v_proj"][1],
            head_weights=text.hidden_size * text.vocab_size,
        )

    def forward(self, n_tokens: int, n_past: int = 0) -> int:
        """Operations of a pass over new tokens behind `n_past` that the cache holds; the output head runs once."""
        per_layer = 2 * n_tokens * self.layer_weights + 4 * n_tokens * (n_past + n_tokens) * self.attention_width
        return self.n_layers * per_layer + 2 * self.head_weights

    def query(self, n_prompt: int, n_new: int, lora: LoRA | None = None, n_kept: int = 0) -> int:
        """Operations of a prompt and an answer of `n_new` tokens, the last of which is not read.

        Args:
            n_kept: tokens of the prompt's beginning that the cache holds from before.
        """
        steps = sum(self.forward(1, n_prompt + i) for i in range(n_new - 1))
        return self.forward(n_prompt - n_kept, n_kept) + steps + (n_prompt - n_kept + n_new - 1) * lora_flops(lora)

    def cache_bytes(self, n_tokens: int, bytes_per_number: int = 2) -> int:
        """Size of the keys and values of so many tokens."""
        return self.n_layers * self.kv_width * n_tokens * bytes_per_number


def lora_flops(lora: LoRA | None) -> int:
    """Operations that a LoRA adds for each token."""
    if lora is None:
        return 0
    factors = sum(2 * (a.numel() + b.numel()) for a, b in lora.factors.values())
    return factors + sum(2 * delta.numel() for delta in lora.dense.values())


def counted(work: Callable[[], object]) -> int:
    """Operations of any work that runs on torch, by torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())
