"""Loads adapters of the library into a running vLLM server, and checks that they have an effect there."""

from __future__ import annotations

import json
import os
import re
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from loracast.errors import AdapterError, LoracastError
from loracast.export.adapter import export_adapter
from loracast.export.formats import KEY_VARIABLE, MOST_LOST
from loracast.files import move_unless_there
from loracast.library.adapter import Adapter
from loracast.library.index import read_chunks

_TIMEOUT_S = 120
_PROBE_TOKENS = 8


def exported_for_vllm(adapter: Adapter, exports: Path) -> Path:
    """Export an adapter for vLLM once, in whole; returns its folder, which is called by the adapter's version."""
    folder = exports / adapter.version
    if folder.is_dir():
        return folder
    exports.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=exports, prefix=".new-") as temporary:
        built = Path(temporary) / folder.name
        (made,) = export_adapter(adapter, "vllm", built)
        if made.error > MOST_LOST:
            raise AdapterError(
                f"at the largest rank that vLLM takes, {made.error:.0%} of {adapter.name!r} is lost: serve it with "
                "`loracast serve --engine`, which gives each question its chunks"
            )
        move_unless_there(built, folder)
    return folder


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
    name, folder = adapter.version, exported_for_vllm(adapter, exports)
    where = folder.resolve() if path_there is None else Path(path_there) / folder.name
    listed = _call(url, "/v1/models")
    if not isinstance(listed, dict) or not isinstance(models := listed.get("data"), list):
        raise LoracastError(f"what answers at {url} is no server with OpenAI's API: give the address of vLLM")
    base = next((model["id"] for model in models if not model.get("parent")), None)
    if base is None:
        raise LoracastError(f"the server at {url} serves no base model")
    if name not in [model["id"] for model in models]:
        _call(url, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(where)})
    prompts = [chunk.text[:400] for chunk in read_chunks(adapter.index)[:3]]
    if all(_probe(url, base, prompt) == _probe(url, name, prompt) for prompt in prompts):
        _call(url, "/v1/unload_lora_adapter", {"lora_name": name})
        raise LoracastError(
            f"the server at {url} answers with {name} as without it, so it is unloaded again: look at the server's log "
            "for modules that it left out, and at its --max-lora-rank"
        )
    return name


def _probe(url: str, model: str, prompt: str) -> Any:
    """A short answer with its log-probabilities, which show an effect even where no word changes."""
    asked = {"model": model, "prompt": prompt, "max_tokens": _PROBE_TOKENS, "temperature": 0, "logprobs": 1}
    choice = _call(url, "/v1/completions", asked)["choices"][0]
    return choice["text"], (choice.get("logprobs") or {}).get("token_logprobs")


def _call(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Send a GET request, or a POST request with a JSON body; returns the answer, parsed where it is JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url.rstrip("/") + path, data, {"Content-Type": "application/json"})
    if key := os.environ.get(KEY_VARIABLE):
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        said = " ".join(error.read().decode(errors="replace").split())[:300]
        hint = "; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" if error.code == 404 and "lora" in path else ""
        hint = f"; set {KEY_VARIABLE} to its key" if error.code == 401 else hint
        raise LoracastError(f"the server at {url} refused {path}: {error.code} {said}{hint}") from error
    except (urllib.error.URLError, TimeoutError) as error:
        raise LoracastError(f"no server answers at {url}: {getattr(error, 'reason', error)}") from error
    try:
        return json.loads(text)
    except ValueError:
        return text
