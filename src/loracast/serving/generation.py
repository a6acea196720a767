"""What an engine is asked for and what it gives back: requests, their tokens and text as they come, errors, a queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition
from typing import Any, Literal

from loracast.base.copying import CopyBias
from loracast.base.generate import Sampling, confidence
from loracast.base.load import Base
from loracast.errors import BaseModelError, ConfigError, LoracastError
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
    copy_bias: CopyBias | None = None
    """The bias for what the answer may copy from documents; a vLLM server does not take it."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    n_logprobs: int | None = None
    """Number of likeliest tokens that come with each token, 0 for the token's own logprob alone; None for neither."""
    strips: bool = True
    """Whether whitespace before and after the answer is left out; False for raw completions."""

    def read_lora(self) -> LoRA | None:
        """The LoRA, read in this thread if need be; None where there is nothing to apply."""
        lora = self.lora if self.lora is None or isinstance(self.lora, LoRA) else self.lora()
        return lora if lora is not None and lora.names else None


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


@dataclass
class EngineStats:
    """What an engine is doing, and what it has done since it started."""

    n_slots: int
    n_queued: int = 0
    n_running: int = 0
    n_generated_tokens: int = 0
    n_prompt_tokens: int = 0
    n_cached_tokens: int = 0
    """Tokens of prompts that came from the prefix cache."""
    n_prefix_hits: int = 0
    n_prefix_misses: int = 0
    n_adapters_in_memory: int = 0
    adapter_bytes: int = 0
    prefix_bytes: int = 0
    n_steps: int = 0
    """Forward passes in this process."""
    n_decoded_rows: int = 0
    """Tokens chosen in all of them: divided by `n_steps` it is the mean size of the batch."""


_INCOMPLETE = "\ufffd"


