"""The curve of a training run."""

from __future__ import annotations

import json
from pathlib import Path

from loracast.errors import LoracastError


def plot_metrics(metrics: Path, picture: Path) -> None:
    """Draw loss and exact match over the steps, with a second axis of hours. Needs the extra `train`."""
    try:
        import matplotlib
    except ImportError as error:
        raise LoracastError("plots need matplotlib: pip install 'loracast[train]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    if not rows:
        return
    steps = [row["step"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(steps, [row["loss"] for row in rows], color="tab:blue")
    left.set(xlabel="step", ylabel="cross-entropy of the answers", title="loss", yscale="log")
    names = [*sorted({name for row in rows for name in row if name.startswith("exact")}), "token_accuracy"]
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        right.plot(*zip(*points, strict=True), label=name.replace("_", " "))
    right.set(xlabel="step", ylim=(0, 1), title="training answers, teacher-forced")
    right.legend(loc="upper left")
    hours = rows[-1]["elapsed_s"] / 3600
    figure.suptitle(f"{rows[-1]['step']} steps in {hours:.1f} h")
    figure.savefig(picture, dpi=120)
    plt.close(figure)
