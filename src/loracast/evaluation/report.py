"""What an evaluation leaves behind: a table on the terminal, `table.md`, `results.json` and `answers.jsonl`."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracast import __version__
from loracast.base.load import Base
from loracast.files import write_atomically

if TYPE_CHECKING:
    from rich.console import Console

Row = Mapping[str, Any]
Progress = Callable[[int, int], None]
"""How an evaluation tells how far it is: (done, in all)."""


def no_progress(done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Column:
    """One column of a table, made from a row of results."""

    header: str
    form: Callable[[Row], str]


_FORMS: dict[str, Callable[[Row, str], str]] = {
    "text": lambda row, key: str(row[key]),
    "%": lambda row, key: f"{100 * row[key]:.1f}",
    "interval": lambda row, key: f"{100 * row[key]:.1f} - {100 * row[key.removesuffix('low') + 'high']:.1f}",
    "change": lambda row, key: "{:+.1f} ({:+.1f} to {:+.1f})".format(
        *(100 * row[key + end] for end in ("", "_low", "_high"))
    ),
}


def columns(**given: str | tuple[str, int | str]) -> tuple[Column, ...]:
    """The columns of a table, each by the key of its figure in a row; a dash stands where a row has none.

    `key="header"` is a column of text, `key=("header", 2)` one of numbers with two digits behind the point. In place of
    the digits, "%" makes shares in per cent, "interval" 95 % intervals (for a key that ends with "low", up to the same
    key with "high"), and "change" differences in points with their interval.
    """

    def column(key: str, header: str, kind: int | str = "text") -> Column:
        form = (lambda row, key: f"{row[key]:,.{kind}f}") if isinstance(kind, int) else _FORMS[kind]
        return Column(header, lambda row: "-" if row.get(key) is None else form(row, key))

    return tuple(column(key, *([one] if isinstance(one, str) else one)) for key, one in given.items())


@dataclass(frozen=True)
class Report:
    """The results of one evaluation."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    is_complete: bool = True
    """False while the run goes on, and for good where it was killed."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "evaluation": self.title,
            "is_complete": self.is_complete,
            "seed": self.settings.get("seed"),
            "settings": dict(self.settings),
            **self.environment,
            "rows": [dict(row) for row in self.rows],
        }

    def cells(self) -> list[list[str]]:
        return [[column.form(row) for column in self.columns] for row in self.rows]

    def markdown(self) -> str:
        lines = [[column.header for column in self.columns], ["---"] * len(self.columns), *self.cells()]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def write(self, out: Path) -> None:
        """Write results.json and table.md, each of them whole or not at all."""
        out.mkdir(parents=True, exist_ok=True)
        encoded = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
        write_atomically(out / "results.json", encoded.encode())
        write_atomically(out / "table.md", f"{self.title}\n\n{self.markdown()}".encode())

    def show(self, console: Console) -> None:
        """Print the table."""
        from rich.table import Table

        table = Table(title=self.title, title_justify="left")
        for column in self.columns:
            table.add_column(column.header, justify="left" if column.header == "method" else "right")
        for cells in self.cells():
            table.add_row(*cells)
        console.print(table)


class ReportWriter:
    """Writes one evaluation into a folder while it runs: its tables, as often as wanted, and its answers one by one."""

    def __init__(
        self,
        out: Path,
        title: str,
        columns: Sequence[Column],
        config: Any,
        base: Base | None,
        hypernetwork: str | None = None,
    ):
        """
        Args:
            config: the evaluation's dataclass of settings.
            base, hypernetwork: the base and the hash of the hypernetwork that are measured, if there are any.
        """
        self.out, self.title, self.columns = out, title, columns
        self.settings: dict[str, Any] = asdict(config)
        self.environment = environment(base, hypernetwork)
        out.mkdir(parents=True, exist_ok=True)
        (out / "answers.jsonl").unlink(missing_ok=True)

    def write(self, rows: Sequence[Row], is_complete: bool = True) -> Report:
        """Write the table of these rows."""
        report = Report(self.title, self.columns, tuple(rows), self.settings, self.environment, is_complete)
        report.write(self.out)
        return report

    def add_answers(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append lines to answers.jsonl, to look at what went wrong."""
        with open(self.out / "answers.jsonl", "a", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def environment(base: Base | None, hypernetwork: str | None = None) -> dict[str, Any]:
    """What the figures were measured with: command, date, versions, machine, base and hypernetwork."""
    import torch
    import transformers

    device = base.device if base else torch.device("cpu")
    return {
        "command": shlex.join(["loracast", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": asdict(base.fingerprint) if base else None,
        "dtype": str(base.model.dtype).removeprefix("torch.") if base else None,
        "hypernetwork": hypernetwork,
        "versions": {
            "python": platform.python_version(),
            "loracast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        },
    }


def cpu_model() -> str:
    """The processor's name, as far as this machine tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
