"""The base of exported adapters: its config, its GGUF file, and itself as a folder, plain or with a LoRA added."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracast.base.embedded import DEFAULT_BASE, embedded, embedded_folder, pull, quiet_transformers
from loracast.base.fingerprint import config_fingerprint
from loracast.base.footprint import is_plain
from loracast.errors import AdapterError, BaseModelError
from loracast.library.adapter import Adapter

if TYPE_CHECKING:
    from loracast.base.load import Base
    from loracast.lora.algebra import LoRA


def write_base(name: str | None, out: Path, say: Callable[[str], None] = lambda text: None) -> list[Path]:
    """Copy an embedded base, its GGUF file included, into a folder; returns the files.

    Raises:
        BaseModelError: it is not an embedded one, or the folder is not empty.
    """
    name = name or DEFAULT_BASE
    if name not in embedded("base"):
        raise BaseModelError(
            f"{name!r} is no embedded base but a folder or hub repository: other programs load it from there"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BaseModelError(f"{out} is there already and not an empty folder; give another one")
    shutil.copytree(pull(name, say=say), out, copy_function=shutil.copyfile, dirs_exist_ok=True)
    return sorted(out.iterdir())


def write_merged(lora: LoRA, out: Path, base: Base, max_shard_size: str = "2GB") -> None:
    """Write the base's checkpoint with a LoRA added to its weights, for transformers, vLLM and llama.cpp's converter.

    The base in memory is the same afterwards.

    Args:
        max_shard_size: largest file, as transformers takes it.

    Raises:
        AdapterError: the base lacks a module of the LoRA, or its weights are quantized.
    """
    import torch

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


def base_config(name: str, adapter: Adapter, say: Callable[[str], None] = lambda text: None) -> Any:
    """The config of the base that an adapter was made for, without weights. Raises BaseModelError for another base."""
    from transformers import AutoConfig

    where = str(pull(name, say=say)) if name in embedded("base") else name
    try:
        config = AutoConfig.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"cannot read the config of the base {name!r}: give its folder or hub id with --base"
        ) from error
    if config_fingerprint(config) != adapter.manifest.made_for.config:
        raise BaseModelError(
            f"{adapter.name!r} was made for a base of other shapes than {name!r}; give the right one with --base"
        )
    return config


def base_gguf(name: str) -> Path | None:
    """The GGUF file of an embedded base, if it has been fetched; None for other bases."""
    files = sorted(embedded_folder(name).glob("*.gguf")) if name in embedded("base") else []
    return files[0] if files else None
