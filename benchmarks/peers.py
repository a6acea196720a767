"""Throughput with several adapters at once: `loracast serve` beside vLLM, llama.cpp and transformers.

    python benchmarks/peers.py [--vllm URL] [--llama-cpp node_modules/node-llama-cpp] [--adapters 8] [--rows 4]

All get the same adapters (documents of one chunk, exported for each), the same token ids, all rows at the same moment,
and give answers of the same length; transformers answers one row of each adapter, one at a time. vLLM must be running
(docs/serving.md has the command; --max-lora-rank 64 is enough here), so that its start does not count; what is not
given is left out. llama.cpp runs the Q4_1 weights that the embedded base was made from, with a context for each
adapter. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import httpx
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import loracast
from loracast.base.chat import encode_text
from loracast.base.embedded import DEFAULT_BASE, embedded_folder
from loracast.export.adapter import export_adapter
from loracast.export.base import base_gguf
from loracast.lab.evaluation.report import markdown
from loracast.serving.generation import GenerationRequest, Ticket
from servers import eventually, is_ready

PROMPTS = (
    "Here is what a visitor should know about the {}.",
    "This is a long letter about the {}.",
    "The history of the {} has several parts.",
    "These are notes for whoever repairs the {}.",
)


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


class Row(NamedTuple):
    """One prompt for one adapter."""

    adapter: str
    prompt: list[int]


def at_once(complete: Callable[[Row], int], rows: Sequence[Row], repeats: int) -> float:
    """Tokens per second of all rows together, the best of some times; `complete` gives a row's number of tokens."""
    rates = []
    with ThreadPoolExecutor(len(rows)) as threads:
        list(threads.map(complete, {row.adapter: row for row in rows}.values()))  # adapters are loaded
        for _ in range(repeats):
            started = time.perf_counter()
            n_tokens = sum(threads.map(complete, rows))
            rates.append(n_tokens / (time.perf_counter() - started))
    return max(rates)


def serve(library: Path, engine: str, port: int) -> None:
    """What `loracast serve --engine ENGINE` runs, but that no answer ends before it has its `max_tokens`."""
    from loracast.serving.app import create_app, make_engine, run
    from loracast.serving.settings import ServerSettings

    settings = ServerSettings(port=port, engine=engine)
    with settings.bound() as listening:
        model = loracast.load(library=library)
        made = make_engine(model.base, settings)
        submit = made.submit

        def submit_whole(request: GenerationRequest) -> Ticket:
            length = request.sampling.max_new_tokens
            return submit(replace(request, sampling=replace(request.sampling, min_new_tokens=length)))

        made.submit = submit_whole
        run(create_app(model, made, settings), settings, listening)


@contextmanager
def served(library: Path, engine: str) -> Iterator[str]:
    """The URL of a server of a library, in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = get_context("spawn").Process(target=serve, args=(library, engine, port))
    server.start()
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: is_ready(url) or not server.is_alive(), 120)
        if not server.is_alive():
            raise SystemExit("the server does not start")
        yield url
    finally:
        server.terminate()
        server.join(60)


def completes(http: httpx.Client, url: str, n_tokens: int, **more: object) -> Callable[[Row], int]:
    """Asks a server with OpenAI's API."""

    def complete(row: Row) -> int:
        body = {"model": row.adapter, "prompt": row.prompt, "max_tokens": n_tokens, "temperature": 0, **more}
        return http.post(f"{url}/v1/completions", json=body).raise_for_status().json()["usage"]["completion_tokens"]

    return complete


def in_vllm(http: httpx.Client, folders: dict[str, Path], rows: Sequence[Row], given: argparse.Namespace) -> float:
    """vLLM asked directly, with the adapters loaded for the time of the measurement."""
    for name, folder in folders.items():
        body = {"lora_name": name, "lora_path": str(folder)}
        http.post(f"{given.vllm}/v1/load_lora_adapter", json=body).raise_for_status()
    try:
        return at_once(completes(http, given.vllm, given.tokens, min_tokens=given.tokens), rows, given.repeats)
    finally:
        for name in folders:
            http.post(f"{given.vllm}/v1/unload_lora_adapter", json={"lora_name": name}).raise_for_status()


