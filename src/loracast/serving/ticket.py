"""A ticket for a submitted request: its tokens as they are generated, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from threading import Condition

from loracast.base.generate import confidence
from loracast.serving.request import Finish, GenerationRequest, Token


class Ticket:
    """The tokens of one request, in order. Thread-safe; every iteration begins with the first token.

    A request that was cancelled ends without an error and with `finish` None.
    """

    def __init__(self, request: GenerationRequest):
        self.request = request
        self.finish: Finish | None = None
        """Why the answer ended; None until then."""
        self.n_prompt_tokens = len(request.prompt)
        self.n_cached_tokens = 0
        """Tokens of the prompt that came from the prefix cache."""
        self.n_lora_bytes = 0
        """Bytes that the request's LoRA takes in memory, without what it shares with others."""
        self.n_tokens = 0
        """Generated tokens, without the one that ended the answer."""
        self.first_token_s: float | None = None
        """Seconds from `submit` to the first token; None until then."""
        self.total_s: float | None = None
        """Seconds from `submit` to the end; None until then."""
        self.is_cancelled = False
        self._logprobs: list[float] = []
        self._started = time.perf_counter()
        self._tokens: list[Token] = []
        self._has_ended = False
        self._error: BaseException | None = None
        self._changed = Condition()
        self._listeners: list[Callable[[], object]] = []

    def __iter__(self) -> Iterator[Token]:
        """Yield each token when it is generated; raises what failed."""
        n_seen = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda n=n_seen: len(self._tokens) > n or self._has_ended)  # type: ignore[misc]
            tokens, has_ended = self._since(n_seen)
            yield from tokens
            n_seen += len(tokens)
            if has_ended:
                return

    async def __aiter__(self) -> AsyncIterator[Token]:
        """The same for an event loop."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop was closed while the engine went on
                loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._listeners.append(wake)
        n_seen = 0
        try:
            while True:
                changed.clear()
                tokens, has_ended = self._since(n_seen)
                for token in tokens:
                    yield token
                n_seen += len(tokens)
                if has_ended:
                    return
                if not tokens:  # an error may already follow those that were seen
                    await changed.wait()
        finally:
            with self._changed:
                self._listeners.remove(wake)

    def text(self) -> str:
        """The whole answer; waits until it is complete."""
        return "".join(token.text for token in self)

    @property
    def confidence(self) -> float:
        """How probable the tokens so far were (`base.generate.confidence`), for a request with `n_logprobs`."""
        return confidence(self._logprobs)

    def cancel(self) -> None:
        """Stop the generation: the request leaves the queue, or its slot before the next step."""
        self.is_cancelled = True

    def _since(self, n_seen: int) -> tuple[list[Token], bool]:
        """The tokens after the first `n_seen`, and whether they are the last; raises what failed after them."""
        with self._changed:
            tokens, has_ended = self._tokens[n_seen:], self._has_ended
        if has_ended and not tokens and self._error is not None:
            raise self._error
        return tokens, has_ended and (self._error is None or not tokens)

    # ---- what the engine does

    def put(self, token: Token) -> None:
        """Hand over the next token."""
        if token.id is not None:
            self.n_tokens += 1
        if token.logprob is not None:
            self._logprobs.append(token.logprob)
        if self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self._started
        with self._changed:
            self._tokens.append(token)
            self._notify()

    def end(self, finish: Finish | None, error: BaseException | None = None, logprob: float | None = None) -> None:
        """End the answer: with an error where it failed, with the logprob of the token that ended it where known."""
        self.finish, self._error = finish, error
        if logprob is not None:
            self._logprobs.append(logprob)
        self.total_s = time.perf_counter() - self._started
        with self._changed:
            self._has_ended = True
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        for wake in self._listeners:
            wake()


def finished_ticket(text: str) -> Ticket:
    """The ticket of an answer that takes no model: it has ended, and its text is one token without an id."""
    ticket = Ticket(GenerationRequest([]))
    ticket.put(Token(None, text))
    ticket.end("stop")
    return ticket
