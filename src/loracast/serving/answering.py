"""One request from its words to its last token: names, routing, prompts, the engine, and what came of it.

Routing and reading LoRAs happen in a worker thread, tokens arrive in the event loop. Whatever ends a request early (the
client leaves, its time is over, another prompt of it fails) takes all of its answers out of the engine.

`Asked` is what a request asks for, in one form for all routes of the API.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from starlette.concurrency import run_in_threadpool

from loracast.answering.answers import NOT_SAID, AnsweredBy, Prepared, refusal
from loracast.answering.question_answering import ASK_SYSTEM_TURN
from loracast.base.chat import Message, encode_text
from loracast.base.generate import Sampling
from loracast.cast.memory import Memory
from loracast.library.adapter import Adapter
from loracast.library.index import read_chunks
from loracast.reading.wide_route import Source, routing_key
from loracast.serving.errors import ApiError
from loracast.serving.generation import Finish, GenerationRequest, Ticket, Token, finished_ticket
from loracast.serving.resolve import Resolved, Windowed, in_window
from loracast.serving.schema import Extensions, FileSearch
from loracast.serving.service import Service
from loracast.serving.store_search import among
from loracast.serving.vector_stores import StoreFile


@dataclass(frozen=True)
class Asked:
    """A request, whichever route it came by."""

    model: str
    extensions: Extensions
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


DEFAULT_MAX_TOKENS = 512
"""Tokens of an answer where the request does not say, as far as the window has room."""


@dataclass
class Answered:
    """What has been generated of one answer."""

    ticket: Ticket
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    is_refused: bool = False
    """Whether it was too unsure for a strict request, so that `NOT_SAID` stands in its place."""

    def add(self, token: Token) -> None:
        self.text += token.text
        if token.id is not None:
            self.tokens.append(token)

    @property
    def finish(self) -> Finish:
        return "stop" if self.is_refused else self.ticket.finish or "length"


class Call:
    """A request that is being answered. Whoever makes one closes it."""

    def __init__(self, service: Service, asked: Asked):
        self.service, self.asked = service, asked
        self.answers: list[Answered] = []
        """`n` for each prompt."""
        self.prepared: list[Prepared] = []
        self.files: dict[str, StoreFile] = {}
        """Files of vector stores that could be chosen, by their adapters' names."""
        self.created = int(time.time())
        self._resolved = Resolved((), {})
        self._named: list[Adapter] = []
        self._shown: list[Adapter] = []
        self._windowed: Windowed | None = None
        self._started = time.perf_counter()
        self._memory: Memory | None = None
        self._is_late = False
        self._timer: asyncio.TimerHandle | None = None

    async def begin(self) -> None:
        """Route the question and queue the answers. Raises what the request is refused with."""
        limits = self.service.settings
        if self.asked.n * max(1, len(self.asked.prompts)) > limits.max_answers:
            raise ApiError(400, f"a request gets {limits.max_answers} answers at most", param="n")
        if self.asked.sampling.max_new_tokens > limits.max_tokens:
            raise ApiError(400, f"an answer has {limits.max_tokens:,} tokens at most", param="max_tokens")
        self._timer = asyncio.get_running_loop().call_later(limits.answer_timeout_s, self._expire)
        await run_in_threadpool(self._begin)

    def _begin(self) -> None:
        asked, given = self.asked, self.asked.extensions
        names, model = self.service.names, self.service.model
        parts = [(part.id, part.scale) for part in given.adapters]
        if asked.style:
            if (kind := names.adapter(asked.style).manifest.kind) != "task":
                raise ApiError(400, f"a style is a task's adapter; {asked.style!r} is of kind {kind}", param="style")
            parts.append((asked.style, 1.0))
        if asked.memory:
            self._memory = model.memory(asked.memory)
            self._memory.wait_for_pending()
            named = {*asked.model.rpartition(":")[2].split("+"), *(name for name, _ in parts)}
            if asked.memory not in named and self._memory.messages():
                parts.append((asked.memory, 1.0))
        self._resolved = names.resolve(asked.model, parts, given.tag)
        chosen = [*self._resolved.chosen, *self._searched()]
        self._named = [one for one in chosen if isinstance(one, Adapter)]
        routing: dict[str, Any] = {
            "route": self._route(),
            "tag": given.tag,
            "always": given.always,
            "strict": given.strict,
            "scales": self._resolved.scales,
        }
        if given.strict and asked.searches and not chosen:
            self.prepared.append(refusal([]))
        elif asked.prompts:
            for prompt in asked.prompts:
                ids, text = self._raw(prompt)
                self._room(ids)
                prepared = model.prepare(text, chosen, **routing, outlines=False)
                self.prepared.append(replace(prepared, prompt=ids))
        else:
            turns = list(asked.turns)
            if asked.window:
                turns = self._put_in_window(turns)
            self.prepared.append(model.prepare(turns, chosen, **routing, check=self._room))
        requests = [
            finished_ticket(prepared.answer.text) if prepared.answer else self._request(prepared, i)
            for prepared in self.prepared
            for i in range(asked.n)
        ]
        for request in requests:
            ticket = request if isinstance(request, Ticket) else self.service.engine.submit(request)
            self.answers.append(Answered(ticket))
            if self._is_late:  # until it is appended, `_expire` cannot cancel it
                raise self._too_late()

    def _searched(self) -> list[Adapter | str]:
        """The document in the vector stores, or patterns of their names, among which the question chooses."""
        for search in self.asked.searches:
            found = self.service.learning.stores.documents(search.vector_store_ids)
            fitting = (file for file in found if search.filters is None or search.filters.fits(file.attributes))
            self.files |= {file.adapter: file for file in fitting}
        if len(self.files) == 1:
            return [self.service.names.adapter(name) for name in self.files]
        return [*among([*self.files.values()])]

    def _route(self) -> int | None:
        most = [search.max_num_results for search in self.asked.searches if search.max_num_results is not None]
        route = self.asked.extensions.route
        return route if route is None else min([route, *most])

    def _put_in_window(self, turns: list[Message]) -> list[Message]:
        if self._resolved.chosen:
            raise ApiError(400, "`window` puts texts before the question in place of adapters: name the base as model")
        if turns[0]["role"] != "system":
            turns = [{"role": "system", "content": ASK_SYSTEM_TURN}, *turns]
        self._shown = [self.service.names.adapter(reference) for reference in self.asked.window]
        n_answer = self.asked.sampling.max_new_tokens or DEFAULT_MAX_TOKENS
        most = self.service.settings.max_prompt_tokens
        self._windowed = in_window(self.service.model.base, self._shown, turns, n_answer, most)
        return self._windowed.messages

    def _raw(self, prompt: str | Sequence[int]) -> tuple[list[int], str]:
        """The token ids and the text of a prompt that is continued as it stands."""
        tokenizer = self.service.model.base.tokenizer
        if isinstance(prompt, str):
            return encode_text(tokenizer, prompt), prompt
        if not all(0 <= id < len(tokenizer) for id in prompt):
            raise ApiError(400, f"token ids go from 0 to {len(tokenizer) - 1}", param="prompt")
        return list(prompt), tokenizer.decode(prompt, skip_special_tokens=True)

    def _room(self, prompt: Sequence[int]) -> int:
        """Tokens that an answer may have after a prompt. Raises ApiError where they are too few."""
        base, limits, wanted = self.service.model.base, self.service.settings, self.asked.sampling.max_new_tokens
        room = min(base.window, limits.max_prompt_tokens + limits.max_tokens) - len(prompt)
        if len(prompt) > limits.max_prompt_tokens or room < max(1, wanted):
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens and the answer may have {wanted or 'some'}: the base's window "
                f"holds {base.window}, and a prompt here {limits.max_prompt_tokens} at most",
                param="prompt" if self.asked.prompts else "messages",
                code="context_length_exceeded",
            )
        return room

    def _request(self, prepared: Prepared, i: int) -> GenerationRequest:
        asked, limits, wanted = self.asked, self.service.settings, self.asked.sampling.max_new_tokens
        room = self._room(prepared.prompt)
        seed = None if asked.sampling.seed is None else (asked.sampling.seed + i) % 2**63
        sampling = replace(
            asked.sampling, max_new_tokens=wanted or min(DEFAULT_MAX_TOKENS, limits.max_tokens, room), seed=seed
        )
        model, engine, key = self.service.model, self.service.engine, routing_key(prepared.routed)
        return GenerationRequest(
            prepared.prompt,
            None if key is None else lambda: model.lora_of(prepared.routed),
            key,
            sampling,
            model.copying(prepared) if engine.takes_copying else None,
            asked.stop,
            0 if prepared.least_confidence and asked.n_logprobs is None else asked.n_logprobs,
            strips=not asked.prompts,
        )

    # ---- the tokens

    async def pieces(self) -> AsyncIterator[tuple[int, Token]]:
        """The tokens of all answers as they come, each with the number of its answer; a strict answer's at its end."""
        if len(self.answers) == 1:
            async for token in self._tokens(0):
                self.answers[0].add(token)
                yield 0, token
        else:
            merged: asyncio.Queue[tuple[int, Token] | BaseException | None] = asyncio.Queue()
            feeds = [asyncio.create_task(self._feed(i, merged)) for i in range(len(self.answers))]
            try:
                n_ended = 0
                while n_ended < len(feeds):
                    given = await merged.get()
                    if given is None:
                        n_ended += 1
                    elif isinstance(given, BaseException):
                        raise given
                    else:
                        self.answers[given[0]].add(given[1])
                        yield given
            finally:
                for feed in feeds:
                    feed.cancel()
        if self._is_late:
            raise self._too_late()

    async def _feed(self, i: int, merged: asyncio.Queue[tuple[int, Token] | BaseException | None]) -> None:
        try:
            async for token in self._tokens(i):
                merged.put_nowait((i, token))
            merged.put_nowait(None)
        except Exception as error:
            merged.put_nowait(error)

    async def _tokens(self, i: int) -> AsyncIterator[Token]:
        answer, prepared = self.answers[i], self.prepared[i // self.asked.n]
        if not prepared.comes_whole:
            async for token in answer.ticket:
                yield token
            return
        tokens = [token async for token in answer.ticket]
        if prepared.is_refused(answer.ticket.confidence):
            answer.is_refused = True
            tokens = [Token(None, NOT_SAID)]
        for token in tokens:
            yield token

    async def finish(self) -> None:
        """Wait for all answers."""
        async for _ in self.pieces():
            pass

    def _expire(self) -> None:
        self._is_late = True
        self._cancel()

    def _too_late(self) -> ApiError:
        return ApiError(408, f"the answer took longer than {self.service.settings.answer_timeout_s:g} s")

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
            self._memory.remember_later(self.asked.turns[-1]["content"])

    # ---- what came of it

    @property
    def asked_of(self) -> list[Adapter]:
        """The adapters that the request names, also those whose text it puts before the question."""
        return [*self._named, *self._shown]

    @property
    def sources(self) -> list[Source]:
        """The chunks that the answers came from, or the documents whose outlines gave them."""
        return [source for prepared in self._said for source in prepared.sources]

    @property
    def answered_by(self) -> list[AnsweredBy]:
        """What gave each answer."""
        n = self.asked.n
        return [
            "refusal" if answer.is_refused else self.prepared[i // n].answered_by
            for i, answer in enumerate(self.answers)
        ]

    @property
    def _said(self) -> list[Prepared]:
        """The prompts with an answer that was not refused."""
        n = self.asked.n
        return [
            prepared
            for i, prepared in enumerate(self.prepared)
            if not all(answer.is_refused for answer in self.answers[i * n : (i + 1) * n])
        ]

    @property
    def n_prompt_tokens(self) -> int:
        return sum(len(prepared.prompt) for prepared in self.prepared)

    @property
    def n_tokens(self) -> int:
        return sum(answer.ticket.n_tokens for answer in self.answers)

    @property
    def n_cached_tokens(self) -> int:
        """Of the prompts, each counted once."""
        return sum(self.answers[i].ticket.n_cached_tokens for i in range(0, len(self.answers), self.asked.n))

    def account(self) -> dict[str, Any]:
        """What an answer says of its adapters, sources and times: the field `loracast`.

        `answered_by` has an entry for each answer. An adapter with `is_used` false gave nothing, since the question is
        not about its document; where none is used, the plain base answered.
        """
        used = [
            {
                "id": adapter.version,
                "scale": self._resolved.scales.get(adapter.manifest.version, 1.0),
                "is_used": not route.is_empty,
                "n_chunks": adapter.manifest.n_chunks,
                "chunks": None if route.chunks is None else list(route.chunks),
                "scores": list(route.scores),
                "weights": list(route.weights),
                "reason": route.reason,
                "about": route.about,
            }
            for prepared in self.prepared
            for adapter, route in prepared.routed
        ]
        firsts = [answer.ticket.first_token_s for answer in self.answers if answer.ticket.first_token_s is not None]
        account: dict[str, Any] = {
            "answered_by": self.answered_by,
            "adapters": used,
            "sources": [asdict(source) for source in self.sources],
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
        for source in self.sources:
            file, adapter = self.files.get(source.adapter), self._adapter(source)
            cited.append(
                {
                    "type": "file_citation",
                    "file_id": file.id if file else adapter.version,
                    "filename": file.filename if file else adapter.manifest.source or source.title,
                    "index": index,
                    "chunk": source.chunk,
                    "start": source.start,
                    "end": source.end,
                }
            )
        return cited

    def results(self) -> list[dict[str, Any]]:
        """OpenAI's results of a search in files: the chunks that the answer came from, or the outline that gave it."""
        return [
            {
                "file_id": file.id,
                "filename": file.filename,
                "attributes": dict(file.attributes),
                "score": source.weight,
                "text": self._text(prepared, source),
            }
            for prepared in self._said
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
        asked = (adapter for adapter in [*routed, *self._named] if adapter.name == source.adapter)
        return next(adapter for adapter in asked if adapter.manifest.version == source.version)
