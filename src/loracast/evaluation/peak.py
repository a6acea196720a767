"""Measure the most memory that a piece of work takes."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_MIB = 2**20


@dataclass
class Peak:
    """Figures that are there when the work has ended."""

    before_mib: float = 0.0
    """Resident memory when the work began."""
    above_mib: float = 0.0
    """The most memory that came on top of it."""


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the resident memory of this process while the context lasts.

    On Linux freed memory is handed back first, so that it cannot hide what is allocated in its place, and the kernel's
    high-water mark starts anew. Elsewhere only what exceeds all that the process ever held shows.
    """
    before = _start()
    peak = Peak(before / _MIB)
    yield peak
    peak.above_mib = max(0, _most() - before) / _MIB


def _start() -> int:
    try:
        if sys.platform == "linux":
            getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)  # glibc has it, musl has nothing to trim
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status("VmRSS")
    except OSError:
        return _most()


def _most() -> int:
    """The most bytes that were resident: since the reset, or of the whole process where there is none."""
    try:
        return _status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
