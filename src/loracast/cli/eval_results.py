"""What every command of `loracast eval` does with its report: write it into --out and show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loracast.cli.options import Json
from loracast.cli.output import print_json, progress_bar, say, stdout

if TYPE_CHECKING:
    from loracast.evaluation.report import Report


@dataclass(frozen=True, kw_only=True)
class Results:
    """Where the results go, and how they are shown."""

    out: Annotated[Path, typer.Option("--out", help="Folder for results.json, table.md and pictures.")]
    as_json: Json = False

    def of(self, unit: str, evaluate: Callable[..., Report], *arguments: Any) -> Report:
        """Run an evaluation with its arguments, the folder and a progress bar in `unit`; show its report."""
        with progress_bar(unit, is_kept=True) as progress:
            report = evaluate(*arguments, self.out, progress)
        self.show(report)
        return report

    def show(self, report: Report) -> None:
        if self.as_json:
            print_json(report.to_dict())
        else:
            report.show(stdout())
            say(f"written to {self.out}")
