"""Measures the engine: tokens per second of rows that each have another adapter, beside rows without and one at a time.

    python benchmarks/engine.py --rows 32 --adapters 32 --tokens 48

The adapters are documents of one chunk each, learned with the base's shipped hypernetwork and routed as `ask` routes
them. Every answer has the same length, so that tokens are compared and not answers. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import loracast
from loracast.base.generate import Sampling, answer
from loracast.library.adapter import Adapter, routing_key
from loracast.serving.engine import LocalEngine
from loracast.serving.generation import EngineConfig, GenerationRequest

_PLACES = ("harbour", "museum", "library", "station", "market", "garden", "theatre", "bakery")
_THINGS = ("lantern", "kettle", "bridge", "printer", "bicycle", "piano", "telescope", "boiler")


def document(i: int) -> loracast.Document:
    """A short text of its own facts, one chunk."""
    place, thing = _PLACES[i % 8], _THINGS[i // 8 % 8]
    return loracast.Document.from_text(
        f"The {place} {thing} number {i} was built in {1800 + i}. Its code is {4000 + 7 * i}. It weighs {3 + i} kg and "
        f"stands on the {i + 1}. floor of the {place}. The warranty of the {thing} is {12 + i} months. Whoever wants "
        f"to repair the {thing} asks for the service line {200 + i}, which is open from nine to five on weekdays. A "
        f"new {thing} costs {50 + 3 * i} euros, and spare parts are kept in the cellar of the {place} for ten years.",
        title=f"{place} {thing} {i}",
    )


def question(i: int) -> str:
    return f"What is the code of the {_PLACES[i % 8]} {_THINGS[i // 8 % 8]}?"


def requests(model: loracast.Model, adapters: Sequence[Adapter], n_rows: int, n_tokens: int) -> list[GenerationRequest]:
    """One request for each row: with an adapter, or without where there are none."""
    sampling = Sampling(n_tokens, min_new_tokens=n_tokens)
    made = []
    for i in range(n_rows):
        which = i % max(len(adapters), 1)
        prepared = model.prepare(question(which), adapters[which] if adapters else (), always=True)
        made.append(
            GenerationRequest(
                prepared.prompt, model.lora_of(prepared.routed), routing_key(prepared.routed), sampling=sampling
            )
        )
    return made


def tokens_per_s(engine: LocalEngine, asked: Sequence[GenerationRequest]) -> float:
    """Throughput from the first request to the last token, prompts included."""
    started = time.perf_counter()
    tickets = [engine.submit(request) for request in asked]
    for ticket in tickets:
        ticket.text()
    return sum(ticket.n_tokens for ticket in tickets) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--alone", type=int, default=2, help="rows that are answered one at a time")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = loracast.load(library=Path(folder))
        adapters = [model.learn(document(i), f"document-{i}") for i in range(given.adapters)]
        config = EngineConfig(n_slots=given.rows, prefix_bytes=0)
        engine = LocalEngine(model.base, config)
        with_adapters = requests(model, adapters, given.rows, given.tokens)
        without = requests(model, [], given.rows, given.tokens)
        tokens_per_s(engine, with_adapters[:2])  # the static LoRA is found, memory is touched
        found: dict[str, list[float]] = {"with_adapters": [], "without": [], "one_at_a_time": [], "generate": []}
        for _ in range(given.repeats):
            found["with_adapters"].append(tokens_per_s(engine, with_adapters))
            found["without"].append(tokens_per_s(engine, without))
            rates = [tokens_per_s(engine, [one]) for one in with_adapters[: given.alone]]
            found["one_at_a_time"].append(sum(rates) / len(rates))
            started = time.perf_counter()
            for one in with_adapters[: given.alone]:
                assert not callable(one.lora)
                answer(model.base, one.prompt, one.lora, one.sampling)
            found["generate"].append(given.alone * given.tokens / (time.perf_counter() - started))
        engine.close()
    best = {name: max(rates) for name, rates in found.items()}
    print(
        json.dumps(
            {
                "rows": given.rows,
                "adapters": given.adapters,
                "tokens": given.tokens,
                "tokens_per_s": {name: [round(rate, 1) for rate in rates] for name, rates in found.items()},
                "with_beside_without": round(best["with_adapters"] / best["without"], 3),
                "batch_beside_one_at_a_time": round(best["with_adapters"] / best["one_at_a_time"], 2),
                "machine": {
                    "processor": platform.processor() or platform.machine(),
                    "threads": given.threads,
                    "dtype": str(model.base.model.dtype),
                    "torch": torch.__version__,
                },
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
