"""`/v1/chat/completions`, `/v1/responses` and `/v1/completions`: a call's answers in the three protocols of OpenAI.

Each answers at once or as server-sent events. /v1/responses also searches files in vector stores, and stores nothing;
the prompts of /v1/completions are continued as they stand, without the chat format.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.responses import StreamingResponse

from loracast.serving.answering import AnswerRequest, Call, RunningAnswer
from loracast.serving.errors import as_api_error
from loracast.serving.generation import Token
from loracast.serving.guard import check_memories, check_scope, needs
from loracast.serving.schema import ChatRequest, CompletionRequest, ResponsesRequest
from loracast.serving.service import Shared

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

router = APIRouter(dependencies=[needs("read")])
DEFAULT_TOKENS = 16
"""OpenAI's default length of what follows a prompt of /v1/completions."""
_LEFT = 499
"""nginx' status for a client that left, which nobody receives."""
Json = dict[str, Any]


@router.post("/v1/chat/completions", response_model=None)
async def create_chat_completion(body: ChatRequest, request: Request, service: Shared) -> Response:
    """Answer a chat. Errors: 400, 403, 404 for an unknown model, 408, 429 where the queue is full, 503."""
    wanted = AnswerRequest(
        body, body.sampling(body.max_completion_tokens or body.max_tokens, body.seed),
        [message.turn() for message in body.messages], window=body.window, memory=body.memory, style=body.style,
        n=body.n or 1, stop=body.stops, n_logprobs=body.n_logprobs,
    )  # fmt: skip
    return await _respond(request, _ChatCompletion(Call(service, wanted), body))


@router.post("/v1/completions", response_model=None)
async def create_completion(body: CompletionRequest, request: Request, service: Shared) -> Response:
    """Continue prompts; the chunks of documents are chosen by the prompt's text. Errors as for
    chats.
    """
    rules = body.sampling(body.max_tokens or DEFAULT_TOKENS, body.seed)
    wanted = AnswerRequest(body, rules, prompts=body.prompts, n=body.n or 1, stop=body.stops, n_logprobs=body.logprobs)
    return await _respond(request, _TextCompletion(Call(service, wanted), body))


@router.post("/v1/responses", response_model=None)
async def create_response(body: ResponsesRequest, request: Request, service: Shared) -> Response:
    """Answer a chat. Errors as for /v1/chat/completions."""
    wanted = AnswerRequest(
        body, body.sampling(body.max_output_tokens), body.turns(), searches=body.searches, memory=body.memory,
        style=body.style, n_logprobs=body.n_logprobs,
    )  # fmt: skip
    return await _respond(request, _Response(Call(service, wanted), body))


class _Protocol:
    """How a call is answered: `whole` is the body once all tokens are there, `events` are those of a stream.

    An error after the first event becomes an event, too.
    """

    def __init__(self, call: Call, body: Any):
        self.call, self.body = call, body
        self.has_logprobs = call.request.n_logprobs is not None

    def token(self, token: Token) -> Json:
        """A token of a chat's answer: text, bytes, logprob, and the likeliest tokens in its place."""
        top = [self._one_token(id, logprob) for id, logprob in token.top_logprobs]
        return {**self._one_token(token.id, token.logprob), "top_logprobs": top}

    def _one_token(self, id: int | None, logprob: float | None) -> Json:
        text = self.text_of(id)
        return {"token": text, "logprob": _bounded(logprob), "bytes": list(text.encode())}

    def text_of(self, id: int | None) -> str:
        """The text of one token; bytes that are no whole character are shown as U+FFFD."""
        return self.call.service.model.base.tokenizer.decode([id])


def _bounded(logprob: float | None) -> float | None:
    """A logprob that JSON can hold: OpenAI tells -9999 for what is as good as impossible."""
    return None if logprob is None else max(logprob, -9999.0)


def _event(data: Any, name: str | None = None) -> str:
    """One server-sent event of JSON."""
    body = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {body}\n\n" if name else f"data: {body}\n\n"


async def _respond(request: Request, protocol: _TextCompletion | _Response) -> Response:
    """Begin a call and give its answers.

    Raises:
        ApiError: what the call is refused with; 403 where the key may not write to its memory, or read one.
    """
    call = protocol.call
    if call.request.memory:
        check_scope(request, "write")
    with ExitStack() as stack:
        stack.callback(call.close)
        await call.begin()
        check_memories(request, call.adapters)
        if protocol.body.stream:
            stack.pop_all()  # the stream closes it
            return _EventStream(protocol)
        is_whole = await _unless_left(request, call)
        return JSONResponse(protocol.whole()) if is_whole else Response(status_code=_LEFT)


