"""What HTTP adds to an answer: the same requests through a server on this machine, and to its engine directly.

    python benchmarks/http_overhead.py [--requests 40] [--max-tokens 16]

The two take turns, so that both meet the same machine; the client is a process of its own, as clients are. Prints
medians in milliseconds, to the first token and in all.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import httpx
import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

TEXT = "The kettle holds 1.7 litres of water and weighs 900 grams. The warranty of the kettle is 24 months."
QUESTION = "How long is the warranty of the kettle?"
Times = tuple[float, float]
"""Seconds to the first token, and to the last one."""


@cache
def connection() -> httpx.Client:
    """The connection of the client's process, which all of its requests use."""
    return httpx.Client()


def through_http(url: str, max_tokens: int) -> Times:
    """Ask the server."""
    body = {"model": "kettle", "messages": [{"role": "user", "content": QUESTION}], "stream": True}
    started, first = time.perf_counter(), 0.0
    with connection().stream("POST", f"{url}/v1/chat/completions", json={**body, "max_tokens": max_tokens}) as answer:
        for line in answer.iter_lines():
            is_piece = line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content")
            first = first or (time.perf_counter() if is_piece else 0.0)
    return first - started, time.perf_counter() - started


def main(requests: int = 40, max_tokens: int = 16) -> None:
    """Print the medians of the times through HTTP and without it."""
    import loracast
    from loracast.base.generate import Sampling
    from loracast.documents import Document
    from loracast.lab.evaluation.report import markdown
    from loracast.reading.routing import routing_key
    from loracast.serving.app import create_app
    from loracast.serving.engine import LocalEngine
    from loracast.serving.generation import GenerationRequest
    from servers import served

    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as client:
        model = loracast.load(library=Path(folder) / "library")
        adapter = model.learn(Document.from_text(TEXT, title="Kettle"), "kettle")
        engine = LocalEngine(model.base)

        def directly() -> Times:
            started = time.perf_counter()
            prepared = model.prepare(QUESTION, adapter)
            lora, key = (lambda: model.lora_of(prepared.routed)), routing_key(prepared.routed)
            request = GenerationRequest(prepared.prompt, lora, key, Sampling(max_tokens))
            tokens = iter(engine.submit(request))
            next(tokens)
            first = time.perf_counter()
            list(tokens)
            return first - started, time.perf_counter() - started

        with served(create_app(model, engine)) as url:
            pairs = []
            for _ in range(requests + 1):
                pairs.append((directly(), client.submit(through_http, url, max_tokens).result()))
    print(f"{requests} requests of {max_tokens} tokens; medians in ms\n")
    engine_ms, http_ms = 1000 * np.median(pairs[1:], axis=0)  # the first ones warm up
    rows = (("engine", engine_ms), ("HTTP", http_ms), ("added by HTTP", http_ms - engine_ms))
    print(markdown([("", "first token", "all"), *((name, *(f"{one:.1f}" for one in ms)) for name, ms in rows)]))


if __name__ == "__main__":
    typer.run(main)
