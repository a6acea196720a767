"""Writes the base with a LoRA in its weights: a checkpoint for transformers, vLLM and llama.cpp's converter."""

from __future__ import annotations

from pathlib import Path

import torch

from loracast.base.embedded import quiet_transformers
from loracast.base.footprint import is_plain
from loracast.base.load import Base
from loracast.errors import AdapterError
from loracast.lora.algebra import LoRA


def write_merged(lora: LoRA, out: Path, base: Base, max_shard_size: str = "2GB") -> None:
    """Write the base's checkpoint with a LoRA added to its weights. The base in memory is the same afterwards.

    Args:
        max_shard_size: largest file, as transformers takes it.

    Raises:
        AdapterError: the base lacks a module of the LoRA, or its weights are quantized.
    """
    modules = dict(base.model.named_modules())
    if missing := [name for name in lora.names if name not in modules]:
        raise AdapterError(f"the base has no {', '.join(missing)}")
    if any(not is_plain(modules[name].weight) for name in lora.names):
        raise AdapterError(
            f"the base {base.name!r} is quantized, and a LoRA cannot be added to such weights: load it without quantize"
        )
    lora = lora.to(dtype=torch.float32)
    kept = {name: modules[name].weight.data for name in lora.names}
    try:
        for name, weight in kept.items():
            modules[name].weight.data = (weight.float() + lora.delta(name).to(weight.device)).to(weight.dtype)
        with quiet_transformers(), torch.no_grad():
            base.model.save_pretrained(out, max_shard_size=max_shard_size)
            base.tokenizer.save_pretrained(out)
    finally:
        for name, weight in kept.items():
            modules[name].weight.data = weight
