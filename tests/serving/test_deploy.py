"""Adapters on a server: an HTTP server that behaves as vLLM's runtime API, and two modules in place of its registry."""

from __future__ import annotations

import json
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from json_handler import JsonHandler
from loracast.answering.model import load
from loracast.cli import app
from loracast.errors import AdapterError, LoracastError
from loracast.library.library import Library
from loracast.serving.vllm_server import deploy


@pytest.fixture(scope="module")
def library(tiny_folder, tiny_hypernet_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    model = load(tiny_folder, tiny_hypernet_folder, library=folder, device="cpu")
    (folder / "lamp.txt").write_text("The lamp on the desk was made in the north.")
    model.learn(folder / "lamp.txt", "lamp")
    return folder


class FakeServer(ThreadingHTTPServer):
    """Keeps LoRAs by name; an adapter changes the log-probabilities unless the server is deaf to it."""

    def __init__(self, is_deaf: bool = False, allows_updates: bool = True, key: str = ""):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.is_deaf, self.allows_updates, self.key = is_deaf, allows_updates, key
        self.loaded: dict[str, str] = {}
        self.calls: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(JsonHandler):
    server: FakeServer

    def _is_refused(self) -> bool:
        is_refused = bool(self.server.key) and self.headers["Authorization"] != f"Bearer {self.server.key}"
        if is_refused:
            self.answer(401, {"error": "Unauthorized"})
        return is_refused

    def do_GET(self) -> None:
        if self._is_refused():
            return
        models = [{"id": "base", "parent": None, "max_model_len": 256}]
        models += [{"id": name, "root": path, "parent": "base"} for name, path in self.server.loaded.items()]
        self.answer(200, {"data": models})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._is_refused():
            return
        self.server.calls.append(self.path)
        if "lora_adapter" in self.path and not self.server.allows_updates:
            self.answer(404, {"error": {"message": "Not Found"}})
        elif self.path == "/v1/load_lora_adapter":
            if not asked["lora_name"]:
                self.answer(400, {"error": {"message": "Both 'lora_name' and 'lora_path' must be provided."}})
                return
            if not (Path(asked["lora_path"]) / "adapter_config.json").is_file():
                self.answer(400, {"error": {"message": "no such adapter"}})
                return
            self.server.loaded[asked["lora_name"]] = asked["lora_path"]
            self.answer(200, "Success: LoRA adapter added.")
        elif self.path == "/v1/unload_lora_adapter":
            del self.server.loaded[asked["lora_name"]]
            self.answer(200, "Success: LoRA adapter removed.")
        else:
            moved = asked["model"] in self.server.loaded and not self.server.is_deaf
            logprobs = {"token_logprobs": [-1.5 if moved else -1.0]}
            self.answer(200, {"choices": [{"text": " the same words", "logprobs": logprobs}]})


@pytest.fixture
def serve():
    running = []

    def start(**options) -> FakeServer:
        server = FakeServer(**options)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_an_adapter_is_loaded_and_its_effect_seen_even_where_no_word_changes(library, serve, tmp_path):
    server, adapter = serve(), Library(library).open("lamp")
    name = deploy(adapter, server.url, tmp_path)
    assert name == f"lamp@{adapter.manifest.version[:12]}" and set(server.loaded) == {name}
    config = json.loads((Path(server.loaded[name]) / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    assert deploy(adapter, server.url, tmp_path) == name  # again: it is there already
    assert server.calls.count("/v1/load_lora_adapter") == 3  # each time it is asked whether it takes LoRAs


def test_an_adapter_without_an_effect_is_an_error_and_does_not_stay(library, serve, tmp_path):
    server = serve(is_deaf=True)
    with pytest.raises(LoracastError, match=r"answers with lamp@.* as without it"):
        deploy(Library(library).open("lamp"), server.url, tmp_path)
    assert not server.loaded


def test_a_server_that_is_none_of_openais_is_said_to_be_none(library, serve, tmp_path, monkeypatch):
    for answered in ("<html>It works!</html>", [], {}):
        monkeypatch.setattr(_Handler, "do_GET", lambda handler, answered=answered: handler.answer(200, answered))
        with pytest.raises(LoracastError, match="no server with OpenAI's API"):
            deploy(Library(library).open("lamp"), serve().url, tmp_path)


def test_what_the_server_refuses_is_said(library, serve, tmp_path):
    adapter = Library(library).open("lamp")
    with pytest.raises(LoracastError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
        deploy(adapter, serve(allows_updates=False).url, tmp_path)
    with pytest.raises(LoracastError, match=r"400 .*no such adapter"):
        deploy(adapter, serve().url, tmp_path, path_there="/elsewhere")
    with pytest.raises(LoracastError, match="does not answer"):
        deploy(adapter, "http://127.0.0.1:9", tmp_path)
    for url in ("file:///etc", "myhost", "localhost:8000", "http://"):
        with pytest.raises(AdapterError, match="no server's address"):
            deploy(adapter, url, tmp_path)


def test_a_server_with_a_key(library, serve, tmp_path, monkeypatch):
    adapter, server = Library(library).open("lamp"), serve(key="SECRET")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(LoracastError, match=r"401.*set VLLM_API_KEY"):
        deploy(adapter, server.url, tmp_path)
    monkeypatch.setenv("VLLM_API_KEY", "SECRET")
    assert deploy(adapter, server.url, tmp_path) in server.loaded


def test_the_command(library, serve, home):
    server = serve()
    done = CliRunner().invoke(app, ["deploy", "lamp", "--vllm", server.url, "--library", str(library), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["model"] in server.loaded
