"""Which precision a device computes in fast: bf16, or float32 on processors without instructions for bf16."""

from __future__ import annotations

import platform

_CHECKS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


def has_fast_bf16(device_type: str) -> bool:
    """Whether a device multiplies matrices in bf16 at least as fast as in float32.

    An x86 processor without AVX512-BF16 or AMX, as in most laptops, emulates bf16 at a fraction of the speed.
    """
    import torch

    if device_type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return any(getattr(torch.cpu, check, lambda: False)() for check in _CHECKS)
