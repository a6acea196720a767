"""Mixed load on a `loracast serve` of its own: answers, learning, deletion, disconnects and bad requests at once.

    python benchmarks/load.py [--minutes 10] [--clients 8] [--adapters 24] [--seed 0] [--json FILE] [--plot FILE]

Every adapter holds a number of its own, and many share their question, so that only the LoRA and its place in the
caches tell them apart. The server keeps few LoRAs and prompts in memory (`--adapter-memory-bytes`,
`--prompt-cache-bytes`), so that they are dropped and read again while others are answered. Exit code 1 says that
something broke which must hold (load_report.py).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from bad_requests import BAD_DOCUMENTS, BAD_REQUESTS
from load_adapters import PROSE, Known
from load_report import Answer, Record, Run, Size, plot, summary, table

from loracast.data.needles import make_needles
from loracast.paths import bases_dir, encoders_dir

MIB = 2**20
N_QUESTIONS = 4
MIX = {
    "ask": 36, "ask, streamed": 24, "base": 8, "disconnect": 8, "bad request": 12, "bad document": 2, "replace": 6,
    "delete and learn": 3, "same name twice": 1,
}  # fmt: skip
"""Kinds of work and how often each is drawn."""


class Load:
    """The clients of one run."""

    def __init__(self, url: str, given: argparse.Namespace):
        self.url, self.rng, self.given = url, random.Random(given.seed), given
        self.run = Run(given.minutes * 60)
        self.started = time.perf_counter()
        self.base = ""
        needles = make_needles(self.rng, N_QUESTIONS, split="dev", kind="number4")
        self.known = [
            Known(f"doc-{i}", one.statement.replace(one.answer, "{}"), one.question)
            for i in range(given.adapters)
            for one in [needles[i % N_QUESTIONS]]
        ]
        # Any two numbers differ in two digits at least, so that a slip of one is not taken for another's number.
        self._numbers = [f"{n}{sum(map(int, str(n))) % 10}" for n in range(100, 1000)]
        self.rng.shuffle(self._numbers)
        self._n_used = 0
        self._bad_requests, self._bad_documents = itertools.cycle(BAD_REQUESTS), itertools.cycle(BAD_DOCUMENTS)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=given.clients)
        self.http = httpx.AsyncClient(base_url=url, timeout=120, limits=limits)

    @property
    def now_s(self) -> float:
        return time.perf_counter() - self.started

    def number(self) -> str:
        """A number that no adapter has had."""
        self._n_used += 1
        return self._numbers[self._n_used - 1]

    # ---- requests

    @asynccontextmanager
    async def recorded(self, kind: str) -> AsyncIterator[Record]:
        """Note when a request began and ended, and what went wrong in the connection."""
        record = Record(kind, self.now_s)
        self.run.records.append(record)
        try:
            yield record
        except httpx.HTTPError as error:
            record.error = type(error).__name__
        record.total_s = self.now_s - record.started_s

    async def send(self, kind: str, method: str, path: str, **content: Any) -> httpx.Response | None:
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

    async def ask(self, kind: str, leave_after: int = 0) -> None:
        """Ask for an adapter's number, by one of its names, and note what answers."""
        one = self.rng.choice(self.known)
        names = [one.name, f"{self.base}:{one.name}"]
        least, n_learned, n_deleted = len(one.versions) - 1, one.n_learned, one.n_deleted
        was_there, was_gone, was_deleting = one.is_there, one.is_gone, one.deletes
        body: dict[str, Any] = {
            "model": self.rng.choice(names),
            "messages": [{"role": "user", "content": one.question}],
            "max_tokens": self.rng.choice([12, 16, 48]),
        }
        if kind != "ask":
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        began = len(self.run.records)
        told = await self.chat(kind, body, leave_after)
        record = self.run.records[began]
        if record.status == 404:
            record.is_expected = not was_there or was_deleting or one.n_deleted > n_deleted
        elif told is not None and record.error is None:
            is_gone = was_gone and one.n_learned == n_learned
            self.run.answers.append(Answer(one.name, one, max(least, 0), is_gone, told))

    async def base_chat(self, kind: str) -> None:
        content = " ".join(self.rng.choices(PROSE, k=self.rng.choice([1, 4, 40]))) + " What is this about?"
        body = {"model": self.base, "messages": [{"role": "user", "content": content}]}
        told = await self.chat(
            kind, {**body, "max_tokens": self.rng.choice([8, 32, 96]), "stream": self.rng.random() < 0.5}
        )
        if told is not None and told["adapters"]:
            self.run.broken.append("an adapter answered a question to the base")

    async def bad_request(self, kind: str) -> None:
        name, method, path, content = next(self._bad_requests)
        response = await self.send(kind, method, path, **content)
        if response is not None and not 400 <= response.status_code < 500:
            self.run.broken.append(f"bad request {name!r}: status {response.status_code}")

    async def bad_document(self, kind: str) -> None:
        name, content = next(self._bad_documents)
        file = {"file": (name, content)}
        response = await self.send(kind, "POST", "/v1/adapters", files=file, data={"name": "bad", "replace": "true"})
        if response is not None and response.status_code == 202:
            job = await self.ended(response.json())
            if job["status"] != "failed":
                self.run.broken.append(f"bad document {name!r}: its job is {job['status']}")

    # ---- changes of adapters

    async def ended(self, job: dict[str, Any]) -> dict[str, Any]:
        """A job when it has ended."""
        while job["status"] in ("queued", "running"):
            await asyncio.sleep(0.2)
            response = await self.send("look at a job", "GET", f"/v1/jobs/{job['id']}")
            if response is not None and response.status_code == 200:
                job = response.json()
        return job

    async def learn(self, kind: str, one: Known, **form: str) -> None:
        """Learn a document with a new number, and note its version when the job is done."""
        number, one.n_learned, one.is_gone = self.number(), one.n_learned + 1, False
        file = {"file": (f"{one.name}.txt", one.document(self.rng, number))}
        while True:
            response = await self.send(kind, "POST", "/v1/adapters", files=file, data={"name": one.name, **form})
            if response is None or response.status_code != 429:
                break
            await asyncio.sleep(float(response.headers["Retry-After"]))
        if response is None or response.status_code != 202:
            return
        job = await self.ended(response.json())
        self.run.n_jobs += 1
        if job["status"] != "completed":
            self.run.broken.append(f"a job to learn {one.name} is {job['status']}: {job['error']}")
            return
        one.versions.append(job["version"])
        self.run.numbers[job["version"]] = number
        one.is_there = True

    async def replace(self, kind: str) -> None:
        one = self.rng.choice(self.known)
        if one.changing.locked():
            return
        async with one.changing:
            await self.learn(kind, one, replace="true")

    async def delete_and_learn(self, kind: str) -> None:
        one = self.rng.choice(self.known)
        if one.changing.locked():
            return
        async with one.changing:
            one.n_deleted, one.deletes = one.n_deleted + 1, True
            response = await self.send("delete", "DELETE", f"/v1/adapters/{one.name}")
            one.is_there = one.deletes = False
            one.is_gone = True
            if response is None or response.status_code != 200:
                self.run.broken.append(f"{one.name} was not deleted")
            await asyncio.sleep(self.rng.random())
            await self.learn("learn", one)

    async def same_name_twice(self, kind: str) -> None:
        """Learn two documents under one name at once: one of them gets it, and the other is refused."""
        name = f"twin-{self._n_used}"
        files = [{"file": (f"{name}.txt", f"The PIN of the twin is {self.number()}.".encode())} for _ in range(2)]
        sent = [self.send(kind, "POST", "/v1/adapters", files=file, data={"name": name}) for file in files]
        taken = [one for one in await asyncio.gather(*sent) if one is not None and one.status_code == 202]
        jobs = [await self.ended(one.json()) for one in taken]
        if taken and [job["status"] for job in jobs].count("completed") != 1:
            self.run.broken.append(f"{name}: its jobs are {[job['status'] for job in jobs]}")
        if taken:
            await self.send("delete", "DELETE", f"/v1/adapters/{name}")

    # ---- the run

    async def do(self, kind: str) -> None:
        if kind == "disconnect":
            await self.ask(kind, leave_after=self.rng.randint(1, 3))
        elif kind.startswith("ask"):
            await self.ask(kind)
        else:
            does = {
                "base": self.base_chat, "bad request": self.bad_request, "bad document": self.bad_document,
                "replace": self.replace, "delete and learn": self.delete_and_learn,
                "same name twice": self.same_name_twice,
            }  # fmt: skip
            await does[kind](kind)

    async def client(self) -> None:
        kinds, weights = zip(*MIX.items(), strict=True)
        while self.now_s < self.run.seconds and len(self.run.records) < self.given.requests:
            if self._n_used > len(self._numbers) - 4 * self.given.clients:  # no new number is left
                kinds, weights = kinds[:5], weights[:5]
            await self.do(self.rng.choices(kinds, weights)[0])

    async def watch(self, pid: int) -> None:
        """Note the server's resident size every ten seconds, and at a fifth of the time."""
        for at in sorted({*range(0, int(self.run.seconds), 10), self.run.seconds / 5}):
            await asyncio.sleep(max(0.0, at - self.now_s))
            self.run.sizes.append(resident(pid, self.now_s))

    async def go(self, pid: int) -> Run:
        async with self.http:
            models = (await self.http.get("/v1/models")).json()["data"]
            self.base = models[0]["id"]
            for one in self.known:
                await self.learn("learn", one)
            self.started = time.perf_counter()
            self.run.records.clear()
            watching = asyncio.create_task(self.watch(pid))
            before = await self.metrics()
            await asyncio.gather(*(self.client() for _ in range(self.given.clients)))
            self.run.seconds_taken = self.now_s
            watching.cancel()
            self.run.sizes.append(resident(pid, self.now_s))
            after = await self.metrics()
            self.run.engine = {
                name: value - before[name] if name.endswith("_total") else value for name, value in after.items()
            }
        return self.run

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


