"""Which precision a device computes in fast: bf16, or float32 on processors without instructions for bf16."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from loracast.errors import ConfigError

if TYPE_CHECKING:
    import torch

_CHECKS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


def has_fast_bf16(device_type: str) -> bool:
    """Whether a device multiplies matrices in bf16 at least as fast as in float32.

    Processors and GPUs without instructions for it emulate bf16 at a fraction of the speed: x86 without AVX512-BF16 or
    AMX, as in most laptops, and GPUs of NVIDIA before Ampere.
    """
    import torch

    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return any(getattr(torch.cpu, check, lambda: False)() for check in _CHECKS)


def fastest_dtype(device: str) -> torch.dtype:
    """The type of weights with which a base runs fastest on a device such as "cpu" or "cuda:0"."""
    import torch

    return torch.bfloat16 if has_fast_bf16(torch.device(device).type) else torch.float32


def dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    """A floating-point type from its name in torch, such as "bfloat16". Raises ConfigError for anything else."""
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"{dtype!r} is no type of weights: give one such as float32, bfloat16 or float16")
    return found
