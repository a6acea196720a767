"""Opens folders on this machine or at any URL that fsspec knows, with errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loracast.errors import LoracastError


@contextmanager
def file_system(where: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL, and the path in it."""
    import fsspec

    with told(where):
        fs, root = fsspec.core.url_to_fs(where)
        yield fs, root.rstrip("/")


@contextmanager
def told(where: str) -> Iterator[None]:
    """Turn whatever a remote service raises into a LoracastError of one line."""
    try:
        yield
    except LoracastError:
        raise
    except ImportError as error:
        raise LoracastError(f"{where} needs another package: {error}") from error
    except Exception as error:  # each of these services has errors of its own
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise LoracastError(f"{where} cannot be used: {said[0]}") from error
