"""Values in memory under a budget of bytes, the least recently used leaving first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ByteCache(Generic[Value]):
    """Values by key. Thread-safe; a value that leaves stays with those who use it."""

    def __init__(self, max_bytes: int, n_bytes_of: Callable[[Value], int]):
        """
        Args:
            n_bytes_of: the bytes that a value takes; one that takes more than `max_bytes` is not kept.
        """
        self.max_bytes, self.n_bytes = max_bytes, 0
        self._n_bytes_of = n_bytes_of
        self._held: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable, load: Callable[[], Value]) -> Value:
        """The value of a key, loaded in this thread where it is not held; a None is not kept."""
        with self._lock:
            if (known := self._held.get(key)) is not None:
                self._held.move_to_end(key)
                return known
        loaded = load()  # without the lock: others need not wait for a file
        if loaded is None or (n_bytes := self._n_bytes_of(loaded)) > self.max_bytes:
            return loaded
        with self._lock:
            if (known := self._held.get(key)) is not None:  # another thread was faster
                return known
            self._held[key] = loaded
            self.n_bytes += n_bytes
            while self.n_bytes > self.max_bytes:
                _, dropped = self._held.popitem(last=False)
                self.n_bytes -= self._n_bytes_of(dropped)
        return loaded
