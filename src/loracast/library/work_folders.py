"""Hidden work folders, each locked by its process; `tidy` deletes those of killed processes."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loracast.files import try_lock

_PREFIX = ".loracast-"
_MADE = "made"  # the purpose in the name of a folder that is made, but perhaps not yet locked
_GRACE_S = 10.0


@contextmanager
def work_folder(parent: Path, purpose: str) -> Iterator[Path]:
    """A folder of this process alone, deleted afterwards; if the process is killed, `tidy` deletes it."""
    made = Path(tempfile.mkdtemp(dir=parent, prefix=f"{_PREFIX}{_MADE}-"))
    lock = try_lock(made)
    folder = made.rename(made.with_name(made.name.replace(_MADE, purpose, 1)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def is_at_work(parent: Path, purpose: str) -> bool:
    """Whether a process has such a work folder, or was killed with one that `tidy` has not deleted yet."""
    return any(parent.glob(f"{_PREFIX}{purpose}-*"))


@contextmanager
def exclusively(parent: Path, what: str) -> Iterator[None]:
    """Wait until nobody else does the same in this folder, and keep them off meanwhile; on POSIX systems only."""
    parent.mkdir(parents=True, exist_ok=True)
    with open(parent / f"{_PREFIX}{what}.lock", "w") as file:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)  # of this open file, so that threads wait for each other too
        yield


def tidy(parent: Path) -> None:
    """Delete the work folders of killed processes."""
    for folder in parent.glob(f"{_PREFIX}*-*"):
        with suppress(OSError):  # another process may be tidying too
            is_made = folder.name.startswith(f"{_PREFIX}{_MADE}-")
            is_new = is_made and time.time() - folder.stat().st_mtime < _GRACE_S
            lock = None if is_new else try_lock(folder)
            if lock is not None:
                try:
                    shutil.rmtree(folder)
                finally:
                    os.close(lock)
