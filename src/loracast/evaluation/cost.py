"""`loracast eval latency` and `memory`: time to the first token, and memory and time of learning a document."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracast.base.chat import encode_with_offsets
from loracast.base.generate import Sampling, answer
from loracast.cast.document import learn_document
from loracast.data.needles import make_needles
from loracast.data.rows import read_texts
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.errors import ConfigError, LoracastError
from loracast.evaluation.documents import DocumentCase, DocumentSetup, whole
from loracast.evaluation.haystack import Haystack, Sample
from loracast.evaluation.in_memory import InMemoryAdapter
from loracast.evaluation.report import Progress, Report, ReportWriter, no_progress, number, text
from loracast.evaluation.runner import warm_up
from loracast.evaluation.synthetic import window_prompt
from loracast.library.adapter import Adapter
from loracast.library.library import open_adapter
from loracast.library.routing import DEFAULT_ROUTE
from loracast.model import ASK_SYSTEM_TURN, Model

_FIRST_TOKEN = Sampling(max_new_tokens=1)
_N_WARM_UP = 2

LATENCY_COLUMNS = (
    text("label", "what answers"),
    number("prompt_tokens", "prompt tokens"),
    number("first_token_s", "first token s, median", 4),
    number("fastest_s", "fastest", 4),
    number("slowest_s", "slowest", 4),
    number("ratio", "x base", 2),
)
MEMORY_COLUMNS = (
    number("n_tokens", "tokens"),
    number("n_chunks", "chunks"),
    number("base_mib", "loaded base MiB"),
    number("above_base_mib", "peak above it MiB"),
    number("learn_s", "learn s, all", 2),
    number("cast_s", "encode + cast s", 2),
    number("encode_s", "encoder alone s", 2),
    number("ratio", "ratio", 3),
    number("adapter_mib", "adapter MiB"),
)


@dataclass(frozen=True)
class LatencyConfig:
    """What `loracast eval latency` measures."""

    texts: tuple[str, ...]
    """Files with the prose of the document."""
    tokens: int = 8192
    """Tokens of the document."""
    repetitions: int = 20
    """Questions, each asked of every baseline in turn."""
    route: int = DEFAULT_ROUTE
    """Chunks that a question is given."""
    seed: int = 0
    """Seed of document and questions."""

    def __post_init__(self) -> None:
        if self.repetitions < 1 or self.route < 1:
            raise ConfigError("repetitions and route must be at least 1")


@dataclass(frozen=True)
class MemoryConfig:
    """What `loracast eval memory` measures."""

    texts: tuple[str, ...]
    """Files with the prose of the documents."""
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    """Tokens of a document, each learned in a process of its own."""
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    """Longest chunk, in tokens."""
    seed: int = 0
    """Seed of the documents."""


def evaluate_latency(model: Model, config: LatencyConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Time the first token of the bare base, of an adapter on disk, and of the same document in the window.

    Every question is another one about another place, so that no LoRA is at hand from the question before.
    """
    setup = DocumentSetup(model, config.route)
    writer = ReportWriter(out, "latency", LATENCY_COLUMNS, config, model.base, model.documents.id)
    sample = _document(model, config.texts, config.tokens, config.seed, config.repetitions + _N_WARM_UP)
    times: dict[str, list[float]] = {"base": [], "adapter": [], "window": []}
    n_prompt: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="loracast-eval-") as scratch:
        document = InMemoryAdapter(model, sample.text)
        learn_document(model.documents, model.base, document.document, Path(scratch), "document")
        adapter = open_adapter(Path(scratch), "document")
        warm_up(setup.model.base)
        for i, needle in enumerate(sample.needles):
            case = DocumentCase(document, document, needle.question)
            order = list(times)
            for name in order[i % 3 :] + order[: i % 3]:  # in turn the first, which finds the caches cold
                seconds, n_prompt[name] = _first_token(setup, name, case, adapter)
                if i >= _N_WARM_UP:
                    times[name].append(seconds)
            progress(i + 1, len(sample.needles))
        document.close()
    labels = {"base": "no document", "adapter": f"adapter, routed {config.route}", "window": "in the window"}
    base_s = statistics.median(times["base"])
    rows = [
        {
            "baseline": name,
            "label": labels[name],
            "n": len(seconds),
            "prompt_tokens": n_prompt[name],
            "first_token_s": statistics.median(seconds),
            "fastest_s": min(seconds),
            "slowest_s": max(seconds),
            "ratio": statistics.median(seconds) / base_s,
        }
        for name, seconds in times.items()
    ]
    return writer.write(rows)


def evaluate_memory(
    model: Model,
    base: str | None,
    hypernetwork: str | None,
    config: MemoryConfig,
    out: Path,
    progress: Progress = no_progress,
) -> Report:
    """Learn documents of several lengths, each in a fresh process that loads the same base and hypernetwork.

    Raises:
        LoracastError: such a process failed; the message ends with its last line.
    """
    writer = ReportWriter(out, "memory", MEMORY_COLUMNS, config, model.base, model.documents.id)
    rows = []
    with tempfile.TemporaryDirectory(prefix="loracast-eval-") as scratch:
        for i, length in enumerate(config.lengths):
            path = Path(scratch) / f"{length}.txt"
            path.write_text(_document(model, config.texts, length, config.seed, 1).text, encoding="utf-8")
            order = {
                "base": base,
                "hypernetwork": hypernetwork,
                "device": str(model.base.device),
                "text": str(path),
                "library": str(Path(scratch) / "adapters"),
                "chunk_tokens": config.chunk_tokens,
            }
            rows.append({"length": length, **_in_fresh_process(order)})
            progress(i + 1, len(config.lengths))
    return writer.write(rows)


def _first_token(setup: DocumentSetup, name: str, case: DocumentCase, adapter: Adapter) -> tuple[float, int]:
    """Seconds from the question to the first token, and the prompt's tokens."""
    model = setup.model
    started = time.perf_counter()
    if name == "window":
        prompt = list(whole(window_prompt)(setup, case).prompt)
    else:
        prompt = model.base.chat.prompt(case.question, ASK_SYSTEM_TURN)
    lora = model.lora_for(case.question, adapter, setup.route)[0] if name == "adapter" else None
    prepared_s = time.perf_counter() - started
    return prepared_s + answer(model.base, prompt, lora, _FIRST_TOKEN).first_token_s, len(prompt)


def _document(model: Model, texts: tuple[str, ...], n_tokens: int, seed: int, n_needles: int) -> Sample:
    """Prose with that many needles spread over it."""
    rng = random.Random(f"{seed}/{n_tokens}")
    needles = make_needles(rng, n_needles, split="test", kind="number4")
    haystack = Haystack(read_texts(texts), lambda part: encode_with_offsets(model.base.tokenizer, part))
    return haystack.sample(rng, n_tokens, needles, [(i + 0.5) / n_needles for i in range(n_needles)])


def _in_fresh_process(order: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "loracast.evaluation.learn_once", json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise LoracastError(f"learning {Path(order['text']).stem} tokens failed in its process: {last[0]}")
    return json.loads(done.stdout.splitlines()[-1])
