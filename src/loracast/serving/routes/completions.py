"""`/v1/chat/completions`, and `/v1/completions`, whose prompts are continued as they stand, without the chat format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from itertools import accumulate
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from loracast.serving.answering import Answered, Asked, Call
from loracast.serving.errors import as_api_error
from loracast.serving.generation import Token
from loracast.serving.guard import needs
from loracast.serving.responding import Json, bounded, event, respond, text_of, token_dict
from loracast.serving.schema import ChatRequest, CompletionRequest, Sampled
from loracast.serving.service import Shared

router = APIRouter(dependencies=[needs("read")])
DEFAULT_TOKENS = 16
"""OpenAI's default length of what follows a prompt of /v1/completions."""


@router.post("/v1/chat/completions", response_model=None)
async def create_chat_completion(body: ChatRequest, request: Request, service: Shared) -> Response:
    """Answer a chat. Errors: 400, 403, 404 for an unknown model, 408, 429 where the queue is full, 503."""
    asked = Asked(
        body.model, body, body.sampling(body.max_completion_tokens or body.max_tokens, body.seed),
        [message.turn() for message in body.messages], window=body.window, memory=body.memory, style=body.style,
        n=body.n or 1, stop=body.stops, n_logprobs=body.n_logprobs,
    )  # fmt: skip
    completion = _ChatCompletion(Call(service, asked), body)
    return await respond(request, completion.call, bool(body.stream), completion.events, completion.whole)


@router.post("/v1/completions", response_model=None)
async def create_completion(body: CompletionRequest, request: Request, service: Shared) -> Response:
    """Continue prompts; the chunks of documents are chosen by the prompt's text. Errors as for
    chats.
    """
    sampling = body.sampling(body.max_tokens or DEFAULT_TOKENS, body.seed)
    asked = Asked(
        body.model, body, sampling, prompts=body.prompts, n=body.n or 1, stop=body.stops, n_logprobs=body.logprobs
    )
    completion = _TextCompletion(Call(service, asked), body)
    return await respond(request, completion.call, bool(body.stream), completion.events, completion.whole)


class _Completion(ABC):
    """A completion of a call: one body once all tokens are there, or chunks as they come."""

    id_prefix: str
    kind: str
    """The type of the object, as OpenAI calls it."""
    chunk_kind: str
    """That of a chunk of a stream."""

    def __init__(self, call: Call, body: Sampled):
        self.call, self.body = call, body
        self._tokenizer = call.service.model.base.tokenizer

    @abstractmethod
    def _choice(self, i: int, answer: Answered) -> Json:
        """A whole answer, the i-th one."""

    def _first_pieces(self) -> Sequence[Json]:
        """What a stream tells of the answers before their first tokens."""
        return ()

    @abstractmethod
    def _piece(self, i: int, token: Token, tokens: Sequence[Token]) -> Json:
        """What a token adds to an answer; `tokens` is empty for text without a token."""

    @abstractmethod
    def _last_piece(self, i: int, answer: Answered) -> Json:
        """What a stream tells of an answer after its last token."""

    def _head(self, kind: str) -> Json:
        id = f"{self.id_prefix}-{uuid4().hex}"
        return {"id": id, "object": kind, "created": self.call.created, "model": self.call.asked.model}

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
        """The completion once all tokens are there."""
        choices = [self._choice(i, answer) for i, answer in enumerate(self.call.answers)]
        return {**self._head(self.kind), "choices": choices, "usage": self._usage(), "loracast": self.call.account()}

    async def events(self) -> AsyncIterator[str]:
        """The chunks of a streamed completion: pieces of the answers, their ends, the usage where it is wanted.

        The very last one says what the answers came from.
        """
        call, head = self.call, self._head(self.chunk_kind)
        blank = {"usage": None} if self.body.includes_usage else {}

        def chunk(choice: Json) -> Json:
            return {**head, "choices": [choice], **blank}

        try:
            for piece in self._first_pieces():
                yield event(chunk(piece))
            async for i, token in call.pieces():
                tokens = [] if token.id is None else [token]
                if token.text or (tokens and call.asked.n_logprobs is not None):
                    yield event(chunk(self._piece(i, token, tokens)))
            ends = [chunk(self._last_piece(i, answer)) for i, answer in enumerate(call.answers)]
            if self.body.includes_usage:
                ends.append({**head, "choices": [], "usage": self._usage()})
            ends[-1]["loracast"] = call.account()
            for end in ends:
                yield event(end)
        except Exception as error:
            yield event(as_api_error(error).body())
        yield "data: [DONE]\n\n"


class _ChatCompletion(_Completion):
    """The answers of a chat."""

    id_prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, i: int, answer: Answered) -> Json:
        citations = self.call.citations(len(answer.text))
        message = {"role": "assistant", "content": answer.text, "refusal": None, "annotations": citations}
        logprobs = self._logprobs(answer.tokens)
        return {"index": i, "message": message, "logprobs": logprobs, "finish_reason": answer.finish}

    def _first_pieces(self) -> Sequence[Json]:
        blank = {"role": "assistant", "content": "", "refusal": None}
        return [self._delta(i, blank) for i in range(len(self.call.answers))]

    def _piece(self, i: int, token: Token, tokens: Sequence[Token]) -> Json:
        return self._delta(i, {"content": token.text}, tokens)

    def _last_piece(self, i: int, answer: Answered) -> Json:
        citations = self.call.citations(len(answer.text))
        return self._delta(i, {"annotations": citations} if citations else {}, finish=answer.finish)

    def _delta(self, i: int, delta: Json, tokens: Sequence[Token] = (), finish: str | None = None) -> Json:
        return {"index": i, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if self.call.asked.n_logprobs is None:
            return None
        return {"content": [token_dict(self._tokenizer, token) for token in tokens], "refusal": None}


class _TextCompletion(_Completion):
    """What follows prompts."""

    id_prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _choice(self, i: int, answer: Answered) -> Json:
        return self._part(i, answer.text, answer.tokens, answer.finish)

    def _piece(self, i: int, token: Token, tokens: Sequence[Token]) -> Json:
        return self._part(i, token.text, tokens, offset=len(self.call.answers[i].text) - len(token.text))

    def _last_piece(self, i: int, answer: Answered) -> Json:
        return self._part(i, "", (), answer.finish)

    def _part(self, i: int, text: str, tokens: Sequence[Token], finish: str | None = None, offset: int = 0) -> Json:
        """A piece of an answer that begins at a character of it."""
        logprobs: dict[str, Any] | None = None
        if self.call.asked.n_logprobs is not None:
            texts = [text_of(self._tokenizer, token.id) for token in tokens]
            logprobs = {
                "tokens": texts,
                "token_logprobs": [bounded(token.logprob) for token in tokens],
                "top_logprobs": [  # of tokens with one text, the likeliest stays
                    {text_of(self._tokenizer, id): bounded(logprob) for id, logprob in reversed(token.top_logprobs)}
                    for token in tokens
                ],
                "text_offset": list(accumulate(map(len, texts), initial=offset))[:-1],
            }
        return {"index": i, "text": text, "logprobs": logprobs, "finish_reason": finish}
