"""Gradient checkpointing of a base's blocks (arXiv 1604.06174): activations are computed twice and kept once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def checkpointed_blocks(decoder: Any, prepared: Callable[[nn.Module], AbstractContextManager[Any]]) -> Iterator[None]:
    """Keep only what enters each block during forward passes inside; the backward pass computes the rest again.

    Args:
        decoder: of a causal language model, frozen and in evaluation mode.
        prepared: block -> the state that its forward pass runs in, such as injected LoRAs; entered when the block is
            computed again, since by then the forward pass has left it.
    """

    def contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), prepared(block)

    own = [vars(block).get("forward") for block in decoder.layers]  # accelerate gives blocks one of their own
    for block in decoder.layers:
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False,
            context_fn=partial(contexts, block),
        )  # fmt: skip
    try:
        yield
    finally:
        for block, forward in zip(decoder.layers, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def names_within(model: nn.Module, block: nn.Module) -> set[str]:
    """The names that the modules of a block, itself included, have in the whole model."""
    own = set(block.modules())
    return {name for name, module in model.named_modules() if module in own}
