"""PEFT's format: a LoRA's factors read from a folder, written to one, or given to PEFT itself.

What is written has one rank in all modules, the scale folded in and alpha = rank. Runtimes compute the scale in
different ways (alpha / r, alpha / sqrt(r), one for all modules, none), and several take one rank for all modules. With
alpha == r, no rank-stabilised scale and no patterns, all of them multiply by one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from loracast.errors import AdapterError, PackageError
from loracast.files import write_atomically
from loracast.lora.factors import Factors
from loracast.lora.inject import check_fits
from loracast.lora.tensor_file import TensorInfo, in_one_order, number_faults, read_header

if TYPE_CHECKING:
    from torch import Tensor


_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_FACTOR_NAMES = (f"{_PREFIX}{{}}{_A}", f"{_PREFIX}{{}}{_B}")
"""How PEFT calls A [r, in] and B [out, r] of a module."""
MAX_RANK = 512
"""The largest that vLLM serves; a module that is larger on both sides may have more, up to its smaller side."""
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
_TYPES = ("F32", "BF16", "F16")
_MAX_ALPHA = 1e6
_MAX_CONFIG_BYTES = 10_000_000
_MAX_PATTERNS = 10_000
_BEYOND_A_LORA = (
    "use_dora", "modules_to_save", "trainable_token_indices", "alora_invocation_tokens", "layer_replication",
)  # fmt: skip
"""Keys of adapter_config.json that, set, make an adapter more than factors that are added at every token."""
_STARTS_BESIDE_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""Names of initialisations that leave the base's weights alone, as true and false do; PEFT's others change them."""
_ENDLESS = re.compile(r"\)[*+?{]|([*+?{].*){3}")
"""Regular expressions that repeat a group, or repeat thrice: some of them take for ever to match a name."""


def read_peft(folder: Path, shapes: Mapping[str, tuple[int, int]] | None = None) -> dict[str, Factors]:
    """The factors of modules in a PEFT folder, with each module's scale (alpha / r, or alpha / sqrt(r)) folded into B.

    Args:
        shapes: (out, in) of the base's linear modules, which the LoRA must fit; not looked at if None.

    Raises:
        AdapterError: there is no such adapter, it is damaged, does not fit, or is more than a LoRA on linear modules
            (DoRA, biases, trained embeddings); with every fault that there is.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config, faults = _read_config(folder / "adapter_config.json")
    header, more = read_header(folder / "adapter_model.safetensors")
    faults += more
    tensors: dict[str, Tensor] = {}
    if header and not more:
        try:
            tensors = load_file(folder / "adapter_model.safetensors")
        except (OSError, SafetensorError) as error:
            faults.append(f"adapter_model.safetensors cannot be read: {error}")
    modules = sorted({name.removesuffix(end) for name in header for end in (_A, _B) if name.endswith(end)})
    others = [name for name in header if not (name.startswith(_PREFIX) and name.endswith((_A, _B)))]
    faults += [f"{name[:200]}: not a factor of a linear module" for name in others]
    faults += [f"{m}{end[:-7]} is missing" for m in modules for end in (_A, _B) if m + end not in header]
    pairs = {m.removeprefix(_PREFIX): (header.get(m + _A), header.get(m + _B)) for m in modules}
    whole = {name: (a, b) for name, (a, b) in pairs.items() if a is not None and b is not None}
    # Where all modules have one rank, smaller ones are padded to that of the largest.
    most = max(
        [MAX_RANK, *(min(a.shape[1], b.shape[0]) for a, b in whole.values() if len(a.shape) == len(b.shape) == 2)]
    )
    for name, pair in whole.items():
        faults += _faults_of(name, *pair, shapes, most)
    faults += number_faults((name, value) for name, value in tensors.items() if value.is_floating_point())
    if not faults and not modules:
        faults = ["it is empty"]
    if faults:
        raise AdapterError(f"the adapter in {folder} is not a LoRA that can be used: {'; '.join(faults)}")
    factors: dict[str, Factors] = {}
    patterns = [(_pattern(key), alpha) for key, alpha in (config.get("alpha_pattern") or {}).items()]
    for module in modules:
        a, b = tensors[module + _A], tensors[module + _B]
        name = module.removeprefix(_PREFIX)
        alpha = next((alpha for pattern, alpha in patterns if pattern and pattern.match(name)), config["lora_alpha"])
        scale = alpha / a.shape[0] ** (0.5 if config.get("use_rslora") else 1)  # as PEFT multiplies the delta
        factors[name] = Factors(a, b * scale)
    if faults := number_faults((f"B of {name}, scaled,", b) for name, (_, b) in factors.items()):
        raise AdapterError(f"the adapter in {folder} is not a LoRA that can be used: {'; '.join(faults)}")
    return factors


def write_peft_folder(
    factors: Mapping[str, Factors],
    folder: Path,
    base: str | None = None,
    about: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write a LoRA as PEFT does; returns the folder, made if need be.

    Args:
        factors: by module, all of one rank (`algebra.uniform`).
        base: name of the base, for people: PEFT is given the base by its user.
        about: provenance, which goes into the weights' metadata, since PEFT drops keys of its config that it does not
            know.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: factor.contiguous() for name, factor in _peft_tensors(factors).items()}
    weights = in_one_order(save(tensors, metadata={"format": "pt", **about}))
    write_atomically(folder / "adapter_model.safetensors", weights)
    write_atomically(folder / "adapter_config.json", json.dumps(_peft_config(factors, base), indent=2).encode())
    return folder


def peft_model(factors: Mapping[str, Factors], shapes: Mapping[str, tuple[int, int]], model: Any, name: str) -> Any:
    """A PeftModel around a transformers model, or the PeftModel that is given, with a LoRA as the adapter `name`.

    Args:
        factors: as in `write_peft_folder`.
    Raises:
        AdapterError: the LoRA does not fit the model. PackageError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, PeftModel, set_peft_model_state_dict
    except ImportError as error:
        raise PackageError("to_peft needs PEFT: pip install peft") from error
    config = LoraConfig(**_peft_config(factors, getattr(model, "name_or_path", None)))
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        check_fits(model, shapes.items())  # before PEFT changes the model
        model = PeftModel(model, config, adapter_name=name)
    set_peft_model_state_dict(model, _peft_tensors(factors), adapter_name=name)
    return model


