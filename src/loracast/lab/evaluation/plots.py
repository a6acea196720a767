"""Pictures of evaluations. matplotlib is an extra, loaded when something is drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from loracast.lab.data.answer_metrics import is_exact
from loracast.lab.data.labelled import Labelled
from loracast.lab.evaluation.modality import ModalityAnswer
from loracast.lab.training import progress

Row = Mapping[str, Any]


require_matplotlib = partial(progress.require_matplotlib, "the pictures need", "eval")


def heat_map(path: Path, rows: Sequence[Row], baselines: Sequence[str]) -> None:
    """Exact match by length (across) and depth (down), a panel for each baseline; `rows` as needle.py makes them."""
    plt = pyplot()
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    size = (1.8 + max(3.6, 0.9 * len(lengths) + 0.6) * len(baselines), 4.2)
    figure, axes = plt.subplots(1, len(baselines), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, name in zip(axes[0], baselines, strict=True):
        mine = {row["length"]: row for row in rows if row["baseline"] == name}
        bins = next(iter(mine.values()))["depths"]
        cells = [[_percent(mine[length]["depths"][i]["exact"]) for length in lengths] for i in range(len(bins))]
        image = axis.imshow(cells, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for i, line in enumerate(cells):
            for j, cell in enumerate(line):
                label, colour = ("-", "black") if cell != cell else (f"{cell:.0f}", "white" if cell < 70 else "black")
                axis.text(j, i, label, ha="center", va="center", fontsize=11, color=colour)
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right")
        axis.set_yticks(range(len(bins)), [f"{100 * b['low']:.0f} - {100 * b['high']:.0f}" for b in bins])
        axis.set_title(next(iter(mine.values()))["label"], fontsize=11)
        axis.set_xlabel("document, tokens")
    axes[0][0].set_ylabel("depth of the needle, %")
    figure.colorbar(image, ax=axes[0], label="exact match, %", fraction=0.05)
    save(figure, path)


def by_length(path: Path, rows: Sequence[Row]) -> None:
    """Exact match of every baseline over the documents' lengths, with its 95 % interval."""
    with _picture(path, "document, tokens", "exact match, %", "Needle in a haystack") as axis:
        _with_intervals(axis, rows, "exact", lambda row, aside: row["length"] * 2 ** (0.07 * aside))
        lengths = list(dict.fromkeys(row["length"] for row in rows))
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.minorticks_off()
        axis.set_ylim(-4, 104)


def f1_by_length(path: Path, rows: Sequence[Row]) -> None:
    """Token F1 of every baseline over the documents' lengths, with its 95 % interval; `rows` as qa.py makes them."""
    with _picture(path, "", "F1, %", "Questions about real documents, by the documents' length") as axis:
        parts = list(dict.fromkeys(row["part"] for row in rows))
        _with_intervals(axis, rows, "f1", lambda row, aside: parts.index(row["part"]) + 0.06 * aside)
        axis.set_xticks(range(len(parts)), parts, rotation=15)


def f1_by_cost(path: Path, rows: Sequence[Row]) -> None:
    """Token F1 of every baseline over the tokens that an answer's prompt takes."""
    title = "Questions about real documents, by what an answer costs"
    with _picture(path, "tokens of the prompt", "F1, %", title) as axis:
        for row in rows:
            axis.plot(row["prompt_tokens"], 100 * row["f1"], "o", markersize=9, label=row["label"])
        axis.set_xlim(left=0)


