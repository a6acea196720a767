"""An engine on several vLLM servers, each of which gets the LoRAs that are its own; methods as in `Engine`.

Rendezvous hashing (Thaler and Ravishankar 1998) gives every LoRA an order of the servers: its own is the first one that
does not fail, so that a server that goes or comes back moves no LoRA but those that were its own.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import fields

from loracast.serving.engine_config import EngineStats
from loracast.serving.request import EngineFailed, GenerationRequest
from loracast.serving.ticket import Ticket
from loracast.serving.vllm import VllmEngine, VllmTicket

_DOWN_S = 5.0
"""A server that failed is the last choice for so long."""
_log = logging.getLogger(__name__)


class VllmReplicas:
    """Several vLLM servers as one engine."""

    def __init__(self, engines: Sequence[VllmEngine]):
        self._engines = list(engines)
        self._down_until = dict.fromkeys((engine.url for engine in engines), 0.0)
        for engine in engines:
            engine.hand_over = lambda ticket, failed=engine: self._hand_over(ticket, failed)  # type: ignore[misc]

    def submit(self, request: GenerationRequest) -> Ticket:
        """As `Engine.submit`. Raises EngineFailed where all servers fail."""
        ticket = VllmTicket(request)
        self._enter(ticket)
        return ticket

    def _enter(self, ticket: VllmTicket) -> None:
        """Queue a request at the first server that takes it. Raises EngineFailed where none is left to try."""
        failures = []
        for engine in self._in_order(ticket.request):
            if ticket.n_failed == len(self._engines):
                break
            try:
                return engine.enter(ticket)
            except EngineFailed as error:
                failures.append(str(error))
                self._note(ticket, engine)
        raise EngineFailed(f"none of {len(self._engines)} vLLM servers answers: {'; '.join(failures)}")

    def _hand_over(self, ticket: VllmTicket, failed: VllmEngine) -> bool:
        self._note(ticket, failed)
        try:
            self._enter(ticket)
        except Exception as error:  # its own server's error is reported
            _log.warning("%s", error)
            return False
        return True

    def _note(self, ticket: VllmTicket, engine: VllmEngine) -> None:
        ticket.n_failed += 1
        self._down_until[engine.url] = time.monotonic() + _DOWN_S

    def _in_order(self, request: GenerationRequest) -> list[VllmEngine]:
        """The servers for a LoRA, its own first; without a LoRA, those for the beginning of the prompt."""
        key, now = request.lora_key or str(request.prompt[:32]), time.monotonic()

        def place(engine: VllmEngine) -> tuple[bool, bytes]:
            return self._down_until[engine.url] > now, hashlib.sha256(f"{engine.url} {key}".encode()).digest()

        return sorted(self._engines, key=place)

    def stats(self) -> EngineStats:
        """The sums over all servers."""
        found = [engine.stats() for engine in self._engines]
        return EngineStats(**{f.name: sum(getattr(one, f.name) for one in found) for f in fields(EngineStats)})

    def drain(self, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        drained = [engine.drain(max(0.0, until - time.monotonic())) for engine in self._engines]
        return all(drained)

    def close(self) -> None:
        for engine in self._engines:
            engine.close()
