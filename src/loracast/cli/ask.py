"""`loracast ask`: one question, one answer."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from loracast.cli import options
from loracast.cli.output import Stream, print_json, say
from loracast.cli.session import open_answerer
from loracast.library.routing import DEFAULT_ROUTE


def ask(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask.")],
    adapters: options.Adapters = None,
    route: options.Route = DEFAULT_ROUTE,
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = None,
    system: options.System = None,
    base: options.Base = None,
    hypernetwork: options.AnswerersHypernetwork = None,
    library: options.Library = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Ask a question of learned documents.

    Without an adapter the plain base answers.
    """
    from loracast.library.library import open_adapter
    from loracast.paths import library_dir

    if not question.strip():
        raise typer.BadParameter("the question is empty", param_hint="QUESTION")
    started = time.perf_counter()
    for name in adapters or []:
        open_adapter(library or library_dir(), name)  # a wrong name is told before a model is loaded
    answerer = open_answerer(base, library, device, hypernetwork)
    load_s = time.perf_counter() - started

    from loracast.base.generate import Sampling
    from loracast.library.routing import route as choose
    from loracast.model import ASK_SYSTEM_TURN

    opened = [answerer.adapter(name) for name in adapters or []]
    system = ASK_SYSTEM_TURN if system is None else system
    sampling = Sampling(max_new_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if not as_json:
        stream = Stream()
        try:
            given = answerer.answer(question, opened, route=route, system=system, sampling=sampling, on_text=stream)
        finally:
            stream.end()
        if not given.finished:
            say(f"(cut after {given.n_tokens} tokens; --max-tokens allows more)")
        return
    given = answerer.answer(question, opened, route=route, system=system, sampling=sampling)
    chosen: dict[str, Any] = {}
    for adapter in opened:
        picked = choose(adapter, question, route)
        every = range(adapter.manifest.n_chunks)
        chosen[adapter.name] = {
            "chunks": list(every if picked.chunks is None else picked.chunks),
            "scores": list(picked.scores),
            "weights": list(picked.weights),
            "reason": picked.reason,
        }
    print_json(
        {
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
    )
