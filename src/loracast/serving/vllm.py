"""An engine that lets vLLM servers generate; its LoRAs are written as PEFT folders and loaded while they run.

A document's LoRA is another one for each question, since the question weighs its chunks and sentences; each is loaded
under a name that is used once, so that a name never means other weights, as the server's prefix cache demands. It is
unloaded when others need its place.

Of several servers, each gets the LoRAs that are its own: rendezvous hashing (Thaler and Ravishankar 1998) gives every
LoRA an order of the servers. Its own is the first one that does not fail, so that a server that goes or comes back
moves no LoRA but those that were its own.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

from loracast.base.load import Base
from loracast.errors import BaseModelError, ConfigError, LoracastError
from loracast.export.formats import MOST_LOST, VLLM_RANKS, too_much_lost
from loracast.lora.algebra import LoRA, uniform
from loracast.lora.inject import check_fits
from loracast.lora.peft_format import write_peft_folder
from loracast.serving.client import HTTPClient, Refused
from loracast.serving.generation import (
    AnswerWriter,
    Engine,
    EngineConfig,
    EngineFailed,
    EngineStopped,
    Finish,
    GenerationRequest,
    Ticket,
)

_BAD_REQUEST, _NOT_FOUND = 400, 404


class NoVllmServer(EngineFailed):
    """Nobody answers at a vLLM server's address, or not to the end."""

    def __init__(self, url: str, error: Exception):
        if isinstance(error, (ValueError, LookupError, TypeError)):
            super().__init__(f"what answers at {url} is no server with OpenAI's API: give the address of vLLM")
        else:
            super().__init__(f"the vLLM server at {url} does not answer ({str(error) or type(error).__name__})")


