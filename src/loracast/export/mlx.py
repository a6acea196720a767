"""Writes a LoRA as an adapter folder of mlx-lm."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from loracast.export.format import Format, Request
from loracast.files import write_atomically
from loracast.lora.target import module_shapes


def write_mlx(request: Request) -> Path:
    """Write a LoRA for mlx-lm; returns the folder.

    mlx-lm gives LoRA layers to the same modules of the last so many layers; those among them that this LoRA leaves
    alone get zeros.
    """
    from safetensors.torch import save

    made, out = request.made, request.out
    text = request.config.get_text_config()
    shapes, n_layers = module_shapes(request.config), text.num_hidden_layers
    # mlx-lm keeps the decoder of a base that reads images too in a model of its own.
    layers = "model.layers" if text is request.config else "language_model.model.layers"
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


FORMAT = Format(write_mlx, needs_config=True)
