"""What commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Documents, and so answers, come from strangers: their escape sequences and direction marks stay out of the terminal.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text without control characters, except newlines and tabs."""
    return _UNPRINTABLE.sub("", text)


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))


def print_result(as_json: bool, value: dict[str, Any], text: str) -> None:
    """Print what a command has done: as JSON, or as text for people."""
    if as_json:
        print_json(value)
    else:
        print(printable(text))


def say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    say(f"warning: {text}")


def stdout() -> Console:
    """Console for tables; where nobody looks, it is wide enough to cut nothing."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], wrapped: Sequence[str] = ("text",)) -> None:
    """Print rows under their headings. A heading that begins with ">" has its column set to the right.

    Cells are plain text, never markup. On a narrow terminal only the columns in `wrapped` take several lines.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        justify = "right" if column.startswith(">") else "left"
        table.add_column(column.removeprefix(">"), justify=justify, no_wrap=column not in wrapped, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    stdout().print(table)


@contextmanager
def progress_bar(unit: str, title: str = "", *, is_kept: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar with an estimate of the time that is left, on standard error where that is a terminal.

    Args:
        is_kept: leave the bar there at the end, with the time that it took.
    """
    from rich import progress as parts

    columns = [parts.TextColumn("{task.description}", markup=False), parts.BarColumn(), parts.MofNCompleteColumn()]
    columns += [parts.TextColumn(unit), *([parts.TimeElapsedColumn()] if is_kept else []), parts.TimeRemainingColumn()]
    bar = parts.Progress(*columns, console=stderr(), transient=not is_kept, disable=not sys.stderr.isatty())
    with bar:
        task = bar.add_task(printable(title), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:,.1f} kB"


def plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def loss(error: float | None) -> str:
    """What compressing a LoRA has cost."""
    return f"compressed: {100 * error:.2g} % of the delta is lost" if error else "nothing lost"


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
