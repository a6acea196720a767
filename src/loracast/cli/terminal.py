"""What commands print (results on standard output, everything else on standard error), and Ctrl-C in a command."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

EXIT_CODE = 130
_PATIENCE_S = 0.3
_advice = ""
"""Text that is printed where a command is interrupted."""


@contextmanager
def prompt_interrupts() -> Iterator[None]:
    """Have SIGINT raise KeyboardInterrupt, or end the process where it cannot be raised within 0.3 s.

    Where the block exits with 130, or code in C made a SystemError of the KeyboardInterrupt, the process ends without
    taking its models apart, which takes seconds. All are as safe as a kill: whatever loracast writes is whole or not
    there. Where SIGINT is ignored (a job in the background of a script), and on systems other than POSIX, nothing
    changes.
    """
    if os.name != "posix" or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    noticed = threading.Event()
    is_interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal is_interrupted
        is_interrupted = True
        if not _is_importing(frame):  # what a library runs then may catch everything: the thread ends the process
            noticed.set()
            raise KeyboardInterrupt

    def watch() -> None:
        while received := os.read(awakened, 1):
            if received[0] == signal.SIGINT and signal.getsignal(signal.SIGINT) is interrupt:
                if not noticed.wait(_PATIENCE_S):
                    os.write(2, _advice.encode())  # not through Python's buffers, which the main thread may hold
                    os._exit(EXIT_CODE)
                noticed.clear()
        os.close(awakened)

    awakened, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.signal(signal.SIGINT, interrupt)
    before = signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="interrupts", daemon=True).start()
    try:
        yield
    except (SystemExit, SystemError) as end:
        ends_here = end.code == EXIT_CODE if isinstance(end, SystemExit) else is_interrupted
        if ends_here:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError):  # nobody reads it
                    stream.flush()
            os._exit(EXIT_CODE)
        raise
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.close(wakes)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a frame runs, at any depth, within an import."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


@contextmanager
def advice(text: str) -> Iterator[None]:
    """Print how to continue where the command is interrupted within the block."""
    global _advice
    _advice = f"{text}\n"
    try:
        yield
    except KeyboardInterrupt:
        say(text)
        raise
    finally:
        _advice = ""


# Documents, and so answers, come from strangers: their escape sequences and direction marks stay out of the terminal.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text without control characters, except newlines and tabs."""
    return _UNPRINTABLE.sub("", text)


def print_json(value: dict[str, Any]) -> None:
    """Print an object, in which a dataclass is an object of its fields."""
    print(json.dumps(value, ensure_ascii=False, indent=2, default=asdict))


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
    """Console for tables; without a terminal it is wide enough to cut nothing."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], wrapped: Sequence[str] = ("text",)) -> None:
    """Print rows under their headings. A heading that begins with ">" has its column set to the right.

    Cells are plain text, never markup. On a narrow terminal only the columns in `wrapped` take several lines.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name.removeprefix(">"), no_wrap=name not in wrapped, overflow="fold")
        table.columns[-1].justify = "right" if name.startswith(">") else "left"
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    stdout().print(table)


@contextmanager
def progress_bar(
    unit: str, title: str = "", *, is_kept: bool = False, is_shown: bool = True
) -> Iterator[Callable[[int, int], None]]:
    """A bar with an estimate of the time that is left, on standard error where that is a terminal.

    Args:
        is_kept: leave the bar there at the end, with the time that it took.
    """
    from rich import progress as parts

    columns = [parts.TextColumn("{task.description}", markup=False), parts.BarColumn(), parts.MofNCompleteColumn()]
    columns += [parts.TextColumn(unit), *([parts.TimeElapsedColumn()] if is_kept else []), parts.TimeRemainingColumn()]
    is_shown = is_shown and sys.stderr.isatty()
    bar = parts.Progress(*columns, console=stderr(), transient=not is_kept, disable=not is_shown)
    with bar:
        task = bar.add_task(printable(title), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:,.1f} kB"


def plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def loss(error: float | None) -> str:
    """Describe the share of a LoRA's delta that compression has lost."""
    return f"compressed: {100 * error:.2g} % of the delta is lost" if error else "nothing lost"


class Stream:
    """Prints an answer as it comes, without the white space before it."""

    def __init__(self) -> None:
        self.text = ""
        """The text that has been printed."""

    def __call__(self, piece: str) -> None:
        piece = piece if self.text else piece.lstrip()
        if piece:
            self.text += piece
            print(printable(piece), end="", flush=True)

    def end(self) -> None:
        print(flush=True)
