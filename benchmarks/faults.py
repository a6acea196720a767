"""Kills and starves the commands that write a library, again and again, and looks at the library afterwards.

    python benchmarks/faults.py [--rounds 200] [--seed 0] [--seconds 300]
    python benchmarks/faults.py --shared URL|folder|s3 [--rounds 1000] [--seed 0] [--seconds 300]

A round draws a command (learn, task, combine, compact, edit, import, export, gc, rm) and a fault: SIGKILL or SIGINT at
a random moment, a disk that is full after a random number of bytes (as root a small tmpfs), a library that may not be
written, a register that another process holds, or a clock that is years off. Afterwards `loracast verify` must find no
damage, every adapter must open, an adapter that the round did not name must be as before, and what the command has
acknowledged must be there. In every tenth round a server is killed while it is sent documents, and another one must
learn all that the first had taken. The models are tiny and loaded once; each command runs in a forked process. Exit
code 1: something broke.

With --shared, two machines change the names of one shared library, so many writes each, and are killed at random
(tests/shared_writers.py): at a URL, in a new folder, or at moto's S3 server.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import unittest.mock
from collections import Counter
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import fsspec
import httpx
import torch
import typer
from typer.testing import CliRunner

import loracast.answering.model
import loracast.serving.app  # servers are forked from here
import shared_writers
from loracast import files as workfolders
from loracast.cli import app
from loracast.cli.terminal import prompt_interrupts
from loracast.hypernets.encoders import load_text_encoder
from loracast.lab.training.task_start import remember_seen
from loracast.library import register
from loracast.library.library import Library
from loracast.lora.algebra import uniform
from loracast.lora.peft_format import write_peft_folder
from s3 import BUCKET, s3_server
from servers import eventually, is_ready
from tiny import for_base, make_sentence_encoder, make_task_hypernet, save_models

NAMES = ("lamp", "pump", "kettle", "sum")
FAULTS = ("kill", "kill", "kill", "interrupt", "full disk", "read only", "locked", "clock", "none")
YEARS_S = 10 * 365 * 86_400
SERVE_EVERY = 10
_NOBODY = 65_534
_FORKS = multiprocessing.get_context("fork")
_DISK_BYTES = 64 * 2**20


class Rounds:
    """A library, the commands that change it, and what must hold."""

    def __init__(self, folder: Path, rng: random.Random):
        self.folder, self.rng, self.disk = folder, rng, folder / "disk"
        self.disk.mkdir()
        self.library = self.disk / "library"
        mounted = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(self.disk)]
        self.is_mounted = os.getuid() == 0 and not subprocess.run(mounted, capture_output=True, check=False).returncode
        base = save_models(folder)
        encoder = make_sentence_encoder(folder / "encoder")
        tasks = for_base(make_task_hypernet(base, encoder, 4, 30.0), base.fingerprint)
        remember_seen(tasks, load_text_encoder(str(encoder))(["Answer in French.", "Say it in one word."]))
        tasks.save_pretrained(folder / "tasks", storage="float32")
        models = str(folder / "base"), str(folder / "hypernetwork")
        self.models = ["--base", models[0], "--hypernetwork", models[1], "--device", "cpu"]
        self.model = loracast.answering.model.load(*models, library=self.library, device="cpu")
        for number, name in enumerate(NAMES):
            self.model.learn(loracast.Document.from_text(self.text(number)), name)
        write_peft_folder(uniform(self.model.adapter("lamp").lora()).lora.factors, folder / "peft")
        for place in (folder, folder / "peft"):
            place.chmod(0o755)
        self.broken: list[str] = []
        self.n_took_effect = 0

    def text(self, number: int) -> str:
        """A document that differs with its number."""
        sentence = f"The code of part {number} is {7919 * number % 10_000}. "
        return f"# Part {number}\n\n" + sentence * self.rng.randint(5, 60)

    def commands(self) -> list[tuple[list[str], set[str]]]:
        """The words of each command, for names at random, and the names that it may change."""
        name, other = self.rng.sample(NAMES, 2)
        document = self.folder / "document.md"
        document.write_text(self.text(self.rng.randrange(1000)))
        library = ["--library", str(self.library)]
        out = self.folder / f"out-{self.rng.randrange(10**9)}"
        models, description = self.models, f"Say it in {self.rng.randrange(1000)} words."
        tasks = ["--hypernetwork", str(self.folder / "tasks")]
        return [([*words, *library], changed) for words, changed in (
            (["learn", str(document), "--name", name, "--replace", "--local", *models], {name}),
            (["task", description, "--name", name, "--replace", "--local", *tasks], {name}),
            (["combine", name, f"{other}:0.5", "--name", "sum", "--replace"], {"sum"}),
            (["compact", name, "--storage", self.rng.choice(("int8", "int4", "text"))], {name}),
            (["edit", name, "--tag", "a", "--note", f"note {self.rng.random()}"], set()),
            (["edit", name, "--rename", f"{name}-2"], {name, f"{name}-2"}),
            (["import", str(self.folder / "peft"), "--name", "lamp", "--replace", *models[:2]], {"lamp"}),
            (["export", name, "--to", "peft", "--out", str(out)], set()),
            (["gc", "--keep", "1"], set()),
            (["rm", name, "--yes"], {name}),
        )]  # fmt: skip

    def warm(self) -> float:
        """Run every command once in this process, which imports what they need; how long the longest takes, in s."""
        times_s = []
        for words, _ in self.commands():
            began = time.monotonic()
            done = CliRunner().invoke(app, words)
            times_s.append(time.monotonic() - began)
            assert done.exit_code in (0, 1), done.output
            self._mend(self.state())
        return max(times_s)

    def run(self, words: list[str], fault: str, longest_s: float) -> int:
        """Run a command in a forked process with a fault; its exit status."""
        n_bytes, ahead = self.rng.choice((0, 100, 5_000, 40_000, 100_000)), self.rng.choice((-1, 1)) * YEARS_S
        if fault == "full disk" and self.is_mounted:
            (self.disk / "filler").write_bytes(bytes(max(0, shutil.disk_usage(self.disk).free - n_bytes)))
        with contextlib.closing(sqlite3.connect(self.library / register.FILE, isolation_level=None)) as database:
            if fault == "locked":
                database.execute("BEGIN IMMEDIATE")
            child = self._fork(words, fault, n_bytes, ahead)
            if fault in ("kill", "interrupt"):
                time.sleep(self.rng.random() * longest_s)
                os.kill(child.pid, signal.SIGKILL if fault == "kill" else signal.SIGINT)
            began = time.monotonic()
            child.join()
        if fault == "interrupt" and time.monotonic() - began > 1.0:
            self.broken.append(f"{words[0]} ended {time.monotonic() - began:.1f} s after SIGINT")
        (self.disk / "filler").unlink(missing_ok=True)
        self.n_took_effect += child.exitcode != 0
        return child.exitcode

    def _fork(self, *command: object) -> multiprocessing.Process:
        """Begin a command in a forked process, which takes no SIGINT before it has its own handler.

        Else one that comes right after the fork is raised in the copy of the caller, pytest among others.
        """
        child = _FORKS.Process(target=self._in_child, args=command)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        child.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return child

    def serve(self) -> list[str]:
        """Kill a server that is sent documents, start another, and see that it learns what the first had taken."""
        rng = random.Random(self.rng.random())
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        words = ["serve", "--port", str(port), "--library", str(self.library), *self.models]
        url = f"http://127.0.0.1:{port}"
        server, taken, problems = self._fork(words), {}, []
        with httpx.Client(base_url=url, timeout=60) as client:
            eventually(lambda: is_ready(url))
            killer = threading.Timer(rng.random(), server.kill)
            killer.start()
            with contextlib.suppress(httpx.TransportError):
                while True:
                    name, file = rng.choice(NAMES), {"file": ("part.md", self.text(rng.randrange(1000)).encode())}
                    answer = client.post("/v1/adapters", files=file, data={"name": name, "replace": "true"})
                    if answer.status_code == 202:
                        taken[answer.json()["id"]] = name
                    time.sleep(0.02 if answer.status_code == 202 else 0.2)
            killer.join()
            server.join()
            server = self._fork(words)
            eventually(lambda: is_ready(url))
            for id, name in taken.items():
                job = eventually(lambda id=id: self._ended(client, id))
                versions = [entry.version for entry in Library(self.library).versions(name)]
                if job["status"] != "completed" or job["version"] not in versions:
                    problems.append(f"what it had taken for {name} is {job['status']}: {job['error']}")
        server.terminate()
        server.join()
        if server.exitcode != 0:
            problems.append(f"it ended with {server.exitcode}")
        self.n_took_effect += 1
        return problems

    @staticmethod
    def _ended(client: httpx.Client, id: str) -> dict | None:
        job = client.get(f"/v1/jobs/{id}").raise_for_status().json()
        return None if job["status"] in ("queued", "running") else job

    def close(self) -> None:
        """Take the disk away."""
        if self.is_mounted:
            subprocess.run(["umount", "-l", str(self.disk)], check=True)

    def _in_child(self, words: list[str], fault: str = "none", n_bytes: int = 0, ahead: int = 0) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if fault == "full disk" and not self.is_mounted:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
        elif fault == "read only" and os.getuid() == 0:
            os.setuid(_NOBODY)
        elif fault == "locked":
            register._WAIT_S = 0.05
        elif fault == "clock":
            now = time.time
            time.time = lambda: now() + ahead
        status, errors = 130, io.StringIO()
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            with contextlib.redirect_stderr(errors), prompt_interrupts():
                app(words)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0
        except Exception as error:
            errors.write(f"Traceback of {fault}, {words[0]}: {type(error).__name__}: {error}\n")
        finally:  # an interrupt may also come before the command began, or after its end
            said = errors.getvalue()
            if "Traceback" in said and "Exception ignored in" not in said:  # extensions in C may swallow an interrupt
                os.write(2, said.encode())
                status = 99
            os._exit(status)

    def state(self) -> dict[str, str]:
        """The newest version of every name."""
        return {name: Library(self.library).open(name).manifest.version for name in Library(self.library).names()}

    def round(self, fault: str, longest_s: float, is_server: bool) -> str:
        """One command with one fault, or a server that is killed; the command's name. Notes what broke and mends it."""
        before = self.state()
        if is_server:
            words, changed, status, problems = ["serve"], set(NAMES), 0, self.serve()
        else:
            words, changed = self.rng.choice(self.commands())
            status, problems = self.run(words, fault, longest_s), []
        after = self.state()
        if status == 0 and words[0] in ("learn", "task", "import", "combine") and not changed <= after.keys():
            problems.append("it was acknowledged and is gone")
        if status == 0 and words[0] == "rm" and changed & after.keys():
            problems.append("it was removed and is there")
        if status == 99:
            problems.append("the command crashed")
        problems += [one for one in Library(self.library).verify() if "belongs to no name" not in one]
        differing = {name for name, _ in before.items() ^ after.items()}
        problems += [f"{name} was changed" for name in differing - changed]
        for name in after:
            adapter = Library(self.library).open(name)
            if adapter.manifest.storage != "text":
                adapter.lora()
        self.broken += [f"{words[0]} with {fault} (status {status}): {problem}" for problem in problems]
        self._mend(after)
        return words[0]

    def _mend(self, after: dict[str, str]) -> None:
        """Learn names anew that are gone, so that the next round has them all."""
        for number, name in enumerate(NAMES):
            if name not in after:
                self.model.learn(loracast.Document.from_text(self.text(number)), name)
        for out in self.folder.glob("out-*"):
            shutil.rmtree(out)


