"""Writes a LoRA for Ollama: a Modelfile beside the LoRA and, where it has been fetched, the base, both in GGUF."""

from __future__ import annotations

import shutil
from pathlib import Path

from loracast.export.format import Format, Request
from loracast.export.gguf import write_file
from loracast.files import write_atomically

_ADAPTER, _BASE = "adapter.gguf", "base.gguf"


def write_ollama(request: Request) -> Path:
    """Write a LoRA for Ollama; returns the folder. FROM names a copy of the base's GGUF file or else the base."""
    out, base = request.out, request.base
    write_file(request, out / _ADAPTER)
    if request.base_gguf is not None:
        shutil.copyfile(request.base_gguf, out / _BASE)
        base = f"./{_BASE}"
    lines = [
        f"# ollama create {request.name} -f Modelfile",
        f"FROM {base}",
        f"ADAPTER ./{_ADAPTER}",
        "PARAMETER temperature 0",
    ]
    write_atomically(out / "Modelfile", ("\n".join(lines) + "\n").encode())
    return out


FORMAT = Format(write_ollama, needs_config=True)