class _EventStream(StreamingResponse):
    """The events of a call, which is closed when they end or the client leaves."""

    def __init__(self, protocol: _TextCompletion | _Response):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # a proxy hands events on at once
        super().__init__(protocol.events(), media_type="text/event-stream", headers=headers)
        self._call = protocol.call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.close()


async def _unless_left(request: Request, call: Call) -> bool:
    """Wait for all answers of a call; False where the client leaves before."""
    finished = asyncio.ensure_future(call.finish())
    left = asyncio.ensure_future(request.receive())  # the body is read: what comes next is that the client leaves
    try:
        await asyncio.wait({finished, left}, return_when=asyncio.FIRST_COMPLETED)
        if finished.done():
            finished.result()  # raises what failed
        return finished.done()
    finally:
        finished.cancel()
        left.cancel()


# ---- completions of chats and of texts


class _TextCompletion(_Protocol):
    """What follows prompts: one object with a choice for each answer, or chunks with what is added to them."""

    id_prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    """The types of the object and of a chunk of a stream, as OpenAI calls them."""
    first_piece: Json | None = None
    """What a stream tells of each answer before its first token."""

    def _whole(self, answer: RunningAnswer) -> Json:
        """What the choice of a whole answer holds."""
        return {"text": answer.text}

    def _piece(self, text: str) -> Json:
        """What a chunk holds that adds text to an answer."""
        return {"text": text}

    def _last_piece(self, answer: RunningAnswer) -> Json:
        """What a stream tells of an answer after its last token."""
        return {"text": ""}

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> Json:
        """The logprobs of tokens; the first of them begins at a character of the answer."""
        texts = [self.text_of(token.id) for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [_bounded(token.logprob) for token in tokens],
            "top_logprobs": [  # of tokens with one text, the likeliest stays
                {self.text_of(id): _bounded(logprob) for id, logprob in reversed(token.top_logprobs)}
                for token in tokens
            ],
            "text_offset": list(accumulate(map(len, texts), initial=offset))[:-1],
        }

    def _choice(
        self, i: int, content: Json, tokens: Sequence[Token] = (), finish: str | None = None, offset: int = 0
    ) -> Json:
        logprobs = self._logprobs(tokens, offset) if self.has_logprobs else None
        return {"index": i, **content, "logprobs": logprobs, "finish_reason": finish}

    def _head(self, kind: str) -> Json:
        id = f"{self.id_prefix}-{uuid4().hex}"
        return {"id": id, "object": kind, "created": self.call.created, "model": self.body.model}

    def _usage(self) -> Json:
        """What the completion cost, in tokens."""
        n_prompt, n_tokens = self.call.n_prompt_tokens, self.call.n_tokens
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_tokens,
            "total_tokens": n_prompt + n_tokens,
            "prompt_tokens_details": {"cached_tokens": self.call.n_cached_tokens},
        }

    def whole(self) -> Json:
        choices = [self._choice(i, self._whole(one), one.tokens, one.finish) for i, one in enumerate(self.call.answers)]
        return {**self._head(self.kind), "choices": choices, "usage": self._usage(), "loracast": self.call.account()}

    async def events(self) -> AsyncIterator[str]:
        """Pieces of the answers, their ends, the usage where it is wanted.

        The very last one says what the answers came from.
        """
        call, head = self.call, self._head(self.chunk_kind)
        blank = {"usage": None} if self.body.includes_usage else {}

        def chunk(choice: Json) -> Json:
            return {**head, "choices": [choice], **blank}

        try:
            if self.first_piece is not None:
                for i in range(len(call.answers)):
                    yield _event(chunk(self._choice(i, self.first_piece)))
            async for i, token in call.pieces():
                tokens = [] if token.id is None else [token]
                if token.text or (tokens and self.has_logprobs):
                    offset = len(call.answers[i].text) - len(token.text)
                    yield _event(chunk(self._choice(i, self._piece(token.text), tokens, offset=offset)))
            ends = [
                chunk(self._choice(i, self._last_piece(one), finish=one.finish)) for i, one in enumerate(call.answers)
            ]
            if self.body.includes_usage:
                ends.append({**head, "choices": [], "usage": self._usage()})
            ends[-1]["loracast"] = call.account()
            for end in ends:
                yield _event(end)
        except Exception as error:
            yield _event(as_api_error(error).body())
        yield "data: [DONE]\n\n"


class _ChatCompletion(_TextCompletion):
    """The answers of a chat: a completion whose choices are messages and what is added to them."""

    id_prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    first_piece = {"delta": {"role": "assistant", "content": "", "refusal": None}}  # noqa: RUF012  (nobody changes it)

    def _whole(self, answer: RunningAnswer) -> Json:
        citations = self.call.citations(len(answer.text))
        return {"message": {"role": "assistant", "content": answer.text, "refusal": None, "annotations": citations}}

    def _piece(self, text: str) -> Json:
        return {"delta": {"content": text}}

    def _last_piece(self, answer: RunningAnswer) -> Json:
        citations = self.call.citations(len(answer.text))
        return {"delta": {"annotations": citations} if citations else {}}

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> Json:
        return {"content": [self.token(token) for token in tokens], "refusal": None}


