"""The engine: continuous batching on a base in this process, with another LoRA for every row.

One thread runs the base for all requests. Each step is one forward pass that takes every running request one token
further and reads a piece of the prompts that came in meanwhile. A request joins the batch when a slot is
free and leaves it with its last token, so nobody waits for others' answers to end.

    generation.py    what is asked for, the tokens as they come, and text from tokens
    batch.py         the rows that run, a step of them, and the choice of each next token
    packed_lora.py   LoRAs without what they share with others, stacked for a batch, and their products
    attention.py     attention over rows of different lengths; keys and values of rows, and of prompts read before

transformers' own continuous batching is not used: it does not tell linear modules which token belongs to which request,
and it gathers the blocks of keys and values of all rows anew in every layer of every step.

LoRAs are read and packed by the thread that submits a request. The base's lock is held for a step, or for as long as
the engine had to wait for it, so that learning and decoding get half of the time each while both have work.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from dataclasses import replace
from typing import NamedTuple

from cachetools import LRUCache, cached

from loracast.base.load import Base
from loracast.errors import BaseModelError
from loracast.lora.inject import check_fits
from loracast.serving.batch import Batch, token_bytes, tokens_needed
from loracast.serving.generation import Engine, EngineConfig, EngineStats, EngineStopped, GenerationRequest, Ticket
from loracast.serving.packed_lora import PackedLoRA, SharedParts

_MAX_HOLD_S = 2.0
"""Longest time in which the engine keeps the base's lock."""
_BASE_ALONE = "base"
"""Key of the prefix cache for requests without a LoRA."""


class _Queued(NamedTuple):
    ticket: Ticket
    packed: PackedLoRA | None
    prefix_key: str | None


class LocalEngine(Engine):
    """An engine on a base in this process."""

    takes_copy_bias = True

    def __init__(self, base: Base, config: EngineConfig = EngineConfig()):
        """Raises BaseModelError for a base whose requests cannot be computed side by side."""
        super().__init__(base, config, base.window)
        self._batch = Batch(base, config)
        self._shared = SharedParts(base.device, base.model.dtype)
        # No LoRA at all is larger than any budget, so that it is not kept.
        self._adapters: LRUCache[str, PackedLoRA | None] = LRUCache(
            config.adapter_bytes, lambda packed: packed.n_bytes if packed else math.inf
        )
        kept = cached(self._adapters, key=lambda key, load: key, lock=threading.Lock())
        self._from_memory = kept(lambda key, load: load())
        self._queue: deque[_Queued] = deque()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="loracast-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> Ticket:
        self._check(request)
        with self._changed:
            self._refuse_if_full()
        packed = self._packed(request)
        prefix_key = _BASE_ALONE if packed is None else request.lora_key and f"lora {request.lora_key}"
        ticket = Ticket(request)
        ticket.n_lora_bytes = 0 if packed is None else packed.n_bytes
        with self._changed:
            self._refuse_if_full()
            self._queue.append(_Queued(ticket, packed, prefix_key))
            self._changed.notify_all()
        return ticket

    def _check(self, request: GenerationRequest) -> None:
        super()._check(request)
        if tokens_needed(request) * token_bytes(self.base) > self.config.kv_bytes:
            raise BaseModelError(
                f"{len(request.prompt)} tokens of prompt and {request.sampling.max_new_tokens} of answer do not fit "
                "into the engine's memory for keys and values; ask for a shorter answer, or raise EngineConfig.kv_bytes"
            )

    def _n_waiting(self) -> int:
        return sum(not queued.ticket.is_cancelled for queued in self._queue)

    def _is_idle(self) -> bool:
        return not self._queue and not self._batch.n_rows

    def _packed(self, request: GenerationRequest) -> PackedLoRA | None:
        """The LoRA of a request, from memory or read in this thread."""

        def load() -> PackedLoRA | None:
            if (lora := request.read_lora()) is None:
                return None
            check_fits(self.base.model, lora.shapes.items())
            return self._shared.pack(lora)

        if request.lora is None or request.lora_key is None:
            return load()
        return self._from_memory(request.lora_key, load)

    def stats(self) -> EngineStats:
        batch, prefixes = self._batch, self._batch.prefixes
        with self._changed:
            return replace(
                batch.counts, n_queued=self._n_waiting(), n_running=batch.n_rows, n_prefix_hits=prefixes.n_hits,
                n_prefix_misses=prefixes.n_misses, prefix_bytes=prefixes.n_bytes,
                n_adapters_in_memory=len(self._adapters), adapter_bytes=int(self._adapters.currsize),
            )  # fmt: skip

    def close(self) -> None:
        with self._changed:
            self._is_draining = self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    # ---- the engine's thread

    def _run(self) -> None:
        try:
            self._serve()
        finally:  # whoever waits gets the error, also where the engine itself fails
            with self._changed:
                self._is_draining = self._is_closed = True
                queued = [*self._queue]
                self._queue.clear()
            self._batch.fail(EngineStopped())
            for one in queued:
                one.ticket.end(None, EngineStopped())

    def _serve(self) -> None:
        batch = self._batch
        while True:
            with self._changed:
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue or batch.n_rows or self._is_closed)
                if self._is_closed:
                    return
            asked = time.perf_counter()
            with self.base.lock:
                got = time.perf_counter()
                until = got + min(got - asked, _MAX_HOLD_S)
                while not self._is_closed and self._step() and time.perf_counter() < until:
                    pass

    def _step(self) -> bool:
        """Let requests in and go one step; whether there was anything to do."""
        batch = self._batch
        try:
            batch.drop_cancelled()
            self._admit()
            if not batch.n_rows:
                return False
            running = [row.ticket for row in batch.rows]
            batch.step()
            for ticket in running:
                if ticket.has_ended:
                    self._count_time(ticket)
        except Exception as error:  # whoever runs gets the error, and the engine goes on with the next requests
            batch.fail(error)
        return True

    def _admit(self) -> None:
        """Start waiting requests, first come, first served, and forget those that nobody waits for."""
        batch, waits = self._batch, deque[_Queued]()
        with self._changed:
            queue = deque(queued for queued in self._queue if not queued.ticket.is_cancelled)
            while queue:
                ticket, _, prefix_key = queue[0]
                if batch.is_reading(ticket.request, prefix_key):
                    waits.append(queue.popleft())  # for the keys and values of the same prompt
                elif batch.has_room(ticket.request):
                    try:
                        batch.add(*queue.popleft())
                    except Exception as error:
                        ticket.end(None, error)
                else:
                    break
            self._queue = waits + queue
