"""`loracast ask`: one question, one answer."""

from __future__ import annotations

import time
from typing import Any

import typer

from loracast.base.chat import Message
from loracast.cli.options import Answering, Json, Question
from loracast.cli.output import Stream, print_json, say
from loracast.cli.session import open_answerer


def ask(question: Question, answering: Answering, *, as_json: Json = False) -> None:
    """Ask a question of learned documents.

    Without an adapter the plain base answers.
    """
    if not question.strip():
        raise typer.BadParameter("the question is empty", param_hint="QUESTION")
    started = time.perf_counter()
    answerer, adapters, sampling = open_answerer(answering)
    load_s = time.perf_counter() - started

    from loracast.base.generate import answer
    from loracast.model import ASK_SYSTEM_TURN

    lora, routes = answerer.lora_for(question, list(adapters.values()), answering.route)
    turns: list[Message] = [
        {"role": "system", "content": answering.system or ASK_SYSTEM_TURN},
        {"role": "user", "content": question},
    ]
    prompt = answerer.base.chat.conversation(turns)
    stream = Stream()
    try:
        given = answer(answerer.base, prompt, lora, sampling, (lambda text: None) if as_json else stream)
    finally:
        if not as_json:
            stream.end()
    if not as_json:
        if not given.finished:
            say(f"(cut after {given.n_tokens} tokens; --max-tokens allows more)")
        return
    chosen: dict[str, dict[str, Any]] = {}
    for adapter, (name, route) in zip(adapters.values(), routes.items(), strict=True):
        chunks = range(adapter.manifest.n_chunks) if route.chunks is None else route.chunks
        figures = {"scores": list(route.scores), "weights": list(route.weights), "reason": route.reason}
        chosen[name] = {"chunks": list(chunks), **figures}
    facts = {
        "question": question,
        "answer": given.text,
        "finished": given.finished,
        "adapters": chosen,
        "base": answerer.base.name,
        "n_prompt_tokens": given.n_prompt_tokens,
        "n_tokens": given.n_tokens,
        "load_s": round(load_s, 3),
        "first_token_s": round(given.first_token_s, 3),
        "total_s": round(given.total_s, 3),
    }
    print_json(facts)
