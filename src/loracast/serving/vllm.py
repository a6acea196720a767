"""An engine that lets a vLLM server generate; methods as in `Engine` (engine.py).

    vllm_adapters.py   LoRAs as folders that the server loads, and unloads when others need their place
    vllm_server.py     connects to a running server, or starts one
    vllm_replicas.py   several servers

Prompts go there as token ids and answers come back as token ids, so that text, stop strings and probabilities are those
of the local engine. What the server refuses or fails to do is an error: the plain base never answers for an adapter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from queue import SimpleQueue
from typing import Any, NamedTuple

from loracast.base.load import Base
from loracast.errors import BaseModelError, ConfigError
from loracast.lora.algebra import LoRA
from loracast.serving.answer_text import AnswerText
from loracast.serving.client import Refused
from loracast.serving.engine_config import EngineConfig, EngineStats
from loracast.serving.request import EngineBusy, EngineFailed, EngineStopped, Finish, GenerationRequest, Token
from loracast.serving.ticket import Ticket
from loracast.serving.vllm_adapters import LoadedLoRA, LoadedLoRAs
from loracast.serving.vllm_client import VllmClient, as_loracast_error

_NOT_FOUND = 404


class VllmTicket(Ticket):
    """A ticket that ends as soon as it is cancelled: the server may be silent for long."""

    n_failed = 0
    """Servers that failed before the first token came."""

    def cancel(self) -> None:
        super().cancel()
        self.end(None)

    def end(self, finish: Finish | None, error: BaseException | None = None, logprob: float | None = None) -> None:
        if self.total_s is None:
            super().end(finish, error, logprob)


class _Queued(NamedTuple):
    ticket: VllmTicket
    lora: LoadedLoRA | None


class VllmEngine:
    """An engine whose tokens come from a vLLM server; methods as in `Engine`."""

    def __init__(
        self,
        base: Base,
        client: VllmClient,
        loras: LoadedLoRAs,
        config: EngineConfig = EngineConfig(),
        on_close: Callable[[], object] = lambda: None,
    ):
        """
        Args:
            on_close: called when the engine is closed: ends what was started for it.
        """
        self.base, self.config = base, config
        self.url = client.url
        self.hand_over: Callable[[VllmTicket], bool] = lambda ticket: False
        """Gives a request that the server failed before its first token to another engine; whether there is one."""
        self._client, self._loras, self._on_close = client, loras, on_close
        self._queue: SimpleQueue[_Queued] = SimpleQueue()
        self._changed = threading.Condition()
        self._live: set[VllmTicket] = set()
        self._n_running = self._n_prompt = self._n_generated = self._n_cached = self._n_hits = self._n_misses = 0
        self._is_draining = False
        self._mean_s = 1.0  # of a request from its start to its end
        for i in range(config.n_slots):  # each waits for the tokens of one request
            threading.Thread(target=self._work, name=f"loracast-vllm-{i}", daemon=True).start()

    def submit(self, request: GenerationRequest) -> Ticket:
        ticket = VllmTicket(request)
        self.enter(ticket)
        return ticket

    def enter(self, ticket: VllmTicket) -> None:
        """Queue the request of a ticket that has no tokens yet; raises what `submit` raises."""
        request = ticket.request
        self._check(request)
        with self._changed:
            self._refuse_if_full()
        lora = None if request.lora is None else self._loras.take(request.lora_key, lambda: _read(request))
        ticket.n_lora_bytes = 0 if lora is None else lora.n_bytes
        try:
            with self._changed:
                self._refuse_if_full()
                self._live.add(ticket)
        except BaseException:
            self._give_back(lora)
            raise
        self._queue.put(_Queued(ticket, lora))

    def _check(self, request: GenerationRequest) -> None:
        n_prompt, n_new = len(request.prompt), request.sampling.max_new_tokens
        if not n_prompt or n_new < 1:
            raise ConfigError("a request needs a prompt of at least one token, and room for one new token")
        if n_prompt + n_new > (window := min(self.base.window, self._client.window)):
            raise BaseModelError(
                f"the prompt has {n_prompt} tokens and the window of the vLLM server holds {window}; learn the long "
                "text as a document, or ask for a shorter answer"
            )

    def _refuse_if_full(self) -> None:
        if self._is_draining:
            raise EngineStopped
        if (n := len(self._live) - self.config.n_slots) >= self.config.max_queued:
            raise EngineBusy(n, max(1.0, self._mean_s * n / self.config.n_slots))

    def stats(self) -> EngineStats:
        """What is known here; the server's own /metrics tells of its forward passes and caches."""
        with self._changed:
            return EngineStats(
                n_slots=self.config.n_slots,
                n_queued=len(self._live) - self._n_running,
                n_running=self._n_running,
                n_steps=0,
                n_decoded_rows=0,
                n_generated_tokens=self._n_generated,
                n_prompt_tokens=self._n_prompt,
                n_cached_tokens=self._n_cached,
                n_prefix_hits=self._n_hits,
                n_prefix_misses=self._n_misses,
                prefix_bytes=0,
                n_adapters_in_memory=len(self._loras),
                adapter_bytes=self._loras.n_bytes,
            )

    def drain(self, timeout_s: float) -> bool:
        with self._changed:
            self._is_draining = True
            return self._changed.wait_for(lambda: not self._live, timeout_s)

    def close(self) -> None:
        with self._changed:
            self._is_draining = True
            live = [*self._live]
        for ticket in live:
            ticket.end(None, EngineStopped())
        self._loras.close()
        self._on_close()

    # ---- the threads that wait for tokens

    def _work(self) -> None:
        while True:
            ticket, lora = self._queue.get()
            with self._changed:
                self._n_running += 1
            try:
                if ticket.total_s is None:
                    self._generate(ticket, lora)
            except Exception as error:  # whoever waits gets the error, and the thread goes on with the next request
                can_go_on = isinstance(error, EngineFailed) and not ticket.n_tokens and ticket.total_s is None
                if not (can_go_on and self.hand_over(ticket)):
                    ticket.end(None, error)
            finally:
                self._give_back(lora)
                with self._changed:
                    self._n_running -= 1
                    self._live.discard(ticket)
                    self._mean_s += 0.1 * ((ticket.total_s or 0.0) - self._mean_s)
                    self._changed.notify_all()

    def _give_back(self, lora: LoadedLoRA | None) -> None:
        if lora is not None:
            self._loras.give_back(lora)

    def _generate(self, ticket: VllmTicket, lora: LoadedLoRA | None) -> None:
        request = ticket.request
        text = AnswerText(self.base.tokenizer, request.stop, request.strips)
        finish: Finish | None = None
        end_logprob: float | None = None
        events = self._events(request, lora)
        for event in events:
            if ticket.is_cancelled or ticket.total_s is not None:  # closing the connection ends it there too
                events.close()
                return
            self._count_prompt(ticket, event.get("usage"))
            for choice in event["choices"]:
                for token, logprob, top in _tokens(choice, request.n_logprobs):
                    if token in self.base.end_ids:
                        finish, end_logprob = "stop", logprob
                        break
                    piece, is_stopped = text.add(token)
                    ticket.put(Token(token, piece, logprob, top))
                    with self._changed:
                        self._n_generated += 1
                    if is_stopped:
                        ticket.end("stop")
                        events.close()
                        return
                reason = choice.get("finish_reason")
                if reason in ("stop", "length"):
                    finish = finish or reason
                elif reason is not None:
                    raise EngineFailed(f"the vLLM server ended an answer: {reason}")
        if finish is None:
            raise EngineFailed(f"the vLLM server at {self._client.url} ended an answer before it was complete")
        if rest := text.rest():
            ticket.put(Token(None, rest))
        ticket.end(finish, logprob=end_logprob)

    def _events(self, request: GenerationRequest, lora: LoadedLoRA | None) -> Generator[dict[str, Any], None, None]:
        """The events of an answer. A server that has been started anew gets the LoRA once more."""
        body = {**self._body(request), "model": self._client.base if lora is None else lora.name}
        try:
            yield from self._client.completion(body)
        except Refused as error:
            if lora is None or error.status != _NOT_FOUND:
                raise as_loracast_error(error) from error
            self._loras.load_again(lora)
            try:
                yield from self._client.completion(body)
            except Refused as again:
                raise as_loracast_error(again) from again

    def _body(self, request: GenerationRequest) -> dict[str, Any]:
        sampling, defaults = request.sampling, self.base.model.generation_config
        penalty, n_gram = sampling.repetition_penalty, sampling.no_repeat_ngram_size
        if defaults.no_repeat_ngram_size if n_gram is None else n_gram:
            raise ConfigError("vLLM has no rule against repeated sequences (no_repeat_ngram_size): use --engine local")
        return {
            "prompt": list(request.prompt),
            "max_tokens": sampling.max_new_tokens,
            "min_tokens": sampling.min_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": sampling.seed,
            "repetition_penalty": (defaults.repetition_penalty if penalty is None else penalty) or 1.0,
            "stop_token_ids": sorted(self.base.end_ids),
            "logprobs": request.n_logprobs,
        }

    def _count_prompt(self, ticket: VllmTicket, usage: dict[str, Any] | None) -> None:
        """Note what the server says of the prompt, in an answer's last event."""
        if usage is None:
            return
        ticket.n_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        with self._changed:
            self._n_prompt += ticket.n_prompt_tokens
            self._n_cached += ticket.n_cached_tokens
            self._n_hits += bool(ticket.n_cached_tokens)
            self._n_misses += not ticket.n_cached_tokens


def _read(request: GenerationRequest) -> LoRA | None:
    lora = request.lora if request.lora is None or isinstance(request.lora, LoRA) else request.lora()
    return lora if lora is not None and lora.names else None


def _tokens(
    choice: dict[str, Any], n_logprobs: int | None
) -> Iterator[tuple[int, float | None, tuple[tuple[int, float], ...]]]:
    """The token ids of an event, each with its logprob and the likeliest tokens."""
    ids, logprobs = choice["token_ids"] or [], choice.get("logprobs")
    for i, token in enumerate(ids):
        if n_logprobs is None or logprobs is None:
            yield token, None, ()
            continue
        places = ((int(name.removeprefix("token_id:")), value) for name, value in logprobs["top_logprobs"][i].items())
        top = sorted(places, key=lambda place: -place[1])[:n_logprobs]  # the chosen one comes beside them
        yield token, logprobs["token_logprobs"][i], tuple(top)
