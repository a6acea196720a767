"""The training process: memory settings for CPUs, and its place among other workers."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loracast.errors import ConfigError, TrainingError

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
    """This process among the workers that torchrun or `accelerate launch` started.

    The batches of a step are shared out, and their gradients summed, so that the number of workers changes nothing but
    the time that a step takes. A method that talks to the others raises TrainingError where one of them has ended.
    """

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
            if on_gpu:
                torch.cuda.set_device(where)
            torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
        return cls(rank, n, where)

    def batches(self, step: int, n_batches: int) -> range:
        """The numbers of this worker's batches, of the `n_batches` of a step.

        Raises ConfigError if they cannot be shared out evenly.
        """
        if n_batches % self.n:
            raise ConfigError(
                f"{self.n} processes share the batches of a step, which are {n_batches}: "
                f"set training.accumulate to a multiple of {self.n}"
            )
        n_mine = n_batches // self.n
        first = step * n_batches + self.rank * n_mine
        return range(first, first + n_mine)

    def copy_first(self, model: nn.Module) -> None:
        """Give all workers the weights of the first."""
        if self.n > 1:
            with _together():
                for value in model.state_dict().values():
                    torch.distributed.broadcast(whole := value.contiguous(), 0)
                    value.copy_(whole)

    def sum_gradients(self, model: nn.Module) -> None:
        """Add the gradients of all workers up. A parameter that has none on any of them has none afterwards.

        DistributedDataParallel is not used: it wants each parameter in every batch, and a memory has no loss in some.
        """
        if self.n == 1:
            return
        trained = [p for p in model.parameters() if p.requires_grad]
        with _together():
            n_have = torch.tensor([float(p.grad is not None) for p in trained], device=self.device)
            torch.distributed.all_reduce(n_have)
            present = [p for p, n in zip(trained, n_have.tolist(), strict=True) if n]
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in present])
            torch.distributed.all_reduce(flat)
        for p, part in zip(present, flat.split([p.numel() for p in present]), strict=True):
            p.grad = part.view_as(p)

    def gather(self, value: Any) -> list[Any]:
        """The value of every worker, in the order of their ranks."""
        if self.n == 1:
            return [value]
        values: list[Any] = [None] * self.n
        with _together():
            torch.distributed.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any worker sets the flag, so that all stop together."""
        if self.n == 1:
            return flag
        votes = torch.tensor([float(flag)], device=self.device)
        with _together():
            torch.distributed.all_reduce(votes)
        return bool(votes.item())


@contextmanager
def _together() -> Iterator[None]:
    """Say what it means where the other workers do not answer."""
    try:
        yield
    except RuntimeError as error:  # of the connection to a process that has ended
        raise TrainingError(
            f"another process of this training has ended ({str(error).splitlines()[0]}); "
            "the same command goes on from the last checkpoint"
        ) from error
