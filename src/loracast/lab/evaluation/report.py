"""Reports of evaluations: tables, `results.json` and `answers.jsonl`, and the intervals of figures."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, asdict, dataclass
from datetime import UTC, datetime
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loracast import __version__
from loracast.base.load import Base
from loracast.files import write_atomically

if TYPE_CHECKING:
    from rich.console import Console


def wilson(n_hits: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 %: honest for few samples and for shares near 0 and 1."""
    if n == 0:
        return 0.0, 1.0
    share, z = n_hits / n, 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


_N_RESAMPLES = 2000


def cluster_bootstrap(clusters: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95 % percentile interval of a mean over clusters, such as documents whose questions stand or fall together.

    Args:
        clusters: for each document the scores of its questions, 1 for a right answer.
    """
    hits = np.array([sum(cluster) for cluster in clusters], dtype=float)  # [clusters]
    sizes = np.array([len(cluster) for cluster in clusters], dtype=float)
    drawn = np.random.default_rng(0).integers(len(hits), size=(_N_RESAMPLES, len(hits)))
    shares = hits[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)  # [_N_RESAMPLES]
    low, high = np.percentile(shares, [2.5, 97.5])
    return float(low), float(high)


def mean_with_interval(clusters: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """The mean over the values of all clusters, and the 95 % interval of `cluster_bootstrap`."""
    return mean([value for cluster in clusters for value in cluster]), *cluster_bootstrap(clusters)


def share_row(key: str, n_hits: int, n: int) -> dict[str, float]:
    """A share and the ends of Wilson's interval as they stand in a row: `key`, `low` and `high`."""
    return dict(zip((key, "low", "high"), (n_hits / n, *wilson(n_hits, n)), strict=True))


def named_interval(key: str, found: Sequence[float | None]) -> dict[str, float | None]:
    """A figure and the ends of its interval as they stand in a row: `key`, `key_low` and `key_high`."""
    return dict(zip((key, f"{key}_low", f"{key}_high"), found, strict=True))


def with_interval(key: str, clusters: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """The figure of `mean_with_interval` as it stands in a row, as `named_interval` has it."""
    return named_interval(key, mean_with_interval(clusters))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def mean_if_any(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def paired_bootstrap(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """The mean over tasks of how much more often `one` is right than `other` on the same rows, and its 95 % interval.

    The bootstrap draws tasks, and rows within each drawn task, since tasks and rows both might have been others.

    Args:
        one, other: for each task, the share of seeds with which each of its rows was answered right.
    """
    gains = [np.subtract(a, b, dtype=float) for a, b in zip(one, other, strict=True)]
    sizes = np.array([len(gain) for gain in gains])
    padded = np.zeros((len(gains), sizes.max()))  # [tasks, rows], behind the end of a task's rows 0
    for row, gain in zip(padded, gains, strict=True):
        row[: len(gain)] = gain
    rng = np.random.default_rng(0)
    means = np.zeros(_N_RESAMPLES)
    for _ in gains:  # one drawn task of each resample at a time, so that little memory is needed
        task = rng.integers(len(gains), size=_N_RESAMPLES)
        size = sizes[task][:, None]
        row = rng.integers(size, size=(_N_RESAMPLES, padded.shape[1]))  # [resamples, rows]
        is_drawn = np.arange(padded.shape[1]) < size
        means += (padded[task[:, None], row] * is_drawn).sum(axis=1) / size[:, 0] / len(gains)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(np.mean([gain.mean() for gain in gains])), float(low), float(high)


Row = Mapping[str, Any]
Progress = Callable[[int, int], None]
"""A function that an evaluation calls with the number of cases that are done, and of all."""


def no_progress(done: int, total: int) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class Column:
    """One column of a table, made from a row of results."""

    header: str
    form: Callable[[Row], str]


_FORMS: dict[str, Callable[[Row, str], str]] = {
    "text": lambda row, key: str(row[key]),
    "%": lambda row, key: f"{100 * row[key]:.1f}",
    "interval": lambda row, key: f"{100 * row[key]:.1f} - {100 * row[key.removesuffix('low') + 'high']:.1f}",
    "by seed": lambda row, key: (
        f"{100 * row[key]:.1f} ({', '.join(f'{100 * value:.1f}' for value in row[f'{key}_by_seed'])})"
    ),
    "change": lambda row, key: "{:+.1f} ({:+.1f} to {:+.1f})".format(
        *(100 * row[key + end] for end in ("", "_low", "_high"))
    ),
}


def columns(**given: str | tuple[str, int | str]) -> tuple[Column, ...]:
    """The columns of a table, each by the key of its figure in a row; a dash stands where a row has none.

    `key="header"` is a column of text, `key=("header", 2)` one of numbers with two digits behind the point. In place of
    the digits, "%" makes shares in per cent, "interval" 95 % intervals (for a key that ends with "low", up to the same
    key with "high"), "change" differences in points with their interval, and "by seed" the mean of
    shares and each of them (in the same key with "_by_seed").
    """

    def column(key: str, header: str, kind: int | str = "text") -> Column:
        form = (lambda row, key: f"{row[key]:,.{kind}f}") if isinstance(kind, int) else _FORMS[kind]
        return Column(header, lambda row: "-" if row.get(key) is None else form(row, key))

    return tuple(column(key, *([one] if isinstance(one, str) else one)) for key, one in given.items())


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first line has its headings."""
    headings, *rows = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *rows))


@dataclass
class Report:
    """The results of one evaluation, written into a folder while it runs: its tables, and its answers one by one."""

    out: Path
    title: str
    columns: Sequence[Column]
    config: Any
    """The evaluation's dataclass of settings."""
    base: InitVar[Base | None]
    hypernetwork: InitVar[str | None] = None
    """The hash of the hypernetwork that is measured, if there is one."""
    rows: Sequence[Row] = ()
    is_complete: bool = False

    def __post_init__(self, base: Base | None, hypernetwork: str | None) -> None:
        self.settings: dict[str, Any] = asdict(self.config)
        self.environment = environment(base, hypernetwork)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "answers.jsonl").unlink(missing_ok=True)

    def write(self, rows: Sequence[Row], is_complete: bool = True) -> Report:
        """Write results.json and table.md of these rows, each of them whole or not at all.

        Args:
            is_complete: False while the run goes on, and for good where it was killed.
        """
        self.rows, self.is_complete = tuple(rows), is_complete
        encoded = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
        write_atomically(self.out / "results.json", encoded.encode())
        write_atomically(self.out / "table.md", f"{self.title}\n\n{self.markdown()}".encode())
        return self

    def add_answers(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append lines to answers.jsonl, to look at what went wrong."""
        with open(self.out / "answers.jsonl", "a", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def to_dict(self) -> dict[str, Any]:
        return {
            "evaluation": self.title,
            "is_complete": self.is_complete,
            "seed": self.settings.get("seed"),
            "settings": self.settings,
            **self.environment,
            "rows": self.rows,
        }

    def cells(self) -> list[list[str]]:
        return [[column.form(row) for column in self.columns] for row in self.rows]

    def markdown(self) -> str:
        return markdown([[column.header for column in self.columns], *self.cells()]) + "\n"

    def show(self, console: Console) -> None:
        """Print the table."""
        from rich.table import Table

        table = Table(title=self.title, title_justify="left")
        for column in self.columns:
            table.add_column(column.header, justify="left" if column.header == "method" else "right")
        for cells in self.cells():
            table.add_row(*cells)
        console.print(table)


def environment(base: Base | None, hypernetwork: str | None = None) -> dict[str, Any]:
    """The circumstances of a measurement: command, date, versions, machine, base and hypernetwork."""
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
