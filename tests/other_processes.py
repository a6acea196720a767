"""Other processes: programs that can be interrupted, functions in a process of their own, and another hash seed."""

from __future__ import annotations

import functools
import gc
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

_SET_OF_MODULES = "list({'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'})"
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["transformers.models.llama.modeling_llama", "loracast.answering.model", "loracast.serving.app"]
)


def interruptible() -> None:
    """For `preexec_fn`: let SIGINT end the child, also where the tests run in the background of a script."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Forked:
    """A function that runs in a process of its own, forked from one that has imported torch and transformers.

    A new Python takes five seconds of processor time to import them; here each worker pays that once. The process has
    another hash seed than this one. The function has to be a module's. What it prints goes to two files in `folder`.
    """

    def __init__(self, folder: Path, function: Callable[..., None], *arguments: str):
        number = next(n for n in itertools.count() if not (folder / f"out-{n}").exists())
        self._out, self._err = folder / f"out-{number}", folder / f"err-{number}"
        for file in (self._out, self._err):
            file.touch()
        what = (str(self._out), str(self._err), dict(os.environ), function, arguments)
        _start_server_of_forks()
        self._process = _FORKS.Process(target=_run, args=what, daemon=True)
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """What it has written to standard error so far."""
        return self._err.read_text()

    def lines(self, n: int, timeout_s: float = 60.0) -> list[str]:
        """The first lines that it prints, as soon as there are that many, or it has ended."""
        until = time.monotonic() + timeout_s
        while self.out.count("\n") < n and self.has_not_ended:
            assert time.monotonic() < until, f"fewer than {n} lines in {timeout_s} s: {self.out!r}, {self.err!r}"
            time.sleep(0.005)
        return self.out.splitlines()[:n]

    @property
    def has_not_ended(self) -> bool:
        return self._process.is_alive()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Its exit code, or the negative number of the signal that killed it."""
        self._process.join(timeout_s)
        assert self._process.exitcode is not None, f"it did not end in {timeout_s} s: {self.err}"
        return self._process.exitcode


class ForkedProgram(Forked):
    """A forked process with the methods of `subprocess.Popen` that ask for its end and send signals."""

    def poll(self) -> int | None:
        return None if self.has_not_ended else self.wait()

    def kill(self) -> None:
        if self.has_not_ended:
            self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        if self.has_not_ended:
            self.send_signal(signal.SIGTERM)


@functools.cache
def _start_server_of_forks() -> None:
    """Start the process that is forked, with a hash seed that puts sets of modules' names into another order."""

    def order_with(seed: int) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        command = [sys.executable, "-S", "-c", f"print({_SET_OF_MODULES})"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    here = str(eval(_SET_OF_MODULES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", str(next(seed for seed in itertools.count() if order_with(seed) != here)))
        multiprocessing.forkserver.ensure_running()


def _run(
    out: str, err: str, environment: Mapping[str, str], function: Callable[..., None], arguments: Sequence[str]
) -> None:
    import torch

    gc.freeze()  # or the child's garbage collector copies the pages of all that was imported
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background of a script
    torch.set_num_threads(1)
    for stream, file in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream.fileno())
        stream.reconfigure(line_buffering=True)
    function(*arguments)


def loracast_command(*words: str) -> None:
    """The program `loracast` with the words of a command, for `Forked`."""
    from loracast.cli import main

    sys.argv = ["loracast", *words]
    main()


def run_module(name: str, *words: str) -> None:
    """`python -m NAME WORDS`, for `Forked`."""
    sys.path[:0] = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = [name, *words]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def digests_of_loras(base_folder: str, hypernetworks: Sequence[str], texts: Sequence[str]) -> list[str]:
    """A hash of the LoRAs that descriptions become with each hypernetwork."""
    from loracast.base.load import load_base
    from loracast.cast.load import load_caster
    from loracast.cast.task import TaskCaster

    base = load_base(base_folder, device="cpu", dtype="float32")
    found = []
    for folder in hypernetworks:
        digest = hashlib.sha256()
        for lora in TaskCaster(load_caster(folder, "task", base)).loras(texts):
            for name, factors in lora.factors.items():
                digest.update(name.encode())
                for factor in factors:
                    digest.update(factor.contiguous().numpy().tobytes())
        found.append(digest.hexdigest())
    return found


def print_digests(base_folder: str, hypernetworks: str, texts: str) -> None:
    """Print how this process orders a set, and the digests of LoRAs; lists come as JSON."""
    print(eval(_SET_OF_MODULES))
    print(*digests_of_loras(base_folder, json.loads(hypernetworks), json.loads(texts)))


def digests_in_another_process(
    folder: Path, base_folder: Path, hypernetworks: Sequence[str], texts: Sequence[str]
) -> list[str]:
    """`digests_of_loras` in a process that orders sets of names of modules in another way."""
    other = Forked(folder, print_digests, str(base_folder), json.dumps(hypernetworks), json.dumps(texts))
    assert other.wait(240) == 0, other.err
    order, digests = other.out.splitlines()
    assert order != str(eval(_SET_OF_MODULES))
    return digests.split()
