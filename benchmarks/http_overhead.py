"""What HTTP adds to an answer: the same requests through a server on this machine, and to its engine directly.

    python benchmarks/http_overhead.py [--requests 40] [--max-tokens 16]

The two take turns, so that both meet the same machine. Prints medians in milliseconds, to the first token and in all.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import uvicorn

import loracast
from loracast.base.generate import Sampling
from loracast.documents import Document
from loracast.library.adapter import routing_key
from loracast.serving.app import create_app
from loracast.serving.engine import LocalEngine
from loracast.serving.generation import GenerationRequest
from loracast.serving.settings import ServerSettings

TEXT = "The kettle holds 1.7 litres of water and weighs 900 grams. The warranty of the kettle is 24 months."
QUESTION = "How long is the warranty of the kettle?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=16)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = loracast.load(library=Path(folder) / "library")
        model.learn(Document.from_text(TEXT, title="Kettle"), "kettle")
        engine = LocalEngine(model.base)
        listening = socket.create_server(("127.0.0.1", 0))
        app = create_app(model, engine, ServerSettings())
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/chat/completions"
        adapter = model.adapter("kettle")

        def directly() -> tuple[float, float]:
            started = time.perf_counter()
            prepared = model.prepare(QUESTION, adapter)
            request = GenerationRequest(
                prepared.prompt, lambda: model.lora_of(prepared.routed), routing_key(prepared.routed),
                Sampling(given.max_tokens),
            )  # fmt: skip
            tokens = iter(engine.submit(request))
            next(tokens)
            first = time.perf_counter()
            list(tokens)
            return first - started, time.perf_counter() - started

        command = [sys.executable, __file__, "--client", url, str(given.max_tokens)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdin is not None and client.stdout is not None
            asks, tells = client.stdin, client.stdout

            def through_http() -> tuple[float, float]:
                print(file=asks, flush=True)
                first, total = map(float, tells.readline().split())
                return first, total

            ways: dict[str, Callable[[], tuple[float, float]]] = {"engine": directly, "HTTP": through_http}
            for way in ways.values():
                way()
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for _ in range(given.requests):
                for name, way in ways.items():
                    times[name].append(way())
            asks.close()
        server.should_exit = True
        thread.join()
    print(
        f"{given.requests} requests of {given.max_tokens} tokens; medians in ms\n"
        "\n| | first token | all |\n|---|---|---|"
    )
    medians = {name: [1000 * statistics.median(one) for one in zip(*of, strict=True)] for name, of in times.items()}
    for name, (first, total) in medians.items():
        print(f"| {name} | {first:.1f} | {total:.1f} |")
    added = [http - engine for http, engine in zip(medians["HTTP"], medians["engine"], strict=True)]
    print(f"| added by HTTP | {added[0]:.1f} | {added[1]:.1f} |")


def ask_on_signal(url: str, max_tokens: int) -> None:
    """The client, a process of its own as clients are: a request for each line that it reads, and its two times."""
    body = {"model": "kettle", "messages": [{"role": "user", "content": QUESTION}], "stream": True}
    body["max_tokens"] = max_tokens
    with httpx.Client() as client:
        for _ in sys.stdin:
            started, first = time.perf_counter(), 0.0
            with client.stream("POST", url, json=body) as answer:
                for line in answer.iter_lines():
                    is_piece = line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content")
                    first = first or (time.perf_counter() if is_piece else 0.0)
            print(first - started, time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        ask_on_signal(sys.argv[2], int(sys.argv[3]))
    else:
        main()
