"""Reads hypernetworks of format 1: maps old names of config keys and tensors, and refuses options that are gone.

Shipped hypernetworks keep the old names of their tensors, so tensors are renamed at every reading.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from loracast.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

V = TypeVar("V")

_ARCHITECTURES = {"AttendingToLoRA": "AttentionDeltaToLoRA"}
_CONFIG_KEYS = {
    "lead_in": "prefix",
    "document_independent_rank": "static_rank",
    "shared_modules": "static_modules",
    "most_summed_chunks": "max_unscaled_chunks",
    "memory_merge_ridge": "key_decorrelation",
    "probe": "dummy_input",
    "probe_answer": "dummy_answer",
    "recall_rank": "task_bank_rank",
    "recall_width": "task_bank_width",
    "recalled": "bank_sizes",
    "n_known": "n_seen",
}
_GONE: dict[str, Any] = {
    "among_latents": False,
    "whitened": False,
    "weighting_width": 0,
    "weighting_dropout": None,
    "reading_strength": 1.0,
    "n_encoder_blocks": 0,
    "n_latents": 0,
    "gated_projection": False,
    "factorised_queries": True,
    "n_latent_mlps": 0,
}
"""Options that are gone, with the value at which each had no effect; None if no value of its own had one."""
_TENSORS = {
    "document_independent.": "static.",
    "reading.": "encoder_lora.",
    "recall.entries": "task_bank.keys",
    "recall.": "task_bank.",
    "known": "seen",
}
_UNITS = (".in_scale", ".out_scale")
"""Endings of names of buffers that were all ones unless `whitened` was set."""


def current(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Architecture and config of a config.json of format 1, under their current names.

    Raises:
        ConfigError: it uses an option that is gone.
    """
    architecture = str(stored.get("architecture"))
    architecture, values = _ARCHITECTURES.get(architecture, architecture), stored["config"]
    used = [key for key, idle in _GONE.items() if idle is not None and values.get(key, idle) != idle]
    if used:
        raise ConfigError(
            f"this hypernetwork was trained with {', '.join(used)}, which this version of loracast no longer has: use "
            "loracast 0.1.0"
        )
    keys = _CONFIG_KEYS | ({"shared_rank": "static_modules_rank"} if architecture == "DocToLoRA" else {})
    config = {keys.get(key, key): value for key, value in values.items() if key not in _GONE}
    return {"architecture": architecture, "config": config}


def tensors(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their current names, without buffers that are gone; current names stay as they are."""
    return {_renamed(name, _TENSORS): value for name, value in stored.items() if not _is_idle(name, value)}


def former_id(weights: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> str:
    """The id that loracast 0.1 gave a hypernetwork: a hash of its weights alone, under their old names.

    Args:
        weights: in fp32, under their current names.
        stored: the tensors of the file.
    """
    back = {new: old for old, new in _TENSORS.items()}
    old = {_renamed(name, back): value for name, value in weights.items()}
    old |= {name: value.float() for name, value in stored.items() if _is_idle(name, value)}
    digest = hashlib.sha256()
    for name, value in sorted(old.items()):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _is_idle(name: str, value: Tensor) -> bool:
    return name.endswith(_UNITS) and bool((value == 1).all())
