"""Show the progress of training in one line on the terminal."""

from __future__ import annotations

import sys
from typing import Any

from loracast.training.loop import TrainConfig


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
