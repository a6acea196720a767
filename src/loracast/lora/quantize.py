"""How an adapter keeps the factors of its chunks: as numbers of 16 bits, of 8, or not at all.

bf16    as the hypernetwork gives them (the default)
int8    a byte for each number and a scale for each row: half the size
text    only the chunks' text; the hypernetwork that would have made the factors makes them when they are asked for
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from loracast.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

Storage = Literal["bf16", "int8", "text"]
STORAGE: tuple[Storage, ...] = get_args(Storage)
SCALE = ".scale"
"""Ends the name of the tensor with another one's scales."""


def check_storage(storage: str) -> Storage:
    """Raises AdapterError for a storage that there is not."""
    for known in STORAGE:
        if storage == known:
            return known
    raise AdapterError(f"unknown storage {storage!r}; one of {', '.join(STORAGE)}")


def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., d] -> int8 [..., d] and scales [..., 1] in bf16, so that their product is the rows but for half a step."""
    import torch

    rows = rows.float()
    scale = (rows.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127).bfloat16()  # rounded before it is used
    return (rows / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def restored(rows: Tensor, scale: Tensor) -> Tensor:
    """What `quantised` gave -> the rows [..., d] in bf16."""
    return (rows.float() * scale.float()).bfloat16()


def as_kept(rows: Tensor, storage: Storage) -> Tensor:
    """Rows [..., d] as they come back from an adapter of that storage, in bf16."""
    return restored(*quantised(rows)) if storage == "int8" else rows.bfloat16()
