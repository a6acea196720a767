"""What an engine is asked for and what it gives back: requests, tokens, and the errors of a full or stopping engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from loracast.base.copying import Copying
from loracast.base.generate import Sampling
from loracast.errors import LoracastError
from loracast.lora.algebra import LoRA

Finish = Literal["stop", "length"]
"""Why an answer ended: at an end token or a stop string, or at `Sampling.max_new_tokens`."""


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to be continued."""

    prompt: Sequence[int]
    """Token ids."""
    lora: LoRA | Callable[[], LoRA | None] | None = None
    """The LoRA of this request; or a function that reads it, which `submit` calls in the caller's thread unless a LoRA
    with the same `lora_key` is in memory."""
    lora_key: str | None = None
    """Names the LoRA: requests with equal keys have equal LoRAs, so they share it and the caches of prompts. For a
    routed adapter it says the version, the chunks and all weights. None shares nothing; ignored without a LoRA."""
    sampling: Sampling = field(default_factory=Sampling)
    copying: Copying | None = None
    """The bonus for what the answer may copy from documents; a vLLM server does not take it."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    n_logprobs: int | None = None
    """Number of likeliest tokens that come with each token, 0 for the token's own logprob alone; None for neither."""
    strips: bool = True
    """Whether whitespace before and after the answer is left out; False for raw completions."""


@dataclass(frozen=True)
class Token:
    """One generated token."""

    id: int | None
    """None where only text follows that had been held back when the answer ended."""
    text: str
    """What it adds to the answer; "" while a character is incomplete or a stop string may be about to begin."""
    logprob: float | None = None
    """Natural logarithm of its probability before temperature, top_p, top_k and penalties."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The likeliest token ids with their logprobs, likeliest first."""


class EngineBusy(LoracastError):
    """The engine's queue is full; `retry_after_s` is when it is worth another try."""

    def __init__(self, n_queued: int, retry_after_s: float):
        super().__init__(f"{n_queued} requests are waiting already; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class EngineStopped(LoracastError):
    """The engine finishes what runs and takes no more requests, or was closed before a request was done."""

    def __init__(self) -> None:
        super().__init__("the engine is stopping and takes no more requests: send it again when the server is back")


class EngineFailed(LoracastError):
    """The server that generates for this one does not answer, or fails."""
