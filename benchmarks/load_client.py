"""What a load test talks with: a server that can be killed, and a client that notes the times of each request."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from load_report import Record, Run, Size

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from servers import eventually, is_ready

_START_S = 120.0


class Client:
    """Sends requests to one server, which is sometimes down."""

    def __init__(self, url: str, n_connections: int, seconds: float):
        self.run = Run(seconds)
        self.started = time.perf_counter()
        self.is_up = asyncio.Event()
        self.is_up.set()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=n_connections)
        self.http = httpx.AsyncClient(base_url=url, timeout=120, limits=limits)

    @property
    def now_s(self) -> float:
        return time.perf_counter() - self.started

    @asynccontextmanager
    async def recorded(self, kind: str) -> AsyncIterator[Record]:
        """Note when a request began and ended, and what went wrong in the connection."""
        record = Record(kind, self.now_s)
        self.run.records.append(record)
        try:
            yield record
        except httpx.HTTPError as error:
            record.error = type(error).__name__
            record.is_excused = self.run.was_down(record.started_s)
        record.total_s = self.now_s - record.started_s

    async def send(self, kind: str, method: str, path: str, **content: Any) -> httpx.Response | None:
        """Send a request once the server is up; None where the connection broke."""
        await self.is_up.wait()
        async with self.recorded(kind) as record:
            response = await self.http.request(method, path, **content)
            record.status = response.status_code
            return response
        return None

    async def chat(self, kind: str, body: dict[str, Any], leave_after: int = 0) -> Mapping[str, Any] | None:
        """Ask, and note the times; the text and the account of what answered.

        Args:
            leave_after: the number of pieces after which the client leaves; 0 stays to the end.
        """
        async with self.recorded(kind) as record:
            if not body.get("stream"):
                response = await self.http.post("/v1/chat/completions", json=body)
                record.status, whole = response.status_code, response.json()
                if response.is_error:
                    return None
                record.n_tokens = whole["usage"]["completion_tokens"]
                return {"text": whole["choices"][0]["message"]["content"], **whole["loracast"]}
            text, account, n_pieces, is_done = "", {}, 0, False
            async with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
                record.status = response.status_code
                if response.is_error:
                    return None
                async for line in response.aiter_lines():
                    is_done = is_done or line == "data: [DONE]"
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        record.error = f"in the stream: {event['error']['message']}"
                        return None
                    account |= event.get("loracast", {})
                    record.n_tokens = (event.get("usage") or {}).get("completion_tokens", record.n_tokens)
                    piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                    if piece:
                        record.first_s = record.first_s or self.now_s - record.started_s
                        text, n_pieces = text + piece, n_pieces + 1
                    if leave_after and n_pieces >= leave_after:
                        return None
            if not is_done:
                record.error = "the stream has no end"
            return {"text": text, **account}
        return None

    async def metrics(self) -> dict[str, float]:
        """The figures of the engine that /metrics tells."""
        lines = (await self.http.get("/metrics")).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("loracast_") and "{" not in line)
        return {name.removeprefix("loracast_"): float(value) for name, value in pairs}


def resident(pid: int, at_s: float) -> Size:
    """The resident size of a process; Linux alone has it there."""
    lines = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    of = {key: int(value.split()[0]) * 1024 for key, _, value in lines if key in ("VmRSS", "RssAnon")}
    return Size(at_s, of["VmRSS"], of["RssAnon"])


class Server:
    """A server in a process of its own, which starts anew at the same address.

    Args:
        words: of the command `loracast serve`, without the port.
        home: LORACAST_HOME.
        log: what all of its lives print goes there.
    """

    def __init__(self, words: Sequence[str], home: Path, log: Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._words, self._home, self._log = [*words, "--port", str(port)], home, log
        self.url = f"http://127.0.0.1:{port}"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it takes requests. Raises SystemExit where it ends."""
        self._process = start(self._words, self._home, self._log)
        eventually(lambda: is_ready(self.url) or self._process.poll() is not None, _START_S)
        if self._process.poll() is not None:
            raise SystemExit("the server does not start")

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """Ask it to end; its exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(60)


def start(words: list[str], home: Path, log_path: Path) -> subprocess.Popen[bytes]:
    """Start `loracast` with the words of a command in a process of its own, which writes to a log."""
    environment = {**os.environ, "LORACAST_HOME": str(home)}
    with open(log_path, "a") as log:
        return subprocess.Popen([sys.executable, "-m", "loracast", *words], env=environment, stdout=log, stderr=log)
