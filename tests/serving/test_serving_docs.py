"""The examples of docs/serving.md about files, vector stores and adapters run against a server of the tiny base."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

import loracast
from loracast.serving.app import create_app
from loracast.serving.engine import LocalEngine
from servers import eventually, manual, served

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
SECTION = re.search(r"^## Files, vector stores and adapters\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.S | re.M)


def block(language: str, api: str) -> str:
    """The one block of the section in a language, for the server at a URL."""
    assert SECTION is not None
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", SECTION[1], re.S | re.M)
    assert "http://127.0.0.1:8000" in found
    return found.replace("http://127.0.0.1:8000", api)


@pytest.fixture
def model(tiny_folder, tiny_hypernet_folder, hypernetwork, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("manual.md").write_bytes(manual(24))
    return loracast.load(
        tiny_folder, tiny_hypernet_folder, task_hypernetwork=hypernetwork, library=tmp_path / "adapters", device="cpu"
    )


@pytest.fixture
def url(model):
    with served(create_app(model, LocalEngine(model.base))) as found:
        yield found


def test_the_program_for_file_search(url, model, capsys):
    code = block("python", url)
    name = Path(model.base.name).name
    assert '"smollm2-135m-instruct"' in code
    exec(compile(code.replace("smollm2-135m-instruct", name), PAGE.name, "exec"), {})
    status, *rest = capsys.readouterr().out.splitlines()
    assert status == "completed None"
    assert any(re.fullmatch(r"manual\.md file-[0-9a-f]{24}", line) for line in rest)
    assert any("K24-0 is 24 months" in line for line in rest)


def test_the_calls_of_curl(url, model):
    script = "set -euo pipefail\n" + block("bash", url)
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=60, env={**os.environ, "no_proxy": "*"}
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("data: ")]
    assert (events[-1]["status"], events[-1]["adapter"]) == ("completed", "manual")
    (entry,), _ = model.library.entries(tag="new")
    assert (entry.name, entry.tags) == ("kettle", ("kitchen", "new"))
    assert Path("kettle-peft.zip").stat().st_size > 1000
    eventually(lambda: "french" in model.library.names())
