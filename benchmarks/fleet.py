"""What a fleet of servers would take: a million documents, of which a few are asked for often. A simulation.

    python benchmarks/fleet.py [--lengths docqa_long.jsonl.gz] [--memories 8 32 128] [--watts 15] [--images DIR] ...

Prints three tables: bytes of all adapters in each storage; the share of requests that each replica's cache answers, by
its memory and by how unevenly documents are asked for, simulated and by Che's formula; and what 1,000 questions take
with an adapter, with the document in the window, with and without a prefix cache, and with a retrieved passage.
docs/scale.md has the formulas. Whatever is measured comes from docs/results; the options are assumptions, each a field
of `Fleet`.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracast.lab.evaluation.cost import QueryFlops
from loracast.lab.evaluation.report import markdown
from loracast.lab.training.loop import pyplot

sys.path.insert(0, str(Path(__file__).parent))
from picture import draw_bars

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
Numbers = NDArray[np.int64]
Shares = NDArray[np.float64]


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
    """Bytes of one chunk in each storage: the table of docs/library.md; a server keeps the static LoRA once."""
    tokens_per_chunk: float = 168.5
    """Tokens of a chunk: 24,601 tokens in 146 chunks (27,072 of another text in 160: docs/library.md)."""
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
        adapters = {name: (chunks * size).astype(np.int64) for name, size in self.chunk_bytes}
        return {**adapters, CACHED[1]: self.flops.cache_bytes(tokens)}

    def draw_lengths(self, rng: np.random.Generator) -> Numbers:
        """Tokens of each document, whatever its place among the requests."""
        return np.interp(rng.random(self.documents), np.linspace(0, 1, len(self.lengths)), self.lengths).astype(int)

    def learn_s(self, tokens: Any) -> Any:
        """Seconds to learn a document of so many tokens, between and beyond those that were measured."""
        (n_first, first), *_, (n_last, last) = self.learned
        between = np.interp(tokens, *zip(*self.learned, strict=True))
        cases = [tokens < n_first, tokens > n_last]
        return np.select(cases, [tokens * first / n_first, tokens * last / n_last], between)


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

    asked = [row for row in rows("needle") + rows("needle-prompt") if row["length"] == MEASURED_TOKENS]
    return Fleet(
        first_token_s={row["baseline"]: row["first_token_s"] for row in rows("first-token")},
        learned=tuple((row["n_tokens"], row["learn_s"]) for row in rows("learning")),
        prompt_tokens={row["baseline"]: row["prompt_tokens"] for row in asked},
        lora_numbers=numbers_of_lora(json.loads(SHIPPED.read_text(encoding="utf-8"))["config"], Fleet.route),
        **assumed,
    )


def read_lengths(path: Path) -> tuple[float, ...]:
    """Percentiles of the field `tokens` of JSONL rows, gzipped or not."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
        tokens = [json.loads(line)["tokens"] for line in lines]
    return tuple(np.percentile(tokens, np.arange(101)).tolist())


# ---- caches that drop what was used least recently
#
# Documents are requested independently of each other, each at a rate of its own. A cache keeps whatever was requested
# last, as far as its bytes go. Memory smaller than a document is outside this model.


def request_rates(n: int, n_hot: int, hot_share: float, exponent: float) -> Shares:
    """The rate of each of `n` documents: Zipf's law over the hot ones, the others alike; they add up to 1."""
    zipf = np.arange(1, n_hot + 1, dtype=float) ** -exponent
    if n == n_hot:
        return zipf / zipf.sum()
    return np.concatenate([hot_share * zipf / zipf.sum(), np.full(n - n_hot, (1 - hot_share) / (n - n_hot))])


def draw_requests(rng: np.random.Generator, rates: Shares, n: int) -> Numbers:
    """Draw `n` documents in proportion to their rates."""
    ends = np.cumsum(rates)
    return np.minimum(np.searchsorted(ends, rng.random(n) * ends[-1], side="right"), len(rates) - 1)


def requests_before(rng: np.random.Generator, rates: Shares, n_bytes: Numbers, max_bytes: float) -> Numbers:
    """The last requests to a cache that has been in use for ever, the oldest first: so nothing has to warm up.

    The time since a document was last requested is exponential with its rate, so the order of these times is drawn. No
    more documents are given than `max_bytes` can hold.
    """
    latest = np.argsort(rng.exponential(size=len(rates)) / rates)
    n_held = np.searchsorted(np.cumsum(n_bytes[latest]), max_bytes, side="right")
    return latest[:n_held][::-1]


def hits_of_cache(requests: Numbers, n_bytes: Numbers, memory: float) -> NDArray[np.bool_]:
    """Whether a cache of `memory` bytes, at first empty, has each document when it is requested.

    Args:
        requests: documents in the order of their requests.
        n_bytes: bytes of each document.
    """
    held: OrderedDict[int, int] = OrderedDict()
    sizes, free, hits = n_bytes.tolist(), memory, []
    for document in requests.tolist():
        hits.append(document in held)
        if document in held:
            held.move_to_end(document)
            continue
        held[document] = sizes[document]
        free -= sizes[document]
        while free < 0:
            free += held.popitem(last=False)[1]
    return np.array(hits)


