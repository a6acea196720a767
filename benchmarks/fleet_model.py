"""What a fleet of servers takes: its inputs, the simulation of its caches, and the cost of a question in each way."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fleet_cache import (
    Numbers,
    Shares,
    bytes_between,
    che_hit_rates,
    draw_requests,
    hit_rates,
    request_rates,
    requests_before,
)
from numpy.typing import NDArray

from loracast.lab.evaluation.cost import QueryFlops

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "results"
SHIPPED = ROOT / "src" / "loracast" / "pretrained" / "doc-smollm2-135m" / "config.json"
MEASURED_TOKENS = 1024
"""Tokens of the document whose questions were timed."""
SMOLLM2_135M = QueryFlops(
    n_layers=30, layer_weights=3_538_944, attention_width=576, kv_width=384, head_weights=576 * 49_152
)
ROUTINGS = {"by document": "each document has its replica", "any": "any replica answers"}
CACHED = ("adapters, int4", "keys and values")
"""What the two simulated caches hold."""


@dataclass(frozen=True)
class Fleet:
    """All that the simulation takes, each with its source; what is called an assumption was not measured."""

    first_token_s: Mapping[str, float]
    """Seconds to the first token with nothing (`base`), an adapter (`adapter`) and a text of 1,024 tokens in the window
    (`window`): docs/results/first-token.json."""
    learned: tuple[tuple[int, float], ...]
    """Tokens of documents, and the seconds that learning one took: docs/results/learning.json."""
    prompt_tokens: Mapping[str, float]
    """Tokens of a prompt with an adapter (`routed`), with 1,024 tokens in the window (`window`) and with a passage
    (`bm25`): docs/results/needle.json and needle-prompt.json."""
    lora_numbers: int
    """Numbers of the LoRA that a question gets: `numbers_of_lora` of the shipped hypernetwork's config."""

    flops: QueryFlops = SMOLLM2_135M
    """Shapes of the base: the config of SmolLM2-135M-Instruct."""
    chunk_bytes: tuple[tuple[str, float], ...] = (
        ("text", 2.7e3), ("int4", 0.669e6), ("int8", 0.669e6), ("bf16", 1.33e6),
    )  # fmt: skip
    """Bytes of one chunk in each storage: the table of docs/library.md."""
    static_bytes: tuple[tuple[str, float], ...] = (("text", 0), ("int4", 1.93e6), ("int8", 1.93e6), ("bf16", 3.78e6))
    """Bytes of the static LoRA in an adapter of each storage: docs/library.md."""
    tokens_per_chunk: float = 168.5
    """Tokens of a chunk: 24,601 tokens in 146 chunks (25,590 of another text in 152: docs/library.md)."""
    route: int = 2
    """Chunks that a question gets: what was timed."""
    lengths: tuple[float, ...] = (
        298, 748, 1012, 1346, 1692, 2093, 2428, 2739, 2949, 3205, 3426, 3659, 3966, 4337, 4483, 4602, 5126, 5541, 5633,
        5682, 6000,
    )  # fmt: skip
    """Quantiles of documents' tokens, evenly spaced: the field `tokens` of docqa_long.jsonl.gz, 645 documents."""
    documents: int = 1_000_000
    """Documents in the library (assumption)."""
    hot: int = 10_000
    """Documents that most requests are for (assumption)."""
    hot_share: float = 0.9
    """Share of requests that are for hot documents; the others are for all others alike (assumption)."""
    exponents: tuple[float, ...] = (0.6, 0.8, 1.0, 1.2)
    """Exponents of Zipf's law among the hot documents (assumption)."""
    requests: int = 1_000_000
    """Requests to the whole fleet, for each exponent."""
    replicas: int = 8
    """Servers, each with a cache of its own (assumption)."""
    memories: tuple[float, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Sizes of each replica's cache, in 10^9 bytes (assumption)."""
    exponent: float = 1.0
    """The exponent for the questions' table (assumption)."""
    memory: float = 32
    """The cache's size for the questions' table (assumption)."""
    answer_tokens: int = 8
    """Tokens of an answer (assumption)."""
    network: float = 125
    """10^6 bytes a second at which an adapter is fetched that the cache has not: 1 Gbit/s (assumption)."""
    watts: float = 15
    """Power that the machine draws while it works, as in `loracast eval cost` (assumption)."""
    seed: int = 0
    """Of lengths, replicas and requests."""

    def __post_init__(self) -> None:
        if not 0 < self.hot <= self.documents or not 0 < self.hot_share <= 1:
            raise ValueError("hot must be from 1 to documents, and hot_share above 0 and at most 1")
        if min(self.requests, self.replicas, self.answer_tokens, self.network, self.watts, *self.exponents) <= 0:
            raise ValueError("requests, replicas, answer_tokens, network, watts and exponents must be above 0")
        if self.exponent not in self.exponents or self.memory not in self.memories:
            raise ValueError("exponent must be one of exponents, and memory one of memories")
        if 1e9 * min(self.memories) < max(self.bytes_of(np.array([max(self.lengths)])).values()):
            raise ValueError("the smallest of memories must hold the longest document")

    def bytes_of(self, tokens: Numbers) -> dict[str, Numbers]:
        """Bytes of documents in each storage, and of their keys and values in bf16."""
        chunks = np.ceil(tokens / self.tokens_per_chunk)
        adapters = {
            storage: (chunks * size + dict(self.static_bytes)[storage]).astype(np.int64)
            for storage, size in self.chunk_bytes
        }
        return {**adapters, CACHED[1]: self.flops.cache_bytes(tokens)}

    def draw_lengths(self, rng: np.random.Generator) -> Numbers:
        """Tokens of each document, whatever its place among the requests."""
        return np.interp(rng.random(self.documents), np.linspace(0, 1, len(self.lengths)), self.lengths).astype(int)

    def learn_s(self, tokens: Any) -> Any:
        """Seconds to learn a document of so many tokens, between and beyond those that were measured."""
        (n_first, first), *_, (n_last, last) = self.learned
        found = np.interp(tokens, *zip(*self.learned, strict=True))
        return np.where(
            tokens < n_first, tokens * first / n_first, np.where(tokens > n_last, tokens * last / n_last, found)
        )


def numbers_of_lora(config: Mapping[str, Any], route: int) -> int:
    """Numbers of the factors that apply to a question with `route` chunks, as a hypernetwork's config has them."""

    def of(modules: Sequence[Sequence[Any]], rank: int) -> int:
        return rank * sum(d_in + d_out for *_, d_in, d_out in modules)

    per_chunk = of(config["modules"], config["rank"]) + of(config["memory_modules"], config["memory_rank"])
    static = of(config["modules"], config["static_rank"]) + of(config["static_modules"], config["static_modules_rank"])
    return route * per_chunk + static


def read_fleet(figures: Path = FIGURES, **assumed: Any) -> Fleet:
    """The fleet with all that is measured."""

    def rows(name: str) -> list[dict[str, Any]]:
        return json.loads((figures / f"{name}.json").read_text(encoding="utf-8"))["rows"]

    asked = {
        row["baseline"]: row["prompt_tokens"]
        for row in rows("needle") + rows("needle-prompt")
        if row["length"] == MEASURED_TOKENS
    }
    return Fleet(
        first_token_s={row["baseline"]: row["first_token_s"] for row in rows("first-token")},
        learned=tuple((row["n_tokens"], row["learn_s"]) for row in rows("learning")),
        prompt_tokens=asked,
        lora_numbers=numbers_of_lora(json.loads(SHIPPED.read_text(encoding="utf-8"))["config"], Fleet.route),
        **assumed,
    )


def read_lengths(path: Path) -> tuple[float, ...]:
    """Percentiles of the field `tokens` of JSONL rows, gzipped or not."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
        tokens = [json.loads(line)["tokens"] for line in lines]
    return tuple(np.percentile(tokens, np.arange(101)).tolist())


# ---- caches


@dataclass(frozen=True)
class Simulated:
    """What the caches of all replicas did, for both of `CACHED`."""

    hits: Shares
    """Share of requests that they answered: [memories, 2]."""
    che: Shares
    """The same by Che's formula."""
    requests: Numbers
    """The documents that were asked for."""
    is_hit: NDArray[np.bool_]
    """Whether a cache of `Fleet.memory` had each: [requests, 2]."""


def simulate(fleet: Fleet, tokens: Numbers, exponent: float, routing: str) -> Simulated:
    """Send the requests to the replicas, whose caches have been in use for ever.

    Where any replica answers, all are asked alike, so one stands for all of them.
    """
    rng = np.random.default_rng([fleet.seed, *ROUTINGS[routing].encode(), round(1000 * exponent)])
    sizes = fleet.bytes_of(tokens)
    n_bytes = np.stack([sizes["int4"], sizes[CACHED[1]]], axis=1)
    rates = request_rates(fleet.documents, fleet.hot, fleet.hot_share, exponent)
    memories = [1e9 * memory for memory in fleet.memories]
    if routing == "any":
        requests, owner, n_replicas = draw_requests(rng, rates, fleet.requests // fleet.replicas), None, 1
    else:
        requests, n_replicas = draw_requests(rng, rates, fleet.requests), fleet.replicas
        owner = rng.integers(n_replicas, size=fleet.documents)
    parts, apart, che, weights = [], [], [], []
    for replica in range(n_replicas):
        mine = np.arange(fleet.documents) if owner is None else np.flatnonzero(owner == replica)
        asked = requests if owner is None else requests[owner[requests] == replica]
        if not len(asked):
            continue
        before = mine[requests_before(rng, rates[mine], n_bytes[mine].min(1), max(memories))]
        apart.append(bytes_between(np.concatenate([before, asked]), n_bytes)[len(before) :])
        parts.append(asked)
        che.append(np.stack([che_hit_rates(rates[mine], of[mine], memories) for of in n_bytes.T], axis=1))
        weights.append(rates[mine].sum())
    together = np.concatenate(apart)
    return Simulated(
        hits=hit_rates(together, memories),
        che=np.average(che, axis=0, weights=weights),
        requests=np.concatenate(parts),
        is_hit=together <= 1e9 * fleet.memory,
    )


# ---- questions


@dataclass(frozen=True)
class Way:
    """What 1,000 questions take, answered in one way."""

    label: str
    hits: float | None
    """Share of requests that the cache answered."""
    read_tokens: float
    """Tokens of the prompt that are computed, mean of a question."""
    gflop: float | None
    """10^9 operations, of the prompt and the answer; None where nothing counts them."""
    seconds: float
    """To the first token, all questions together, one after the other."""
    joules: float
    fetched_gb: float
    """10^9 bytes that come over the network."""


def ways(fleet: Fleet, tokens: Numbers, found: Simulated) -> list[Way]:
    """What 1,000 questions take in each way, as means over the simulated requests."""
    n, flops, timed = tokens[found.requests], fleet.flops, fleet.first_token_s
    asked = {name: round(value) for name, value in fleet.prompt_tokens.items()}
    around = asked["window"] - MEASURED_TOKENS  # question and instruction

    def computed(n_read: Any, n_kept: Any = 0) -> Any:
        """Operations that take time: causal attention leaves out half of the new tokens' square."""
        return flops.forward(n_read, n_kept) - 2 * flops.n_layers * flops.attention_width * n_read**2

    first = computed(asked["routed"])
    s_per_flop = (timed["window"] - timed["base"]) / (computed(asked["window"]) - first)

    def way(
        label: str, n_prompt: Any, *, n_kept: Any = 0, is_hit: Any = None, missing: Any = 0, cast_s: Any = None,
        uses_adapter: bool = False,
    ) -> Way:  # fmt: skip
        n_read = n_prompt - n_kept
        operations = flops.query(n_prompt, fleet.answer_tokens, n_kept=n_kept)
        seconds = timed["base"] + (computed(n_read, n_kept) - first) * s_per_flop
        if uses_adapter:
            operations = operations + (n_read + fleet.answer_tokens - 1) * 2 * fleet.lora_numbers
            seconds = timed["adapter"] + missing / (1e6 * fleet.network) + (cast_s or 0.0)
        mean_s = 1000 * float(np.mean(seconds))
        return Way(
            label=label,
            hits=None if is_hit is None else float(np.mean(is_hit)),
            read_tokens=float(np.mean(n_read)),
            gflop=None if cast_s else 1000 * float(np.mean(operations)) / 1e9,
            seconds=mean_s,
            joules=fleet.watts * mean_s,
            fetched_gb=1000 * float(np.mean(missing)) / 1e9,
        )

    sizes, (has_adapter, has_kv) = fleet.bytes_of(tokens), found.is_hit.T
    cast_s = float(fleet.learn_s(fleet.route * fleet.tokens_per_chunk))
    return [
        way("adapter, int4", asked["routed"], uses_adapter=True, is_hit=has_adapter,
            missing=~has_adapter * sizes["int4"][found.requests]),
        way("adapter kept as text, cast for each question", asked["routed"], uses_adapter=True, cast_s=cast_s,
            missing=sizes["text"][found.requests]),
        way("document in the window", n + around),
        way("document in the window, prefix cache", n + around, n_kept=has_kv * n, is_hit=has_kv),
        way("passage of BM25 in the window", asked["bm25"]),
    ]  # fmt: skip
