"""Gradient checkpointing of a base's blocks (arXiv 1604.06174): activations are computed twice and kept once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint


@contextmanager
def checkpointed_blocks(decoder: Any, prepared: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Keep only what enters each block during forward passes inside; the backward pass computes the rest again.

    Args:
        decoder: of a causal language model, frozen and in evaluation mode.
        prepared: the state that the forward pass runs in, such as injected LoRAs; entered again when a block is
            computed again, since by then the forward pass has left it.
    """
    own = [vars(block).get("forward") for block in decoder.layers]  # accelerate gives blocks one of their own
    for block in decoder.layers:
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), prepared()),
        )  # fmt: skip
    try:
        yield
    finally:
        for block, forward in zip(decoder.layers, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