def _peft_tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The factors under PEFT's names."""
    return {
        name.format(module): factor
        for module, pair in factors.items()
        for name, factor in zip(_FACTOR_NAMES, pair, strict=True)
    }


def _peft_config(factors: Mapping[str, Factors], base: str | None) -> dict[str, Any]:
    """The content of adapter_config.json."""
    (rank,) = {pair.rank for pair in factors.values()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(factors),  # whole paths: a kind's name alone would mean every layer
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _read_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read adapter_config.json, with its faults: whatever makes it more than a plain LoRA's."""
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError(f"it has more than {_MAX_CONFIG_BYTES:,} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        return {}, [f"{path.name} cannot be read: {error}"]
    faults = [f"peft_type {config.get('peft_type')!r}"] if config.get("peft_type") != "LORA" else []
    faults += [key for key in _BEYOND_A_LORA if config.get(key)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in _STARTS_BESIDE_THE_BASE:
        faults.append(f"init_lora_weights {start!r}, which changes the base's weights, too: convert it with PEFT"[:200])
    faults += ["bias"] if config.get("bias", "none") != "none" or config.get("lora_bias") else []
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or len(patterns) > _MAX_PATTERNS:
        return config, [*faults, f"alpha_pattern {patterns!r}"[:200]]
    alphas = {"lora_alpha": config.get("lora_alpha"), **patterns}
    for name, alpha in alphas.items():
        if type(alpha) not in (int, float) or not -_MAX_ALPHA <= alpha <= _MAX_ALPHA:
            faults.append(f"the alpha of {name!r} is {alpha!r}"[:200])
        if _pattern(name) is None:
            faults.append(f"the pattern {name!r} names no modules"[:200])
    return config, faults


def _pattern(text: str) -> re.Pattern[str] | None:
    """PEFT's own rule: a pattern names a module by the end of its path, or as a regular expression that ends it.

    None for what is no regular expression, or one that may take for ever.
    """
    try:
        return None if _ENDLESS.search(text) else re.compile(rf"(.*\.)?({text})$")
    except (re.error, OverflowError, RecursionError):
        return None


def _faults_of(
    name: str, a: TensorInfo, b: TensorInfo, shapes: Mapping[str, tuple[int, int]] | None, most: int
) -> list[str]:
    """What is wrong with the factors of one module, whose rank may be `most`."""
    faults = [f"{name}: factors of type {info.dtype}" for info in (a, b) if info.dtype not in _TYPES]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        return [*faults, f"{name}: A {list(a.shape)} and B {list(b.shape)} are no factors of one matrix"]
    found = (b.shape[0], a.shape[1])
    if not 1 <= a.shape[0] <= most:
        faults.append(f"{name}: rank {a.shape[0]} is not from 1 to {most}")
    if shapes is not None and name not in shapes:
        faults.append(f"{name}: the base has no such linear module")
    elif shapes is not None and found != shapes[name]:
        faults.append(f"{name}: the LoRA is for {list(found)}, the base has {list(shapes[name])}")
    return faults
