"""LoRAs kept in memory under a budget of bytes, the least recently used leaving first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

from loracast.serving.packed_lora import PackedLoRA


class AdaptersInMemory:
    """Packed LoRAs by key. Thread-safe; a LoRA that leaves stays with the rows that run with it."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self._held: OrderedDict[str, PackedLoRA] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: str, load: Callable[[], PackedLoRA | None]) -> PackedLoRA | None:
        """The LoRA of a key, loaded in this thread where it is not held."""
        with self._lock:
            if (known := self._held.get(key)) is not None:
                self._held.move_to_end(key)
                return known
        loaded = load()  # without the lock: others need not wait for a file
        if loaded is None:
            return None
        with self._lock:
            if (known := self._held.get(key)) is not None:  # another thread was faster
                return known
            self._held[key] = loaded
            self.n_bytes += loaded.n_bytes
            while self.n_bytes > self.max_bytes:
                _, dropped = self._held.popitem(last=False)
                self.n_bytes -= dropped.n_bytes
        return loaded
