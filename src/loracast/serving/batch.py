"""The rows that an engine runs at the same time, the forward pass of one step, and the choice of each next token.

A step is one pass over a flat batch: the last token of every row that is decoded, and pieces of the prompts of rows
that came in since, so that a long prompt holds nobody up for longer than a piece takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from loracast.base.generate import Sampling
from loracast.base.load import Base
from loracast.errors import AdapterError, BaseModelError
from loracast.lora.target import layer_shapes
from loracast.serving.attention import OwnCache, PrefixCache, RowBatch, Run, SlotCache, row_attention
from loracast.serving.generation import AnswerText, EngineConfig, Finish, GenerationRequest, Ticket, Token
from loracast.serving.packed_lora import LoRABatcher, PackedLoRA, Place


class Sampler:
    """The rules of one request, applied in the order of transformers' `generate`."""

    def __init__(self, base: Base, sampling: Sampling, prompt: Sequence[int]):
        from transformers import (
            LogitsProcessorList,
            MinNewTokensLengthLogitsProcessor,
            NoRepeatNGramLogitsProcessor,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        defaults, device = base.model.generation_config, str(base.device)
        penalty = _first(sampling.repetition_penalty, defaults.repetition_penalty, 1.0)
        n_gram = int(_first(sampling.no_repeat_ngram_size, defaults.no_repeat_ngram_size, 0))
        rules = LogitsProcessorList()
        if penalty != 1.0:
            rules.append(RepetitionPenaltyLogitsProcessor(penalty))
        if n_gram:
            rules.append(NoRepeatNGramLogitsProcessor(n_gram))
        if sampling.min_new_tokens:
            ends = list(base.end_ids)
            rules.append(MinNewTokensLengthLogitsProcessor(len(prompt), sampling.min_new_tokens, ends, device))
        drawing = LogitsProcessorList()
        self._generator: torch.Generator | None = None
        if not sampling.is_greedy:
            if sampling.temperature != 1:
                drawing.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k:
                drawing.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                drawing.append(TopPLogitsWarper(sampling.top_p))
            self._generator = torch.Generator(device)
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)
        self._rules, self._drawing = rules, drawing
        self.takes_likeliest = not rules and self._generator is None
        """Whether the token is that of the highest logit: no rule changes the logits, and nothing is drawn."""

    def choose(self, logits: Tensor, ids: Sequence[int], bonus: Tensor | None = None) -> int:
        """The next token from logits [vocabulary], after the token ids of the prompt and of the answer so far.

        Args:
            bonus: what is added to the logits of the likeliest answers [vocabulary] (base/copying.py).
        """
        so_far = torch.tensor([ids], device=logits.device) if self._rules or self._drawing else None
        if self._rules:
            logits = self._rules(so_far, logits[None].float().clone())[0]  # type: ignore[arg-type]
        if bonus is not None:
            logits = logits + bonus.to(logits)
        if self._drawing:
            logits = self._drawing(so_far, logits[None].float().clone())[0]  # type: ignore[arg-type]
        if self._generator is None:
            return int(logits.argmax())
        return int(torch.multinomial(logits.float().softmax(-1), 1, generator=self._generator))


def _first(*values: float | int | None) -> float | int:
    return next(value for value in values if value is not None)


