"""SIGINT during long commands: they end within a second, with nothing half-written. Children are forked."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loracast.cli import main
from loracast.cli.terminal import advice, prompt_interrupts
from loracast.library import save
from loracast.library.library import Library
from servers import eventually
from tiny import PROSE

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")


def interrupted(words: list[object], began, log: Path) -> tuple[int, float, str]:
    """Run a command, and interrupt it once `began()` is true: its status, the seconds until its end, what it said."""

    def run() -> None:
        sys.argv = ["loracast", *(str(word) for word in words)]
        main()

    return interrupted_call(run, began, log)


def interrupted_call(function: Callable[[], None], began, log: Path) -> tuple[int, float, str]:
    """As `interrupted`, for a function."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            torch.set_num_threads(1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
            sys.stdout, sys.stderr = io.StringIO(), os.fdopen(2, "w", buffering=1)
            try:
                function()
            except SystemExit as end:
                status = end.code or 0
        finally:
            os._exit(status)
    eventually(lambda: began() or os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT), 100)
    time.sleep(0.1)
    os.kill(child, signal.SIGINT)
    since = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, time.monotonic() - since, log.read_text()


def test_learning(tiny_folder, tiny_hypernet_folder, tmp_path, home, monkeypatch):
    def slow_check(*given: Any) -> None:  # so that learning lasts on a quick machine, too
        began.touch()  # a signal while a library is imported, before, may be caught by its `except:`
        time.sleep(0.05)
        check(*given)

    check, began = save.check_finite, tmp_path / "began"
    monkeypatch.setattr(save, "check_finite", slow_check)
    (tmp_path / "long.txt").write_text("".join(f"{i}. {PROSE}\n\n" for i in range(700)))
    library = tmp_path / "library"
    models = ["--base", tiny_folder, "--hypernetwork", tiny_hypernet_folder, "--device", "cpu"]
    words = ["learn", tmp_path / "long.txt", "--library", library, *models]
    status, seconds, said = interrupted(words, began.exists, tmp_path / "said")
    assert status == 130 and seconds < 1.5 and "Traceback" not in said, said
    assert Library(library).names() == [] and Library(library).verify() == [] and not [*library.glob(".loracast-new*")]


def test_training(tiny_folder, tmp_path, home):
    (tmp_path / "texts.txt").write_text("".join(f"{i}. {PROSE}\n\n" for i in range(60)))
    out = tmp_path / "run"
    words = [
        "train",
        "doc",
        "--base",
        tiny_folder,
        "--texts",
        tmp_path / "texts.txt",
        "--out",
        out,
        "--device",
        "cpu",
        "--budget",
        "90s",
    ]
    status, seconds, said = interrupted(words, out.exists, tmp_path / "said")
    assert status == 130 and seconds < 1.5 and "Traceback" not in said, said
    assert "the same command resumes from the last save" in said
    assert not (out / "config.json").exists() and not [*out.rglob(".*.*")]


def test_in_the_middle_of_one_long_call(tmp_path):
    """A backward pass is one call, in which Python raises nothing."""

    def compute() -> None:
        matrix = torch.rand(3000, 3000, dtype=torch.float64)
        with prompt_interrupts(), advice("it goes on"):
            (tmp_path / "began").touch()
            torch.linalg.eigvals(matrix)  # for more than ten seconds

    status, seconds, said = interrupted_call(compute, (tmp_path / "began").exists, tmp_path / "said")
    assert status == 130 and seconds < 1.5 and said == "it goes on\n"


def test_a_module_that_catches_everything_while_it_is_imported(tmp_path, monkeypatch):
    began = tmp_path / "began"
    waiting = f"    open({str(began)!r}, 'w').close()\n    time.sleep(20)\n"
    (tmp_path / "catches_all.py").write_text(f"import time\ntry:\n{waiting}except:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)

    def load() -> None:
        with prompt_interrupts(), advice("it goes on"):
            importlib.import_module("catches_all")

    status, seconds, said = interrupted_call(load, began.exists, tmp_path / "said")
    assert status == 130 and seconds < 1.5 and said == "it goes on\n"


@pytest.mark.parametrize("is_interrupt", [True, False])
def test_code_in_c_that_loses_the_interrupt(tmp_path, is_interrupt):
    """As Python 3.11 does while it parses a program: "AST constructor recursion depth mismatch"."""

    def lose() -> None:
        with prompt_interrupts():
            (tmp_path / "began").touch()
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(20 if is_interrupt else 0.0)
            raise SystemError("returned a result with an exception set")

    status, _, _ = interrupted_call(lose, (tmp_path / "began").exists, tmp_path / "said")
    assert status == (130 if is_interrupt else 99)


def test_evaluation(suite, tiny_folder, hypernetwork, tmp_path, home):
    out = tmp_path / "out"
    words = [
        "eval",
        "tasks",
        "--tasks",
        suite,
        "--hypernetwork",
        hypernetwork,
        "--base",
        tiny_folder,
        "--out",
        out,
        "--device",
        "cpu",
    ]
    status, seconds, said = interrupted(words, lambda: out.exists(), tmp_path / "said")
    assert status == 130 and seconds < 1.5 and "Traceback" not in said, said
    results = out / "results.json"
    assert not results.exists() or not json.loads(results.read_text())["is_complete"]