def main(
    rounds: int = 200,
    seed: int = 0,
    seconds: Annotated[float, typer.Option(help="It ends after so many seconds at the latest.")] = 300,
    shared: Annotated[str, typer.Option(help="Names of a library shared at a URL, in a folder, or at s3.")] = "",
) -> None:
    """Kill and starve the commands that write a library, again and again, and print what broke."""
    counts = run_shared(shared, rounds, seed, seconds) if shared else run(rounds, seed, seconds)
    print(json.dumps(counts, indent=1))
    sys.exit(bool(counts["broken"]))


def run_shared(where: str, n_writes: int, seed: int, seconds: float) -> dict:
    """The counts of `shared_writers.run`, and the seconds it took."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        url = f"{folder}/there" if where == "folder" else where
        if where == "s3":
            os.environ.update(stack.enter_context(s3_server()))
            fsspec.filesystem("s3").mkdir(url := BUCKET)
        began = time.monotonic()
        counts = shared_writers.run(url, Path(folder), n_writes, seed, seconds)
        return {**counts, "seconds": round(time.monotonic() - began)}


def run(rounds: int, seed: int, seconds: float) -> dict:
    """The counts of faults and commands, and all that broke."""
    torch.set_num_threads(1)
    rng, faults, commands = random.Random(seed), Counter(), Counter()
    with (
        unittest.mock.patch.object(workfolders, "_GRACE_S", 0.0),
        tempfile.TemporaryDirectory() as folder,
        unittest.mock.patch.dict(os.environ, LORACAST_HOME=folder),
        contextlib.closing(Rounds(Path(folder), rng)) as runs,
        unittest.mock.patch("loracast.answering.model.load", lambda *_, **__: runs.model),  # for all commands
    ):
        began = time.monotonic()
        longest_s = runs.warm()
        while sum(faults.values()) < rounds and time.monotonic() - began < seconds:
            is_server = sum(faults.values()) % SERVE_EVERY == 0
            fault = "kill" if is_server else rng.choice(FAULTS)
            commands[runs.round(fault, longest_s, is_server)] += 1
            faults[fault] += 1
        return {
            "seed": seed, "rounds": sum(faults.values()), "took_effect": runs.n_took_effect, "faults": dict(faults),
            "commands": dict(commands), "broken": runs.broken,
        }  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
