"""A server that behaves as vLLM's does, on a small base: completions of token ids, LoRAs that PEFT loads while it runs.

`started_as_vllm` lets the command that starts vLLM start this one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from json_handler import JsonHandler


class FakeVllm(ThreadingHTTPServer):
    """The base of a folder, served. Tests change what the fields say while it runs."""

    daemon_threads = True
    lock = threading.Lock()
    """Of all servers: transformers cannot load two models at once."""

    def __init__(self, folder: Path | str, port: int = 0, max_lora_rank: int = 128, key: str = ""):
        from transformers import AutoModelForCausalLM

        super().__init__(("127.0.0.1", port), _Handler)
        self.folder, self.max_lora_rank, self.key = str(folder), max_lora_rank, key
        self.make = lambda: AutoModelForCausalLM.from_pretrained(folder).float().eval()
        self.base = self.make()
        self.loras: dict[str, torch.nn.Module] = {}
        self.ids: dict[str, str] = {}
        self.calls: list[tuple[str, str]] = []
        """Of each request that changes LoRAs or completes a prompt: the last part of its path, and the LoRA's name."""
        self.allows_updates = True
        self.dies_after: int | None = None
        """Tokens after which a stream breaks off."""
        self.goes_on = threading.Event()
        """Where it is not set, streams wait before their second token."""
        self.goes_on.set()
        self.n_left = 0
        """Streams whose client went away."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def start(self) -> FakeVllm:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def forget(self) -> None:
        """What a restart does."""
        self.loras.clear()
        self.ids.clear()

    def model(self, name: str) -> torch.nn.Module | None:
        return self.base if name == "base" else self.loras.get(name)

    def load(self, name: str, path: str) -> tuple[int, str]:
        from peft import PeftModel

        if not name or not path:
            return 400, "Both 'lora_name' and 'lora_path' must be provided."
        if name in self.loras:
            return 400, f"The lora adapter '{name}' has already been loaded."
        config = Path(path) / "adapter_config.json"
        if not config.is_file():
            return 404, f"Loading lora {name} failed: No adapter found for {path}"
        if (rank := json.loads(config.read_text())["r"]) > self.max_lora_rank:
            return 500, f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}."
        self.loras[name] = PeftModel.from_pretrained(self.make(), path).eval()
        self.ids[name] = path
        return 200, ""


class _Handler(JsonHandler):
    server: FakeVllm
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self._is_refused():
            return
        models = [{"id": "base", "root": self.server.folder, "parent": None, "max_model_len": 256}]
        models += [{"id": name, "root": path, "parent": "base"} for name, path in self.server.ids.items()]
        self.answer(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._is_refused():
            return
        what, name = self.path.removeprefix("/v1/"), asked.get("lora_name", asked.get("model"))
        with self.server.lock:
            self.server.calls.append((what, name))
            if what == "completions":
                model = self.server.model(name)
            elif not self.server.allows_updates:
                self.answer(404, {"detail": "Not Found"})
                return
            elif what == "load_lora_adapter":
                self._say(*self.server.load(name, asked["lora_path"]))
                return
            else:
                is_there = self.server.loras.pop(name, None) is not None and bool(self.server.ids.pop(name))
                self._say(*((200, "") if is_there else (404, f"The lora adapter '{name}' cannot be found.")))
                return
        if model is None:
            self._say(404, f"The model `{name}` does not exist.")
        elif len(asked["prompt"]) + asked["max_tokens"] > 256:
            self._say(400, "This model's maximum context length is 256 tokens.")
        elif "prompt_logprobs" in asked:
            logprobs = logprobs_of(model, asked["prompt"])
            places = [{str(t): {"logprob": logprobs[i, t].item()}} for i, t in enumerate(asked["prompt"][1:])]
            self.answer(200, {"choices": [{"prompt_logprobs": [None, *places]}]})
        else:
            self._stream(model, asked)

    def _stream(self, model: torch.nn.Module, asked: dict) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        ids = list(asked["prompt"])
        try:
            for i in range(asked["max_tokens"]):
                if i:
                    assert self.server.goes_on.wait(20)
                if i == self.server.dies_after:
                    self.close_connection = True
                    return
                logprobs = logprobs_of(model, ids)[-1]
                token = int(logprobs.argmax())
                ids.append(token)
                is_last = token in asked["stop_token_ids"]
                reason = "stop" if is_last else "length" if i + 1 == asked["max_tokens"] else None
                choice = {"index": 0, "text": "?", "token_ids": [token], "finish_reason": reason, "logprobs": None}
                if asked["logprobs"] is not None:
                    top = logprobs.topk(max(1, asked["logprobs"]))
                    choice["logprobs"] = {
                        "token_logprobs": [logprobs[token].item()],
                        "top_logprobs": [
                            {f"token_id:{t}": value for t, value in zip(top[1].tolist(), top[0].tolist(), strict=True)}
                        ],
                    }
                self._event({"choices": [choice]})
                if is_last:
                    break
            details = {"cached_tokens": 3}
            self._event({"choices": [], "usage": {"prompt_tokens": len(ids), "prompt_tokens_details": details}})
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")
        except OSError:
            self.server.n_left += 1
            self.close_connection = True

    def _event(self, body: dict) -> None:
        self._chunk(b"data: " + json.dumps(body).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _is_refused(self) -> bool:
        if is_refused := bool(self.server.key) and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self._say(401, "Unauthorized")
        return is_refused

    def _say(self, status: int, message: str) -> None:
        self.answer(status, {"error": {"message": message}} if status >= 400 else "Success")


@torch.no_grad()
def logprobs_of(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """The log-probabilities after each of the tokens [tokens, vocabulary]."""
    return model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


def started_as_vllm(
    folder: Path, monkeypatch: pytest.MonkeyPatch, does: str = "from fake_vllm import main; main()"
) -> None:
    """Put a package `vllm` into a folder and before all others, whose server runs the code."""
    package = folder / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(does)
    paths = [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def main() -> None:
    """Read the arguments of vLLM, and serve."""
    parser = argparse.ArgumentParser()
    for name in ("model", "served-model-name", "host", "port", "dtype", "max-lora-rank", "max-loras", "max-cpu-loras"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("enable-lora", "enable-prompt-tokens-details", "disable-log-stats", "disable-uvicorn-access-log"):
        parser.add_argument(f"--{name}", action="store_true", required=True)
    given = parser.parse_args()
    assert given.host == "127.0.0.1" and given.served_model_name == "base"
    assert re.fullmatch("float32|bfloat16", given.dtype) and os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    FakeVllm(given.model, int(given.port), int(given.max_lora_rank), os.environ["VLLM_API_KEY"]).serve_forever()