class VllmClient(HTTPClient):
    """A vLLM server. Raises EngineFailed where it does not answer, and Refused for what it refuses."""

    no_server = NoVllmServer

    def __init__(self, url: str, key: str = ""):
        """Raises ConfigError where the server takes no LoRAs while it runs."""
        super().__init__(url.rstrip("/").removesuffix("/v1"), key)
        try:
            models = self.get("/v1/models")["data"]
        except (LookupError, TypeError) as error:
            raise NoVllmServer(self.url, error) from error
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
            self.load("", "")
        except Refused as error:
            if error.status == _NOT_FOUND:
                raise ConfigError(
                    f"the server at {self.url} takes no LoRAs while it runs: start vLLM with --enable-lora and "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
                ) from error

    def load(self, name: str, folder: Path | str) -> None:
        """Load a LoRA in PEFT's format under a name."""
        self._tell("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def unload(self, name: str) -> None:
        self._tell("/v1/unload_lora_adapter", {"lora_name": name})

    def completion(self, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The events of a streamed completion, with token ids; closing the generator ends it on the server."""
        more = {"stream_options": {"include_usage": True}, "return_token_ids": True, "return_tokens_as_token_ids": True}
        yield from self.stream("/v1/completions", {**body, **more, "stream": True})

    def prompt_logprobs(self, prompt: Sequence[int]) -> list[float]:
        """The log-probability that the base gives each token of a prompt but the first, after those before it."""
        body = {"model": self.base, "prompt": list(prompt), "max_tokens": 1, "prompt_logprobs": 0}
        places = self.post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
        return [place[str(token)]["logprob"] for token, place in zip(prompt[1:], places[1:], strict=True)]

    def _tell(self, path: str, body: Mapping[str, Any]) -> None:
        """Post what is answered with text."""
        with self._exchange("POST", path, body) as response:
            response.read()


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn what the server refuses into the error that a request gets."""
    try:
        yield
    except Refused as error:
        if error.status == _BAD_REQUEST:
            raise BaseModelError(f"the vLLM server refuses this: {error}") from error
        raise EngineFailed(f"the vLLM server failed: {error}") from error


MAX_LOADED = 32
"""LoRAs that stay loaded, and on the disk, while nobody uses them: give vLLM --max-cpu-loras of at least that many."""
PREFIX = "loracast-"
"""What names of LoRAs on the server begin with."""
_DOWN_S = 5.0
"""A server that failed is the last choice for so long."""
_RANK_THERE = re.compile(r"greater than max_lora_rank\D*(\d+)")


class LoadedLoRA:
    """A LoRA under its name on the server."""

    def __init__(self, key: str, folder: Path):
        self.key, self.name, self.folder = key, folder.name, folder
        self.n_bytes = 0
        self.n_users = 0
        self.is_loaded = False
        self.lock = Lock()
        """Held while it is loaded, so that requests for the same LoRA load it once."""


class LoadedLoRAs:
    """A server, and the LoRAs that it has loaded for one engine. Thread-safe; one that is in use is never unloaded."""

    def __init__(self, base: Base, client: VllmClient, folder: Path, max_loaded: int = MAX_LOADED):
        """
        Args:
            folder: where LoRAs are written; the server must see it under the same path.
        """
        self.client = client
        self.down_until = 0.0
        """The server is the last choice until then, since it has failed."""
        self._base, self._folder, self._max_loaded = base, folder, max_loaded
        self._max_rank = max(VLLM_RANKS)
        self._held: OrderedDict[str, LoadedLoRA] = OrderedDict()
        """By key, the one used last at the end."""
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
        new = self._folder / f"{PREFIX}{secrets.token_hex(16)}"
        key = key or new.name
        with self._lock:
            one = self._held.setdefault(key, LoadedLoRA(key, new))
            self._held.move_to_end(key)
            one.n_users += 1
        with ExitStack() as failing:
            failing.callback(self.give_back, one)
            with one.lock, _refusals():
                if not one.is_loaded and (lora := read()) is not None:
                    self._load(one, lora)
            if not one.is_loaded:
                return None
            failing.pop_all()
        return one

    def load_again(self, one: LoadedLoRA) -> None:
        """Load a LoRA that the server has forgotten, since it was started anew."""
        try:
            self.client.load(one.name, one.folder)
        except Refused as error:
            if "already been loaded" not in str(error):  # another request was faster
                raise

    def give_back(self, one: LoadedLoRA | None) -> None:
        """Let go of a LoRA. The least recently used ones are unloaded where too many are loaded."""
        if one is None:
            return
        with self._lock:
            one.n_users -= 1
            free = [held for held in self._held.values() if not held.n_users]
            n_over = len(self._held) - self._max_loaded
            gone = [held for i, held in enumerate(free) if i < n_over or not held.is_loaded]
            for held in gone:  # whoever asks for it from here on loads it under another name
                del self._held[held.key]
        self._unload(gone)

    def close(self) -> None:
        """Unload all."""
        with self._lock:
            held = [*self._held.values()]
            self._held.clear()
        self._unload(held)

    def _unload(self, loras: Iterable[LoadedLoRA]) -> None:
        for one in loras:
            if one.is_loaded:
                with suppress(LoracastError):  # a server that has gone, or was started anew, has it no more
                    self.client.unload(one.name)
            shutil.rmtree(one.folder, ignore_errors=True)

    def _load(self, one: LoadedLoRA, lora: LoRA) -> None:
        check_fits(self._base.model, lora.shapes.items())
        while not one.is_loaded:
            made = uniform(lora, self._max_rank, VLLM_RANKS)
            if made.error > MOST_LOST:
                remedy = "ask with fewer chunks (route) or adapters"
                raise too_much_lost(lora.rank, self._max_rank, made.error, remedy)
            write_peft_folder(made.lora.factors, one.folder, self._base.name)
            try:
                self.client.load(one.name, one.folder)
            except Refused as error:
                rank_there = _RANK_THERE.search(str(error))  # the server tells it only so
                if rank_there is None or int(rank_there[1]) >= made.rank:
                    raise
                self._max_rank = int(rank_there[1])
            else:
                one.n_bytes, one.is_loaded = made.lora.n_bytes, True


class VllmEngine(Engine):
    """An engine whose tokens come from vLLM servers."""

    takes_copy_bias = False

    def __init__(self, base: Base, servers: Sequence[LoadedLoRAs], config: EngineConfig, close: Callable[[], object]):
        """
        Args:
            config: its slots and its queue are those of each server.
            close: ends what was started for the engine.
        """
        n = len(servers)
        config = replace(config, n_slots=n * config.n_slots, max_queued=n * config.max_queued)
        super().__init__(base, config, min(base.window, *(server.client.window for server in servers)))
        self.servers, self._close = servers, close
        self._queue: SimpleQueue[tuple[Ticket, Iterator[None]]] = SimpleQueue()
        self._live: set[Ticket] = set()
        for i in range(config.n_slots):  # each waits for the tokens of one request
            threading.Thread(target=self._work, name=f"loracast-vllm-{i}", daemon=True).start()

    def submit(self, request: GenerationRequest) -> Ticket:
        """As `Engine.submit`. Raises EngineFailed where all servers fail."""
        ticket = Ticket(request)
        answering = self._answer(ticket)
        with self._changed:
            self._refuse_if_full()
            self._live.add(ticket)
        try:
            next(answering, None)  # loads the LoRA, so that what is wrong with it is raised here
        except BaseException:
            self._leave(ticket)
            raise
        self._queue.put((ticket, answering))
        return ticket

    def _n_waiting(self) -> int:
        return len(self._live) - self.config.n_slots

    def _sizes(self) -> dict[str, int]:
        """What is known here; the servers' own /metrics tell of their forward passes and caches."""
        n_loaded, n_bytes = sum(map(len, self.servers)), sum(server.n_bytes for server in self.servers)
        running = {"n_queued": len(self._live) - self.counts.n_running, "n_running": self.counts.n_running}
        return {**running, "n_adapters_in_memory": n_loaded, "adapter_bytes": n_bytes}

    def close(self) -> None:
        with self._changed:
            self._is_draining = True
            live = [*self._live]
        for ticket in live:
            ticket.end(None, EngineStopped())
        for server in self.servers:
            server.close()
        self._close()

    def _leave(self, ticket: Ticket) -> None:
        with self._changed:
            self._live.discard(ticket)
            self._changed.notify_all()

    # ---- the threads that wait for tokens

    def _work(self) -> None:
        while True:
            ticket, answering = self._queue.get()
            with self._changed:
                self.counts.n_running += 1
            try:
                for _ in answering:
                    pass
            except Exception as error:  # whoever waits gets the error, and the thread goes on with the next request
                ticket.end(None, error)
            with self._changed:
                self.counts.n_running -= 1
                self._count_time(ticket)
            self._leave(ticket)

    def _answer(self, ticket: Ticket) -> Iterator[None]:
        """Have a server generate, and the next one where it fails before the first token.

        Yields whenever a server has the request's LoRA, before it generates. Raises EngineFailed where all fail.
        """
        request, failures = ticket.request, []
        for server in in_order(self.servers, request):
            lora = None
            try:
                if request.lora is not None and (lora := server.take(request.lora_key, request.read_lora)):
                    ticket.n_lora_bytes = lora.n_bytes
                yield
                if not ticket.has_ended:
                    with _refusals():
                        self._generate(ticket, server, lora)
                return
            except EngineFailed as error:
                failures.append(str(error))
                server.down_until = time.monotonic() + _DOWN_S
                if ticket.n_tokens or ticket.has_ended:
                    raise
            finally:
                server.give_back(lora)
        raise EngineFailed("; ".join(failures))

    def _generate(self, ticket: Ticket, server: LoadedLoRAs, lora: LoadedLoRA | None) -> None:
        request = ticket.request
        writer = AnswerWriter(self.base.tokenizer, ticket)
        finish: Finish | None = None
        with closing(self._events(request, server, lora)) as events:  # closing the connection ends it there too
            for event in events:
                if ticket.has_ended:
                    return
                self._count_prompt(ticket, event.get("usage"))
                for choice in event["choices"]:
                    for token, logprob, top in _tokens(choice, request.n_logprobs):
                        if token in self.base.end_ids:
                            finish = "stop"
                            break
                        with self._changed:
                            self.counts.n_generated_tokens += 1
                        if writer.put(token, logprob, top):
                            return
                    reason = choice.get("finish_reason")
                    if reason in ("stop", "length"):
                        finish = finish or reason
                    elif reason is not None:
                        raise EngineFailed(f"the vLLM server ended an answer: {reason}")
        if finish is None:
            raise EngineFailed(f"the vLLM server at {server.client.url} ended an answer before it was complete")
        writer.end(finish)

    def _events(
        self, request: GenerationRequest, server: LoadedLoRAs, lora: LoadedLoRA | None
    ) -> Generator[dict[str, Any], None, None]:
        """The events of an answer. A server that has been started anew gets the LoRA once more."""
        body = {**self._body(request), "model": server.client.base if lora is None else lora.name}
        try:
            yield from server.client.completion(body)
        except Refused as error:
            if lora is None or error.status != _NOT_FOUND:
                raise
            server.load_again(lora)
            yield from server.client.completion(body)

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

    def _count_prompt(self, ticket: Ticket, usage: dict[str, Any] | None) -> None:
        """Note what the server says of the prompt, in an answer's last event."""
        if usage is None:
            return
        ticket.n_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        with self._changed:
            self.counts.n_prompt_tokens += ticket.n_prompt_tokens
            self.counts.n_cached_tokens += ticket.n_cached_tokens
            self.counts.n_prefix_hits += bool(ticket.n_cached_tokens)
            self.counts.n_prefix_misses += not ticket.n_cached_tokens


def in_order(servers: Sequence[LoadedLoRAs], request: GenerationRequest) -> list[LoadedLoRAs]:
    """The servers for a request's LoRA, its own first; without a LoRA, those for the beginning of the prompt."""
    key, now = request.lora_key or str(request.prompt[:32]), time.monotonic()

    def place(server: LoadedLoRAs) -> tuple[bool, bytes]:
        return server.down_until > now, hashlib.sha256(f"{server.client.url} {key}".encode()).digest()

    return sorted(servers, key=place)


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
