"""Show a training run: a line of progress on the terminal, and its curve as a picture."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loracast.errors import LoracastError
from loracast.lab.training.loop import TrainConfig


class ProgressLine:
    """A progress bar on a terminal, or a plain line for each log entry elsewhere; on stderr."""

    def __init__(self, config: TrainConfig, enabled: bool = True):
        self.config, self.enabled = config, enabled
        self._bar: Any = None

    def __enter__(self) -> ProgressLine:
        if self.enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[figures]}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("train", total=self.config.steps, figures="")
            self._bar.start()
        return self

    def show(self, metrics: dict[str, float]) -> None:
        """Show the figures of a log entry."""
        if not self.enabled:
            return
        shown = ("loss", "exact", "token_accuracy", "relative_error", "grad_norm")
        figures = "  ".join(f"{name} {metrics[name]:.3f}" for name in shown if name in metrics)
        if self._bar:
            self._bar.update(self._task, completed=metrics["step"], figures=figures)
        else:
            done = f"step {metrics['step']}/{self.config.steps}  {metrics['elapsed_s']:.0f} s"
            print(f"{done}  {figures}", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()


_SHARES = ("token_accuracy", "relative_error")


def require_matplotlib(needed_by: str = "the curve of a training needs", extra: str = "train") -> None:
    """Raise LoracastError where nothing can be drawn: before the work, not after it."""
    if find_spec("matplotlib") is None:
        raise LoracastError(f"{needed_by} matplotlib: pip install 'loracast[{extra}]'")


def pyplot() -> Any:
    """matplotlib's pyplot, set up to draw into files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_metrics(metrics: Path, plot: Path) -> bool:
    """Plot loss, accuracies and relative errors over the steps; False if there are none. Needs the extra `train`."""
    plt = pyplot()
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    if not rows:
        return False
    steps = [row["step"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(steps, [row["loss"] for row in rows], color="tab:blue")
    left.set(xlabel="step", title="loss", yscale="log")
    figures = sorted({name for row in rows for name in row if name.startswith("exact") or name in _SHARES})
    for name in figures:
        points = [(row["step"], row[name]) for row in rows if name in row]
        right.plot(*zip(*points, strict=True), label=name.replace("_", " "))
    highest = max([1.0, *(row[name] for row in rows for name in figures if name in row)])
    right.set(xlabel="step", ylim=(0, highest), title="in training")
    if figures:
        right.legend(loc="lower left")
    figure.suptitle(f"{rows[-1]['step']} steps in {rows[-1]['elapsed_s'] / 3600:.1f} h")
    figure.savefig(plot, dpi=120)
    plt.close(figure)
    return True
