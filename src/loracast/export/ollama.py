"""Writes a LoRA for Ollama: a Modelfile beside the LoRA and, where it has been fetched, the base, both in GGUF."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from loracast.export.gguf import write_gguf
from loracast.export.uniform import Uniform
from loracast.files import write_atomically

_ADAPTER, _BASE = "adapter.gguf", "base.gguf"


def write_ollama(made: Uniform, out: Path, config: Any, name: str, base: str, base_gguf: Path | None) -> None:
    """Write a LoRA for Ollama.

    Args:
        base: the base's name, which FROM names where there is no GGUF file of it.
        base_gguf: the base as a GGUF file, which is copied.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_gguf(made, out / _ADAPTER, config, name)
    if base_gguf is not None:
        shutil.copyfile(base_gguf, out / _BASE)
    lines = [
        f"# ollama create {name} -f Modelfile",
        f"FROM {'./' + _BASE if base_gguf is not None else base}",
        f"ADAPTER ./{_ADAPTER}",
        "PARAMETER temperature 0",
    ]
    write_atomically(out / "Modelfile", ("\n".join(lines) + "\n").encode())
