"""Ctrl-C in a command: it ends within a second, also where Python waits for a long call into C.

Python raises KeyboardInterrupt between two of its own instructions, and a backward pass or the import of a library is
one instruction. A thread that the signal wakes therefore ends a process that has not noticed it in time.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from loracast.cli.output import say

EXIT_CODE = 130
_PATIENCE_S = 0.3
_advice = ""
"""What to say at the end of a command that is interrupted."""


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
    """Say how to go on where the command is interrupted meanwhile."""
    global _advice
    _advice = f"{text}\n"
    try:
        yield
    except KeyboardInterrupt:
        say(text)
        raise
    finally:
        _advice = ""
