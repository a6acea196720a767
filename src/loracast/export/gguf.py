"""Writes a LoRA for llama.cpp: a GGUF file with llama.cpp's tensor names and its order of the rows of q and k."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loracast.errors import AdapterError
from loracast.export.uniform import Uniform
from loracast.files import write_with

_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "smollm3": "smollm3",
}
"""Type of a base -> llama.cpp's name of its architecture."""
_PERMUTED = {"llama", "smollm3"}  # whose rotary pairs llama.cpp wants as neighbours


def write_gguf(made: Uniform, out: Path, config: Any, name: str) -> None:
    """Write a LoRA for llama.cpp.

    Args:
        out: the file.
        config: of the base, transformers' own.
        name: for people.

    Raises:
        AdapterError: llama.cpp has no such module.
    """
    import gguf

    text = config.get_text_config()
    architecture = _ARCHITECTURES[text.model_type]
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(number, text.num_hidden_layers)
    tensors: dict[str, np.ndarray] = {}
    problems = []
    for module, (a, b) in made.lora.to(dtype=torch.float32).factors.items():
        module = module.replace("model.language_model.", "model.")  # where a multimodal base keeps its decoder
        stem = names.get_name(module)
        if stem is None:
            problems.append(module)
            continue
        b_rows = b.numpy()
        if architecture in _PERMUTED and module.endswith((".q_proj", ".k_proj")):
            n_heads = text.num_attention_heads if module.endswith(".q_proj") else text.num_key_value_heads
            b_rows = _neighbouring_pairs(b_rows, n_heads)
        tensors[f"{stem}.weight.lora_a"] = a.contiguous().numpy()
        tensors[f"{stem}.weight.lora_b"] = np.ascontiguousarray(b_rows)
    if problems:
        raise AdapterError(f"llama.cpp has no tensor for {', '.join(problems)}")

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(made.rank))  # divided by the rank: one
        writer.add_name(name)
        for tensor, value in tensors.items():
            writer.add_tensor(tensor, value)
        steps: tuple[Callable[[], None], ...] = (
            writer.write_header_to_file,
            writer.write_kv_data_to_file,
            writer.write_tensors_to_file,
            writer.close,
        )
        for step in steps:
            step()

    out.parent.mkdir(parents=True, exist_ok=True)
    write_with(out, write)


def _neighbouring_pairs(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows [heads * d, r] in llama.cpp's order: the two rows that a rotation mixes are neighbours, not d / 2 apart."""
    d_out, rank = rows.shape
    return rows.reshape(n_heads, 2, d_out // n_heads // 2, rank).swapaxes(1, 2).reshape(d_out, rank)
