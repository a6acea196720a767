"""`loracast learn SOURCE --out TARGET --ray local`: the same adapters as without Ray, whatever dies meanwhile.

LORACAST_BULK_DOCUMENTS=9980 python -m pytest tests/cast/test_bulk_ray.py -k killed_worker_costs_nothing
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from bulk import config_files, make_documents, weights_of
from loracast.cast.bulk import Casting, FolderCaster, Line, cast_all, cast_with_ray
from loracast.errors import HypernetworkError, LoracastError
from loracast.lora.algebra import LoRA
from loracast.lora.peft_format import read_peft

pytest.importorskip("ray", reason="pip install 'loracast[ray]'")
parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'loracast[ray]'")
N = int(os.environ.get("LORACAST_BULK_DOCUMENTS", "200"))
BROKEN = 20
_SECONDS = 200 + N // 10
"""Longest time of a command with so many documents."""


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Path:
    return make_documents(tmp_path_factory.mktemp("documents"), N, BROKEN)


@pytest.fixture
def start(tiny_folder, tiny_hypernet_folder, tmp_path):
    """Starts the program; without Ray if `actors` is 0."""
    running = []

    def begin(documents: Path, out: Path, actors: int) -> subprocess.Popen:
        models = ["--base", str(tiny_folder), "--hypernetwork", str(tiny_hypernet_folder), "--device", "cpu"]
        with_ray = ["--ray", "local", "--actors", str(actors)] if actors else []
        words = ["learn", str(documents), "--out", str(out), *models, *with_ray, "--json"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LORACAST_HOME": str(tmp_path / "home")}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen([sys.executable, "-m", "loracast", *words], env=environment, **pipes))
        return running[-1]

    yield begin
    for process in running:
        process.kill()


def children(pid: int) -> list[tuple[int, str]]:
    """The processes below one, with what they call themselves."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            name = (stat.parent / "cmdline").read_text().replace("\0", " ")
        except (OSError, ValueError):
            continue
        if parent == pid:
            found += [(int(stat.parent.name), name), *children(int(stat.parent.name))]
    return found


def written_at(out: Path) -> dict[Path, int]:
    """When each file and folder was changed, but for what the killed process left."""
    return {path: path.stat().st_mtime_ns for path in out.rglob("[!.]*") if ".loracast-" not in str(path)}


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs Linux's /proc")
@pytest.mark.timeout(4 * _SECONDS)
def test_a_killed_worker_costs_nothing(start, documents, tmp_path):
    out, alone = tmp_path / "out", tmp_path / "alone"
    casting = start(documents, out, actors=2)
    until = time.monotonic() + _SECONDS
    while len(config_files(out)) < N // 10:
        assert casting.poll() is None and time.monotonic() < until, casting.communicate(timeout=10)
        time.sleep(N / 10_000)
    workers = [pid for pid, name in children(casting.pid) if re.match(r"ray::_Worker", name)]
    os.kill(workers[0], signal.SIGKILL)
    assert len(config_files(out)) < N, "it was killed too late"
    result, _ = casting.communicate(timeout=_SECONDS)
    report = json.loads(result)
    assert casting.returncode == 1 and (report["learned"], report["failed"]) == (N, BROKEN)
    assert len(config_files(out)) == N

    written = written_at(out)
    second = start(documents, out, actors=2)
    report = json.loads(second.communicate(timeout=_SECONDS)[0])
    assert (report["learned"], report["unchanged"], report["failed"]) == (0, N, BROKEN)
    assert written_at(out) == written and not list(out.glob(".*")), "what the killed one left is gone"

    lines = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    assert parquet.read_table(out / "report.parquet").to_pylist() == lines
    assert len(lines) == N + BROKEN and sum(line["error"] is not None for line in lines) == BROKEN

    start(documents, alone, actors=0).communicate(timeout=_SECONDS)
    assert weights_of(alone) == weights_of(out)


@pytest.fixture
def here(monkeypatch):
    """Ray's processes find this module, and are this process's own."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


class Deadly(FolderCaster):
    """Dies of a document with "poison" in its name, and casts nothing."""

    def __init__(self, casting: Casting):
        self.casting = casting

    def __call__(self, line: Line) -> Line:
        if "poison" in line.url:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(line, folder=line.name)


def test_a_document_that_kills_its_worker_fails_alone(here, tmp_path):
    for i in range(40):
        (tmp_path / f"{'poison' if i == 20 else 'note'}-{i}.txt").write_text("A text.")
    casting = Casting(str(tmp_path / "out"), "nothing", "base")
    run = cast_all(str(tmp_path), casting, cast_with_ray("local", partial(Deadly, casting), actors=2))
    assert (run.count("learned"), run.count("failed")) == (39, 1)
    assert "poison-20" in run.failed()[0].url and "died 3 times" in run.failed()[0].error


def test_ray_serve_finds_the_adapters_in_a_bucket(model, s3, tmp_path):
    """Its own functions list and fetch them: each is a folder below `dynamic_lora_loading_path`."""
    lora_utils = pytest.importorskip("ray.llm._internal.common.utils.lora_utils")
    out = f"{s3}/{tmp_path.name}"
    casting = Casting(out, "tiny", "the-base")
    caster = FolderCaster(casting, model.documents, model.base)
    run = cast_all(str(make_documents(tmp_path / "in", 2, 1)), casting, partial(map, caster))
    wanted = {line.folder for line in run.lines.values() if not line.error}
    assert set(lora_utils.get_lora_model_ids(out, "base")) == {f"base:{folder}" for folder in wanted}
    for folder in wanted:
        lora_utils.sync_files_with_lock(f"{out}/{folder}", str(tmp_path / "fetched" / folder))
        lora = LoRA(read_peft(tmp_path / "fetched" / folder))
        text = tmp_path / "in" / f"{folder.partition('@')[0]}.txt"
        for name, delta in ((name, model.cast(text).delta(name)) for name in lora.names):
            torch.testing.assert_close(lora.delta(name).float(), delta.float(), atol=1e-3, rtol=1e-2)


def broken(casting: Casting) -> FolderCaster:
    raise HypernetworkError("this hypernetwork is none")


def test_models_that_cannot_be_loaded_end_it_with_their_own_error(here, tmp_path):
    (tmp_path / "note.txt").write_text("A text.")
    casting = Casting(str(tmp_path / "out"), "nothing", "base")
    with pytest.raises(LoracastError, match="this hypernetwork is none"):
        cast_all(str(tmp_path), casting, cast_with_ray("local", partial(broken, casting), actors=1))