def top_logprobs(logits: Tensor, chosen: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The logprob of the chosen token and the n likeliest tokens with theirs, from logits [vocabulary]."""
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(min(n, len(logprobs)))
    return logprobs[chosen].item(), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


class _Row:
    """One request that runs."""

    def __init__(self, base: Base, ticket: Ticket, place: Place | None, prefix_key: str | None):
        request = ticket.request
        self.ticket, self.place, self.prefix_key = ticket, place, prefix_key
        self.ids = list(request.prompt)
        self.n_done = 0
        """Tokens whose keys and values are stored."""
        self.cache: OwnCache | None = None
        """None for a row in a slot."""
        self.sampler = Sampler(base, request.sampling, request.prompt)
        self.text = AnswerText(base.tokenizer, request.stop, request.strips)
        self.ends = base.end_ids

    def bonus(self, logits: Tensor) -> Tensor | None:
        """What is added to the logits of the next token [vocabulary] for what the answer may copy."""
        copying, n_prompt = self.ticket.request.copying, self.ticket.n_prompt_tokens
        return None if copying is None else copying.bonus(self.ids[n_prompt:], logits)

    def take(self, chosen: int, logits: Tensor) -> bool:
        """Hand over the next token; whether the answer is complete."""
        request, ticket = self.ticket.request, self.ticket
        logprobs = () if request.n_logprobs is None else top_logprobs(logits, chosen, request.n_logprobs)
        if chosen in self.ends:
            return self._end("stop", *logprobs[:1])
        self.ids.append(chosen)
        piece, is_stopped = self.text.add(chosen)
        ticket.put(Token(chosen, piece, *logprobs))
        if is_stopped:
            ticket.end("stop")
            return True
        return ticket.n_tokens >= request.sampling.max_new_tokens and self._end("length")

    def _end(self, finish: Finish, logprob: float | None = None) -> bool:
        if rest := self.text.rest():
            self.ticket.put(Token(None, rest))
        self.ticket.end(finish, logprob=logprob)
        return True


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

    def __init__(self, base: Base, config: EngineConfig):
        _check_base(base)
        self.base, self.config = base, config
        self.n_steps = self.n_decoded_rows = self.n_generated = self.n_prompt = self.n_cached = self.n_reserved = 0
        self.prefixes = PrefixCache(config.prefix_bytes)
        self._max_tokens = config.kv_bytes // token_bytes(base)
        self._loras = LoRABatcher(base.model, config.n_slots)
        self._slots = SlotCache(config.n_slots, config.slot_tokens)
        self._n_layers = base.model.config.get_text_config().num_hidden_layers
        self._in_slots: list[_Row] = []  # in the order of their slots
        self._long: list[_Row] = []  # with caches of their own
        self._reading: list[_Row] = []  # whose prompt is not read to its end

    @property
    def rows(self) -> list[_Row]:
        return [*self._in_slots, *self._long, *self._reading]

    @property
    def n_rows(self) -> int:
        return len(self._in_slots) + len(self._long) + len(self._reading)

    def has_room(self, request: GenerationRequest) -> bool:
        """Whether a request can start now."""
        return self.n_rows < self.config.n_slots and self.n_reserved + tokens_needed(request) <= self._max_tokens

    def is_reading(self, request: GenerationRequest, prefix_key: str | None) -> bool:
        """Whether the same prompt is being read, so that it is worth waiting for its keys and values."""
        return prefix_key is not None and any(
            row.prefix_key == prefix_key and list(row.ticket.request.prompt) == list(request.prompt)
            for row in self._reading
        )

    def add(self, ticket: Ticket, packed: PackedLoRA | None, prefix_key: str | None) -> None:
        """Start a request.

        Args:
            prefix_key: names the LoRA in the prefix cache; None keeps the request out of it.
        """
        request = ticket.request
        row = _Row(self.base, ticket, None, prefix_key)
        row.place = None if packed is None else self._loras.add(packed)
        needed = tokens_needed(request)
        is_long = needed > self.config.slot_tokens
        row.cache = OwnCache(self._n_layers, needed if is_long else len(request.prompt))
        if prefix_key is not None:
            row.n_done, held = self.prefixes.find(prefix_key, row.ids, len(row.ids) - 1)
            if held is not None:
                row.cache = held.copy(row.n_done, row.cache.capacity)
        ticket.n_cached_tokens = row.n_done
        self.n_cached += row.n_done
        self.n_prompt += len(row.ids)
        self.n_reserved += needed
        self._reading.append(row)

    def fail(self, error: BaseException) -> None:
        """End all rows with an error."""
        for row in self.rows:
            self._remove(row)
            row.ticket.end(None, error)

    def drop_cancelled(self) -> None:
        """Free the slots of requests that nobody waits for."""
        for row in [row for row in self.rows if row.ticket.is_cancelled]:
            self._remove(row)
            row.ticket.end(None)

    @torch.no_grad()
    def step(self) -> None:
        """Take every row one token further, and read pieces of prompts."""
        decoded = [*self._in_slots, *self._long]
        n_slots = len(self._in_slots)
        runs = [self._run(row, n_slots + i, 1) for i, row in enumerate(self._long)]
        left = self.config.prefill_tokens if decoded else self.config.prefill_tokens_alone
        first, read = len(decoded), []
        for row in self._reading:
            n_tokens = min(left, len(row.ids) - row.n_done)
            if not n_tokens:
                break
            runs.append(self._run(row, first, n_tokens))
            read.append((row, n_tokens))
            first, left = first + n_tokens, left - n_tokens
        spans = [(row, 1) for row in decoded] + read
        ids = [id_ for row, n in spans for id_ in row.ids[row.n_done : row.n_done + n]]
        positions = [i for row, n in spans for i in range(row.n_done, row.n_done + n)]
        lasts, asking = [], []
        at = 0
        for row, n in spans:
            at += n
            if row.n_done + n == len(row.ids):
                lasts.append(at - 1)
                asking.append(row)
        batch = RowBatch(self._slots, [row.n_done for row in self._in_slots], runs)
        places = [row.place for row in decoded]
        of_runs = [(run.tokens, row.place) for run, (row, _) in zip(runs[len(self._long) :], read, strict=True)]
        device = self.base.device
        with row_attention(self.base.model), self._loras.applied(places, of_runs):
            given = self.base.model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(lasts, dtype=torch.long, device=device),
                rows=batch,
            )
        self.n_steps += 1
        self.n_decoded_rows += len(asking)
        for row, n in spans:
            row.n_done += n
        self._choose(asking, given.logits[0])

    @staticmethod
    def _run(row: _Row, first: int, n_tokens: int) -> Run:
        assert row.cache is not None
        return Run(first, n_tokens, row.n_done, row.cache)

    def _choose(self, rows: Sequence[_Row], logits: Tensor) -> None:
        """Choose the next token of each row from logits [rows, vocabulary], and let go of the rows that are done."""
        highest = logits.max(-1)
        likeliest, is_finite = highest.indices.tolist(), highest.values.isfinite().tolist()
        read = [row for row in rows if row in self._reading]
        done, failed = [], []
        for i, row in enumerate(rows):
            try:
                if not is_finite[i]:
                    raise AdapterError("the base's logits are not finite with this LoRA: lower its strength")
                bonus = row.bonus(logits[i])
                of_row = logits[i] if bonus is None else logits[i] + bonus.to(logits)
                is_known = bonus is None and row.sampler.takes_likeliest
                chosen = likeliest[i] if is_known else row.sampler.choose(logits[i], row.ids, bonus)
                before = row.ticket.n_tokens
                if row.take(chosen, of_row):
                    done.append(row)
                self.n_generated += row.ticket.n_tokens - before
            except Exception as error:  # the other rows go on
                row.ticket.end(None, error)
                failed.append(row)
        for row in read:
            if row not in failed:
                self._read_to_end(row)
        for row in done:
            self._remove(row, keep=True)
        for row in failed:
            self._remove(row)

    def _read_to_end(self, row: _Row) -> None:
        """Move a row whose prompt was read to those that are decoded, and keep the prompt's keys and values."""
        self._reading.remove(row)
        assert row.cache is not None
        cache, n_prompt = row.cache, row.ticket.n_prompt_tokens
        if tokens_needed(row.ticket.request) > self.config.slot_tokens:
            self._long.append(row)
            if row.prefix_key is not None and n_prompt * token_bytes(self.base) <= self.prefixes.max_bytes:
                self.prefixes.put(row.prefix_key, row.ids[:n_prompt], cache.copy(n_prompt, n_prompt))
            return
        self._slots.adopt(len(self._in_slots), cache, n_prompt)
        self._in_slots.append(row)
        row.cache = None
        if row.prefix_key is not None:
            self.prefixes.put(row.prefix_key, row.ids[:n_prompt], cache)

    def _remove(self, row: _Row, keep: bool = False) -> None:
        """Let go of a row; its keys and values stay for prompts that go on from its answer if they are to be kept."""
        self.n_reserved -= tokens_needed(row.ticket.request)
        if row.place is not None:
            self._loras.remove(row.place)
        keep = keep and row.prefix_key is not None
        if row in self._in_slots:
            slot = self._in_slots.index(row)
            if keep:
                self._keep(row, self._slots.copy(slot, row.n_done))
            last = self._in_slots.pop()
            self._slots.free(slot, row.n_done)
            if last is not row:
                self._slots.move(len(self._in_slots), slot, last.n_done)
                self._in_slots[slot] = last
        else:
            rows = self._long if row in self._long else self._reading
            if keep and row.cache is not None and row.n_done * token_bytes(self.base) <= self.prefixes.max_bytes:
                self._keep(row, row.cache.copy(row.n_done, row.n_done))
            rows.remove(row)
        row.cache = None

    def _keep(self, row: _Row, cache: OwnCache) -> None:
        assert row.prefix_key is not None
        self.prefixes.put(row.prefix_key, row.ids[: row.n_done], cache)


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
