"""The server of a load test, which can be killed and started anew, and a lock on one of its databases."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import httpx

_START_S = 120.0


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
        """Start it, and wait until it takes requests. Raises SystemExit where it ends, or needs over two minutes."""
        self._process = start(self._words, self._home, self._log)
        until = time.monotonic() + _START_S
        while time.monotonic() < until and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
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


def hold(database: Path, seconds: float) -> None:
    """Keep everybody else from writing to a database for a while, and from reading the register."""
    with closing(sqlite3.connect(database, timeout=30, isolation_level=None)) as held:
        held.execute("BEGIN EXCLUSIVE")
        time.sleep(seconds)
        held.execute("ROLLBACK")