def exact_by_operations(path: Path, rows: Sequence[Row]) -> None:
    """Exact match of every baseline over the operations of a query."""
    with _picture(path, "operations of a query, GFLOP", "exact match, %", "Tasks, by what a query costs") as axis:
        for i, row in enumerate(rows):  # another marker once the ten colours come again
            axis.plot(row["gflops"], 100 * row["exact"], "os^D"[i // 10 % 4], markersize=9, label=row["label"])
        axis.set_xscale("log")
        ends = axis.get_xlim()
        ticks = [n * 10**power for power in range(-1, 5) for n in (1, 2, 3, 5, 7)]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlim(ends)


def exact_by_seconds(path: Path, rows: Sequence[Row]) -> None:
    """Exact match over the seconds of gradient descent, a line for each start."""
    where = "gradient descent on the examples of a task, seconds"
    with _picture(path, where, "exact match, %", "Tasks, by what refining a LoRA takes") as axis:
        for label in dict.fromkeys(row["label"] for row in rows):
            mine = [row for row in rows if row["label"] == label and row["seconds"] is not None]
            axis.plot([row["seconds"] for row in mine], [100 * row["exact"] for row in mine], "o-", label=label)


def costs(path: Path, rows: Sequence[Row], reference: str) -> None:
    """Operations of every baseline's queries, times those of `reference`: a point for each task, a bar at the mean."""
    plt = pyplot()
    baselines = [name for name in dict.fromkeys(row["baseline"] for row in rows) if name != reference]
    figure, axis = plt.subplots(figsize=(8.5, 1.2 + 0.6 * len(baselines)), layout="constrained")
    for place, name in enumerate(baselines):
        ratios = [row["flops_ratio"] for row in rows if row["baseline"] == name]
        axis.plot(ratios, [place] * len(ratios), "o", alpha=0.4, color="tab:blue")
        axis.plot(sum(ratios) / len(ratios), place, "|", markersize=22, markeredgewidth=2, color="black")
    axis.axvline(1, color="tab:orange")
    labels = {row["baseline"]: row["label"] for row in rows}
    axis.set_yticks(range(len(baselines)), [labels[name] for name in baselines])
    axis.set_xscale("log")
    axis.set_xlabel(f"operations of a query, times those of: {labels[reference]}")
    axis.margins(y=0.25)
    axis.invert_yaxis()
    save(figure, path)


def _with_intervals(axis: Any, rows: Sequence[Row], key: str, place: Callable[[Row, float], float]) -> None:
    """Each baseline's shares in per cent with their 95 % intervals; `place` puts them side by side."""
    baselines = list(dict.fromkeys(row["baseline"] for row in rows))
    for i, name in enumerate(baselines):
        mine = [row for row in rows if row["baseline"] == name]
        places = [place(row, i - len(baselines) / 2) for row in mine]
        low = [max(0.0, 100 * (row[key] - row[f"{key}_low"])) for row in mine]
        high = [max(0.0, 100 * (row[f"{key}_high"] - row[key])) for row in mine]
        shares = [100 * row[key] for row in mine]
        axis.errorbar(places, shares, [low, high], marker="o", capsize=3, label=mine[0]["label"])


@contextmanager
def _picture(path: Path, x_label: str, y_label: str, title: str) -> Iterator[Any]:
    """A picture's axes to draw on; it is then labelled, gets its legend beside it, and is written."""
    figure, axis = pyplot().subplots(figsize=(8.5, 4.8), layout="constrained")
    yield axis
    if axis.get_autoscaley_on():  # no limits were set
        axis.set_ylim(bottom=0)
    axis.set(xlabel=x_label, ylabel=y_label, title=title)
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a picture to a file and free it."""
    figure.savefig(path, dpi=150)
    pyplot().close(figure)


def _percent(share: float | None) -> float:
    return float("nan") if share is None else 100 * share


def pyplot() -> Any:
    """matplotlib's pyplot. Raises LoracastError where it is not installed."""
    require_matplotlib()
    return progress.pyplot()


_RIGHT, _WRONG = "#1a7f37", "#c0392b"


def confusion(path: Path, answers: Sequence[ModalityAnswer], title: str) -> None:
    """Classes down, the likeliest names across, in % of a class's examples; held-out classes come last."""
    plt = pyplot()
    names = list(dict.fromkeys(one.name for one in sorted(answers, key=lambda one: one.is_held_out)))
    counts = np.zeros((len(names), len(names)))
    for one in answers:
        counts[names.index(one.name), names.index(one.chosen)] += 1
    shares = 100 * counts / counts.sum(1, keepdims=True)
    size = 2.6 + 0.46 * len(names)
    figure, axis = plt.subplots(figsize=(size + 0.6, size), layout="constrained")
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for i, j in np.argwhere(shares >= 0.5):
        colour = "white" if shares[i, j] > 60 else "black"
        axis.text(j, i, f"{shares[i, j]:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=9)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set(xlabel="the likeliest name", ylabel="what it is")
    if n_held_out := len({one.name for one in answers if one.is_held_out}):
        edge = len(names) - n_held_out - 0.5
        axis.axhline(edge, color="grey", linewidth=0.8)
        axis.axvline(edge, color="grey", linewidth=0.8)
    axis.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axis, label="of a class, %", fraction=0.045)
    save(figure, path)


def sheet(
    path: Path, answers: Sequence[ModalityAnswer], test: Labelled, seed: int, columns: int = 8, rows: int = 4
) -> None:
    """Examples drawn at random with what the base wrote about them; the last row is of held-out classes, if any."""
    plt = pyplot()
    rng = random.Random(f"{seed}/sheet")
    trained, held_out = ([one for one in answers if one.is_held_out == wanted] for wanted in (False, True))
    n_held_out = min(columns, len(held_out))
    n_trained = min(columns * rows - (columns if n_held_out else 0), len(trained))
    shown = [*rng.sample(trained, n_trained), *rng.sample(held_out, n_held_out)]
    n_rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        n_rows, columns, figsize=(1.65 * columns, 2.1 * n_rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, one in zip(axes.flat, shown, strict=False):
        example = test.load(one.place)
        axis.imshow(example)
        is_right = is_exact(one.free, one.name)
        said = one.free if len(one.free) <= 24 else f"{one.free[:23]}…"
        label = said if is_right else f"{said}\n({one.name})"
        axis.set_title(label, fontsize=8, color=_RIGHT if is_right else _WRONG)
    below = "; last row: classes that were never trained on" if n_held_out else ""
    figure.suptitle(f"What the text-only base writes with the LoRA of each{below}", fontsize=11)
    save(figure, path)
