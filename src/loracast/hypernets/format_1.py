"""Reads hypernetworks of format 1, whose config keys and tensors had other names.

Format 2 differs from it in names alone, so a folder of format 1 opens without being written anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

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
_TENSORS = {
    "document_independent.": "static.",
    "reading.": "encoder_lora.",
    "recall.entries": "task_bank.keys",
    "recall.": "task_bank.",
    "known": "seen",
}


def architecture(name: str) -> str:
    """The architecture's name of today."""
    return _ARCHITECTURES.get(name, name)


def config(values: Mapping[str, Any], of: str) -> dict[str, Any]:
    """A config of format 1 under the keys of today.

    Args:
        of: the architecture's name of today: `shared_rank` means two things.
    """
    keys = {**_CONFIG_KEYS, "shared_rank": "static_modules_rank"} if of == "DocToLoRA" else _CONFIG_KEYS
    return {keys.get(key, key): value for key, value in values.items()}


def tensors(stored: Mapping[str, V]) -> dict[str, V]:
    """Tensors under their names of today; those of format 2 come back as they are."""
    return {_tensor(name): value for name, value in stored.items()}


def _tensor(name: str) -> str:
    for old, new in _TENSORS.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
