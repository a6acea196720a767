"""Pictures of a modality's evaluation: a confusion matrix, and a sheet of examples with the answers about them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loracast.data.answer_metrics import is_exact
from loracast.data.labelled import Labelled
from loracast.evaluation.modality import ModalityAnswer
from loracast.evaluation.plots import pyplot, save

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
    for i, line in enumerate(shares):
        for j, share in enumerate(line):
            if share >= 0.5:
                axis.text(
                    j, i, f"{share:.0f}", ha="center", va="center", fontsize=8, color="white" if share > 60 else "black"
                )
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=9)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_xlabel("the likeliest name")
    axis.set_ylabel("what it is")
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
