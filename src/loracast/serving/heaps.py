"""How the threads of a server share the heaps of glibc's malloc."""

from __future__ import annotations

import ctypes
import os
import platform

_M_ARENA_MAX = -8
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
"""Options of mallopt (malloc.h): how many heaps there are at most, the size from which on a block has pages of its own,
and how much a heap keeps free at its end."""


def share_heaps() -> None:
    """Have all threads share two of glibc's heaps and give large blocks back, unless MALLOC_ARENA_MAX is set.

    With one for each thread every heap keeps the pages of the largest LoRA that its thread ever read: under mixed load
    (benchmarks/load.py) the resident size grew by 6 % from the second to the fifth minute, and by 1 % with two.
    Blocks from 1 MiB on have pages of their own, which took 100 MiB less after three minutes.
    """
    if platform.libc_ver()[0] == "glibc" and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_M_ARENA_MAX, 2), (_M_MMAP_THRESHOLD, 1 << 20), (_M_TRIM_THRESHOLD, 32 << 20)):
            mallopt(option, value)
