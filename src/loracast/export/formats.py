"""What a format is given to write, and the formats that are folders of safetensors: PEFT's, vLLM's and mlx-lm's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loracast.errors import AdapterError
from loracast.files import write_atomically
from loracast.lora.algebra import Uniform
from loracast.lora.peft_format import write_peft_folder
from loracast.lora.target import module_shapes

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be."""
KEY_VARIABLE = "VLLM_API_KEY"
"""Environment variable with the key of a server at a URL; vLLM itself reads the same one."""
MOST_LOST = 0.1
"""A LoRA is compressed to a server's rank where that loses at most this share of its delta (Frobenius norm)."""


@dataclass(frozen=True)
class Request:
    """One LoRA to write, with all that a format may need to know of it."""

    made: Uniform
    out: Path
    """The folder to write into, which the writer makes."""
    name: str
    """Name of the adapter, with the chunk's number where chunks are written one by one."""
    version: str
    """`name@hash`, which never means other weights."""
    base: str
    """Name, folder or hub id of the base, as the user gave it."""
    about: Mapping[str, str]
    """Provenance as strings, for a file's metadata; `about["base"]` is the base's fingerprint as JSON."""
    read_config: Callable[[], Any]
    """Reads the base's config, transformers' own. Raises BaseModelError where it cannot be read."""


def write_peft(request: Request) -> Path:
    """Write a LoRA as PEFT does; returns the folder, which `PeftModel.from_pretrained` and SGLang load."""
    return write_peft_folder(request.made.lora.factors, request.out, request.base, request.about)


def write_vllm(request: Request) -> Path:
    """Write a LoRA for vLLM, with a README of the server's flags; returns the folder.

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


def too_much_lost(rank: int, max_rank: int, error: float, remedy: str) -> AdapterError:
    """The error for a LoRA that loses more than `MOST_LOST` at the rank of a server.

    Args:
        rank: of the LoRA.
        error: the share that it loses.
        remedy: what to do instead of starting the server with a higher rank.
    """
    enough = next((size for size in VLLM_RANKS if size >= rank), None)
    advice = f"start vLLM with --max-lora-rank {enough}"
    if enough is None:
        advice = f"vLLM takes {max(VLLM_RANKS)} at most, so ask fewer chunks at once"
    lost = f"this LoRA has the rank {rank}, and the vLLM server takes {max_rank}, at which {error:.0%} of it is lost"
    return AdapterError(f"{lost}: {advice}, or {remedy}")


def write_mlx(request: Request) -> Path:
    """Write a LoRA for mlx-lm; returns the folder.

    mlx-lm gives LoRA layers to the same modules of the last so many layers; those among them that this LoRA leaves
    alone get zeros.
    """
    from safetensors.torch import save

    made, out, config = request.made, request.out, request.read_config()
    text = config.get_text_config()
    shapes, n_layers = module_shapes(config), text.num_hidden_layers
    # mlx-lm keeps the decoder of a base that reads images too in a model of its own.
    layers = "model.layers" if text is config else "language_model.model.layers"
    place = {name: _place(name) for name in made.lora.factors}
    kinds = sorted({path for _, path in place.values()})
    first = min(layer for layer, _ in place.values())
    by_place = {place[name]: pair for name, pair in made.lora.factors.items()}
    dtype = next(iter(by_place.values())).a.dtype
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(first, n_layers):
        for path in kinds:
            d_in, d_out = shapes[path.rpartition(".")[2]]
            a, b = by_place.get((layer, path)) or (
                torch.zeros(made.rank, d_in, dtype=dtype),
                torch.zeros(d_out, made.rank, dtype=dtype),
            )
            tensors[f"{layers}.{layer}.{path}.lora_a"] = a.T.contiguous()  # [in, r]
            tensors[f"{layers}.{layer}.{path}.lora_b"] = b.T.contiguous()  # [r, out]
    adapter = {
        "fine_tune_type": "lora",
        "num_layers": n_layers - first,
        "lora_parameters": {"rank": made.rank, "scale": 1.0, "dropout": 0.0, "keys": kinds},
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "adapters.safetensors", save(tensors))
    write_atomically(out / "adapter_config.json", json.dumps(adapter, indent=2).encode())
    return out


def _place(name: str) -> tuple[int, str]:
    """The layer of a module, and its path inside the layer."""
    found = re.search(r"layers\.(\d+)\.(.+)$", name)
    assert found is not None, name
    return int(found[1]), found[2]
