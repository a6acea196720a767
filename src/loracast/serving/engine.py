"""The engine: continuous batching on a base in this process, with another LoRA for every row.

A step is one pass over a flat batch: the last token of every row that is decoded, and pieces of the prompts of rows
that came in since, so that a long prompt holds nobody up for longer than a piece takes.

One thread runs the base for all requests. Each step is one forward pass that takes every running request one token
further and reads a piece of the prompts that came in meanwhile. A request joins the batch when a slot is
free and leaves it with its last token, so nobody waits for others' answers to end.

    generation.py    what is asked for, the tokens as they come, and text from tokens
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
from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from cachetools import LRUCache, cached
from torch import Tensor

from loracast.base.generate import Sampling
from loracast.base.load import Base
from loracast.errors import AdapterError, BaseModelError
from loracast.lora.inject import check_fits
from loracast.lora.target import layer_shapes
from loracast.serving.attention import OwnCache, PrefixCache, RowBatch, Run, SlotCache, row_attention
from loracast.serving.generation import (
    AnswerWriter,
    Engine,
    EngineConfig,
    EngineStats,
    EngineStopped,
    GenerationRequest,
    Ticket,
)
from loracast.serving.packed_lora import LoRABatcher, PackedLoRA, Place, SharedParts

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
        super().__init__(base, config, min(base.window, config.kv_bytes // token_bytes(base)))
        self._batch = Batch(base, config, self.counts)
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

    def _n_waiting(self) -> int:
        return sum(not queued.ticket.has_ended for queued in self._queue)

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

    def _sizes(self) -> dict[str, int]:
        prefixes, adapters = self._batch.prefixes, self._adapters
        return {
            "n_queued": self._n_waiting(), "n_running": self._batch.n_rows, "n_prefix_hits": prefixes.n_hits,
            "n_prefix_misses": prefixes.n_misses, "prefix_bytes": prefixes.n_bytes,
            "n_adapters_in_memory": len(adapters), "adapter_bytes": int(adapters.currsize),
        }  # fmt: skip

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
            queue = deque(queued for queued in self._queue if not queued.ticket.has_ended)
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


class Sampler:
    """Chooses the tokens of one request by the rules that transformers' `generate` would apply."""

    def __init__(self, base: Base, sampling: Sampling, n_prompt: int):
        from transformers import LogitsProcessorList

        model = base.model
        config, _ = model._prepare_generation_config(None, min_new_tokens=sampling.min_new_tokens, **sampling.options)
        config._eos_token_tensor = torch.tensor(list(base.end_ids), device=base.device)
        self._bias: Tensor | None = None
        self._rules = model._get_logits_processor(
            config, n_prompt, logits_processor=LogitsProcessorList([self._add_bias]), device=str(base.device)
        )
        self._generator: torch.Generator | None = None
        if not sampling.is_greedy:
            self._generator = torch.Generator(base.device)
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)
        self.takes_likeliest = len(self._rules) == 1 and self._generator is None
        """Whether the token is that of the highest logit: no rule changes the logits, and nothing is drawn."""

    def _add_bias(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores if self._bias is None else scores + self._bias.to(scores)

    def choose(self, logits: Tensor, ids: Sequence[int], bias: Tensor | None = None) -> int:
        """The next token from logits [vocabulary], after the token ids of the prompt and of the answer so far.

        Args:
            bias: what is added to the logits of the likeliest answers [vocabulary] (base/copying.py).
        """
        self._bias = bias
        scores = self._rules(torch.tensor([ids], device=logits.device), logits[None].float().clone())[0]
        if self._generator is None:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


def top_logprobs(logits: Tensor, chosen: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The logprob of the chosen token and the n likeliest tokens with theirs, from logits [vocabulary]."""
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(min(n, len(logprobs)))
    return logprobs[chosen].item(), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


class _Row:
    """One request that runs."""

    def __init__(self, base: Base, ticket: Ticket, place: Place | None, prefix_key: str | None, cache: OwnCache):
        request = ticket.request
        self.ticket, self.place, self.prefix_key = ticket, place, prefix_key
        self.ids = list(request.prompt)
        self.n_done = 0
        """Tokens whose keys and values are stored."""
        self.cache: OwnCache | None = cache
        """None for a row in a slot."""
        self.sampler = Sampler(base, request.sampling, len(request.prompt))
        self.writer = AnswerWriter(base.tokenizer, ticket)
        self.ends = base.end_ids

    @property
    def is_read(self) -> bool:
        """Whether the prompt has been read to its end."""
        return self.n_done >= self.ticket.n_prompt_tokens

    def take(self, chosen: int, logits: Tensor) -> bool:
        """Hand over the next token; whether the answer is complete."""
        request, ticket = self.ticket.request, self.ticket
        if chosen in self.ends:
            self.writer.end("stop")
            return True
        self.ids.append(chosen)
        logprobs = () if request.n_logprobs is None else top_logprobs(logits, chosen, request.n_logprobs)
        if self.writer.put(chosen, *logprobs):
            return True
        if is_long := ticket.n_tokens >= request.sampling.max_new_tokens:
            self.writer.end("length")
        return is_long


def tokens_needed(request: GenerationRequest) -> int:
    """Tokens of a request whose keys and values are kept at most."""
    return len(request.prompt) + request.sampling.max_new_tokens


def token_bytes(base: Base) -> int:
    """Bytes of one token's keys and values in all layers."""
    config, shapes = base.model.config, layer_shapes(base.model.config)
    size = shapes["k_proj"][1] + shapes["v_proj"][1]
    return size * config.get_text_config().num_hidden_layers * base.model.dtype.itemsize


class Batch:
    """The running rows. For one thread, which holds the base's lock during `step`."""

    def __init__(self, base: Base, config: EngineConfig, counts: EngineStats):
        _check_base(base)
        self.base, self.config, self.counts = base, config, counts
        self.n_reserved = 0
        self.prefixes = PrefixCache(config.prefix_bytes)
        self._max_tokens = config.kv_bytes // token_bytes(base)
        self._loras = LoRABatcher(base.model, config.n_slots)
        self._slots = SlotCache(config.n_slots, config.slot_tokens)
        self._n_layers = base.model.config.get_text_config().num_hidden_layers
        self._in_slots: list[_Row] = []  # in the order of their slots
        self._own: list[_Row] = []  # with caches of their own: prompts that are being read, and long requests

    @property
    def rows(self) -> list[_Row]:
        return [*self._in_slots, *self._own]

    @property
    def n_rows(self) -> int:
        return len(self._in_slots) + len(self._own)

    def has_room(self, request: GenerationRequest) -> bool:
        """Whether a request can start now."""
        return self.n_rows < self.config.n_slots and self.n_reserved + tokens_needed(request) <= self._max_tokens

    def is_reading(self, request: GenerationRequest, prefix_key: str | None) -> bool:
        """Whether the same prompt is being read, so that it is worth waiting for its keys and values."""
        prompt = list(request.prompt)
        return prefix_key is not None and any(
            row.prefix_key == prefix_key and not row.is_read and row.ids == prompt for row in self._own
        )

    def add(self, ticket: Ticket, packed: PackedLoRA | None, prefix_key: str | None) -> None:
        """Start a request.

        Args:
            prefix_key: names the LoRA in the prefix cache; None keeps the request out of it.
        """
        needed = tokens_needed(ticket.request)
        prompt = ticket.request.prompt
        cache = OwnCache(self._n_layers, needed if needed > self.config.slot_tokens else len(prompt))
        n_cached, held = 0, None
        if prefix_key is not None:
            n_cached, held = self.prefixes.find(prefix_key, prompt, len(prompt) - 1)
        if held is not None:
            cache = held.copy(n_cached, cache.capacity)
        row = _Row(self.base, ticket, None, prefix_key, cache)
        row.place = None if packed is None else self._loras.add(packed)
        row.n_done = ticket.n_cached_tokens = n_cached
        self.counts.n_cached_tokens += n_cached
        self.counts.n_prompt_tokens += len(prompt)
        self.n_reserved += needed
        self._own.append(row)

    def fail(self, error: BaseException) -> None:
        """End all rows with an error."""
        for row in self.rows:
            self._remove(row)
            row.ticket.end(None, error)

    def drop_cancelled(self) -> None:
        """Free the slots of requests that nobody waits for."""
        for row in [row for row in self.rows if row.ticket.has_ended]:
            self._remove(row)

    @torch.no_grad()
    def step(self) -> None:
        """Take every row one token further, and read pieces of prompts."""
        decoded = [*self._in_slots, *(row for row in self._own if row.is_read)]
        spans = [(row, 1) for row in decoded]
        left = self.config.prefill_tokens if decoded else self.config.prefill_tokens_alone
        for row in self._own:
            if not row.is_read and (n := min(left, len(row.ids) - row.n_done)):
                spans.append((row, n))
                left -= n
        ids, positions, lasts, asking = list[int](), list[int](), list[int](), list[_Row]()
        runs, of_runs = list[Run](), list[tuple[slice, Place | None]]()
        for row, n in spans:
            if row.cache is not None:
                runs.append(Run(len(ids), n, row.n_done, row.cache))
                if len(ids) >= len(decoded):
                    of_runs.append((runs[-1].tokens, row.place))
            ids += row.ids[row.n_done : row.n_done + n]
            positions += range(row.n_done, row.n_done + n)
            if row.n_done + n == len(row.ids):
                lasts.append(len(ids) - 1)
                asking.append(row)
        batch = RowBatch(self._slots, [row.n_done for row in self._in_slots], runs)
        device = self.base.device
        with row_attention(self.base.model), self._loras.applied([row.place for row in decoded], of_runs):
            given = self.base.model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(lasts, dtype=torch.long, device=device),
                rows=batch,
            )
        self.counts.n_steps += 1
        self.counts.n_decoded_rows += len(asking)
        for row, n in spans:
            row.n_done += n
        self._choose(asking, given.logits[0])

    def _choose(self, rows: Sequence[_Row], logits: Tensor) -> None:
        """Choose the next token of each row from logits [rows, vocabulary], and let go of the rows that are done."""
        highest = logits.max(-1)
        likeliest, is_finite = highest.indices.tolist(), highest.values.isfinite().tolist()
        done, failed = list[_Row](), list[_Row]()
        for i, row in enumerate(rows):
            request, n_prompt = row.ticket.request, row.ticket.n_prompt_tokens
            try:
                if not is_finite[i]:
                    raise AdapterError("the base's logits are not finite with this LoRA: lower its strength")
                bias = None if request.copy_bias is None else request.copy_bias.bias(row.ids[n_prompt:], logits[i])
                of_row = logits[i] if bias is None else logits[i] + bias.to(logits)
                is_known = bias is None and row.sampler.takes_likeliest
                chosen = likeliest[i] if is_known else row.sampler.choose(logits[i], row.ids, bias)
                n_before = row.ticket.n_tokens
                if row.take(chosen, of_row):
                    done.append(row)
                self.counts.n_generated_tokens += row.ticket.n_tokens - n_before
            except Exception as error:  # the other rows go on
                row.ticket.end(None, error)
                failed.append(row)
        for row in rows:
            if row.n_done == row.ticket.n_prompt_tokens and row not in failed:
                self._read_to_end(row)
        for row in done:
            self._remove(row, keep=True)
        for row in failed:
            self._remove(row)

    def _read_to_end(self, row: _Row) -> None:
        """Move a row whose prompt was read into a slot, unless it is long, and keep the prompt's keys and values."""
        assert row.cache is not None
        cache, n_prompt = row.cache, row.ticket.n_prompt_tokens
        if tokens_needed(row.ticket.request) > self.config.slot_tokens:
            self._keep(row, n_prompt, lambda: cache.copy(n_prompt))
            return
        self._slots.adopt(len(self._in_slots), cache, n_prompt)
        self._in_slots.append(row)
        self._own.remove(row)
        row.cache = None
        self._keep(row, n_prompt, lambda: cache)

    def _remove(self, row: _Row, keep: bool = False) -> None:
        """Let go of a row; its keys and values stay for prompts that go on from its answer if they are to be kept."""
        self.n_reserved -= tokens_needed(row.ticket.request)
        if row.place is not None:
            self._loras.remove(row.place)
        if (cache := row.cache) is not None:
            if keep:
                self._keep(row, row.n_done, lambda: cache.copy(row.n_done))
            self._own.remove(row)
            row.cache = None
            return
        slot = self._in_slots.index(row)
        if keep:
            self._keep(row, row.n_done, lambda: self._slots.row(slot).copy(row.n_done))
        last = self._in_slots.pop()
        self._slots.free(slot, row.n_done)
        if last is not row:
            self._slots.move(len(self._in_slots), slot, last.n_done)
            self._in_slots[slot] = last

    def _keep(self, row: _Row, n_tokens: int, copy: Callable[[], OwnCache]) -> None:
        """Keep the keys and values of a row's first tokens for other prompts, unless they are too many."""
        if row.prefix_key is not None and n_tokens * token_bytes(self.base) <= self.prefixes.max_bytes:
            self.prefixes.put(row.prefix_key, row.ids[:n_tokens], copy())


def _check_base(base: Base) -> None:
    """Raise BaseModelError for a base whose rows cannot be computed side by side."""
    places = getattr(base.model, "hf_device_map", None) or {}
    if len(set(places.values())) > 1:
        raise BaseModelError("the engine runs a base on one device: load it with device and not with device_map")
    types = (getattr(module, "rope_type", None) for module in base.model.modules())
    kinds = set(chain.from_iterable(t.values() if isinstance(t, dict) else [t] for t in types))
    if bad := kinds & {"dynamic", "longrope"}:
        raise BaseModelError(
            f"this base's position encoding ({', '.join(sorted(bad))}) depends on the length of the whole batch, so "
            "requests would change each other's answers: serve another base"
        )
