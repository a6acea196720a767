"""An engine that lets a vLLM server generate; its LoRAs are written as PEFT folders and loaded while it runs.

LoRAs on a vLLM server: written as PEFT folders, loaded while it runs, and unloaded when others need their place.

A document's LoRA is another one for each question, since the question weighs its chunks and sentences; each is loaded
under the digest of its `lora_key`, so that a name never means other weights, as the server's prefix cache demands.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any, NamedTuple

from loracast.base.load import Base
from loracast.errors import AdapterError, BaseModelError, ConfigError, LoracastError
from loracast.export.formats import MOST_LOST, VLLM_RANKS, too_much_lost
from loracast.lora.algebra import LoRA, Uniform, uniform
from loracast.lora.inject import check_fits
from loracast.lora.peft_format import write_peft_folder
from loracast.serving.client import Client, NoServer, Refused
from loracast.serving.generation import (
    AnswerText,
    EngineConfig,
    EngineFailed,
    EngineStats,
    EngineStopped,
    Finish,
    GenerationRequest,
    RequestQueue,
    Ticket,
    Token,
)

_BAD_REQUEST, _NOT_FOUND = 400, 404


class VllmClient(Client):
    """A vLLM server. Raises EngineFailed where it does not answer or fails, and Refused for what it refuses."""

    def __init__(self, url: str, key: str = ""):
        """Raises ConfigError where the server takes no LoRAs while it runs."""
        super().__init__(url.rstrip("/").removesuffix("/v1"), key)
        with self._reached():
            models = self.get("/v1/models")["data"]
        bases = [model for model in models if not model.get("parent")]
        if not bases:
            raise ConfigError(f"the server at {self.url} serves no base model")
        self.base: str = bases[0]["id"]
        """The name of the base there."""
        self.window: int = bases[0]["max_model_len"]
        """Tokens that fit into a request there."""
        self.loaded: dict[str, str] = {model["id"]: model["root"] for model in models if model.get("parent")}
        """LoRAs that the server had when the client was made, with their paths."""
        try:
            self.load("", Path())
        except Refused as error:
            if error.status == _NOT_FOUND:
                raise ConfigError(
                    f"the server at {self.url} takes no LoRAs while it runs: start vLLM with --enable-lora and "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
                ) from error

    def load(self, name: str, folder: Path) -> None:
        """Load a LoRA in PEFT's format under a name."""
        self._tell("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder) if name else ""})

    def unload(self, name: str) -> None:
        self._tell("/v1/unload_lora_adapter", {"lora_name": name})

    def completion(self, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The events of a streamed completion, with token ids; closing the generator ends it on the server."""
        more = {
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        with self._reached():
            yield from self.stream("/v1/completions", {**body, **more})

    def prompt_logprobs(self, prompt: Sequence[int]) -> list[float]:
        """The log-probability that the base gives each token of a prompt but the first, after those before it."""
        body = {"model": self.base, "prompt": list(prompt), "max_tokens": 1, "prompt_logprobs": 0}
        with self._reached():
            places = self.post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
        return [place[str(token)]["logprob"] for token, place in zip(prompt[1:], places[1:], strict=True)]

    def _tell(self, path: str, body: Mapping[str, Any]) -> None:
        """Post what is answered with text."""
        with self._reached(), self._exchange("POST", path, body) as response:
            response.read()

    @contextmanager
    def _reached(self) -> Generator[None, None, None]:
        try:
            yield
        except NoServer as error:
            why = error.__cause__
            raise EngineFailed(
                f"the vLLM server at {self.url} does not answer ({str(why) or type(why).__name__})"
            ) from error


def as_loracast_error(error: Refused) -> LoracastError:
    """The error that a request gets for what the server refused."""
    if error.status == _BAD_REQUEST:
        return BaseModelError(f"the vLLM server refuses this: {error}")
    return EngineFailed(f"the vLLM server failed: {error}")


MAX_LOADED = 32
"""LoRAs that stay loaded, and on the disk, while nobody uses them: give vLLM --max-cpu-loras of at least that many."""
PREFIX = "loracast-"
"""What names of LoRAs on the server begin with."""
_RANK_THERE = re.compile(r"greater than max_lora_rank\D*(\d+)")


class LoadedLoRA:
    """A LoRA under its name on the server."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self.n_bytes = 0
        self.n_users = 0
        self.is_loaded = False
        self.lock = Lock()
        """Held while it is loaded or unloaded, so that requests for the same LoRA load it once."""


class LoadedLoRAs:
    """The LoRAs that a server has loaded for one engine. Thread-safe; one that is in use is never unloaded."""

    def __init__(self, base: Base, client: VllmClient, folder: Path, max_loaded: int = MAX_LOADED):
        """
        Args:
            folder: where LoRAs are written; the server must see it under the same path.
        """
        self._base, self._client, self._folder, self._max_loaded = base, client, folder, max_loaded
        # Another engine on the same server has names of its own, which it may unload.
        self._prefix = f"{PREFIX}{secrets.token_hex(4)}-"
        self._max_rank = max(VLLM_RANKS)
        self._held: OrderedDict[str, LoadedLoRA] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def n_bytes(self) -> int:
        """Bytes of the LoRAs that are loaded."""
        with self._lock:
            return sum(one.n_bytes for one in self._held.values())

    def take(self, key: str | None, read: Callable[[], LoRA | None]) -> LoadedLoRA | None:
        """The LoRA of a key, loaded in this thread if need be; None where there is none. `give_back` lets go of it.

        Args:
            key: None shares the LoRA with nobody.

        Raises:
            AdapterError: it does not fit the base, or its rank is too high for the server.
            EngineFailed: the server does not answer, or does not load it.
        """
        name = self._prefix + hashlib.sha256((key or secrets.token_hex(16)).encode()).hexdigest()[:32]
        with self._lock:
            one = self._held.setdefault(name, LoadedLoRA(name, self._folder / name))
            self._held.move_to_end(name)
            one.n_users += 1
        try:
            with one.lock:
                if not one.is_loaded and (lora := read()) is not None:
                    self._load(one, lora)
        except BaseException:
            self.give_back(one)
            raise
        if not one.is_loaded:
            self.give_back(one)
            return None
        return one

    def load_again(self, one: LoadedLoRA) -> None:
        """Load a LoRA that the server has forgotten, since it was started anew."""
        with one.lock:
            try:
                self._load_there(one)
            except Refused as error:
                raise as_loracast_error(error) from error

    def give_back(self, one: LoadedLoRA) -> None:
        """Let go of a LoRA. The least recently used ones are unloaded where too many are loaded."""
        with self._lock:
            one.n_users -= 1
            free = [held for held in self._held.values() if not held.n_users]
            n_over = len(self._held) - self._max_loaded
            gone = [held for i, held in enumerate(free) if i < n_over or not held.is_loaded]
        for held in gone:
            self._drop(held)

    def close(self) -> None:
        """Unload all."""
        with self._lock:
            held = [*self._held.values()]
            self._held.clear()
        for one in held:
            self._unload(one)

    def _drop(self, one: LoadedLoRA) -> None:
        """Unload a LoRA that nobody uses. Whoever asks for it meanwhile waits, and loads it again."""
        if not one.lock.acquire(blocking=False):  # another thread loads it again, or drops it
            return
        try:
            with self._lock:
                if one.n_users or self._held.get(one.name) is not one:
                    return
            self._unload(one)
            one.n_bytes, one.is_loaded = 0, False
            with self._lock:
                if not one.n_users:
                    self._held.pop(one.name, None)
        finally:
            one.lock.release()

    def _unload(self, one: LoadedLoRA) -> None:
        if one.is_loaded:
            with suppress(LoracastError):  # a server that has gone, or was started anew, has it no more
                self._client.unload(one.name)
        shutil.rmtree(one.folder, ignore_errors=True)

    def _load(self, one: LoadedLoRA, lora: LoRA) -> None:
        check_fits(self._base.model, lora.shapes.items())
        made = self._write(one, lora)
        try:
            try:
                self._load_there(one)
            except Refused as error:
                rank_there = _RANK_THERE.search(str(error))
                if rank_there is None:
                    raise
                self._max_rank = int(rank_there[1])  # the server tells it only so
                made = self._write(one, lora)
                self._load_there(one)
        except Refused as error:
            raise as_loracast_error(error) from error
        one.n_bytes, one.is_loaded = made.lora.n_bytes, True

    def _load_there(self, one: LoadedLoRA) -> None:
        try:
            self._client.load(one.name, one.folder)
        except Refused as error:
            if "already been loaded" not in str(error):  # another request was faster, or it could not be unloaded
                raise

    def _write(self, one: LoadedLoRA, lora: LoRA) -> Uniform:
        made = uniform(lora, self._max_rank, VLLM_RANKS)
        if made.error > MOST_LOST:
            problem = too_much_lost(lora.rank, self._max_rank, made.error)
            raise AdapterError(f"{problem}, or ask with fewer chunks (route) or adapters")
        write_peft_folder(made.lora.factors, one.folder, self._base.name)
        return made


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


class VllmEngine(RequestQueue):
    """An engine whose tokens come from a vLLM server; methods as in `Engine`."""

    takes_copying = False
    window_of = "the window of the vLLM server"

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
        super().__init__(base, config, min(base.window, client.window))
        self.url = client.url
        self.hand_over: Callable[[VllmTicket], bool] = lambda ticket: False
        """Gives a request that the server failed before its first token to another engine; whether there is one."""
        self._client, self._loras, self._on_close = client, loras, on_close
        self._queue: SimpleQueue[_Queued] = SimpleQueue()
        self._live: set[VllmTicket] = set()
        self._n_running = self._n_prompt = self._n_generated = self._n_cached = self._n_hits = self._n_misses = 0
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
        lora = None if request.lora is None else self._loras.take(request.lora_key, request.read_lora)
        ticket.n_lora_bytes = 0 if lora is None else lora.n_bytes
        try:
            with self._changed:
                self._refuse_if_full()
                self._live.add(ticket)
        except BaseException:
            self._give_back(lora)
            raise
        self._queue.put(_Queued(ticket, lora))

    def _n_waiting(self) -> int:
        return len(self._live) - self.config.n_slots

    def _is_idle(self) -> bool:
        return not self._live

    def stats(self) -> EngineStats:
        """What is known here; the server's own /metrics tells of its forward passes and caches."""
        with self._changed:
            return EngineStats(
                n_slots=self.config.n_slots,
                n_queued=len(self._live) - self._n_running,
                n_running=self._n_running,
                n_generated_tokens=self._n_generated,
                n_prompt_tokens=self._n_prompt,
                n_cached_tokens=self._n_cached,
                n_prefix_hits=self._n_hits,
                n_prefix_misses=self._n_misses,
                n_adapters_in_memory=len(self._loras),
                adapter_bytes=self._loras.n_bytes,
            )

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
                    self._count_time(ticket.total_s or 0.0)
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
