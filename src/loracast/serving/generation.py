"""What an engine is asked for and what it gives back: requests, their tokens and text as they come, errors, a queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from queue import SimpleQueue
from threading import Condition, Lock
from typing import Any, Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from loracast.base.copying import CopyBias
from loracast.base.generate import AnswerText, Sampling
from loracast.base.load import Base
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


def _figure(kind: type[Metric], name: str, what: str) -> Any:
    """A field that starts at 0, with the kind, name and description under which Prometheus reads it."""
    return field(default=0, metadata={"metric": partial(kind, f"loracast_{name}", what)})


_gauge, _counter = partial(_figure, GaugeMetricFamily), partial(_figure, CounterMetricFamily)


@dataclass
class EngineStats:
    """What an engine is doing, and what it has done since it started."""

    n_queued: int = _gauge("queued_requests", "Requests that wait for a slot")
    n_running: int = _gauge("running_requests", "Requests that are being answered: the size of the batch")
    n_slots: int = _gauge("slots", "Requests that can be answered at the same time")
    n_adapters_in_memory: int = _gauge("adapters_in_memory", "LoRAs in memory")
    adapter_bytes: int = _gauge("adapter_bytes", "Bytes of the LoRAs in memory")
    prefix_bytes: int = _gauge("prefix_cache_bytes", "Bytes of the cached prompts")
    n_steps: int = _counter("engine_steps", "Forward passes of the base")
    n_decoded_rows: int = _counter("decoded_rows", "Rows of all forward passes; over engine_steps: the mean batch")
    n_generated_tokens: int = _counter("generated_tokens", "Tokens generated")
    n_prompt_tokens: int = _counter("prompt_tokens", "Tokens of prompts")
    n_cached_tokens: int = _counter("prompt_tokens_saved", "Tokens of prompts that the prefix cache had")
    n_prefix_hits: int = _counter("prefix_cache_hits", "Prompts whose beginning was in the prefix cache")
    n_prefix_misses: int = _counter("prefix_cache_misses", "Prompts whose beginning was not in the prefix cache")

    def metrics(self) -> Iterator[Metric]:
        """The figures as Prometheus' client takes them."""
        for one in fields(self):
            yield one.metadata["metric"](getattr(self, one.name))


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
        self._started = time.perf_counter()
        self._tokens: list[Token] = []
        self._error: BaseException | None = None
        self._lock = Lock()
        self._followers: list[Callable[[Token | None], object]] = []

    def _follow(self, take: Callable[[Token | None], object]) -> None:
        """Hand all tokens to a function, those that come later too; None after the last."""
        with self._lock:
            for token in self._tokens:
                take(token)
            if self.has_ended:
                take(None)
            self._followers.append(take)

    def __iter__(self) -> Iterator[Token]:
        """Yield each token when it is generated; raises what failed."""
        tokens: SimpleQueue[Token | None] = SimpleQueue()
        self._follow(tokens.put)
        yield from iter(tokens.get, None)
        if self._error is not None:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[Token]:
        """The same for an event loop."""
        loop, tokens = asyncio.get_running_loop(), asyncio.Queue[Token | None]()

        def take(token: Token | None) -> None:
            with suppress(RuntimeError):  # the loop was closed while the engine went on
                loop.call_soon_threadsafe(tokens.put_nowait, token)

        self._follow(take)
        while (token := await tokens.get()) is not None:
            yield token
        if self._error is not None:
            raise self._error

    @property
    def has_ended(self) -> bool:
        return self.total_s is not None

    def text(self) -> str:
        """The whole answer; waits until it is complete."""
        return "".join(token.text for token in self)

    def cancel(self) -> None:
        """Stop the generation: the request leaves the queue, or its slot before the next step."""
        self.end(None)

    # ---- what the engine does

    def put(self, token: Token) -> None:
        """Hand over the next token, unless the answer has ended."""
        with self._lock:
            if self.has_ended:
                return
            if token.id is not None:
                self.n_tokens += 1
            if self.first_token_s is None:
                self.first_token_s = time.perf_counter() - self._started
            self._tokens.append(token)
            self._notify(token)

    def end(self, finish: Finish | None, error: BaseException | None = None) -> None:
        """End the answer, unless it has ended; `error` is what failed, if anything."""
        with self._lock:
            if self.has_ended:
                return
            self.finish, self._error, self.total_s = finish, error, time.perf_counter() - self._started
            self._notify(None)

    def _notify(self, token: Token | None) -> None:
        for take in self._followers:
            take(token)


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

    def end(self, finish: Finish) -> None:
        """End the answer with the text that was held back."""
        if rest := self._text.rest():
            self._ticket.put(Token(None, rest))
        self._ticket.end(finish)


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

    def __init__(self, base: Base, config: EngineConfig, window: int):
        self.base, self.config, self.counts = base, config, EngineStats(n_slots=config.n_slots)
        self.window = window
        """Most tokens of a prompt together with its answer; requests that are submitted keep to it."""
        self._changed = Condition()
        self._is_draining = False
        self._mean_s = 1.0  # of a request from its start to its end

    def submit(self, request: GenerationRequest) -> Ticket:
        """Queue a request, whose prompt has a token at least, and fits into the window with its answer.

        Raises:
            EngineBusy: too many requests wait already.
            EngineStopped: the engine takes no more requests.
            AdapterError: the LoRA does not fit the base.
        """
        raise NotImplementedError

    def stats(self) -> EngineStats:
        with self._changed:
            return replace(self.counts, **self._sizes())

    def _sizes(self) -> dict[str, int]:
        """The fields of the statistics that are not counted but looked up."""
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
        sizes = self._sizes()
        return not sizes["n_queued"] + sizes["n_running"]

    def _refuse_if_full(self) -> None:
        if self._is_draining:
            raise EngineStopped
        if (n := self._n_waiting()) >= self.config.max_queued:
            raise EngineBusy(n, max(1.0, self._mean_s * n / self.config.n_slots))

    def _count_time(self, ticket: Ticket) -> None:
        """Let a request's time count in the mean, by which it is guessed when it is worth another try."""
        self._mean_s += 0.1 * ((ticket.total_s or 0.0) - self._mean_s)
