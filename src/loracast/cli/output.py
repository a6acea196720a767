"""What commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Documents, and so answers, come from strangers: their escape sequences and direction marks stay out of the terminal.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text without control characters, newlines and tabs apart."""
    return _UNPRINTABLE.sub("", text)


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))


def say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    say(f"warning: {text}")


def stdout() -> Console:
    """For tables; wide enough not to cut anything where nobody looks."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(unit), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr(), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:,.1f} kB"


class Stream:
    """Prints an answer as it comes, without the white space before it."""

    def __init__(self) -> None:
        self.text = ""
        """What has been shown."""

    def __call__(self, piece: str) -> None:
        piece = piece if self.text else piece.lstrip()
        if piece:
            self.text += piece
            print(printable(piece), end="", flush=True)

    def end(self) -> None:
        print(flush=True)
