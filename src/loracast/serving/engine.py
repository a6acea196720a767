"""The engine: one thread that runs the base for all requests of a server."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch

from loracast.base.load import Base
from loracast.errors import BaseModelError
from loracast.lora.algebra import LoRA
from loracast.lora.inject import inject
from loracast.serving.answer_text import AnswerText
from loracast.serving.request import EngineBusy, EngineStopped, Finish, GenerationRequest, Token
from loracast.serving.sampler import Sampler, top_logprobs
from loracast.serving.ticket import Ticket


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine."""

    n_slots: int = 32
    """Requests that are decoded at the same time."""
    max_queued: int = 256
    """Requests that may wait for a slot; more are refused with EngineBusy."""


@dataclass(frozen=True)
class EngineStats:
    """What an engine is doing, and what it has done since it started."""

    n_slots: int
    n_queued: int
    n_running: int
    n_steps: int = 0
    """Forward passes."""
    n_decoded_rows: int = 0
    """Rows of all forward passes: divided by `n_steps` it is the mean batch size."""
    n_generated_tokens: int = 0
    n_prompt_tokens: int = 0
    n_cached_tokens: int = 0
    """Tokens of prompts that came from the prefix cache."""
    n_prefix_hits: int = 0
    n_prefix_misses: int = 0
    prefix_bytes: int = 0
    n_adapters_in_memory: int = 0
    adapter_bytes: int = 0


class Engine(Protocol):
    """What the HTTP API needs of an engine."""

    def submit(self, request: GenerationRequest) -> Ticket:
        """Queue a request. Raises EngineBusy, EngineStopped, or BaseModelError where the prompt is too long."""

    def stats(self) -> EngineStats: ...

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait until all others are done; whether they were in time."""

    def close(self) -> None:
        """Stop at once: requests that are not done fail with EngineStopped."""


class LocalEngine:
    """An engine on a base in this process."""

    def __init__(self, base: Base, config: EngineConfig = EngineConfig()):
        self.base, self.config = base, config
        self._queue: deque[tuple[Ticket, LoRA | None]] = deque()
        self._changed = threading.Condition()
        self._is_draining = self._is_closed = False
        self._n_running = self._n_generated = self._n_prompt = self._n_steps = 0
        self._thread = threading.Thread(target=self._run, name="loracast-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> Ticket:
        window, n_prompt = self.base.window, len(request.prompt)
        if n_prompt + request.sampling.max_new_tokens > window:
            raise BaseModelError(
                f"the prompt has {n_prompt} tokens and the base's window holds {window}; learn the long text as a "
                "document, or ask for a shorter answer"
            )
        if not n_prompt:
            raise BaseModelError("the prompt is empty: give at least one token")
        ticket = Ticket(request)
        lora = request.lora if request.lora is None or isinstance(request.lora, LoRA) else request.lora()
        with self._changed:
            if self._is_draining or self._is_closed:
                raise EngineStopped
            if len(self._queue) >= self.config.max_queued:
                raise EngineBusy(len(self._queue), 1.0)
            self._queue.append((ticket, lora))
            self._changed.notify_all()
        return ticket

    def stats(self) -> EngineStats:
        with self._changed:
            return EngineStats(
                self.config.n_slots, len(self._queue), self._n_running, self._n_steps, self._n_steps,
                self._n_generated, self._n_prompt,
            )  # fmt: skip

    def drain(self, timeout_s: float) -> bool:
        with self._changed:
            self._is_draining = True
            return self._changed.wait_for(lambda: not self._queue and not self._n_running, timeout_s)

    def close(self) -> None:
        with self._changed:
            self._is_draining = self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_closed)
                if self._is_closed:
                    for ticket, _ in self._queue:
                        ticket.end(None, EngineStopped())
                    return
                ticket, lora = self._queue.popleft()
                self._n_running = 1
            try:
                ticket.end(self._answer(ticket, lora))
            except Exception as error:  # the engine goes on with the next request
                ticket.end(None, error)
            with self._changed:
                self._n_running = 0
                self._changed.notify_all()

    @torch.no_grad()
    def _answer(self, ticket: Ticket, lora: LoRA | None) -> Finish | None:
        request, base = ticket.request, self.base
        sampler = Sampler(base, request.sampling, request.prompt)
        text = AnswerText(base.tokenizer, request.stop, request.strips)
        ids, fresh, cache = list(request.prompt), list(request.prompt), None
        self._n_prompt += len(ids)
        finish: Finish | None = "length"
        for _ in range(request.sampling.max_new_tokens):
            if ticket.is_cancelled:
                return None
            if self._is_closed:
                raise EngineStopped
            with inject(base.model, lora):
                given = base.model(input_ids=torch.tensor([fresh], device=base.device), cache=cache, use_cache=True)
            cache, logits = given.cache, given.logits[0, -1]
            self._n_steps += 1
            time.sleep(0)  # others may take the base's lock
            chosen = sampler.choose(logits, ids)
            if chosen in base.end_ids:
                finish = "stop"
                break
            self._n_generated += 1
            ids.append(chosen)
            fresh = [chosen]
            piece, is_stopped = text.add(chosen)
            logprobs = () if request.n_logprobs is None else top_logprobs(logits, chosen, request.n_logprobs)
            ticket.put(Token(chosen, piece, *logprobs))
            if is_stopped:
                return "stop"
        if rest := text.rest():
            ticket.put(Token(None, rest))
        return finish
