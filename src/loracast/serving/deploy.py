"""Loads adapters of the library into a running vLLM server, and checks that they have an effect there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from loracast.errors import AdapterError, LoracastError
from loracast.export.formats import KEY_VARIABLE
from loracast.export.replica import export_for_vllm
from loracast.library.adapter import Adapter
from loracast.library.index import read_chunks
from loracast.serving.client import Refused
from loracast.serving.vllm import VllmClient

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