# ---- responses


class _Response(_Protocol):
    """The response object of a call, at its beginning and at its end, and the events between."""

    def __init__(self, call: Call, body: ResponsesRequest):
        super().__init__(call, body)
        self.id, self.message_id, self.search_id = (f"{kind}_{uuid4().hex}" for kind in ("resp", "msg", "fs"))

    def _object(self, status: str, output: list[Json], **fields: Any) -> Json:
        body = self.body
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.call.created,
            "status": status,
            **dict.fromkeys(("error", "incomplete_details", "previous_response_id", "usage")),
            **body.model_dump(include={"instructions", "max_output_tokens", "model", "user"}),
            "metadata": body.metadata or {},
            "output": output,
            "parallel_tool_calls": False,
            "store": False,
            "temperature": body.temperature or 0.0,
            "text": {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            **fields,
        }

    def whole(self) -> Json:
        call = self.call
        is_cut = call.answers[0].finish == "length"
        status = "incomplete" if is_cut else "completed"
        usage = {
            "input_tokens": call.n_prompt_tokens,
            "input_tokens_details": {"cached_tokens": call.n_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": call.n_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": call.n_prompt_tokens + call.n_tokens,
        }
        details = {"reason": "max_output_tokens"} if is_cut else None
        output = [*self._searches(), self._message(status, self._part())]
        return self._object(status, output, incomplete_details=details, usage=usage, loracast=call.account())

    def _searches(self) -> list[Json]:
        """The item that tells of the search in vector stores, if there was one."""
        if not self.body.searches:
            return []
        shown = self.call.results() if "file_search_call.results" in (self.body.include or ()) else None
        query = self.call.request.turns[-1]["content"]
        item = {"id": self.search_id, "type": "file_search_call", "status": "completed"}
        return [{**item, "queries": [query], "results": shown}]

    def _message(self, status: str, *content: Json) -> Json:
        head = {"id": self.message_id, "type": "message", "role": "assistant"}
        return {**head, "status": status, "content": [*content]}

    def _part(self) -> Json:
        answer = self.call.answers[0]
        logprobs = [self.token(token) for token in answer.tokens] if self.has_logprobs else []
        return _text_part(answer.text, self.call.citations(len(answer.text)), logprobs)

    async def events(self) -> AsyncIterator[str]:
        """The events of a streamed response, in OpenAI's order."""
        number = -1

        def numbered(kind: str, fields: Mapping[str, Any]) -> str:
            nonlocal number
            number += 1
            return _event({"type": f"response.{kind}", "sequence_number": number, **fields}, f"response.{kind}")

        beginning = self._object("in_progress", [])
        try:
            yield numbered("created", {"response": beginning})
            yield numbered("in_progress", {"response": beginning})
            searches = self._searches()
            for item in searches:
                place = {"output_index": 0, "item_id": self.search_id}
                yield numbered("output_item.added", {"output_index": 0, "item": {**item, "status": "in_progress"}})
                for kind in ("in_progress", "searching", "completed"):
                    yield numbered(f"file_search_call.{kind}", place)
                yield numbered("output_item.done", {"output_index": 0, "item": item})
            at = {"output_index": len(searches)}
            inside = {"item_id": self.message_id, **at, "content_index": 0}
            yield numbered("output_item.added", {**at, "item": self._message("in_progress")})
            yield numbered("content_part.added", {**inside, "part": _text_part("", [], [])})
            async for _, token in self.call.pieces():
                if token.text or self.has_logprobs:
                    logprobs = [self.token(token)] if self.has_logprobs and token.id is not None else []
                    yield numbered("output_text.delta", {**inside, "delta": token.text, "logprobs": logprobs})
            part, response = self._part(), self.whole()
            yield numbered("output_text.done", {**inside, "text": part["text"], "logprobs": part["logprobs"]})
            for i, citation in enumerate(part["annotations"]):
                fields = {**inside, "annotation_index": i, "annotation": citation}
                yield numbered("output_text.annotation.added", fields)
            yield numbered("content_part.done", {**inside, "part": part})
            yield numbered("output_item.done", {**at, "item": response["output"][-1]})
            yield numbered(response["status"], {"response": response})
        except Exception as error:
            refused = as_api_error(error)
            fault = {"code": refused.code or "server_error", "message": str(refused)}
            yield numbered("failed", {"response": self._object("failed", [], error=fault)})


def _text_part(text: str, annotations: list[Json], logprobs: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": annotations, "logprobs": logprobs}
