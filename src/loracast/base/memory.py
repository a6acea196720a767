"""Tells how much memory a base will take before its weights are read, and refuses one that cannot fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loracast.base.footprint import Quantization, footprint, free_memory
from loracast.base.packages import Say
from loracast.errors import BaseModelError

if TYPE_CHECKING:
    import torch

_WINDOW = 1024
"""Tokens that a base must be able to read and continue to be of use."""
_SMALL = 2 * 10**9
"""Bytes up to which nothing is said."""


def devices_of(device: str, device_map: str | dict[str, Any] | None) -> list[str]:
    """The devices that a base is spread over; none where the map names something else, such as the disk."""
    import torch

    if device_map is None:
        return [device]
    if isinstance(device_map, dict):
        named = [f"cuda:{place}" if isinstance(place, int) else str(place) for place in device_map.values()]
        return [] if "disk" in named else list(dict.fromkeys(named))
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or [device]
    return [device_map]


def check_memory(
    name: str,
    config: Any,
    dtype: torch.dtype,
    quantization: Quantization | None,
    devices: Sequence[str],
    say: Say,
) -> None:
    """Say what a base takes, if that is much.

    Args:
        devices: as `devices_of` gives them; what they have free is added up.

    Raises:
        BaseModelError: its weights and a window of 1,024 tokens do not fit into what is free.
    """
    if getattr(config, "quantization_config", None) is not None:
        return  # the checkpoint is quantized: its config does not tell how large it is
    takes = footprint(config, dtype, quantization)
    needed = takes.generating(_WINDOW)
    if needed < _SMALL:
        return
    how = quantization or str(dtype).removeprefix("torch.")
    message = (
        f"the base {name!r} takes {_gb(takes.weights)} in {how}, and {_gb(needed)} while it answers in a window of "
        f"{_WINDOW:,} tokens"
    )
    of_each = [free_memory(device) for device in devices]
    free = [n_bytes for n_bytes in of_each if n_bytes is not None]
    if not free or len(free) < len(of_each):
        say(message)
        return
    where = ", ".join(devices)
    if needed > sum(free):
        smaller = (
            "a smaller dtype (bfloat16), or quantize (8bit, 4bit)" if dtype.itemsize > 2 else "quantize (8bit, 4bit)"
        )
        remedy = "take a smaller base or a larger machine" if quantization == "4bit" else f"give {smaller}"
        raise BaseModelError(f"{message}, and {where} has {_gb(sum(free))} free: {remedy}")
    say(f"{message}; {where} has {_gb(sum(free))} free")


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
