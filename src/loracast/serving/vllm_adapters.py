"""LoRAs on a vLLM server: written as PEFT folders, loaded while it runs, and unloaded when others need their place.

A document's LoRA is another one for each question, since the question weighs its chunks and sentences; each is loaded
under the digest of its `lora_key`, so that a name never means other weights, as the server's prefix cache demands.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock

from loracast.base.load import Base
from loracast.errors import AdapterError, LoracastError
from loracast.export.vllm import MOST_LOST, RANKS, too_much_lost
from loracast.lora.algebra import LoRA
from loracast.lora.fits import check_fits
from loracast.lora.peft_format import write_peft_folder
from loracast.lora.uniform import Uniform, uniform
from loracast.serving.client import Refused
from loracast.serving.vllm_client import VllmClient, as_loracast_error

MAX_LOADED = 32
"""LoRAs that stay loaded, and on the disk, while nobody uses them: give vLLM --max-cpu-loras of at least that many."""
PREFIX = "loracast-"
"""What names of LoRAs on the server begin with."""
_RANK_THERE = re.compile(r"greater than max_lora_rank\D*(\d+)")


class LoadedLoRA:
    """A LoRA under its name on the server."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self.n_bytes = 0
        self.n_users = 0
        self.is_loaded = False
        self.lock = Lock()
        """Held while it is loaded or unloaded, so that requests for the same LoRA load it once."""


class LoadedLoRAs:
    """The LoRAs that a server has loaded for one engine. Thread-safe; one that is in use is never unloaded."""

    def __init__(self, base: Base, client: VllmClient, folder: Path, max_loaded: int = MAX_LOADED):
        """
        Args:
            folder: where LoRAs are written; the server must see it under the same path.
        """
        self._base, self._client, self._folder, self._max_loaded = base, client, folder, max_loaded
        # Another engine on the same server has names of its own, which it may unload.
        self._prefix = f"{PREFIX}{secrets.token_hex(4)}-"
        self._max_rank = max(RANKS)
        self._held: OrderedDict[str, LoadedLoRA] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def n_bytes(self) -> int:
        """Bytes of the LoRAs that are loaded."""
        with self._lock:
            return sum(one.n_bytes for one in self._held.values())

    def take(self, key: str | None, read: Callable[[], LoRA | None]) -> LoadedLoRA | None:
        """The LoRA of a key, loaded in this thread if need be; None where there is none. `give_back` lets go of it.

        Args:
            key: None shares the LoRA with nobody.

        Raises:
            AdapterError: it does not fit the base, or its rank is too high for the server.
            EngineFailed: the server does not answer, or does not load it.
        """
        name = self._prefix + hashlib.sha256((key or secrets.token_hex(16)).encode()).hexdigest()[:32]
        with self._lock:
            one = self._held.setdefault(name, LoadedLoRA(name, self._folder / name))
            self._held.move_to_end(name)
            one.n_users += 1
        try:
            with one.lock:
                if not one.is_loaded and (lora := read()) is not None:
                    self._load(one, lora)
        except BaseException:
            self.give_back(one)
            raise
        if not one.is_loaded:
            self.give_back(one)
            return None
        return one

    def load_again(self, one: LoadedLoRA) -> None:
        """Load a LoRA that the server has forgotten, since it was started anew."""
        with one.lock:
            try:
                self._load_there(one)
            except Refused as error:
                raise as_loracast_error(error) from error

    def give_back(self, one: LoadedLoRA) -> None:
        """Let go of a LoRA. The least recently used ones are unloaded where too many are loaded."""
        with self._lock:
            one.n_users -= 1
            free = [held for held in self._held.values() if not held.n_users]
            n_over = len(self._held) - self._max_loaded
            gone = [held for i, held in enumerate(free) if i < n_over or not held.is_loaded]
        for held in gone:
            self._drop(held)

    def close(self) -> None:
        """Unload all."""
        with self._lock:
            held = [*self._held.values()]
            self._held.clear()
        for one in held:
            self._unload(one)

    def _drop(self, one: LoadedLoRA) -> None:
        """Unload a LoRA that nobody uses. Whoever asks for it meanwhile waits, and loads it again."""
        if not one.lock.acquire(blocking=False):  # another thread loads it again, or drops it
            return
        try:
            with self._lock:
                if one.n_users or self._held.get(one.name) is not one:
                    return
            self._unload(one)
            one.n_bytes, one.is_loaded = 0, False
            with self._lock:
                if not one.n_users:
                    self._held.pop(one.name, None)
        finally:
            one.lock.release()

    def _unload(self, one: LoadedLoRA) -> None:
        if one.is_loaded:
            with suppress(LoracastError):  # a server that has gone, or was started anew, has it no more
                self._client.unload(one.name)
        shutil.rmtree(one.folder, ignore_errors=True)

    def _load(self, one: LoadedLoRA, lora: LoRA) -> None:
        check_fits(self._base.model, lora.shapes.items())
        made = self._write(one, lora)
        try:
            try:
                self._load_there(one)
            except Refused as error:
                rank_there = _RANK_THERE.search(str(error))
                if rank_there is None:
                    raise
                self._max_rank = int(rank_there[1])  # the server tells it only so
                made = self._write(one, lora)
                self._load_there(one)
        except Refused as error:
            raise as_loracast_error(error) from error
        one.n_bytes, one.is_loaded = made.lora.n_bytes, True

    def _load_there(self, one: LoadedLoRA) -> None:
        try:
            self._client.load(one.name, one.folder)
        except Refused as error:
            if "already been loaded" not in str(error):  # another request was faster, or it could not be unloaded
                raise

    def _write(self, one: LoadedLoRA, lora: LoRA) -> Uniform:
        made = uniform(lora, self._max_rank, RANKS)
        if made.error > MOST_LOST:
            problem = too_much_lost(lora.rank, self._max_rank, made.error)
            raise AdapterError(f"{problem}, or ask with fewer chunks (route) or adapters")
        write_peft_folder(made, one.folder, self._base.name)
        return made