def in_llama_cpp(package: Path, files: dict[str, Path], rows: Sequence[Row], given: argparse.Namespace) -> float:
    script = Path(__file__).with_name("peers_llama_cpp.mjs")
    prompts = {name: [row.prompt for row in rows if row.adapter == name] for name in files}
    asked = [{"file": str(file), "prompts": prompts[name]} for name, file in files.items()]
    order = json.dumps({"adapters": asked, "tokens": given.tokens, "threads": torch.get_num_threads()})
    command = ["node", script, package.resolve(), base_gguf(DEFAULT_BASE)]
    done = subprocess.run([str(part) for part in command], input=order, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["tokens_per_s"]


def in_transformers(folders: dict[str, Path], rows: Sequence[Row], given: argparse.Namespace) -> float:
    """transformers with PEFT: one row of each adapter, one after the other."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(embedded_folder(DEFAULT_BASE), dtype=given.dtype).eval()
    (first, *others) = folders
    model = PeftModel.from_pretrained(base, str(folders[first]), adapter_name=first)
    for name in others:
        model.load_adapter(str(folders[name]), adapter_name=name)
    n_tokens, started = 0, time.perf_counter()
    for row in {row.adapter: row for row in rows}.values():
        model.set_adapter(row.adapter)
        ids, length = torch.tensor([row.prompt]), {"max_new_tokens": given.tokens, "min_new_tokens": given.tokens}
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length)
        n_tokens += made.shape[1] - ids.shape[1]
    return n_tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="URL of a running vLLM server with the embedded base")
    parser.add_argument("--llama-cpp", type=Path, help="folder of the npm package node-llama-cpp")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4, choices=range(1, len(PROMPTS) + 1), help="of each adapter")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary, httpx.Client(timeout=300) as http:
        folder = Path(temporary)
        model = loracast.load(library=folder / "library")
        given.dtype = model.base.model.dtype
        rows, peft, gguf = [], {}, {}
        for i in range(given.adapters):
            text = document(i)
            adapter = model.learn(text, name := f"document-{i}")
            peft[name] = export_adapter(adapter, "vllm", folder / "peft" / name)[0].path
            if given.llama_cpp:
                gguf[name] = export_adapter(adapter, "gguf", folder / "gguf" / name)[0].path
            prompts = [prompt.format(text.title) for prompt in PROMPTS[: given.rows]]
            rows += [Row(name, encode_text(model.base.tokenizer, prompt)) for prompt in prompts]
        del model
        with served(folder / "library", "local") as url:
            rates["loracast serve"] = at_once(completes(http, url, given.tokens, always=True), rows, given.repeats)
        if given.vllm:
            rates["vLLM"] = in_vllm(http, peft, rows, given)
            with served(folder / "library", given.vllm) as url:
                asks = completes(http, url, given.tokens, always=True)
                rates["loracast serve --engine (vLLM)"] = at_once(asks, rows, given.repeats)
        if given.llama_cpp:
            rates["llama.cpp (Q4_1)"] = in_llama_cpp(given.llama_cpp, gguf, rows, given)
        rates["transformers with PEFT, one at a time"] = in_transformers(peft, rows, given)
    print(f"\n{given.adapters} adapters x {given.rows} rows, {given.tokens} tokens each; {os.cpu_count()} cores\n")
    rows = [(engine, f"{rate:.1f}", f"{rate / rates['loracast serve']:.2f}") for engine, rate in rates.items()]
    print(markdown([("engine", "tokens/s", "beside loracast serve"), *rows]))


if __name__ == "__main__":
    main()
