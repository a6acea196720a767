"""`loracast eval latency` and `memory`: what answering and learning take, and the operations of a query.

Floating point operations of a query, from a base's shapes alone (docs/evaluation.md has the formula).

They are counted as torch's own counter does: two for each multiply-add of a matmul, attention as full squares, nothing
for norms and activations.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loracast.answering.model import Model, load
from loracast.base.chat import encode_with_offsets
from loracast.base.forward import token_batches
from loracast.base.generate import Sampling
from loracast.cast.document import split_document
from loracast.documents import Document
from loracast.errors import LoracastError
from loracast.lab.data.needles import Haystack, Needle, make_needles
from loracast.lab.data.rows import read_texts
from loracast.lab.evaluation import documents
from loracast.lab.evaluation.documents import DocumentBaseline, DocumentCase, DocumentSetup
from loracast.lab.evaluation.report import Progress, Report, columns, no_progress
from loracast.lab.evaluation.runner import Answered, Baseline, Settings, ask_one, in_turn, peak_memory, warm_up
from loracast.lab.evaluation.synthetic import window_prompt
from loracast.lora.algebra import LoRA
from loracast.lora.target import layer_shapes, text_config
from loracast.reading.routing import DEFAULT_ROUTE


@dataclass(frozen=True)
class QueryFlops:
    """Operations of the forward passes of one base."""

    n_layers: int
    layer_weights: int
    """Numbers in the linear modules of one layer."""
    attention_width: int
    """Query heads times their width."""
    kv_width: int
    """Key and value heads times their width, of keys and values together."""
    head_weights: int
    """Numbers in the output head."""

    @classmethod
    def of(cls, config: Any) -> QueryFlops:
        """From a transformers config."""
        text, shapes = text_config(config), layer_shapes(config)
        return cls(
            n_layers=text.num_hidden_layers,
            layer_weights=sum(d_in * d_out for d_in, d_out in shapes.values()),
            attention_width=shapes["q_proj"][1],
            kv_width=shapes["k_proj"][1] + shapes["v_proj"][1],
            head_weights=text.hidden_size * text.vocab_size,
        )

    def forward(self, n_tokens: int, n_past: int = 0) -> int:
        """Operations of a pass over new tokens behind `n_past` that the cache holds; the output head runs once."""
        per_layer = 2 * n_tokens * self.layer_weights + 4 * n_tokens * (n_past + n_tokens) * self.attention_width
        return self.n_layers * per_layer + 2 * self.head_weights

    def query(self, n_prompt: int, n_new: int, lora: LoRA | None = None, n_kept: int = 0) -> int:
        """Operations of a prompt and an answer of `n_new` tokens, the last of which is not read.

        Args:
            n_kept: tokens of the prompt's beginning that the cache holds from before.
        """
        steps = sum(self.forward(1, n_prompt + i) for i in range(n_new - 1))
        return self.forward(n_prompt - n_kept, n_kept) + steps + (n_prompt - n_kept + n_new - 1) * lora_flops(lora)

    def cache_bytes(self, n_tokens: int, bytes_per_number: int = 2) -> int:
        """Size of the keys and values of so many tokens."""
        return self.n_layers * self.kv_width * n_tokens * bytes_per_number


def lora_flops(lora: LoRA | None) -> int:
    """Operations that a LoRA adds for each token."""
    if lora is None:
        return 0
    factors = sum(2 * (a.numel() + b.numel()) for a, b in lora.factors.values())
    return factors + sum(2 * delta.numel() for delta in lora.dense.values())


def counted(work: Callable[[], object]) -> int:
    """Operations of any work that runs on torch, by torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


_FIRST_TOKEN = Sampling(max_new_tokens=1)
_N_WARM_UP = 2

LATENCY_COLUMNS = columns(
    label="method", prompt_tokens=("prompt tokens", 0), first_token_s=("first token s, median", 4),
    fastest_s=("fastest", 4), slowest_s=("slowest", 4), ratio=("x base", 2),
)  # fmt: skip
MEMORY_COLUMNS = columns(
    n_tokens=("tokens", 0), n_chunks=("chunks", 0), base_mib=("loaded base MiB", 0),
    above_base_mib=("peak above it MiB", 0), learn_s=("learn s, all", 2), cast_s=("encode + cast s", 2),
    encode_s=("encoder alone s", 2), ratio=("ratio", 3), adapter_mib=("adapter MiB", 0),
    kb_per_token=("kB a token", 1),
)  # fmt: skip


@dataclass(frozen=True)
class LatencyConfig(Settings):
    """Settings of `loracast eval latency`."""

    POSITIVE = ("repetitions", "route")
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


@dataclass(frozen=True)
class MemoryConfig(documents.DocumentConfig):
    """Settings of `loracast eval memory`."""

    texts: tuple[str, ...]
    """Files with the prose of the documents."""
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    """Tokens of a document, each learned in a process of its own."""


