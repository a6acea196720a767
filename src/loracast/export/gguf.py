"""Writes a LoRA for llama.cpp and for Ollama, in GGUF.

The GGUF file has llama.cpp's tensor names and its order of the rows of q and k.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from loracast.errors import AdapterError
from loracast.export.base import base_gguf
from loracast.export.formats import Request
from loracast.files import write_atomically, write_with

_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
    "phi3": "phi3",
}
"""Type of a base -> llama.cpp's name of its architecture."""
_PERMUTED = {"llama", "smollm3"}  # whose rotary pairs llama.cpp wants as neighbours
_OLLAMA_ADAPTER, _OLLAMA_BASE = "adapter.gguf", "base.gguf"


def write_gguf(request: Request) -> Path:
    """Write a LoRA for llama.cpp; returns the file. Raises AdapterError for a module that llama.cpp does not have."""
    path = request.out / f"{request.name}.gguf"
    _write_file(request, path)
    return path


def write_ollama(request: Request) -> Path:
    """Write a LoRA for Ollama; returns the folder. FROM names a copy of the base's GGUF file or else the base's folder.

    Raises AdapterError for a base that Ollama cannot read from where it lies.
    """
    out, gguf = request.out, base_gguf(request.base)
    base = f"./{_OLLAMA_BASE}" if gguf is not None else _ollama_folder(request.base)
    _write_file(request, out / _OLLAMA_ADAPTER)
    if gguf is not None:
        shutil.copyfile(gguf, out / _OLLAMA_BASE)
    lines = [
        f"# ollama create {request.name} -f Modelfile",
        f"FROM {base}",
        f"ADAPTER ./{_OLLAMA_ADAPTER}",
        "PARAMETER temperature 0",
    ]
    write_atomically(out / "Modelfile", ("\n".join(lines) + "\n").encode())
    return out


def _write_file(request: Request, out: Path) -> None:
    """Write a LoRA for llama.cpp as a file of any name."""
    import gguf

    made, text = request.made, request.read_config().get_text_config()
    architecture = _ARCHITECTURES.get(text.model_type)
    if architecture is None:
        raise AdapterError(f"loracast does not know what llama.cpp calls a base of type {text.model_type!r}")
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
        writer.add_name(request.name)
        for tensor, value in tensors.items():
            writer.add_tensor(tensor, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    out.parent.mkdir(parents=True, exist_ok=True)
    write_with(out, write)


def _neighbouring_pairs(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows [heads * d, r] in llama.cpp's order: the two rows that a rotation mixes are neighbours, not d / 2 apart."""
    d_out, rank = rows.shape
    return rows.reshape(n_heads, 2, d_out // n_heads // 2, rank).swapaxes(1, 2).reshape(d_out, rank)


def _ollama_folder(base: str) -> Path:
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
