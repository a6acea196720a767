"""Sizes of an engine, and what it reports of itself."""

from __future__ import annotations

from dataclasses import dataclass

_MB = 2**20


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine."""

    n_slots: int = 32
    """Requests that run at the same time."""
    max_queued: int = 256
    """Requests that may wait; more are refused with EngineBusy."""
    slot_tokens: int = 1024
    """Requests of up to so many tokens, prompt and answer, are decoded side by side; longer ones one by one in a step,
    which is a little slower. A slot takes memory for the tokens that it holds."""
    prefill_tokens: int = 64
    """Tokens of new prompts that are read in a step in which others are decoded."""
    prefill_tokens_alone: int = 512
    """Tokens of new prompts that are read in a step in which nothing is decoded."""
    kv_bytes: int = 4096 * _MB
    """Keys and values of all running requests at their longest; a request that does not fit waits for others."""
    adapter_bytes: int = 512 * _MB
    """LoRAs that are kept in memory."""
    prefix_bytes: int = 256 * _MB
    """Keys and values that are kept of prompts and answers."""


@dataclass(frozen=True)
class EngineStats:
    """What an engine is doing, and what it has done since it started."""

    n_slots: int
    n_queued: int
    n_running: int
    n_steps: int
    """Forward passes."""
    n_decoded_rows: int
    """Tokens chosen in all of them: divided by `n_steps` it is the mean size of the batch."""
    n_generated_tokens: int
    n_prompt_tokens: int
    n_cached_tokens: int
    """Tokens of prompts that came from the prefix cache."""
    n_prefix_hits: int
    n_prefix_misses: int
    prefix_bytes: int
    n_adapters_in_memory: int
    adapter_bytes: int
