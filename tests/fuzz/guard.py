"""Watches a fuzzed call: its time, its memory, and that it touches no file, socket or program outside its folder."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LIMIT_S = 10
"""Longest processor time of a case."""
_STUCK_S = 40
"""Time after which a process that not even a signal reaches prints its stacks and exits."""
_SPARE_BYTES = 2 << 30
"""Address space that the cases of a run may take beyond what the process holds before the first."""
_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate", "os.utime",
    "shutil.rmtree", "shutil.move",
}  # fmt: skip
_FORBIDDEN = ("socket.connect", "socket.bind", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen")
_CODE = tuple({sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]), "/usr", "/proc", "/sys", "/dev"})
"""Where code lies, which Python reads when it imports a module late."""


class Outside(BaseException):
    """A case reached for something outside its folder."""


class OutOfTime(BaseException):
    """A call was stopped by `at_most`."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in what takes more processor time; an outer clock goes on afterwards."""

    def stop(number: int, frame: Any) -> None:
        raise OutOfTime(f"longer than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    left, _ = signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        used = seconds - signal.setitimer(signal.ITIMER_PROF, 0)[0]
        signal.signal(signal.SIGPROF, before)
        if left:
            signal.setitimer(signal.ITIMER_PROF, max(0.01, left - used))


class Guard:
    """The fence around the cases of one process."""

    def __init__(self, folder: Path, *, exits_if_stuck: bool = False):
        """
        Args:
            folder: the only one whose files may be opened; the folder of temporary files while a case is watched.
            exits_if_stuck: end the process where a case is stuck outside of Python.
        """
        self.folder, self.exits_if_stuck, self.seen = os.path.realpath(folder), exits_if_stuck, ""
        self.is_on = False
        sys.addaudithook(self._hear)

    def bound_memory(self) -> None:
        """Let the process have no more than _SPARE_BYTES beyond what it holds now."""
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (held + _SPARE_BYTES, hard))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what is called. Raises OutOfTime or Outside, also where the call has swallowed the exception."""
        before, place = tempfile.tempdir, Path.cwd()
        tempfile.tempdir = self.folder
        os.chdir(self.folder)  # what is opened relative to an open folder is taken as relative to this one
        began = time.process_time()
        if self.exits_if_stuck:
            faulthandler.dump_traceback_later(_STUCK_S, exit=True)
        self.seen, self.is_on = "", True
        try:
            with at_most(LIMIT_S):
                yield
        finally:
            self.is_on = False
            if self.exits_if_stuck:
                faulthandler.cancel_dump_traceback_later()
            os.chdir(place)
            tempfile.tempdir = before
            if self.seen:
                raise Outside(self.seen)
            if time.process_time() - began > LIMIT_S:
                raise OutOfTime(f"longer than {LIMIT_S} s")

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        if event == "open":
            path, _, flags = args
            writes = isinstance(flags, int) and bool(flags & _WRITE)
            if isinstance(path, str | bytes) and not self._is_inside(path, writes):
                self._refuse(f"{event} {path!r}")
        elif event in _CHANGES:
            for path in args[: 2 if event in ("os.rename", "os.link", "shutil.move") else 1]:
                if isinstance(path, str | bytes) and not self._is_inside(path, True):
                    self._refuse(f"{event} {path!r}")
        elif event.startswith(_FORBIDDEN):
            self._refuse(event)

    def _is_inside(self, path: str | bytes, writes: bool) -> bool:
        real = os.path.realpath(os.fsdecode(path))
        if real == self.folder or real.startswith(self.folder + os.sep) or real == os.devnull:
            return True
        compiled = "__pycache__" in Path(real).parts  # Python keeps it of a module that is imported for the first time
        return (compiled or not writes) and real.startswith(_CODE)

    def _refuse(self, what: str) -> None:
        self.seen = self.seen or what
        raise Outside(what)
