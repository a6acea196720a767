"""Writes a LoRA as a folder in PEFT's format, which `PeftModel.from_pretrained` and SGLang load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loracast.export.format import Format, Request
from loracast.files import write_atomically
from loracast.lora.peft_format import FACTOR_NAMES


def write_peft(request: Request) -> Path:
    """Write a LoRA as PEFT does; returns the folder.

    The base's name is for people: PEFT is given the base by its user. Provenance goes into the weights' metadata, since
    PEFT drops keys of its config that it does not know.
    """
    from safetensors.torch import save

    made, out = request.made, request.out
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        name.format(module): factor.contiguous()
        for module, pair in made.lora.factors.items()
        for name, factor in zip(FACTOR_NAMES, pair, strict=True)
    }
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": request.base,
        "revision": None,
        "inference_mode": True,
        "r": made.rank,
        "lora_alpha": made.rank,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(made.lora.factors),  # whole paths: a kind's name alone would mean every layer
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    write_atomically(out / "adapter_model.safetensors", save(tensors, metadata={"format": "pt", **request.about}))
    write_atomically(out / "adapter_config.json", json.dumps(config, indent=2).encode())
    return out


FORMAT = Format(write_peft)
