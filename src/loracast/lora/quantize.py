"""How the factors of an adapter's chunks are stored, and the int8 quantiser that adapters and hypernetworks share.

bf16    16 bits a number, as the hypernetwork gives them
int8    a byte a number and a scale for each row: half the size, and answers as good (docs/library.md has the figures)
int4    half a byte a number and a scale for each 16 of them, but int8 in a memory, whose rows tell facts apart, and in
        the static LoRA
text    only the chunks' text; the hypernetwork casts the factors anew whenever they are needed
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

from loracast.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

Storage = Literal["bf16", "int8", "int4", "text"]
STORAGE: tuple[Storage, ...] = get_args(Storage)
"""Every storage, the largest first."""
DEFAULT_STORAGE: Storage = "int4"
"""Storage of documents unless the user says otherwise, and of tasks; images, imports and combinations are in bf16."""
SCALE = ".scale"
"""Suffix of the tensor that holds the scales of a quantised tensor in an adapter's file."""
_LARGEST_GROUP = 16


def check_storage(storage: str) -> Storage:
    """Return a storage that exists. Raises AdapterError for any other."""
    if storage not in STORAGE:
        raise AdapterError(f"unknown storage {storage!r}; one of {', '.join(STORAGE)}")
    return storage


def quantise(values: Tensor, axis: int = -1, floor: float = 1e-30) -> tuple[Tensor, Tensor]:
    """Quantise numbers to int8, with a bf16 scale for each slice along `axis`; an error is half a step at most.

    Args:
        axis: the axis that one scale covers, of size 1 in the scales: -1 for the rows of a matrix, -2 for its columns.
        floor: least value of a slice's largest number, so that a slice of zeros has a scale.
    """
    import torch

    values = values.float()
    # The scale is rounded before it divides, so that reading multiplies by the number that writing divided by.
    scale = (values.abs().amax(axis, keepdim=True).clamp_min(floor) / 127).bfloat16()
    return (values / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    """The numbers, in bf16, that `quantise` gave as int8 `values` with their `scale`."""
    return values * scale  # bf16 holds every int8, and multiplies in fp32 before it rounds


def storage_of(storage: Storage, in_bytes: bool) -> Storage:
    """How an adapter of a storage keeps factors; those of a memory and of the static LoRA take a byte at least."""
    return "int8" if storage == "int4" and in_bytes else storage


def pack(rows: Tensor, storage: Storage) -> dict[str, Tensor]:
    """Rows [..., d] as an adapter's file holds them: its tensors by the suffix of their names ("" and SCALE)."""
    if storage == "int8":
        return dict(zip(("", SCALE), quantise(rows), strict=True))
    if storage == "int4":
        groups = rows.float().unflatten(-1, (-1, _group(rows.shape[-1])))
        scale = (groups.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 7).bfloat16()
        digits = (groups / scale.float()).round().clamp(-7, 7).flatten(-2) + 8  # 1..15
        low, high = digits.byte().unflatten(-1, (-1, 2)).unbind(-1)
        return {"": low | (high << 4), SCALE: scale[..., 0]}
    return {"": rows.bfloat16()}


def unpack(parts: Mapping[str, Tensor], storage: Storage) -> Tensor:
    """The rows [..., d], in bf16, of which `pack` made `parts`."""
    import torch

    if storage == "int8":
        return dequantise(parts[""], parts[SCALE])
    if storage == "int4":
        digits = torch.stack([parts[""] & 15, parts[""] >> 4], dim=-1).flatten(-2).char() - 8
        group = digits.shape[-1] // parts[SCALE].shape[-1]
        return dequantise(digits, parts[SCALE].repeat_interleave(group, -1))
    return parts[""]


def packed(d: int, storage: Storage) -> dict[str, tuple[str, int]]:
    """By suffix, safetensors' type and the last size of the tensors that hold rows [..., d]."""
    if storage == "int8":
        return {"": ("I8", d), SCALE: ("BF16", 1)}
    if storage == "int4":
        return {"": ("U8", d // 2), SCALE: ("BF16", d // _group(d))}
    return {"": ("BF16", d)}


def _group(d: int) -> int:
    """How many numbers of a row of d share a scale in int4."""
    if d % 2:
        raise AdapterError(f"rows of {d} numbers cannot be kept as int4, which needs an even number; use int8")
    return math.gcd(d, _LARGEST_GROUP)


def as_stored(rows: Tensor, storage: Storage) -> Tensor:
    """Rows [..., d] as they come back from an adapter of that storage, in bf16."""
    return unpack(pack(rows.bfloat16(), storage), storage)
