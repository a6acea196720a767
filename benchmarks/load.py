"""Mixed load on a `loracast serve` of its own: answers, learning, deletion, disconnects and bad requests at once.

    python benchmarks/load.py [--minutes 10] [--clients 8] [--adapters 24] [--seed 0] [--json FILE]
    python benchmarks/load.py --minutes 60 --faults     # the server is also killed, and its databases are held

Every adapter holds a number of its own, and many share their question, so that only the LoRA and its place in the
caches tell them apart. The server keeps few LoRAs and prompts in memory (`--adapter-memory-bytes`,
`--prompt-cache-bytes`), so that they are dropped and read again while others are answered. In the end every adapter
must be as it was acknowledged, and `verify` finds no damage. Exit code 1 says that something broke which must hold
(load_report.py).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import httpx
from bad_requests import BAD_DOCUMENTS, BAD_REQUESTS
from load_report import Answer, Record, Run, Size, summary, table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from loracast.files import cache_dir
from loracast.lab.data.needles import make_needles
from loracast.library import register
from loracast.library.library import Library
from servers import eventually, is_ready

MIB = 2**20
N_QUESTIONS = 4
MIX = {
    "ask": (36, "ask"), "ask, streamed": (24, "ask"), "base": (8, "base_chat"), "disconnect": (8, "ask"),
    "bad request": (12, "bad_request"), "bad document": (2, "bad_document"), "replace": (6, "change"),
    "delete and learn": (3, "change"), "same name twice": (1, "same_name_twice"),
}  # fmt: skip
"""Kinds of work: how often each is drawn, and the method of `Load` that does it."""
OPTIONS: tuple[tuple[str, float, str], ...] = (
    ("--minutes", 10.0, ""), ("--clients", 8, ""), ("--adapters", 24, ""), ("--requests", 300_000, "most requests"),
    ("--seed", 0, ""), ("--fault-every", 180.0, "most seconds between two faults"), ("--adapter-memory-mib", 8.0, ""),
    ("--prompt-cache-mib", 4.0, ""),
)  # fmt: skip
"""Options with numbers: their defaults, and what they mean."""
JOB_TIMEOUT_S = 300.0
"""How long after the run a job may end, in seconds."""
KILL_PHASE = 1 / 3
"""The share of the time in which the server is killed; its last life is long enough to show whether it grows."""
_START_S = 120.0
_DATABASES = (register.FILE, "serving/state.sqlite")
PROSE = (
    "The gardener watered the roses before the sun was high.",
    "A narrow road leads from the village to the old mill.",
    "Nobody had expected so many visitors in the first week.",
    "The bread is baked in the night and sold in the morning.",
    "Rain fell on the hills, and the river rose a little.",
    "The committee meets in the hall behind the library.",
    "Two boats lay at the pier, one of them without a mast.",
    "In winter the shop closes an hour earlier than in summer.",
)


class Known:
    """One adapter's name, and what a request for it may get."""

    def __init__(self, name: str, statement: str, question: str):
        self.name, self.question = name, question
        self._statement = statement
        self.versions: list[str] = []
        """Hashes of the versions that were completed, oldest first."""
        self.n_learned = self.n_deleted = 0
        """Changes that were begun."""
        self.is_there = False
        """False from the moment when a deletion is sent until the next version is completed."""
        self.is_gone = False
        """True from the answer to a deletion until the next version is sent."""
        self.changing = asyncio.Lock()

    def document(self, rng: random.Random, number: str) -> bytes:
        prose = rng.sample(PROSE, 4)
        prose.insert(rng.randrange(5), self._statement.format(number))
        return " ".join(prose).encode()


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
        self.process = start(self._words, self._home, self._log)
        eventually(lambda: is_ready(self.url) or self.process.poll() is not None, _START_S)
        if self.process.poll() is not None:
            raise SystemExit("the server does not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def start(words: list[str], home: Path, log_path: Path) -> subprocess.Popen[bytes]:
    """Start `loracast` with the words of a command in a process of its own, which writes to a log."""
    environment = {**os.environ, "LORACAST_HOME": str(home)}
    with open(log_path, "a") as log:
        return subprocess.Popen([sys.executable, "-m", "loracast", *words], env=environment, stdout=log, stderr=log)


class Load:
    """The clients of one run, which note the times of each request to a server that is sometimes down."""

    def __init__(self, server: Server, given: argparse.Namespace):
        self.server, self.rng, self.given, self.run = server, random.Random(given.seed), given, Run(given.minutes * 60)
        self.base = ""
        self.started = time.perf_counter()
        self.is_up = asyncio.Event()
        self.is_up.set()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=given.clients)
        self.http = httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits)
        needles = make_needles(self.rng, N_QUESTIONS, split="dev", kind="number4")
        asked = [(one.statement.replace(one.answer, "{}"), one.question) for one in needles]
        self.known = [Known(f"doc-{i}", *asked[i % N_QUESTIONS]) for i in range(given.adapters)]
        # Any two numbers differ in two digits at least, so that a slip of one is not taken for another's number.
        numbers = [f"{n}{sum(map(int, str(n))) % 10}" for n in range(100, 1000)]
        self._numbers = itertools.cycle(self.rng.sample(numbers, len(numbers)))
        self._jobs: set[str] = set()
        self.is_over = asyncio.Event()
        self._bad_requests, self._bad_documents = itertools.cycle(BAD_REQUESTS), itertools.cycle(BAD_DOCUMENTS)

    # ---- requests

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
        asked = self.http.stream("POST", "/v1/chat/completions", json=body)
        async with self.recorded(kind) as record, asked as response:
            record.status = response.status_code
            if response.is_error:
                return None
            if not body.get("stream"):
                whole = json.loads(await response.aread())
                return {"text": whole["choices"][0]["message"]["content"], **whole["loracast"]}
            text, account, n_pieces, is_done = "", {}, 0, False
            async for line in response.aiter_lines():
                is_done = is_done or line == "data: [DONE]"
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    record.error = f"in the stream: {event['error']['message']}"
                    return None
                account |= event.get("loracast", {})
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

    def note_size(self) -> None:
        """Note the resident size of the server's process; Linux alone has it there."""
        status = Path(f"/proc/{self.server.process.pid}/status").read_text()
        kib = dict(re.findall(r"^(VmRSS|RssAnon):\s*(\d+) kB$", status, re.MULTILINE))
        mib = (round(int(kib[key]) / 1024, 1) for key in ("VmRSS", "RssAnon"))
        self.run.sizes.append(Size(self.now_s, *mib))

    # ---- questions

    async def ask(self, kind: str) -> None:
        """Ask for an adapter's number, by one of its names, and note what answers."""
        leave_after = self.rng.randint(1, 3) if kind == "disconnect" else 0
        one = self.rng.choice(self.known)
        least, n_learned, n_deleted = len(one.versions) - 1, one.n_learned, one.n_deleted
        was_there, was_gone = one.is_there, one.is_gone
        body: dict[str, Any] = {
            "model": self.rng.choice([one.name, f"{self.base}:{one.name}"]),
            "messages": [{"role": "user", "content": one.question}],
            "max_tokens": self.rng.choice([12, 16, 48]),
        }
        if kind != "ask":
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        began = len(self.run.records)
        content = await self.chat(kind, body, leave_after)
        record = self.run.records[began]
        if record.status == 404:
            record.is_expected = not was_there or one.n_deleted > n_deleted
        elif content is not None and record.error is None:
            is_gone = was_gone and one.n_learned == n_learned
            self.run.answers.append(Answer(one.name, one.versions, max(least, 0), is_gone, content))

    async def base_chat(self, kind: str) -> None:
        text = " ".join(self.rng.choices(PROSE, k=self.rng.choice([1, 4, 40]))) + " What is this about?"
        body: dict[str, Any] = {"model": self.base, "messages": [{"role": "user", "content": text}]}
        body |= {"max_tokens": self.rng.choice([8, 32, 96]), "stream": self.rng.random() < 0.5}
        content = await self.chat(kind, body)
        if content is not None and content["adapters"]:
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
            if job["status"] not in ("failed", "lost"):
                self.run.broken.append(f"bad document {name!r}: its job is {job['status']}")

    # ---- changes of adapters

    async def ended(self, job: dict[str, Any]) -> dict[str, Any]:
        """A job when it has ended, with the status "lost" where it is gone, or goes on long after the run."""
        while job["status"] in ("queued", "running"):
            await asyncio.sleep(0.2)
            if self.now_s > self.run.seconds + JOB_TIMEOUT_S:
                self.run.broken.append(f"the job to learn {job['adapter']} does not end")
                return {**job, "status": "lost", "error": None}
            response = await self.send("look at a job", "GET", f"/v1/jobs/{job['id']}")
            if response is not None and response.status_code == 200:
                job = response.json()
            elif response is not None and response.status_code == 404:
                self.run.broken.append(f"the job to learn {job['adapter']} was lost")
                job = {**job, "status": "lost", "error": None}
        return job

    async def taken(self, name: str) -> dict[str, Any] | None:
        """The job of a document whose upload a kill cut off, if the server had taken it."""
        while (response := await self.send("look at jobs", "GET", "/v1/jobs", params={"limit": 100})) is None:
            await asyncio.sleep(0.2)
        found = [job for job in response.json()["data"] if job["adapter"] == name and job["id"] not in self._jobs]
        return found[0] if found else None

    async def learn(self, kind: str, one: Known, **form: str) -> None:
        """Learn a document with a new number, and note its version when the job is done."""
        number, one.n_learned, one.is_gone = next(self._numbers), one.n_learned + 1, False
        file = {"file": (f"{one.name}.txt", one.document(self.rng, number))}
        job = None
        while job is None:
            since = self.now_s
            response = await self.send(kind, "POST", "/v1/adapters", files=file, data={"name": one.name, **form})
            if response is None and self.run.was_down(since):
                job = await self.taken(one.name)
            elif response is not None and response.status_code == 429:
                await asyncio.sleep(float(response.headers["Retry-After"]))
            elif response is not None and response.status_code == 202:
                job = response.json()
            else:
                return
        self._jobs.add(job["id"])
        job = await self.ended(job)
        self.run.n_jobs += 1
        if job["status"] != "completed":
            self.run.broken.append(f"a job to learn {one.name} is {job['status']}: {job['error']}")
            return
        one.versions.append(job["version"])
        self.run.numbers[job["version"]] = number
        one.is_there = True

    async def change(self, kind: str) -> None:
        """Replace an adapter, or delete it and learn it anew, unless it is being changed already."""
        one = self.rng.choice(self.known)
        if one.changing.locked():
            return
        async with one.changing:
            if kind == "replace":
                await self.learn(kind, one, replace="true")
                return
            one.n_deleted, one.is_there = one.n_deleted + 1, False
            if not await self.delete(one.name):
                self.run.broken.append(f"{one.name} was not deleted")
            one.is_gone = True
            await asyncio.sleep(self.rng.random())
            await self.learn("learn", one)

    async def delete(self, name: str) -> bool:
        """Delete an adapter, once more where a kill cut that off; whether it was there and is gone."""
        response, is_again, since = None, False, self.now_s
        while response is None and (not is_again or self.run.was_down(since)):
            response = await self.send("delete", "DELETE", f"/v1/adapters/{name}")
            is_again = is_again or response is None
        return response is not None and (response.status_code == 200 or (is_again and response.status_code == 404))

    async def same_name_twice(self, kind: str) -> None:
        """Learn two documents under one name at once: one of them gets it, and the other is refused."""
        numbers = [next(self._numbers), next(self._numbers)]
        name = f"twin-{numbers[0]}"
        files = [{"file": (f"{name}.txt", f"The PIN of the twin is {number}.".encode())} for number in numbers]
        sent = [self.send(kind, "POST", "/v1/adapters", files=file, data={"name": name}) for file in files]
        answers = await asyncio.gather(*sent)
        taken = [one for one in answers if one is not None and one.status_code == 202]
        jobs = [await self.ended(one.json()) for one in taken]
        is_known = None not in answers  # otherwise a kill leaves open who was first
        if taken and is_known and [job["status"] for job in jobs].count("completed") != 1:
            self.run.broken.append(f"{name}: its jobs are {[job['status'] for job in jobs]}")
        if taken:
            await self.delete(name)

    # ---- the run

    async def client(self) -> None:
        kinds, weights = [*MIX], [weight for weight, _ in MIX.values()]
        while self.now_s < self.run.seconds and len(self.run.records) < self.given.requests:
            await self.is_up.wait()
            (kind,) = self.rng.choices(kinds, weights)
            await getattr(self, MIX[kind][1])(kind)

    async def watch(self) -> None:
        """Note the server's resident size every ten seconds, and at a fifth of the time."""
        for at in sorted({*range(0, int(self.run.seconds), 10), self.run.seconds / 5}):
            await asyncio.sleep(max(0.0, at - self.now_s))
            if self.is_up.is_set():
                self.note_size()

    async def restart(self) -> None:
        """Kill the server and start it anew. What it was asked meanwhile may fail."""
        self.note_size()
        self.is_up.clear()
        self.run.downs.append((self.now_s, math.inf))
        self.server.kill()
        await asyncio.to_thread(self.server.start)
        self.run.downs[-1] = (self.run.downs[-1][0], self.now_s)
        self.is_up.set()

    async def cause_faults(self, library: Path) -> None:
        """Kill the server and hold its databases in turn, at random moments, until the load is over."""
        rng = random.Random(self.given.seed + 1)
        for is_kill in itertools.cycle((True, False)):
            with suppress(TimeoutError):
                await asyncio.wait_for(self.is_over.wait(), self.given.fault_every * rng.uniform(0.3, 1.0))
                return
            if not is_kill:
                await asyncio.to_thread(_hold, library / rng.choice(_DATABASES), rng.uniform(0.5, 3.0))
                self.run.n_held += 1
            elif self.now_s < self.run.seconds * KILL_PHASE:
                await self.restart()

    async def go(self, library: Path) -> Run:
        """Learn the documents, put the load on the server, and look at what is there in the end."""
        async with self.http:
            self.base = (await self.http.get("/v1/models")).json()["data"][0]["id"]
            for one in self.known:
                await self.learn("learn", one)
            self.started = time.perf_counter()
            self.run.records.clear()
            watching = asyncio.create_task(self.watch())
            faults = [asyncio.create_task(self.cause_faults(library))] if self.given.faults else []
            await asyncio.gather(*(self.client() for _ in range(self.given.clients)))
            self.is_over.set()
            await asyncio.gather(*faults)
            self.run.seconds_taken = self.now_s
            watching.cancel()
            self.note_size()
            # The figures of the engine in the server's last life, without those of requests by route.
            found = re.findall(r"^loracast_(\w+) (\S+)$", (await self.http.get("/metrics")).text, re.MULTILINE)
            self.run.engine = {name: float(value) for name, value in found}
            await self.check_kept()
        return self.run

    async def check_kept(self) -> None:
        """Every adapter has the newest version that was acknowledged, and what was deleted is gone."""
        for one in self.known:
            response = await self.http.get(f"/v1/adapters/{one.name}")
            newest = response.json()["versions"][0]["version"] if response.status_code == 200 else None
            if newest != (one.versions[-1] if one.is_there else None):
                self.run.broken.append(f"{one.name} is not as it was acknowledged")


