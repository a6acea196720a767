"""Writes a LoRA as a folder of PEFT, which `PeftModel.from_pretrained` and vLLM load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loracast.export.uniform import Uniform
from loracast.files import write_atomically
from loracast.lora.peft_format import FACTOR_NAMES


def write_peft(made: Uniform, out: Path, base: str, about: Mapping[str, str]) -> None:
    """Write a LoRA as PEFT does.

    Args:
        base: name or folder of the base, for people; PEFT is given the base by its user.
        about: provenance, kept in the weights' metadata: PEFT drops keys of its config that it does not know.
    """
    from safetensors.torch import save

    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        name.format(module): factor.contiguous()
        for module, pair in made.lora.factors.items()
        for name, factor in zip(FACTOR_NAMES, pair, strict=True)
    }
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
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
    write_atomically(out / "adapter_model.safetensors", save(tensors, metadata={"format": "pt", **about}))
    write_atomically(out / "adapter_config.json", json.dumps(config, indent=2).encode())
