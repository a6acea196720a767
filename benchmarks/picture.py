"""Draw README's picture, docs/images/results.svg, from the figures of docs/results: `python benchmarks/picture.py`.

Each way to answer has its right answers, the tokens in its prompt and the time to its first token.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "results"
PICTURE = ROOT / "docs" / "images" / "results.svg"
WAYS = {
    "adapter": ("xquad", "adapter", "adapter"),
    "passage found by BM25\nin the prompt": ("xquad-bm25", "BM25, 1 passage", None),
    "whole text in the prompt": ("xquad-window", "in the window", "in the window"),
    "no document": ("xquad-none", "no document", "no document"),
}
"""What answers, from top to bottom: the file and the label of its figures, and its label in the file of times."""
COLOURS = ("#3949ab", "#9aa0b4", "#9aa0b4", "#9aa0b4")


FILES = {*(name for name, _, _ in WAYS.values()), "first-token"}
SAYS = "Bars: right answers, prompt tokens, first token"


def row(folder: Path, name: str, label: str) -> Mapping[str, Any]:
    """The figures of a file that have this label, or one that begins so. Raises SystemExit if they are not there."""
    path = folder / f"{name}.json"
    if not path.exists():
        raise SystemExit(f"{path} is missing: `python benchmarks/results.py run` measures it")
    rows = [
        one for one in json.loads(path.read_text(encoding="utf-8"))["rows"] if one.get("kind", "source") == "source"
    ]
    found = [one for one in rows if one["label"] == label] or [one for one in rows if one["label"].startswith(label)]
    if len(found) != 1:
        raise SystemExit(f"{path} has {len(found)} rows {label!r}")
    return found[0]


def bars(folder: Path = FIGURES) -> dict[str, list[tuple[str, float]]]:
    """By the title of a panel, its bars from top to bottom: what answers and the figure, where there is one."""
    answered = {way: row(folder, name, label) for way, (name, label, _) in WAYS.items()}
    timed = {way: row(folder, "first-token", label) for way, (_, _, label) in WAYS.items() if label}
    return {
        "answers that contain a right one, %": [(way, 100 * one["contained"]) for way, one in answered.items()],
        "tokens in the prompt": [(way, one["prompt_tokens"]) for way, one in answered.items()],
        "first token, ms (text of 1,024 tokens)": [(way, 1000 * one["first_token_s"]) for way, one in timed.items()],
    }


def draw(panels: Mapping[str, list[tuple[str, float]]], path: Path = PICTURE) -> None:
    """Draw the panels beside each other."""
    from loracast.lab.training.loop import pyplot

    plt = pyplot()
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "loracast"})
    figure, axes = plt.subplots(1, len(panels), figsize=(9.4, 2.3), sharey=True)
    for axis, (title, shown) in zip(axes, panels.items(), strict=True):
        places = [list(WAYS).index(way) for way, _ in shown]
        draw_bars(axis, title, places, [value for _, value in shown], ",.0f", [COLOURS[i] for i in places])
        axis.set_yticks(range(len(WAYS)), list(WAYS))
    axes[0].invert_yaxis()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white", metadata={"Date": None})


def draw_bars(axis: Any, title: str, places: Sequence[Any], values: Sequence[float], form: str, colours: Any) -> None:
    """Draw a panel of bars from left to right, each with its value behind it in a format such as ",.0f"."""
    drawn = axis.barh(places, values, color=colours, height=0.62)
    axis.bar_label(drawn, labels=[f"{value:{form}}" for value in values], padding=3)
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_xlim(0, 1.2 * max(values))
    axis.xaxis.set_visible(False)
    axis.tick_params(left=False)
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def draw_tasks(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the right answers of every way to answer tasks over the operations of a query."""
    from loracast.lab.training.loop import pyplot

    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    for i, row in enumerate(rows):  # another marker once the ten colours come again
        axis.plot(row["gflops"], 100 * row["exact"], "os^D"[i // 10 % 4], markersize=9, label=row["label"])
    axis.set_xscale("log")
    ends = axis.get_xlim()
    ticks = [n * 10**power for power in range(-1, 5) for n in (1, 2, 3, 5, 7)]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(ends)
    axis.set_ylim(bottom=0)
    labels = {"xlabel": "operations of a query, GFLOP", "ylabel": "exact match, %"}
    axis.set(title="Tasks, by what a query costs", **labels)
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    draw(bars())
    print(PICTURE.relative_to(ROOT), file=sys.stderr)