def main(words: list[str] | None = None) -> None:
    """Run the program with the words of a command line, those of this process by default."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for option, default, about in OPTIONS:
        parser.add_argument(option, type=type(default), default=default, help=about)
    parser.add_argument("--faults", action="store_true", help="kill the server in the first third, hold its databases")
    parser.add_argument("--base", help="as of `loracast serve`")
    parser.add_argument("--hypernetwork", help="as of `loracast serve`")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        home, log_path = Path(folder) / "home", Path(folder) / "log"
        home.mkdir()
        for cache in map(cache_dir, ("bases", "encoders")):  # fetched already; the rest is of this run alone
            if cache.exists():
                (home / cache.name).symlink_to(cache)
        serve = [
            "serve", "--library", home / "library",
            "--max-queued-jobs", max(2, given.clients // 4),
            "--adapter-memory-bytes", int(given.adapter_memory_mib * MIB),
            "--prompt-cache-bytes", int(given.prompt_cache_mib * MIB),
            *(["--base", given.base] if given.base else []),
            *(["--hypernetwork", given.hypernetwork] if given.hypernetwork else []),
        ]  # fmt: skip
        server = Server(list(map(str, serve)), home, log_path)
        try:
            run = asyncio.run(Load(server, given).go(home / "library"))
            server.process.send_signal(signal.SIGTERM)
            if (code := server.process.wait(60)) != 0:
                run.broken.append(f"the server ended with {code}")
            run.broken += Library(home / "library").verify()
        finally:
            server.kill()
            print(log_path.read_text(encoding="utf-8")[-2000:], file=sys.stderr)
        run.read_log(log_path.read_text(encoding="utf-8"))
    options = {key: value for key, value in vars(given).items() if key != "json"}
    figures = {"options": options, **summary(run)}
    print(table(figures))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if figures["broken"] else 0)


def _hold(database: Path, seconds: float) -> None:
    """Keep everybody else from writing to a database for a while, and from reading the register."""
    with closing(sqlite3.connect(database, timeout=30, isolation_level=None)) as held:
        held.execute("BEGIN EXCLUSIVE")
        time.sleep(seconds)
        held.execute("ROLLBACK")


if __name__ == "__main__":
    main()
