"""Writes a LoRA for Ollama: a Modelfile beside the LoRA and, where it has been fetched, the base, both in GGUF."""

from __future__ import annotations

import shutil
from pathlib import Path

from loracast.errors import AdapterError
from loracast.export.format import Format, Request
from loracast.export.gguf import write_file
from loracast.files import write_atomically

_ADAPTER, _BASE = "adapter.gguf", "base.gguf"


def write_ollama(request: Request) -> Path:
    """Write a LoRA for Ollama; returns the folder. FROM names a copy of the base's GGUF file or else the base's folder.

    Raises AdapterError for a base that Ollama cannot read from where it lies.
    """
    out, gguf = request.out, request.base_gguf
    base = f"./{_BASE}" if gguf is not None else _folder(request.base)
    write_file(request, out / _ADAPTER)
    if gguf is not None:
        shutil.copyfile(gguf, out / _BASE)
    lines = [
        f"# ollama create {request.name} -f Modelfile",
        f"FROM {base}",
        f"ADAPTER ./{_ADAPTER}",
        "PARAMETER temperature 0",
    ]
    write_atomically(out / "Modelfile", ("\n".join(lines) + "\n").encode())
    return out


def _folder(base: str) -> Path:
    """The folder of a base. Raises AdapterError for a hub id, and for a folder of links, as the hub's cache has them.

    Ollama takes a hub id for a model of its own registry, and refuses links that leave a folder as insecure paths.
    """
    folder = Path(base).resolve()
    if not folder.is_dir() or not all(path.resolve().is_relative_to(folder) for path in folder.iterdir()):
        source = "OWNER/NAME" if Path(base).is_dir() else base
        raise AdapterError(
            f"Ollama reads no base from {base!r}, only from a folder with the files themselves: run `hf download "
            f"{source} --local-dir FOLDER`, and export with --base FOLDER"
        )
    return folder


FORMAT = Format(write_ollama, needs_config=True, holds_base=True)
