"""The training process: memory settings for CPUs, and its place among other workers."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass

import torch
from torch import nn

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory instead of returning it to the kernel. Returns whether it took effect.

    A step allocates and frees gigabytes; without this, page faults took 40 % of its time (docs/notebook).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another libc
        return False
    largest = 2**31 - 1
    settings = ((_M_MMAP_THRESHOLD, largest), (_M_TRIM_THRESHOLD, largest), (_M_TOP_PAD, 2**28))
    return all(mallopt(option, value) for option, value in settings)


@dataclass(frozen=True)
class Workers:
    """This process among the workers that torchrun or `accelerate launch` started."""

    rank: int
    n: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @classmethod
    def join(cls, device: str | None = None) -> Workers:
        """Join the other workers, if the launcher's environment names any."""
        n = int(os.environ.get("WORLD_SIZE", "1"))
        rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
        on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
        where = torch.device(f"cuda:{local_rank}" if on_gpu else "cpu")
        if n > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
        return cls(rank, n, where)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Average the model's gradients over all workers."""
        return model if self.n == 1 else nn.parallel.DistributedDataParallel(model)

    def any(self, flag: bool) -> bool:
        """Whether any worker sets the flag, so that all stop together."""
        if self.n == 1:
            return flag
        votes = torch.tensor([float(flag)], device=self.device)
        torch.distributed.all_reduce(votes)
        return bool(votes.item())
