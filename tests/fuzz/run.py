"""Feeds damaged files and requests to what reads them: nothing but a LoracastError (or a status of 4xx) may come out.

    python tests/fuzz/run.py TARGET [--count N] [--seed S] [--start I] [--seconds T] [--kept FOLDER]

TARGET is adapter, hypernetwork, checkpoint, document or http. Case I of a seed is always the same input, so a run that
was stopped goes on where it was (build/fuzz/TARGET-SEED.json), or with --start anywhere else. A case fails if anything
but a refusal comes out, if it takes more than 10 s of the processor or much memory, or if it opens a file outside of its folder. Its
input and its traceback are then kept in build/fuzz/found, once for each place in the code. What is in
corpus/TARGET went wrong once: every run, and the tests, begin with it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402

from fuzz.guard import Guard, OutOfTime, Outside  # noqa: E402
from fuzz.targets import Adapters, Checkpoints, Documents, Files, Hypernetworks, Target, files_in, fresh  # noqa: E402
from loracast.errors import LoracastError  # noqa: E402

CORPUS = Path(__file__).parent / "corpus"
_TELL_EVERY_S = 30.0


@dataclass
class Outcome:
    """What a run came to."""

    n_cases: int = 0
    n_refused: int = 0
    """Cases that ended with a LoracastError or a 4xx; the others were read in spite of the damage."""
    slowest_s: float = 0.0
    found: dict[str, str] = field(default_factory=dict)
    """Place in the code -> what came out of it."""


def make_target(name: str, folder: Path) -> Target:
    """The target of a name; it keeps what it needs in a folder."""
    if name == "http":
        from fuzz.http_api import Http

        return Http(folder)
    kinds = {"adapter": Adapters, "hypernetwork": Hypernetworks, "checkpoint": Checkpoints, "document": Documents}
    return kinds[name](folder)


class Run:
    """Cases of one target in this process, inside a fence."""

    def __init__(self, name: str, guard: Guard, target: Target, kept: Path | None = None):
        """
        Args:
            kept: the folder for inputs that fail; None keeps none.
        """
        self.name, self.guard, self.target, self.kept = name, guard, target, kept
        self.case = Path(guard.folder) / "case"
        self.outcome = Outcome()

    def corpus(self) -> None:
        """Read what went wrong once."""
        for folder in sorted((CORPUS / self.name).glob("*")):
            self.read(files_in(folder), f"corpus {folder.name}")

    def seeded(self, seed: int, index: int) -> None:
        """Make and read one case."""
        self.read(self.target.make(random.Random(f"{self.name}/{seed}/{index}")), f"seed {seed}, case {index}")

    def read(self, files: Files, label: str) -> None:
        """Read an input; what comes out of it is noted."""
        fresh(self.case, files)
        self.outcome.n_cases += 1
        began = time.process_time()
        try:
            with self.guard.watching():
                self.target.read(self.case)
        except LoracastError:
            self.outcome.n_refused += 1
        except (Exception, OutOfTime, Outside) as error:
            self._note(error, files, label)
        self.outcome.slowest_s = max(self.outcome.slowest_s, time.process_time() - began)

    def _note(self, error: BaseException, files: Files, label: str) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "/loracast/" in frame.filename] or frames
        place = f"{type(error).__name__} in {Path(ours[-1].filename).name}:{ours[-1].lineno} ({ours[-1].name})"
        if place in self.outcome.found:
            return
        self.outcome.found[place] = f"{label}: {str(error)[:300]}"
        print(f"FOUND {place}\n  {self.outcome.found[place]}", flush=True)
        if self.kept is not None:
            folder = self.kept / f"{self.name}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for name, content in files.items():
                (folder / name).write_bytes(content)
            folder.with_suffix(".txt").write_text(f"{label}\n{''.join(traceback.format_exception(error))[-8000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=("adapter", "hypernetwork", "checkpoint", "document", "http"))
    parser.add_argument("--count", type=int, default=1000, help="cases of this run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, help="first case; by default the one after the last of this seed")
    parser.add_argument("--seconds", type=float, default=600, help="the run ends after so many seconds at the latest")
    parser.add_argument("--kept", type=Path, default=ROOT / "build" / "fuzz", help="folder for what is found")
    given = parser.parse_args()
    torch.set_num_threads(1)
    state = given.kept.resolve() / f"{given.target}-{given.seed}.json"
    done = json.loads(state.read_text()) if state.exists() else {"next": 0, "found": {}}
    running = state.with_suffix(".running")  # the number of the case that is being read
    if running.exists():
        died = int(running.read_text())
        done["found"] |= {f"the process died in case {died}": "see its last words"}
        done["next"] = died + 1
    start = done["next"] if given.start is None else given.start
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        target = make_target(given.target, Path(folder))
        run = Run(given.target, Guard(Path(folder), exits_if_stuck=True), target, state.parent / "found")
        run.corpus()
        run.seeded(given.seed, start)  # warms up; what is imported late is in memory from now on
        run.guard.bound_memory()
        began = reported = time.monotonic()
        index = start
        state.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(running, os.O_WRONLY | os.O_CREAT)
        try:
            while index < start + given.count and time.monotonic() - began < given.seconds:
                os.pwrite(file, f"{index:012}".encode(), 0)
                run.seeded(given.seed, index)
                index += 1
                if time.monotonic() - reported > _TELL_EVERY_S:
                    reported = time.monotonic()
                    _keep(state, done, index, run.outcome, given.start is None)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
        os.close(file)
        running.unlink()
        if given.target == "http":
            target.close()
        _keep(state, done, index, run.outcome, given.start is None)
    seconds, peak = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{given.target}, seed {given.seed}: cases {start:,} to {index:,} in {seconds:.0f} s, {run.outcome.n_refused:,} "
        f"refused, slowest {run.outcome.slowest_s:.2f} s, peak {peak:,.0f} MiB, {len(run.outcome.found)} findings"
    )
    sys.exit(bool(run.outcome.found))


def _keep(state: Path, done: dict, index: int, outcome: Outcome, is_in_order: bool) -> None:
    """Write down how far a run is."""
    done["found"] |= outcome.found
    state.write_text(json.dumps(done | ({"next": index} if is_in_order else {}), indent=1))


if __name__ == "__main__":
    main()