def che_hit_rates(rates: Shares, n_bytes: Numbers, memories: Sequence[float]) -> Shares:
    """The same by Che's approximation, for one kind of storage: [memories].

    A document is in the cache if it was requested within the last T requests, which has the probability
    1 - exp(-rate T); T is such that the bytes expected in the cache are its memory (Che, Tung and Wang, "Hierarchical
    Web caching systems", IEEE JSAC 20(7), 2002).
    """
    alike, of = np.unique(rates, return_inverse=True)  # documents of one rate are taken together
    requested, held = np.bincount(of, rates), np.bincount(of, n_bytes)
    found = []
    for memory in memories:
        low, high = 0.0, 50 / alike[0]
        for _ in range(60):
            middle = (low + high) / 2
            is_less = held @ -np.expm1(-alike * middle) < memory
            low, high = (middle, high) if is_less else (low, middle)
        found.append(requested @ -np.expm1(-alike * low) / requested.sum())
    return np.array(found)


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
        requests = draw_requests(rng, rates, fleet.requests // fleet.replicas)
        owner = np.zeros(fleet.documents, int)
    else:
        requests = draw_requests(rng, rates, fleet.requests)
        owner = rng.integers(fleet.replicas, size=fleet.documents)
    parts, hits, che, weights = [], [], [], []
    for replica in range(owner.max() + 1):
        mine, asked = np.flatnonzero(owner == replica), requests[owner[requests] == replica]
        if not len(asked):
            continue
        before = mine[requests_before(rng, rates[mine], n_bytes[mine].min(1), max(memories))]
        all_requests = np.concatenate([before, asked])
        each = [[hits_of_cache(all_requests, of, memory)[len(before) :] for of in n_bytes.T] for memory in memories]
        hits.append(np.array(each))
        parts.append(asked)
        che.append(np.stack([che_hit_rates(rates[mine], of[mine], memories) for of in n_bytes.T], axis=1))
        weights.append(rates[mine].sum())
    together = np.concatenate(hits, axis=2)  # [memories, 2, requests]
    return Simulated(
        hits=together.mean(axis=2),
        che=np.average(che, axis=0, weights=weights),
        requests=np.concatenate(parts),
        is_hit=together[fleet.memories.index(fleet.memory)].T,
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
        read, mean_s, fetched_gb = np.mean(n_read), 1000 * np.mean(seconds), 1000 * np.mean(missing) / 1e9
        gflop = None if cast_s else 1000 * np.mean(operations) / 1e9
        hits = None if is_hit is None else np.mean(is_hit)
        return Way(label, hits, read, gflop, mean_s, fleet.watts * mean_s, fetched_gb)

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


# ---- tables and pictures


def storage_table(fleet: Fleet, tokens: Numbers) -> str:
    """Bytes of all documents and of the hot ones, in each storage."""
    lines = [["storage", "kB a token", "one document, MB", "all documents, TB", "hot documents, GB"]]
    for name, size in fleet.bytes_of(tokens).items():
        figures = (size.sum() / tokens.sum() / 1e3, size.mean() / 1e6, size.sum() / 1e12, size[: fleet.hot].sum() / 1e9)
        lines.append([name, *(f"{value:,.3g}" if value < 100 else f"{value:,.0f}" for value in figures)])
    return markdown(lines)


def hits_table(fleet: Fleet, found: Mapping[tuple[float, str], Simulated]) -> str:
    """Hits of each cache, in brackets by Che's formula."""
    lines = [["cache of", "Zipf", "answered by", *(f"{memory:g} GB" for memory in fleet.memories)]]
    for k, what in enumerate(CACHED):
        for (exponent, routing), one in found.items():
            cells = [f"{100 * a:.1f} ({100 * b:.1f})" for a, b in zip(one.hits[:, k], one.che[:, k], strict=True)]
            lines.append([what, f"{exponent:g}", ROUTINGS[routing], *cells])
    return markdown(lines)


def ways_table(fleet: Fleet, tokens: Numbers, found: Simulated) -> Iterator[str]:
    """What 1,000 questions take, and after how many questions of a document its adapter has paid for itself."""
    lines = [["method", "hits %", "tokens read", "GFLOP", "s to the first tokens", "kJ", "fetched, GB"]]
    all_ways = ways(fleet, tokens, found)
    for one in all_ways:
        hits = "-" if one.hits is None else f"{100 * one.hits:.1f}"
        gflop = "not counted" if one.gflop is None else f"{one.gflop:,.0f}"
        times = [f"{one.seconds:,.0f}", f"{one.joules / 1000:,.1f}", f"{one.fetched_gb:,.2f}"]
        lines.append([one.label, hits, f"{one.read_tokens:,.0f}", gflop, *times])
    yield markdown(lines)
    adapter, _, *others = all_ways
    learn_s = float(fleet.learn_s(tokens).mean())
    days = learn_s * len(tokens) / 86400
    yield f"\nLearning a document takes {learn_s:.2f} s ({learn_s * fleet.watts:.0f} J), all of them {days:,.0f} days."
    for other in others:
        saved_s = (other.seconds - adapter.seconds) / 1000
        pays = f"{learn_s / saved_s:,.1f} questions" if saved_s > 0 else "no number of questions"
        yield f"Against '{other.label}' that is paid back after {pays} about it."


def draw_hits(fleet: Fleet, found: Mapping[tuple[float, str], Simulated], path: Path) -> None:
    """Hits by memory: a line for each exponent, dashed where any replica answers; dots are Che's formula."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for k, (axis, what) in enumerate(zip(axes, CACHED, strict=True)):
        for (exponent, routing), one in found.items():
            colour = f"C{fleet.exponents.index(exponent)}"
            style = "-" if routing == "by document" else "--"
            label = f"Zipf {exponent:g}, {ROUTINGS[routing]}"
            axis.plot(fleet.memories, 100 * one.hits[:, k], style, color=colour, label=label)
            axis.plot(fleet.memories, 100 * one.che[:, k], ".", color=colour)
        axis.set_xscale("log", base=2)
        axis.set_xticks(fleet.memories, [f"{memory:g}" for memory in fleet.memories])
        axis.set(title=f"cache of {what}", xlabel="memory of each replica, GB", ylim=(0, 100))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("requests answered from the cache, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_questions(fleet: Fleet, tokens: Numbers, found: Simulated, path: Path) -> None:
    """Bytes of all documents in each storage, and the energy of 1,000 questions in each way."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 2.6), layout="constrained")
    stored = {name: float(size.sum()) / 1e12 for name, size in fleet.bytes_of(tokens).items()}
    energy = {one.label: one.joules / 1000 for one in ways(fleet, tokens, found)}
    titles = (f"{fleet.documents:,} documents, TB", "1,000 questions, kJ to the first tokens")
    for axis, shown, title in zip(axes, (stored, energy), titles, strict=True):
        draw_bars(axis, title, list(shown), list(shown.values()), ",.3g", "#3949ab")
        axis.invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


OPTIONS = (
    "documents", "hot", "hot_share", "exponents", "requests", "replicas", "memories", "exponent", "memory",
    "answer_tokens", "network", "watts", "seed",
)  # fmt: skip
"""Fields of `Fleet` that the command line takes: all assumptions."""


def read_arguments(arguments: Sequence[str] | None = None) -> tuple[Fleet, Path | None]:
    """The fleet that a command line asks for, and the folder for its pictures."""
    shown_as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown_as_is, allow_abbrev=False)
    for one in fields(Fleet):
        if one.name in OPTIONS:
            parser.add_argument(
                f"--{one.name.replace('_', '-')}", default=one.default, help=f"{one.default} by default",
                type=float if "float" in str(one.type) else int, nargs="+" if isinstance(one.default, tuple) else None,
            )  # fmt: skip
    parser.add_argument("--lengths", type=Path, metavar="FILE", help="JSONL(.gz) rows with the `tokens` of documents")
    parser.add_argument("--images", type=Path, metavar="DIR", help="draw two pictures there")
    given = parser.parse_args(arguments)
    assumed = {name: tuple(v) if isinstance(v := getattr(given, name), list) else v for name in OPTIONS}
    try:
        fleet = read_fleet(**assumed)
        return (replace(fleet, lengths=read_lengths(given.lengths)) if given.lengths else fleet), given.images
    except (OSError, ValueError, KeyError) as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> None:
    fleet, images = read_arguments(arguments)
    tokens = fleet.draw_lengths(np.random.default_rng(fleet.seed))
    found = {each: simulate(fleet, tokens, *each) for each in itertools.product(fleet.exponents, ROUTINGS)}
    of_table = found[fleet.exponent, "by document"]
    print(f"{fleet.documents:,} documents of {tokens.mean():,.0f} tokens, {fleet.hot:,} of them hot\n")
    print(storage_table(fleet, tokens))
    print(f"\nRequests answered from the cache of each of {fleet.replicas} replicas, % (by Che's formula)\n")
    print(hits_table(fleet, found))
    print(f"\n1,000 questions, Zipf {fleet.exponent:g}, caches of {fleet.memory:g} GB\n")
    print(*ways_table(fleet, tokens, of_table), sep="\n")
    if images:
        draw_hits(fleet, found, images / "fleet-hits.png")
        draw_questions(fleet, tokens, of_table, images / "fleet-questions.png")


if __name__ == "__main__":
    main()
