"""One request from its words to its last token: names, routing, prompts, the engine, and what came of it.

Routing and reading LoRAs happen in a worker thread, tokens arrive in the event loop. Whatever ends a request early (the
client leaves, its time is over, another prompt of it fails) takes all of its answers out of the engine.

`AnswerRequest` is what a request asks for, in one form for all routes of the API. As in `Model.answer`, `Prepared`
decides which answers are refused, what gave the others, and from which chunks they come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from starlette.concurrency import run_in_threadpool

from loracast.answering.answers import NOT_SAID, Prepared, SourcedAnswer, without_model
from loracast.answering.model import ASK_SYSTEM_TURN
from loracast.base.chat import Message, encode_text
from loracast.base.generate import Answer, Sampling
from loracast.cast.memory import Memory
from loracast.library.adapter import Adapter
from loracast.library.index import read_chunks
from loracast.reading.routing import Source, routing_key
from loracast.serving.errors import ApiError
from loracast.serving.generation import Finish, GenerationRequest, Ticket, Token, finished_ticket
from loracast.serving.resolve import Windowed, in_window
from loracast.serving.schema import FileSearch, Generating
from loracast.serving.service import Service
from loracast.serving.vector_stores import StoreFile

DEFAULT_MAX_TOKENS = 512
"""Tokens of an answer where the request does not say, as far as the window has room."""


@dataclass(frozen=True)
class AnswerRequest:
    """What a request asks for, whichever route it came by."""

    body: Generating
    sampling: Sampling
    """`max_new_tokens` of 0 leaves it to the server."""
    turns: Sequence[Message] = ()
    """The messages of a chat; or else `prompts`."""
    prompts: Sequence[str | Sequence[int]] = ()
    """Texts or token ids that are continued as they stand."""
    searches: Sequence[FileSearch] = ()
    """Vector stores from which the question chooses documents."""
    window: Sequence[str] = ()
    """Adapters whose text goes into the prompt."""
    memory: str = ""
    """Name of the memory that the last message goes into, and that answers too."""
    style: str = ""
    """Name of the task adapter that goes along."""
    n: int = 1
    stop: tuple[str, ...] = ()
    n_logprobs: int | None = None


@dataclass
class RunningAnswer:
    """One answer, and what of it has been shown."""

    prepared: Prepared
    ticket: Ticket
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    whole: SourcedAnswer | None = None
    """The answer once it has ended."""

    async def pieces(self) -> AsyncIterator[Token]:
        """The tokens as they come."""
        ticket, texts = self.ticket, list[str]()
        async for token in ticket:
            texts.append(token.text)
            yield token
        figures = (ticket.n_prompt_tokens, ticket.n_tokens, ticket.first_token_s or 0.0, ticket.total_s or 0.0)
        generated = Answer("".join(texts), *figures, ticket.finish == "stop")
        self.whole = self.prepared.answer or self.prepared.sourced(generated)

    @property
    def is_refused(self) -> bool:
        return self.whole is not None and self.whole.answered_by == "refusal"

    @property
    def finish(self) -> Finish:
        return "stop" if self.whole is not None and self.whole.finished else "length"


class Call:
    """A request that is being answered. Whoever makes one closes it."""

    def __init__(self, service: Service, request: AnswerRequest):
        self.service, self.request = service, request
        self.prepared: list[Prepared] = []
        self.answers: list[RunningAnswer] = []
        """`n` for each prompt."""
        self.files: dict[str, StoreFile] = {}
        """Files of vector stores that could be chosen, by their adapters' names."""
        self.adapters: list[Adapter] = []
        """The adapters that the request names, also those whose text it puts before the question."""
        self.created = int(time.time())
        self._scales: dict[str, float] = {}
        self._windowed: Windowed | None = None
        self._memory: Memory | None = None
        self._started = time.perf_counter()
        self._is_late = False
        self._timer: asyncio.TimerHandle | None = None

    async def begin(self) -> None:
        """Route the question and queue the answers. Raises what the request is refused with."""
        limits = self.service.settings
        if self.request.n * max(1, len(self.request.prompts)) > limits.max_answers:
            raise ApiError(400, f"a request gets {limits.max_answers} answers at most", param="n")
        if self.request.sampling.max_new_tokens > limits.max_tokens:
            raise ApiError(400, f"an answer has {limits.max_tokens:,} tokens at most", param="max_tokens")
        self._timer = asyncio.get_running_loop().call_later(limits.answer_timeout_s, self._expire)
        await run_in_threadpool(self._begin)

    def _begin(self) -> None:
        self._prepare()
        for prepared in self.prepared:
            for i in range(self.request.n):
                if prepared.answer is not None:
                    ticket = finished_ticket(prepared.answer.text)
                else:
                    ticket = self.service.engine.submit(self._generation(prepared, i))
                self.answers.append(RunningAnswer(prepared, ticket))
                self._check_time()  # until it is appended, `_expire` cannot cancel it

    def _prepare(self) -> None:
        request, body, model = self.request, self.request.body, self.service.model
        chosen, self._scales = self._chosen()
        if body.strict and request.searches and not chosen:
            self.prepared.append(without_model(NOT_SAID, "refusal"))
            return
        limits = [search.max_num_results for search in request.searches if search.max_num_results is not None]
        routing: dict[str, Any] = {
            "route": None if body.route is None else min([body.route, *limits]),
            "tag": body.tag,
            "always": body.always,
            "strict": body.strict,
            "scales": self._scales,
        }
        for prompt in request.prompts:
            ids, text = self._raw(prompt)
            self._room(ids)
            alone = {**routing, "strict": bool(body.strict)}  # a raw prompt is no question that could be refused
            self.prepared.append(replace(model.prepare(text, chosen, **alone, outlines=False), prompt=ids))
        if not request.prompts:
            turns = self._put_in_window(bool(chosen)) if request.window else [*request.turns]
            self.prepared.append(model.prepare(turns, chosen, **routing, check=self._room))

    def _chosen(self) -> tuple[list[Adapter | str], dict[str, float]]:
        """The adapters, and the patterns of names, that may answer; and the factors on their LoRAs by version."""
        request, names = self.request, self.service.names
        body = request.body
        parts = [(part.id, part.scale) for part in body.adapters]
        if body.lora is not None:
            parts += names.by_number((part.id, part.scale) for part in body.lora)
        elif body.model == names.base and not (parts or body.tag or request.window or request.searches):
            parts += names.defaults
        if request.style:
            if (kind := names.adapter(request.style).manifest.kind) != "task":
                raise ApiError(400, f"a style is a task's adapter; {request.style!r} is of kind {kind}", param="style")
            parts.append((request.style, 1.0))
        if request.memory:
            self._memory = self.service.model.memory(request.memory)
            self._memory.wait_for_pending()
            named = {*request.body.model.rpartition(":")[2].split("+"), *(name for name, _ in parts)}
            if request.memory not in named and self._memory.messages():
                parts.append((request.memory, 1.0))
        chosen, scales = names.resolve(request.body.model, parts, request.body.tag)
        for search in request.searches:
            found = self.service.learning.stores.documents(search.vector_store_ids)
            fitting = (file for file in found if search.filters is None or search.filters.fits(file.attributes))
            self.files |= {file.adapter: file for file in fitting}
        searched: list[Adapter | str] = [f"[{name[0]}]{name[1:]}" for name in self.files]  # patterns of one name each:
        if len(searched) == 1:  # the question chooses among several files
            searched = [names.adapter(name) for name in self.files]
        chosen = [*chosen, *searched]
        self.adapters = [one for one in chosen if isinstance(one, Adapter)]
        return chosen, scales

    def _put_in_window(self, has_adapters: bool) -> list[Message]:
        if has_adapters:
            raise ApiError(400, "`window` puts texts before the question in place of adapters: name the base as model")
        turns = [*self.request.turns]
        if turns[0]["role"] != "system":
            turns = [{"role": "system", "content": ASK_SYSTEM_TURN}, *turns]
        self.adapters = [self.service.names.adapter(reference) for reference in self.request.window]
        n_answer = self.request.sampling.max_new_tokens or DEFAULT_MAX_TOKENS
        most = self.service.settings.max_prompt_tokens
        self._windowed = in_window(self.service.model.base, self.adapters, turns, n_answer, most)
        return self._windowed.messages

    def _raw(self, prompt: str | Sequence[int]) -> tuple[list[int], str]:
        """The token ids and the text of a prompt that is continued as it stands."""
        tokenizer = self.service.model.base.tokenizer
        if isinstance(prompt, str):
            if not (ids := encode_text(tokenizer, prompt)):
                raise ApiError(400, "a prompt needs at least one token")
            return ids, prompt
        if not all(0 <= id < len(tokenizer) for id in prompt):
            raise ApiError(400, f"token ids go from 0 to {len(tokenizer) - 1}", param="prompt")
        return list(prompt), tokenizer.decode(prompt, skip_special_tokens=True)

    def _room(self, prompt: Sequence[int]) -> int:
        """Tokens that an answer may have after a prompt. Raises ApiError where they are too few."""
        limits, wanted = self.service.settings, self.request.sampling.max_new_tokens
        window = self.service.engine.window
        room = min(window, limits.max_prompt_tokens + limits.max_tokens) - len(prompt)
        if len(prompt) > limits.max_prompt_tokens or room < max(1, wanted):
            most = f"the engine's window holds {window}, and a prompt here {limits.max_prompt_tokens} at most"
            message = f"the prompt has {len(prompt)} tokens and the answer may have {wanted or 'some'}: {most}"
            param = "prompt" if self.request.prompts else "messages"
            raise ApiError(400, message, param, "context_length_exceeded")
        return room

    def _generation(self, prepared: Prepared, i: int) -> GenerationRequest:
        """What the engine generates for the i-th answer to a prompt."""
        request, service, sampling = self.request, self.service, self.request.sampling
        longest = min(DEFAULT_MAX_TOKENS, service.settings.max_tokens, self._room(prepared.prompt))
        seed = None if sampling.seed is None else (sampling.seed + i) % 2**63
        key = routing_key(prepared.routed)
        return GenerationRequest(
            prepared.prompt,
            None if key is None else lambda: service.model.lora_of(prepared.routed),
            key,
            replace(sampling, max_new_tokens=sampling.max_new_tokens or longest, seed=seed),
            service.model.copy_bias(prepared) if service.engine.takes_copy_bias else None,
            request.stop,
            request.n_logprobs,
            strips=not request.prompts,
        )

    # ---- the tokens

    async def pieces(self) -> AsyncIterator[tuple[int, Token]]:
        """The tokens of all answers as they come, each with the number of its answer; a strict answer's at its end."""
        merged: asyncio.Queue[tuple[int, Token] | Exception | None] = asyncio.Queue()

        async def feed(i: int) -> None:
            try:
                async for token in self.answers[i].pieces():
                    merged.put_nowait((i, token))
                merged.put_nowait(None)
            except Exception as error:
                merged.put_nowait(error)

        feeds = [asyncio.create_task(feed(i)) for i in range(len(self.answers))]
        try:
            for _ in feeds:
                while (piece := await merged.get()) is not None:
                    if isinstance(piece, Exception):
                        raise piece
                    answer, token = self.answers[piece[0]], piece[1]
                    answer.text += token.text
                    answer.tokens += [token] if token.id is not None else []
                    yield piece
        finally:
            for task in feeds:
                task.cancel()
        self._check_time()

    async def finish(self) -> None:
        """Wait for all answers."""
        async for _ in self.pieces():
            pass

    def _expire(self) -> None:
        self._is_late = True
        self._cancel()

    def _check_time(self) -> None:
        """Raise ApiError (408) where the time of the request is over."""
        if self._is_late:
            raise ApiError(408, f"the answer took longer than {self.service.settings.answer_timeout_s:g} s")

    def _cancel(self) -> None:
        for answer in self.answers:
            answer.ticket.cancel()

    def close(self) -> None:
        """Free the slots of answers that are not whole yet, count what was generated, and remember what was said."""
        if self._timer is not None:
            self._timer.cancel()
        self._cancel()
        self.service.metrics.count_answers([answer.ticket for answer in self.answers])
        if self._memory is not None and self.answers:
            self._memory.remember_later(self.request.turns[-1]["content"])

    # ---- what came of it

    @property
    def n_prompt_tokens(self) -> int:
        return sum(len(prepared.prompt) for prepared in self.prepared)

    @property
    def n_tokens(self) -> int:
        return sum(answer.ticket.n_tokens for answer in self.answers)

    @property
    def n_cached_tokens(self) -> int:
        """Of the prompts, each counted once."""
        return sum(answer.ticket.n_cached_tokens for answer in self.answers[:: self.request.n])

    @property
    def _given(self) -> list[Prepared]:
        """The prompts with an answer that was not refused."""
        n = self.request.n
        return [
            prepared
            for i, prepared in enumerate(self.prepared)
            if not all(answer.is_refused for answer in self.answers[i * n : (i + 1) * n])
        ]

    @property
    def _sources(self) -> list[Source]:
        """The chunks that the answers came from, or the documents whose outlines gave them."""
        return [source for prepared in self._given for source in prepared.sources]

    def account(self) -> dict[str, Any]:
        """What an answer says of its adapters, sources and times: the field `loracast`.

        `answered_by` has an entry for each answer. An adapter with `is_used` false gave nothing, since the question is
        not about its document; where none is used, the plain base answered.
        """
        used = [
            {
                "id": adapter.version,
                "scale": self._scales.get(adapter.manifest.version, 1.0),
                "is_used": not route.is_empty,
                "n_chunks": adapter.manifest.n_chunks,
                **{key: getattr(route, key) for key in ("chunks", "weights", "reason", "about")},
            }
            for prepared in self.prepared
            for adapter, route in prepared.routed
        ]
        firsts = [answer.ticket.first_token_s for answer in self.answers if answer.ticket.first_token_s is not None]
        account: dict[str, Any] = {
            "answered_by": [answer.whole.answered_by for answer in self.answers if answer.whole is not None],
            "adapters": used,
            "sources": [asdict(source) for source in self._sources],
            "lora_bytes": max((answer.ticket.n_lora_bytes for answer in self.answers), default=0),
            "first_token_ms": round(1000 * min(firsts), 1) if firsts else None,
            "total_ms": round(1000 * (time.perf_counter() - self._started), 1),
        }
        if self._windowed is not None:
            account["window"] = {"n_tokens": self._windowed.n_tokens, "n_shown": self._windowed.n_shown}
        return account

    def citations(self, index: int) -> list[dict[str, Any]]:
        """OpenAI's `file_citation` annotations of an answer, one for each of its sources, best first.

        Of a document that came without a file, `file_id` is its adapter's version. The chunk's number (None: the whole
        document) and its place in the document's text are additions.

        Args:
            index: the character of the answer where they stand.
        """
        cited = []
        for source in self._sources:
            if file := self.files.get(source.adapter):
                id, name = file.id, file.filename
            else:
                adapter = self._adapter(source)
                id, name = adapter.version, adapter.manifest.source or source.title
            place = {key: getattr(source, key) for key in ("chunk", "start", "end")}
            cited.append({"type": "file_citation", "file_id": id, "filename": name, "index": index, **place})
        return cited

    def results(self) -> list[dict[str, Any]]:
        """OpenAI's results of a search in files: the chunks that the answer came from, or the outline that gave it."""
        return [
            {
                "file_id": file.id,
                "filename": file.filename,
                "attributes": file.attributes,
                "score": source.weight,
                "text": self._text(prepared, source),
            }
            for prepared in self._given
            for source in prepared.sources
            if (file := self.files.get(source.adapter))
        ]

    def _text(self, prepared: Prepared, source: Source) -> str:
        if source.chunk is None:
            return prepared.answer.text if prepared.answer else ""
        (chunk,) = read_chunks(self._adapter(source).index, [source.chunk])
        return chunk.text

    def _adapter(self, source: Source) -> Adapter:
        routed = [adapter for prepared in self.prepared for adapter, _ in prepared.routed]
        asked = (adapter for adapter in [*routed, *self.adapters] if adapter.name == source.adapter)
        return next(adapter for adapter in asked if adapter.manifest.version == source.version)
