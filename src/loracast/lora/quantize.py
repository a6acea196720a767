"""How the factors of an adapter's chunks are stored, and the int8 quantiser that adapters and hypernetworks share.

bf16    16 bits a number, as the hypernetwork gives them
int8    a byte a number and a scale for each row: half the size, and answers as good (docs/library.md has the figures)
text    only the chunks' text; the hypernetwork casts the factors anew whenever they are needed
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from loracast.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

Storage = Literal["bf16", "int8", "text"]
STORAGE: tuple[Storage, ...] = get_args(Storage)
"""Every storage, the largest first."""
DEFAULT_STORAGE: Storage = "int8"
"""Storage of learned documents unless the user says otherwise; single LoRAs (tasks, images, imports) are in bf16."""
SCALE = ".scale"
"""Suffix of the tensor that holds the scales of an int8 tensor in an adapter's file."""


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
    return (values.float() * scale.float()).bfloat16()


def as_stored(rows: Tensor, storage: Storage) -> Tensor:
    """Rows [..., d] as they come back from an adapter of that storage, in bf16."""
    return dequantise(*quantise(rows)) if storage == "int8" else rows.bfloat16()
