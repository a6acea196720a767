"""`loracast ask`: one question, one answer."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from typing import Any

import typer

from loracast.base.chat import Message
from loracast.cli.options import Answering, Json, Question
from loracast.cli.output import Stream, print_json, print_result, say
from loracast.cli.session import open_answerer, say_sources, say_unused
from loracast.library.wide_route import patterns_in, sources


def ask(question: Question, answering: Answering, *, as_json: Json = False) -> None:
    """Ask a question of learned documents.

    With --all, --tag or a pattern of names, the documents that match the question answer, and are named after the
    answer. Without any of them and without an adapter the plain base answers.
    """
    if not question.strip():
        raise typer.BadParameter("the question is empty", param_hint="QUESTION")
    started = time.perf_counter()
    answerer, chosen, sampling = open_answerer(answering)
    load_s = time.perf_counter() - started

    from loracast.base.generate import answer
    from loracast.model import ASK_SYSTEM_TURN

    if (told := answerer.overview(question, list(chosen.values()))) is not None:
        print_result(as_json, {"question": question, "answer": told, "base": None}, told)
        return
    lora, routed = answerer.lora_for(question, list(chosen.values()), answering.route, answering.tag, answering.always)
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
        say_unused(routed)
        if wide := patterns_in(chosen.values()):
            say_sources(routed, len(chosen) - len(wide))
        return
    names = Counter(adapter.name for adapter, _ in routed)
    used: dict[str, dict[str, Any]] = {}
    for adapter, route in routed:
        chunks = range(adapter.manifest.n_chunks) if route.chunks is None else route.chunks
        figures = {
            "scores": list(route.scores),
            "weights": list(route.weights),
            "reason": route.reason,
            "about": route.about,
        }
        used[adapter.name if names[adapter.name] == 1 else adapter.version] = {"chunks": list(chunks), **figures}
    facts = {
        "question": question,
        "answer": given.text,
        "finished": given.finished,
        "adapters": used,
        "sources": [asdict(source) for source in sources(routed)],
        "base": answerer.base.name,
        "n_prompt_tokens": given.n_prompt_tokens,
        "n_tokens": given.n_tokens,
        "load_s": round(load_s, 3),
        "first_token_s": round(given.first_token_s, 3),
        "total_s": round(given.total_s, 3),
    }
    print_json(facts)
