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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from fleet_cache import Numbers
from fleet_model import CACHED, ROUTINGS, Fleet, Simulated, read_fleet, read_lengths, simulate, ways


def storage_table(fleet: Fleet, tokens: Numbers) -> Iterator[str]:
    """Bytes of all documents and of the hot ones, in each storage."""
    yield "| storage | kB a token | one document, MB | all documents, TB | hot documents, GB |\n|---|---|---|---|---|"
    for name, size in fleet.bytes_of(tokens).items():
        figures = (size.sum() / tokens.sum() / 1e3, size.mean() / 1e6, size.sum() / 1e12, size[: fleet.hot].sum() / 1e9)
        yield (
            f"| {name} | " + " | ".join(f"{value:,.3g}" if value < 100 else f"{value:,.0f}" for value in figures) + " |"
        )


def hits_table(fleet: Fleet, found: Mapping[tuple[float, str], Simulated]) -> Iterator[str]:
    """Hits of each cache, in brackets by Che's formula."""
    yield "| cache of | Zipf | answered by | " + " | ".join(f"{memory:g} GB" for memory in fleet.memories) + " |"
    yield "|---" * (3 + len(fleet.memories)) + "|"
    for k, what in enumerate(CACHED):
        for (exponent, routing), one in found.items():
            cells = [f"{100 * a:.1f} ({100 * b:.1f})" for a, b in zip(one.hits[:, k], one.che[:, k], strict=True)]
            yield f"| {what} | {exponent:g} | {ROUTINGS[routing]} | " + " | ".join(cells) + " |"


def ways_table(fleet: Fleet, tokens: Numbers, found: Simulated) -> Iterator[str]:
    """What 1,000 questions take, and after how many questions of a document its adapter has paid for itself."""
    yield "| method | hits % | tokens read | GFLOP | s to the first tokens | kJ | fetched, GB |"
    yield "|---|---|---|---|---|---|---|"
    all_ways = ways(fleet, tokens, found)
    for one in all_ways:
        hits = "-" if one.hits is None else f"{100 * one.hits:.1f}"
        gflop = "not counted" if one.gflop is None else f"{one.gflop:,.0f}"
        figures = f"{one.seconds:,.0f} | {one.joules / 1000:,.1f} | {one.fetched_gb:,.2f}"
        yield f"| {one.label} | {hits} | {one.read_tokens:,.0f} | {gflop} | {figures} |"
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
    plt = _pyplot()
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
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 2.6), layout="constrained")
    stored = {name: float(size.sum()) / 1e12 for name, size in fleet.bytes_of(tokens).items()}
    energy = {one.label: one.joules / 1000 for one in ways(fleet, tokens, found)}
    titles = (f"{fleet.documents:,} documents, TB", "1,000 questions, kJ to the first tokens")
    for axis, shown, title in zip(axes, (stored, energy), titles, strict=True):
        bars = axis.barh(list(shown), list(shown.values()), color="#3949ab", height=0.62)
        axis.bar_label(bars, labels=[f"{value:,.3g}" for value in shown.values()], padding=3)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlim(0, 1.2 * max(shown.values()))
        axis.invert_yaxis()
        axis.xaxis.set_visible(False)
        axis.tick_params(left=False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


OPTIONS = (
    "documents", "hot", "hot_share", "exponents", "requests", "replicas", "memories", "exponent", "memory",
    "answer_tokens", "network", "watts", "seed",
)  # fmt: skip
"""Fields of `Fleet` that the command line takes: all assumptions."""


def read_arguments(arguments: Sequence[str] | None = None) -> tuple[Fleet, Path | None]:
    """The fleet that a command line asks for, and the folder for its pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    defaults = {one.name: one.default for one in fields(Fleet)}
    for name in OPTIONS:
        value = defaults[name]
        several = {"nargs": "+", "type": type(value[-1])} if isinstance(value, tuple) else {"type": type(value)}
        several["type"] = float if name in ("exponents", "memories", "memory", "network", "watts") else several["type"]
        parser.add_argument(f"--{name.replace('_', '-')}", default=value, help=f"{value} by default", **several)
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
    found = {
        (exponent, routing): simulate(fleet, tokens, exponent, routing)
        for exponent in fleet.exponents
        for routing in ROUTINGS
    }
    of_table = found[fleet.exponent, "by document"]
    print(f"{fleet.documents:,} documents of {tokens.mean():,.0f} tokens, {fleet.hot:,} of them hot\n")
    print(*storage_table(fleet, tokens), sep="\n")
    print(f"\nRequests answered from the cache of each of {fleet.replicas} replicas, % (by Che's formula)\n")
    print(*hits_table(fleet, found), sep="\n")
    print(f"\n1,000 questions, Zipf {fleet.exponent:g}, caches of {fleet.memory:g} GB\n")
    print(*ways_table(fleet, tokens, of_table), sep="\n")
    if images:
        draw_hits(fleet, found, images / "fleet-hits.png")
        draw_questions(fleet, tokens, of_table, images / "fleet-questions.png")


if __name__ == "__main__":
    main()
