"""Writes a LoRA for vLLM: PEFT's folder with a rank that vLLM allows, and a README with the server's flags."""

from __future__ import annotations

from pathlib import Path

from loracast.export.format import Format, Request
from loracast.export.peft import write_peft
from loracast.files import write_atomically

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be."""
KEY_VARIABLE = "VLLM_API_KEY"
"""Environment variable with the key of a server at a URL; vLLM itself reads the same one."""
MOST_LOST = 0.1
"""A LoRA is compressed to a server's rank where that loses at most this share of its delta (Frobenius norm)."""


def too_much_lost(rank: int, max_rank: int, error: float) -> str:
    """What to say of a LoRA that a server's rank is too small for, up to what to do about it."""
    enough = next((size for size in RANKS if size >= rank), None)
    advice = f"start vLLM with --max-lora-rank {enough}"
    if enough is None:
        advice = f"vLLM takes {max(RANKS)} at most, so ask fewer chunks at once"
    lost = f"this LoRA has the rank {rank}, and the vLLM server takes {max_rank}, at which {error:.0%} of it is lost"
    return f"{lost}: {advice}"


def write_vllm(request: Request) -> Path:
    """Write a LoRA for vLLM; returns the folder.

    vLLM's prefix cache goes by the adapter's name, so requests call it by its version, which never means other weights.
    """
    made, name = request.made, request.version
    out = write_peft(request)
    short = {module.rpartition(".")[2] for module in made.lora.factors}
    note = f"""# {name} for vLLM

    vllm serve BASE --enable-lora --max-lora-rank {made.rank} --lora-modules {name}={out.name}

BASE is a folder with the base's weights ({request.base}; `loracast export-base --out FOLDER` writes the embedded one).
Requests name the adapter as their model: `"model": "{name}"`. It targets {", ".join(sorted(short))}.

To load it into a server that runs (started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True):

    curl -X POST http://localhost:8000/v1/load_lora_adapter -H 'Content-Type: application/json' \\
        -d '{{"lora_name": "{name}", "lora_path": "/path/to/{out.name}"}}'

The name carries the weights' hash: vLLM's prefix cache goes by names, so other weights need another one.
"""
    write_atomically(out / "README.md", note.encode())
    return out


FORMAT = Format(write_vllm, ranks=RANKS)