def main(words: list[str] | None = None) -> None:
    """Run the program with the words of a command line, those of this process by default."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=24)
    parser.add_argument("--requests", type=int, default=50_000, help="most requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", help="as of `loracast serve`")
    parser.add_argument("--hypernetwork", help="as of `loracast serve`")
    parser.add_argument("--adapter-memory-mib", type=float, default=8.0)
    parser.add_argument("--prompt-cache-mib", type=float, default=4.0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--plot", type=Path, help="file for a picture of latencies and memory; needs matplotlib")
    given = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        home, log_path = Path(folder) / "home", Path(folder) / "log"
        home.mkdir()
        for cache in (bases_dir(), encoders_dir()):  # they are fetched already, and the rest is of this run alone
            if cache.exists():
                (home / cache.name).symlink_to(cache)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        serve = [
            "serve", "--port", port, "--library", home / "library",
            "--max-queued-jobs", max(2, given.clients // 4),
            "--adapter-memory-bytes", int(given.adapter_memory_mib * MIB),
            "--prompt-cache-bytes", int(given.prompt_cache_mib * MIB),
            *(["--base", given.base] if given.base else []),
            *(["--hypernetwork", given.hypernetwork] if given.hypernetwork else []),
        ]  # fmt: skip
        server = start(list(map(str, serve)), home, log_path)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url, server)
            run = asyncio.run(Load(url, given).go(server.pid))
            server.send_signal(signal.SIGTERM)
            if (code := server.wait(60)) != 0:
                run.broken.append(f"the server ended with {code}")
        finally:
            server.kill()
            server.wait()
            print(log_path.read_text(encoding="utf-8")[-2000:], file=sys.stderr)
        run.read_log(log_path.read_text(encoding="utf-8"))
    options = {key: value for key, value in vars(given).items() if key not in ("json", "plot")}
    figures = {"options": options, **summary(run)}
    print(table(figures))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if given.plot:
        plot(run, given.plot)
    sys.exit(1 if figures["broken"] else 0)


def start(words: list[str], home: Path, log_path: Path) -> subprocess.Popen[bytes]:
    """Start `loracast` with the words of a command in a process of its own, which writes to a log."""
    environment = {**os.environ, "LORACAST_HOME": str(home)}
    with open(log_path, "w") as log:
        return subprocess.Popen([sys.executable, "-m", "loracast", *words], env=environment, stdout=log, stderr=log)


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Raises SystemExit where the server ends before it is ready, or takes more than two minutes."""
    until = time.monotonic() + 120
    while time.monotonic() < until and server.poll() is None:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit("the server does not start")


if __name__ == "__main__":
    main()