def evaluate_latency(model: Model, config: LatencyConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Time the first token of the bare base, of an adapter on disk, and of the same document in the window.

    Every question is another one about another place, so that no LoRA is at hand from the question before.
    """
    setup = DocumentSetup(model, documents.RoutedConfig(route=config.route))
    writer = Report(out, "latency", LATENCY_COLUMNS, config, model.base, model.documents.id)
    text, needles = _document(model, config, config.tokens, config.repetitions + _N_WARM_UP)
    document = Document.from_text(text)
    on_disk = documents.LearnedDocument(document, [], setup.learn(document, "document"))
    baselines: dict[str, DocumentBaseline] = {
        "base": Baseline("no document", documents.no_document),
        "adapter": Baseline(f"adapter, routed {config.route}", documents.adapter("document")),
        "window": Baseline("in the window", documents.whole(window_prompt)),
    }
    answered: dict[str, list[Answered[DocumentCase]]] = {name: [] for name in baselines}
    warm_up(model.base)
    for i, needle in enumerate(needles):
        case = DocumentCase(on_disk, needle.question)
        for name in in_turn(list(baselines), i):
            answered[name].append(ask_one(setup, name, baselines[name], case, _FIRST_TOKEN)[0])
        progress(i + 1, len(needles))
    times = {name: [a.first_token_s or 0.0 for a in some[_N_WARM_UP:]] for name, some in answered.items()}
    base_s = statistics.median(times["base"])
    rows = []
    for name, seconds in times.items():
        median_s = statistics.median(seconds)
        row = {"baseline": name, "label": baselines[name].label, "n": len(seconds)}
        row |= {"prompt_tokens": answered[name][-1].n_prompt_tokens, "first_token_s": median_s}
        rows.append({**row, "fastest_s": min(seconds), "slowest_s": max(seconds), "ratio": median_s / base_s})
    return writer.write(rows)


def evaluate_memory(
    model: Model, loaded: Mapping[str, Any], config: MemoryConfig, out: Path, progress: Progress = no_progress
) -> Report:
    """Learn documents of several lengths, each in a fresh process that loads the same base and hypernetwork.

    Args:
        loaded: the arguments of `load` that give the model.

    Raises:
        LoracastError: such a process failed; the message ends with its last line.
    """
    writer = Report(out, "memory", MEMORY_COLUMNS, config, model.base, model.documents.id)
    rows = []
    with tempfile.TemporaryDirectory(prefix="loracast-eval-") as scratch:
        for i, length in enumerate(config.lengths):
            path = Path(scratch) / f"{length}.txt"
            path.write_text(_document(model, config, length, 1)[0], encoding="utf-8")
            order = {
                "load": {**loaded, "library": str(Path(scratch) / "adapters")}, "text": str(path),
                "chunk_tokens": config.chunk_tokens,
            }  # fmt: skip
            rows.append({"length": length, **_in_fresh_process(order)})
            progress(i + 1, len(config.lengths))
    return writer.write(rows)


def _document(model: Model, config: LatencyConfig | MemoryConfig, n_tokens: int, n: int) -> tuple[str, list[Needle]]:
    """Prose with that many needles spread over it, and the needles."""
    rng = random.Random(f"{config.seed}/{n_tokens}")
    needles = make_needles(rng, n, split="test", kind="number4")
    haystack = Haystack(read_texts(config.texts), lambda part: encode_with_offsets(model.base.tokenizer, part))
    return haystack.sample(rng, n_tokens, needles, [(i + 0.5) / n for i in range(n)]), needles


def _in_fresh_process(order: dict[str, Any]) -> dict[str, Any]:
    """What `learn_once` measures, in a process where neither an earlier document nor this one's memory counts."""
    command = [sys.executable, "-m", __name__, json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise LoracastError(f"learning {Path(order['text']).stem} tokens failed in its process: {last[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def learn_once(order: dict[str, Any]) -> dict[str, Any]:
    """Load, warm up, learn one document, then time casting against the encoder alone, batch by batch."""
    model = load(**order["load"])
    caster = model.documents
    # The document's hash tells it from the lengths before, which the library has.
    document = Document.from_text(Path(order["text"]).read_text(encoding="utf-8"))
    with torch.inference_mode():  # reads all the weights: before their first use they may not be in memory at all
        warm = next(token_batches(model.base, ["Warm up."]))
        model.base.model(torch.tensor(warm, device=model.base.device))
        caster.cast(caster.encode(warm))
    with peak_memory() as peak:
        started = time.perf_counter()
        adapter = model.learn(document, Path(order["text"]).stem, max_chunk_tokens=order["chunk_tokens"])
        learn_s = time.perf_counter() - started
    cast_s, encode_s = _cast_times(model, document, order["chunk_tokens"])
    n_tokens, n_bytes = adapter.manifest.n_tokens, adapter.n_bytes
    return {
        "n_tokens": n_tokens, "n_chunks": adapter.manifest.n_chunks, "base_mib": peak.before_mib,
        "above_base_mib": peak.above_mib, "learn_s": learn_s, "cast_s": cast_s, "encode_s": encode_s,
        "ratio": cast_s / encode_s, "adapter_mib": n_bytes / 2**20, "kb_per_token": n_bytes / 1000 / n_tokens,
    }  # fmt: skip


@torch.inference_mode()
def _cast_times(model: Model, document: Document, chunk_tokens: int) -> tuple[float, float]:
    """Seconds to encode and cast all chunks, and to encode them only (to the layer that is read).

    Both run on each batch in turn, so that whatever else the machine does meets both alike.
    """
    prompts = [chunk.prompt for chunk in split_document(model.base, document, chunk_tokens)]
    cast_s = encode_s = 0.0
    for batch in token_batches(model.base, prompts):
        started = _now(model)
        model.documents.encode(batch)
        between = _now(model)
        model.documents.cast(model.documents.encode(batch))
        encode_s += between - started
        cast_s += _now(model) - between
    return cast_s, encode_s


def _now(model: Model) -> float:
    if model.base.device.type == "cuda":
        torch.cuda.synchronize(model.base.device)
    return time.perf_counter()


if __name__ == "__main__":
    print(json.dumps(learn_once(json.loads(sys.argv[1]))))