class AnswerText:
    """The text of one answer, as its tokens come in.

    Held back are bytes of an incomplete character, what may be the beginning of a stop string, and whitespace that may
    be the answer's last. All pieces together are the whole text, cut before the first stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), strips: bool = True):
        """
        Args:
            strips: leave out whitespace before and after the answer.
        """
        self._tokenizer, self._stop, self._strips = tokenizer, [text for text in stop if text], strips
        self._ids: list[int] = []
        self._n_decoded = 0  # ids whose text is in `_waiting` or was given
        self._n_context = 0  # ids before these no longer change what follows them
        self._waiting = ""
        self._has_begun = False

    def add(self, token: int) -> tuple[str, bool]:
        """The text that may be shown after one more token, and whether a stop string has ended the answer."""
        self._ids.append(token)
        context = self._decode(self._n_context, self._n_decoded)
        text = self._decode(self._n_context, len(self._ids))
        if text.endswith(_INCOMPLETE):
            return "", False
        self._n_context, self._n_decoded = self._n_decoded, len(self._ids)
        return self._show(text[len(context) :])

    def rest(self) -> str:
        """The text that is still held back when the answer ends."""
        context = self._decode(self._n_context, self._n_decoded)
        piece, is_stopped = self._show(self._decode(self._n_context, len(self._ids))[len(context) :])
        if is_stopped:
            return piece
        held, self._waiting = self._waiting, ""
        return piece + (held.rstrip() if self._strips else held)

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)

    def _show(self, new: str) -> tuple[str, bool]:
        self._waiting += new
        if self._strips and not self._has_begun:
            self._waiting = self._waiting.lstrip()
        self._has_begun = self._has_begun or bool(self._waiting)
        found = [at for text in self._stop if (at := self._waiting.find(text)) >= 0]
        if found:
            piece, self._waiting = self._waiting[: min(found)], ""
            return piece.rstrip() if self._strips else piece, True
        n_held = max((_overlap(self._waiting, text) for text in self._stop), default=0)
        shown = self._waiting[: len(self._waiting) - n_held]
        if self._strips:
            shown = shown.rstrip()
        self._waiting = self._waiting[len(shown) :]
        return shown, False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Ticket:
    """What a caller holds of one request: its tokens, in order, as the engine makes them.

    Thread-safe; every iteration begins with the first token. A request that is cancelled ends at once, without an error
    and with `finish` None; the engine notices it before its next step.
    """

    def __init__(self, request: GenerationRequest):
        self.request = request
        self.finish: Finish | None = None
        """Why the answer ended; None until then."""
        self.n_prompt_tokens = len(request.prompt)
        self.n_cached_tokens = 0
        """Tokens of the prompt that came from the prefix cache."""
        self.n_lora_bytes = 0
        """Bytes that the request's LoRA takes in memory, without what it shares with others."""
        self.n_tokens = 0
        """Generated tokens, without the one that ended the answer."""
        self.first_token_s: float | None = None
        """Seconds from `submit` to the first token; None until then."""
        self.total_s: float | None = None
        """Seconds from `submit` to the end; None until then."""
        self.is_cancelled = False
        self._logprobs: list[float] = []
        self._started = time.perf_counter()
        self._tokens: list[Token] = []
        self._error: BaseException | None = None
        self._changed = Condition()
        self._listeners: list[Callable[[], object]] = []

    def __iter__(self) -> Iterator[Token]:
        """Yield each token when it is generated; raises what failed."""
        n_seen = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda n=n_seen: len(self._tokens) > n or self.has_ended)  # type: ignore[misc]
            tokens, has_ended = self._since(n_seen)
            yield from tokens
            n_seen += len(tokens)
            if has_ended:
                return

    async def __aiter__(self) -> AsyncIterator[Token]:
        """The same for an event loop."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop was closed while the engine went on
                loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._listeners.append(wake)
        n_seen = 0
        try:
            while True:
                changed.clear()
                tokens, has_ended = self._since(n_seen)
                for token in tokens:
                    yield token
                n_seen += len(tokens)
                if has_ended:
                    return
                if not tokens:  # an error may already follow those that were seen
                    await changed.wait()
        finally:
            with self._changed:
                self._listeners.remove(wake)

    @property
    def has_ended(self) -> bool:
        return self.total_s is not None

    def text(self) -> str:
        """The whole answer; waits until it is complete."""
        return "".join(token.text for token in self)

    @property
    def confidence(self) -> float:
        """How probable the tokens so far were (`base.generate.confidence`), for a request with `n_logprobs`."""
        return confidence(self._logprobs)

    def cancel(self) -> None:
        """Stop the generation: the request leaves the queue, or its slot before the next step."""
        self.is_cancelled = True
        self.end(None)

    def _since(self, n_seen: int) -> tuple[list[Token], bool]:
        """The tokens after the first `n_seen`, and whether they are the last; raises what failed after them."""
        with self._changed:
            tokens, has_ended = self._tokens[n_seen:], self.has_ended
        if has_ended and not tokens and self._error is not None:
            raise self._error
        return tokens, has_ended and (self._error is None or not tokens)

    # ---- what the engine does

    def put(self, token: Token) -> None:
        """Hand over the next token, unless the answer has ended."""
        with self._changed:
            if self.has_ended:
                return
            if token.id is not None:
                self.n_tokens += 1
            if token.logprob is not None:
                self._logprobs.append(token.logprob)
            if self.first_token_s is None:
                self.first_token_s = time.perf_counter() - self._started
            self._tokens.append(token)
            self._notify()

    def end(self, finish: Finish | None, error: BaseException | None = None, logprob: float | None = None) -> None:
        """End the answer, unless it has ended.

        Args:
            error: what failed, if anything.
            logprob: of the token that ended it, where that is known.
        """
        with self._changed:
            if self.has_ended:
                return
            if logprob is not None:
                self._logprobs.append(logprob)
            self.finish, self._error, self.total_s = finish, error, time.perf_counter() - self._started
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        for wake in self._listeners:
            wake()


class AnswerWriter:
    """Hands the tokens of one answer to its ticket, with their text."""

    def __init__(self, tokenizer: Any, ticket: Ticket):
        self._ticket = ticket
        self._text = AnswerText(tokenizer, ticket.request.stop, ticket.request.strips)

    def put(self, token: int, logprob: float | None = None, top: tuple[tuple[int, float], ...] = ()) -> bool:
        """Hand over the next token; whether a stop string has ended the answer."""
        piece, is_stopped = self._text.add(token)
        self._ticket.put(Token(token, piece, logprob, top))
        if is_stopped:
            self._ticket.end("stop")
        return is_stopped

    def end(self, finish: Finish, logprob: float | None = None) -> None:
        """End the answer with the text that was held back, and the logprob of the token that ended it where known."""
        if rest := self._text.rest():
            self._ticket.put(Token(None, rest))
        self._ticket.end(finish, logprob=logprob)


def finished_ticket(text: str) -> Ticket:
    """The ticket of an answer that takes no model: it has ended, and its text is one token without an id."""
    ticket = Ticket(GenerationRequest([]))
    ticket.put(Token(None, text))
    ticket.end("stop")
    return ticket


class Engine:
    """A back end that generates the answers of a server: it checks requests, and refuses them while too many wait."""

    takes_copy_bias: bool
    """Whether it adds the bias for what an answer may copy from documents (`GenerationRequest.copy_bias`)."""
    window_of = "the base's window"
    """What the message of a prompt that is too long calls the window."""

    def __init__(self, base: Base, config: EngineConfig, window: int):
        """
        Args:
            window: most tokens of a prompt together with its answer.
        """
        self.base, self.config, self._window = base, config, window
        self._changed = Condition()
        self._is_draining = False
        self._mean_s = 1.0  # of a request from its start to its end

    def submit(self, request: GenerationRequest) -> Ticket:
        """Queue a request.

        Raises:
            EngineBusy: too many requests wait already.
            EngineStopped: the engine takes no more requests.
            BaseModelError: the prompt is empty or too long.
            AdapterError: the LoRA does not fit the base.
        """
        raise NotImplementedError

    def stats(self) -> EngineStats:
        raise NotImplementedError

    def close(self) -> None:
        """Stop at once: requests that are not done fail with EngineStopped."""
        raise NotImplementedError

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait until all others are done; whether they were in time."""
        with self._changed:
            self._is_draining = True
            return self._changed.wait_for(self._is_idle, timeout_s)

    def _n_waiting(self) -> int:
        """Requests that wait for a slot."""
        raise NotImplementedError

    def _is_idle(self) -> bool:
        """Whether no request waits or runs."""
        raise NotImplementedError

    def _check(self, request: GenerationRequest) -> None:
        n_prompt, n_new = len(request.prompt), request.sampling.max_new_tokens
        if not n_prompt or n_new < 1:
            raise ConfigError("a request needs a prompt of at least one token, and room for one new token")
        if n_prompt + n_new > self._window:
            raise BaseModelError(
                f"the prompt has {n_prompt} tokens and {self.window_of} holds {self._window}; learn the long text as a "
                "document, or ask for a shorter answer"
            )

    def _refuse_if_full(self) -> None:
        if self._is_draining:
            raise EngineStopped
        if (n := self._n_waiting()) >= self.config.max_queued:
            raise EngineBusy(n, max(1.0, self._mean_s * n / self.config.n_slots))

    def _count_time(self, ticket: Ticket) -> None:
        """Let a request's time count in the mean, by which it is guessed when it is worth another try."""
        self._mean_s += 0.1 * ((ticket.total_s or 0.0) - self._mean_s)
