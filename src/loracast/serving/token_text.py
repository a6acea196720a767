"""Tokens with their probabilities as OpenAI tells them."""

from __future__ import annotations

from typing import Any

from loracast.serving.request import Token


def token_dict(tokenizer: Any, token: Token) -> dict[str, Any]:
    """A token of a chat's answer: text, bytes, logprob, and the likeliest tokens in its place."""
    top = [_one(tokenizer, id, logprob) for id, logprob in token.top_logprobs]
    return {**_one(tokenizer, token.id, token.logprob), "top_logprobs": top}


def _one(tokenizer: Any, id: int | None, logprob: float | None) -> dict[str, Any]:
    text = text_of(tokenizer, id)
    return {"token": text, "logprob": bounded(logprob), "bytes": list(text.encode())}


def text_of(tokenizer: Any, id: int | None) -> str:
    """The text of one token; bytes that are no whole character are shown as U+FFFD."""
    return tokenizer.decode([id])


def bounded(logprob: float | None) -> float | None:
    """A logprob that JSON can hold: OpenAI tells -9999 for what is as good as impossible."""
    return None if logprob is None else max(logprob, -9999.0)
