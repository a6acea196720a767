"""Machines that change the names of one shared library at random and are killed, and what must hold afterwards."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import fsspec
import torch

from adapters import STATIC_ROWS, write
from loracast.errors import NameTakenError, NoSuchAdapterError
from loracast.library.library import Library

NAMES = ("doc", "lamp", "pump")
_N_MACHINES = 2
_MOST_WRITES = 20  # in a life
_LONGEST_WAIT_S = 0.3  # until the death that follows, in the middle of a write


def run(url: str, folder: Path, n_writes: int, seed: int, seconds: float = 300.0) -> dict:
    """Two machines make so many writes each at one store, with kills in between: counts, and all that broke.

    After so many seconds they are killed for the last time, and what they have done by then is looked at.
    """
    rng, n_kills, broken = random.Random(seed), 0, []
    machines = [folder / f"machine-{number}" for number in range(_N_MACHINES)]
    logs = [folder / f"log-{number}" for number in range(_N_MACHINES)]
    for library, log in zip(machines, logs, strict=True):
        Library(library).share(url)
        log.touch()
    context, lives = multiprocessing.get_context("fork"), {}
    running, latest = set(range(_N_MACHINES)), time.monotonic() + seconds
    while running:
        for number in sorted(running):
            process, ends = lives.get(number, (None, 0))
            if process is None:
                process = context.Process(
                    target=_change_names, args=(machines[number], logs[number], number, n_writes, rng.random())
                )
                process.start()
                lives[number] = process, _n_lines(logs[number]) + rng.randint(1, _MOST_WRITES)
            elif process.exitcode is None and (_n_lines(logs[number]) >= ends or time.monotonic() > latest):
                time.sleep(rng.random() * _LONGEST_WAIT_S)
                os.kill(process.pid, signal.SIGKILL)
                process.join()
            if process.exitcode is not None:
                del lives[number]
                n_kills += process.exitcode == -signal.SIGKILL
                if process.exitcode >= 0 or time.monotonic() > latest:
                    running.remove(number)
                    broken += ["a machine ended with an error"] if process.exitcode > 0 else []
        time.sleep(0.01)
    done = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    broken += [problem for library in machines for problem in Library(library).verify()]
    broken += _judge(url, folder / "fresh", done)
    kinds = dict(Counter(kind for kind, *_ in done))
    return {"seed": seed, "writes": len(done), "kills": n_kills, "kinds": kinds, "broken": broken}


def _n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def _change_names(library: Path, log: Path, number: int, n_writes: int, seed: float) -> None:
    """Change names until the log has a line for each write, which is appended once the write is acknowledged."""
    torch.set_num_threads(1)
    rng, own = random.Random(seed), f"own-{number}"  # no machine renames or deletes a name of its own
    for i in range(_n_lines(log), n_writes):
        name, other = rng.choice((*NAMES, own)), rng.choice(NAMES)
        kind = rng.choice(("add", "tag") if name == own else ("add", "add", "add", "tag", "rename", "delete"))
        said = ""
        try:
            if kind == "add":
                made = write(library, 1, seed=1_000_000 * number + i, name=name, replace=True, shared=STATIC_ROWS)
                said = made.manifest.version
            elif kind == "tag":
                said = f"t-{number}-{i}"
                Library(library).describe(name, tags=(said,))
            elif kind == "rename":
                Library(library).rename(name, other)
            else:
                Library(library).remove(name)
        except (NoSuchAdapterError, NameTakenError):
            kind = "refused"
        with open(log, "a") as file:
            file.write(json.dumps([kind, name, said]) + "\n")


def _judge(url: str, fresh: Path, done: list[list[str]]) -> list[str]:
    """What was lost, by the files at the store and by a machine that joins now."""
    Library(fresh).share(url)
    problems = Library(fresh).verify()
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    states: dict[str, list[dict]] = {}
    for path in sorted(fs.find(f"{root}/names")):
        name, _, file = path.removeprefix(f"{root}/names/").partition("/")
        if (
            file and not file.startswith(".") and not name.startswith("0-")
        ):  # a killed process; the refusal of older ones
            states.setdefault(name, []).append(json.loads(fs.cat_file(path)))
            if file != f"{len(states[name]):08d}.json":
                problems.append(f"a state before {path} is missing")
    for name, found in states.items():
        for number, (before, after) in enumerate(pairwise([{"history": []}, *found]), 1):
            old, new = before["history"], after["history"]
            if old and new and new not in (old, [*old, new[-1]]):  # neither made, deleted, noted about, nor added to
                problems.append(f"state {number} of {name} takes versions away: {[before, after]}")
    for kind, name, said in done:
        if kind == "add" and all(said not in [v for v, _ in state["history"]] for state in states[name]):
            problems.append(f"{said[:12]} was added to {name} and is lost")
        if kind == "tag" and all(said not in state["tags"] for state in states[name]):
            problems.append(f"{name} was given the tag {said}, which is lost")
        if name.startswith("own") and kind == "add" and said not in {e.version for e in Library(fresh).versions(name)}:
            problems.append(f"{name} lost {said[:12]}")
        if name.startswith("own") and kind == "tag" and said not in Library(fresh).find(name).tags:
            problems.append(f"{name} lost {said}")
    ended = Counter(name for kind, name, _ in done if kind in ("rename", "delete"))
    for name, n_times in ended.items():
        if sum(not state["history"] for state in states[name]) < n_times:
            problems.append(f"{name} was renamed or deleted and came back")
    alive = {name for name, found in states.items() if found[-1]["history"]}
    for name in sorted(alive):
        problems += Library(fresh).open(name).faults()
    return problems
