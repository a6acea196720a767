"""Writes a LoRA for vLLM: PEFT's folder with a rank that vLLM allows, and a README with the server's flags."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loracast.export.peft import write_peft
from loracast.export.uniform import Uniform
from loracast.files import write_atomically

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be."""


def write_vllm(made: Uniform, out: Path, name: str, base: str, about: Mapping[str, str]) -> None:
    """Write a LoRA for vLLM.

    Args:
        name: what requests call it. A name must never mean other weights later: vLLM's prefix cache goes by it.
        base: name or folder of the base.
    """
    short = {module.rpartition(".")[2] for module in made.lora.factors}
    write_peft(made, out, base, about)
    note = f"""# {name} for vLLM

    vllm serve BASE --enable-lora --max-lora-rank {made.rank} --lora-modules {name}={out.name}

BASE is a folder with the base's weights ({base}; `loracast export-base --out FOLDER` writes the embedded one). Requests
name the adapter as their model: `"model": "{name}"`. It targets {", ".join(sorted(short))}.

To load it into a server that runs (started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True):

    curl -X POST http://localhost:8000/v1/load_lora_adapter -H 'Content-Type: application/json' \\
        -d '{{"lora_name": "{name}", "lora_path": "/path/to/{out.name}"}}'

The name carries the weights' hash: vLLM's prefix cache goes by names, so other weights need another one.
"""
    write_atomically(out / "README.md", note.encode())
