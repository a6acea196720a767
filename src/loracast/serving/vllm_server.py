"""Connects to vLLM servers, or starts one: for an engine, and to load an adapter of the library there for good."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from loracast.base.chat import encode_text
from loracast.base.embedded import embedded, embedded_folder
from loracast.base.load import Base
from loracast.errors import AdapterError, ConfigError, LoracastError
from loracast.export.formats import KEY_VARIABLE
from loracast.export.vllm_middleware import export_for_vllm
from loracast.files import cache_dir, tidy, work_folder
from loracast.library.adapter import Adapter
from loracast.library.index import read_chunks
from loracast.serving.client import Refused
from loracast.serving.generation import EngineConfig, EngineFailed
from loracast.serving.vllm import MAX_LOADED, PREFIX, LoadedLoRAs, VllmClient, VllmEngine

_MAX_RANK = 128
"""Rank of a server that is started: what most questions take of two chunks of the shipped hypernetwork."""
_MAX_LORAS = 8
"""Different LoRAs in a batch of a server that is started: each takes memory at the full rank."""
_START_S = 900.0
_STOP_S = 30.0
_GIB = 2**30
_PR_SET_PDEATHSIG = 1
_PROBE = "The capital of France is Paris. Water boils at 100 degrees, and a week has seven days."
_MOST_APART = 0.3
"""Mean difference of log-probabilities of one base in two programs; in bf16 it is below 0.05."""


def vllm_engine(where: str, base: Base, config: EngineConfig = EngineConfig()) -> VllmEngine:
    """An engine on vLLM servers.

    Args:
        where: the URLs of servers, separated by commas; or the Python of an environment with vLLM, to start one there
            ("vllm": this Python).

    Raises:
        ConfigError: no such Python; a server has another base, or takes no LoRAs.
        EngineFailed: a server does not answer.
        LoracastError: it does not start.
    """
    exports = cache_dir("exports")
    exports.mkdir(parents=True, exist_ok=True)
    tidy(exports)
    with ExitStack() as ends:
        servers = []
        for place in where.split(","):
            folder = ends.enter_context(work_folder(exports, "vllm"))
            if "://" in place:
                client = VllmClient(place.strip(), os.environ.get(KEY_VARIABLE, ""))
            else:
                client = ends.enter_context(_started(place, base, config, folder))
            for name, root in client.loaded.items():  # of engines that were killed
                if name.startswith(PREFIX) and not Path(root).is_dir():
                    client.unload(name)
            _check_base(base, client)
            servers.append(LoadedLoRAs(base, client, folder))
        return VllmEngine(base, servers, config, ends.pop_all().close)


def _check_base(base: Base, client: VllmClient) -> None:
    """Raise ConfigError where the server's base gives a text other probabilities than this one."""
    prompt = encode_text(base.tokenizer, _PROBE)
    there = torch.tensor(client.prompt_logprobs(prompt))
    with base.lock, torch.no_grad():
        logits = base.model(input_ids=torch.tensor([prompt], device=base.device)).logits[0, :-1].float().cpu()
    here = logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    if not (apart := (here - there).abs().mean().item()) < _MOST_APART:
        raise ConfigError(
            f"the vLLM server at {client.url} serves another base than {base.name}: the log-probabilities of a "
            f"sentence differ by {apart:.2f}; `loracast export-base` writes the embedded one"
        )


@contextmanager
def _started(python: str, base: Base, config: EngineConfig, folder: Path) -> Iterator[VllmClient]:
    """A server of its own for a base, and its client; its log is in the folder."""
    found = sys.executable if python == "vllm" else shutil.which(python)
    if found is None:
        raise ConfigError(f"{python} is neither a URL (http://localhost:8000) nor the Python of an environment of vLLM")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    key = secrets.token_urlsafe(32)
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, config.kv_bytes // _GIB)), "VLLM_LOGGING_LEVEL": "WARNING",
        **os.environ, KEY_VARIABLE: key, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    where = embedded_folder(base.name) if base.name in embedded("base") else base.name
    command = [
        found, "-m", "vllm.entrypoints.openai.api_server", "--model", where, "--served-model-name", "base",
        "--host", "127.0.0.1", "--port", port, "--dtype", str(base.model.dtype).removeprefix("torch."),
        "--enable-lora", "--max-lora-rank", _MAX_RANK, "--max-loras", _MAX_LORAS, "--max-cpu-loras", MAX_LOADED,
        "--enable-prompt-tokens-details", "--disable-log-stats", "--disable-uvicorn-access-log",
    ]  # fmt: skip
    log = folder / "server.log"
    with open(log, "w") as out:
        server = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment,
            preexec_fn=_end_with_parent(),
        )  # fmt: skip
    try:
        yield _wait(server, f"http://127.0.0.1:{port}", key, log)
    finally:
        server.terminate()
        try:
            server.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait(server: subprocess.Popen[bytes], url: str, key: str, log: Path) -> VllmClient:
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        if server.poll() is not None:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise LoracastError("vLLM did not start:\n" + "\n".join(lines[-20:]))
        with suppress(EngineFailed):
            return VllmClient(url, key)
        time.sleep(0.5)
    raise LoracastError(f"vLLM did not start within {_START_S:g} s; its log: {log}")


def _end_with_parent() -> Callable[[], object] | None:
    """What a child runs before its program, so that it ends when this process is killed; Linux alone can do it."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


_PROBE_TOKENS = 8


def deploy(adapter: Adapter, url: str, exports: Path, *, path_there: str | None = None) -> str:
    """Load an adapter into a running vLLM server, and check that it changes what the server says.

    Args:
        url: of the server, without `/v1`. It must run with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; its
            key, if it has one, is that of the environment (`KEY_VARIABLE`).
        exports: where exports are kept.
        path_there: where the server sees `exports`, if under another path.

    Returns:
        the name by which requests ask for the adapter.

    Raises:
        AdapterError: the URL is none.
        LoracastError: the server cannot be reached, refuses it, or answers with it as without it (it is unloaded
            again then).
    """
    if not re.match(r"https?://[^/]", url):
        raise AdapterError(f"{url!r} is no server's address; give one such as http://localhost:8000")
    name = adapter.version
    folder = exports / name
    if not folder.is_dir():
        export_for_vllm(adapter, folder)
    where = folder.resolve() if path_there is None else Path(path_there) / name
    try:
        client = VllmClient(url, os.environ.get(KEY_VARIABLE, ""))
        if name not in client.loaded:
            client.load(name, where)
        prompts = [chunk.text[:400] for chunk in read_chunks(adapter.index)[:3]]
        has_effect = any(_probe(client, client.base, prompt) != _probe(client, name, prompt) for prompt in prompts)
        if not has_effect:
            client.unload(name)
    except Refused as error:
        hint = f"; set {KEY_VARIABLE} to its key" if error.status == 401 else ""
        raise LoracastError(f"the server at {url} refuses this: {error.status} {error}{hint}") from error
    if not has_effect:
        raise LoracastError(
            f"the server at {url} answers with {name} as without it, so it is unloaded again: look at the server's log "
            "for modules that it left out, and at its --max-lora-rank"
        )
    return name


def _probe(client: VllmClient, model: str, prompt: str) -> tuple[str, object]:
    """A short answer with its log-probabilities, which show an effect even where no word changes."""
    asked = {"model": model, "prompt": prompt, "max_tokens": _PROBE_TOKENS, "temperature": 0, "logprobs": 1}
    choice = client.post("/v1/completions", asked)["choices"][0]
    return choice["text"], (choice.get("logprobs") or {}).get("token_logprobs")
