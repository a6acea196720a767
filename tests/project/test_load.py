"""The load test: it runs against a server with the tiny base, and its grades tell whose number was result."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import load
import load_report

from other_processes import ForkedProgram, loracast_command

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("shown", "text", "is_gone", "grade", "broken"),
    [
        ("doc-0@bb", "It is 2222.", False, "right", []),
        ("doc-0@bb", "It is 2223.", False, "other", []),
        ("doc-0@bb", "It is 3333.", False, "of another adapter", ["doc-0 has 2222, and said ['3333']"]),
        ("doc-1@cc", "It is 3333.", False, "of another adapter", ["['doc-1'] answered for doc-0"]),
        ("doc-0@aa", "It is 1111.", False, "right", ["doc-0: a version that had been replaced answered"]),
        ("doc-0@bb", "It is 2222.", True, "right", ["doc-0 answered after its deletion"]),
    ],
)
def test_an_answer_is_graded_by_the_version_that_gave_it(shown, text, is_gone, grade, broken):
    result = {"text": text, "adapters": [{"id": shown, "is_used": True}]}
    run = load_report.Run(1.0, numbers={"aaaa": "1111", "bbbb": "2222", "cccc": "3333"})
    run.answers.append(load_report.Answer("doc-0", ["aaaa", "bbbb"], 1, is_gone, result))
    grades = load_report.grade(run)
    assert +grades == {grade: 1}
    assert run.broken == broken


def test_text_of_documents_in_the_log_is_found():
    run = load_report.Run(1.0, numbers={"aaaa": "1111"})
    run.read_log("page   http://127.0.0.1:1111/\n")
    assert not run.broken and not run.failures
    run.read_log("KeyError: the PIN is 1111\n")
    assert len(run.broken) == len(run.failures) == 1


def serve(log: str, *words: str) -> None:
    """`loracast` with the words of a command, which writes to a log."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    loracast_command(*words)


def test_a_server_bears_mixed_load(tiny_folder, tiny_hypernet_folder, home, tmp_path, monkeypatch):
    def start(words, home, log):
        monkeypatch.setenv("LORACAST_HOME", str(home))
        return ForkedProgram(tmp_path, serve, str(log), *words)

    monkeypatch.setattr(load, "start", start)
    figures = tmp_path / "figures.json"
    options = [
        "--base", tiny_folder, "--hypernetwork", tiny_hypernet_folder, "--minutes", 0.5, "--requests", 100,
        "--clients", 4, "--adapters", 4, "--json", figures, "--faults", "--fault-every", 2,
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        load.main([str(option) for option in options])
    result = json.loads(figures.read_text())
    # A hundred requests are too few for a size in memory that stays.
    assert [what for what, _ in result["broken"] if "resident size" not in what] == []
    assert result["answers"]["of another adapter"] == 0 and result["n_requests"] > 20
    assert result["n_kills"] >= 1 and len(result["lives"]) == result["n_kills"] + 1
    assert {"ask", "ask, streamed", "bad request"} <= set(result["kinds"])


HEAPS = """
import ctypes, threading
libc, together = ctypes.CDLL(None), threading.Barrier(9)
def allocate():
    libc.malloc(1000), together.wait(), together.wait()
CALL
for _ in range(8):
    threading.Thread(target=allocate).start()
together.wait()
libc.fdopen.restype = ctypes.c_void_p
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out), libc.fflush(out), together.wait()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heaps of glibc")
def test_the_threads_of_a_server_share_two_heaps():
    environment = {key: value for key, value in os.environ.items() if key != "MALLOC_ARENA_MAX"}
    environment["PYTHONPATH"] = str(ROOT / "src")

    def n_heaps(call: str) -> int:
        command = [sys.executable, "-c", HEAPS.replace("CALL", call)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.count("<heap nr=")

    assert n_heaps("from loracast.cli.serve import share_heaps; share_heaps()") <= 2 < n_heaps("")
