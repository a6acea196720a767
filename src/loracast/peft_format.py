"""LoRAs in PEFT's own format, a folder with adapter_config.json and adapter_model.safetensors: as other tools write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loracast.errors import AdapterError
from loracast.lora import Factors, LoRA

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
FACTOR_NAMES = (f"{_PREFIX}{{}}{_A}", f"{_PREFIX}{{}}{_B}")
"""How PEFT calls A [r, in] and B [out, r] of a module."""


def read_peft(folder: Path) -> LoRA:
    """The LoRA in a PEFT folder, its scale (alpha / r, or alpha / sqrt(r) where rank-stabilised, by module) folded into B.

    Raises:
        AdapterError: there is no such adapter, or it is more than a LoRA on linear modules (DoRA, biases, trained embeddings).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"{folder} holds no PEFT adapter that can be read: {error}") from error
    problems = [f"peft_type {config.get('peft_type')!r}"] if config.get("peft_type") != "LORA" else []
    problems += [key for key in ("use_dora", "modules_to_save", "trainable_token_indices") if config.get(key)]
    problems += ["bias"] if config.get("bias", "none") != "none" or config.get("lora_bias") else []
    problems += [name for name in tensors if not name.startswith(_PREFIX) or not name.endswith((_A, _B))]
    a_names = {name.removesuffix(_A) for name in tensors if name.endswith(_A)}
    problems += [
        f"{name}: one factor of two" for name in a_names ^ {n.removesuffix(_B) for n in tensors if n.endswith(_B)}
    ]
    if problems or not a_names:
        raise AdapterError(
            f"the adapter in {folder} is not a LoRA on linear modules alone: {', '.join(sorted(problems)) or 'it is empty'}"
        )
    factors = {}
    for name in sorted(a_names):
        a, b = tensors[name + _A], tensors[name + _B]
        module = name.removeprefix(_PREFIX)
        factors[module] = Factors(a, b * _scale(config, module, a.shape[0]))
    return LoRA(factors)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies a module's delta with."""
    import re

    # PEFT's own rule: a pattern names a module by the end of its path, or as a regular expression that ends it.
    patterns = config.get("alpha_pattern") or {}
    found = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = config["lora_alpha"] if found is None else patterns[found]
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
