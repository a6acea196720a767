"""`loracast ask`: one question, one answer."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict

from loracast.cli.answerer import open_answerer, say_sources, say_unused
from loracast.cli.options import Answering, Json, Question, check_question
from loracast.cli.output import Stream, print_json, say


def ask(question: Question, answering: Answering, *, as_json: Json = False) -> None:
    """Ask a question of learned documents.

    With --all, --tag or a pattern of names, the documents that match the question answer, and are named after the
    answer. Without any of them and without an adapter the plain base answers.
    """
    check_question(question)
    started = time.perf_counter()
    answerer, chosen = open_answerer(answering)
    load_s = time.perf_counter() - started

    stream = Stream()
    try:
        reply = answerer.reply(
            [{"role": "user", "content": question}], chosen, (lambda text: None) if as_json else stream
        )
    finally:
        if not as_json:
            stream.end()
    if not as_json:
        if not reply.is_finished:
            say(f"(cut after {reply.n_tokens} tokens; --max-tokens allows more)")
        say_unused(reply, answering.strict)
        say_sources(reply, chosen)
        return
    names = Counter(used.name for used in reply.used)
    facts = {
        "question": question,
        "answer": reply.text,
        "answered_by": reply.answered_by,
        "finished": reply.is_finished,
        "adapters": {used.name if names[used.name] == 1 else used.version: used.facts() for used in reply.used},
        "sources": [asdict(source) for source in reply.sources],
        "base": answerer.base,
        "n_prompt_tokens": reply.n_prompt_tokens,
        "n_tokens": reply.n_tokens,
        "load_s": round(load_s, 3),
        "first_token_s": round(reply.first_token_s, 3),
        "total_s": round(reply.total_s, 3),
    }
    print_json(facts)
