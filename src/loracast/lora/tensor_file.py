"""Checks safetensors files before anything is loaded (header, layout, numbers), and reads parts of their tensors.

The format: eight bytes with the header's length, the header (JSON: name -> dtype, shape, offsets), then the tensors,
one after the other.
"""

from __future__ import annotations

import json
import math
import stat
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracast.errors import LEARN_AGAIN, AdapterError

if TYPE_CHECKING:
    from torch import Tensor

BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of one number, by safetensors' name of its type; other types occur in no adapter."""
MAX_ABS = 1e4
"""Largest number in a factor: no training makes larger ones, and their products in bf16 are no weights."""
_TORCH_NAMES = {"BF16": "bfloat16", "I16": "int16", "I8": "int8", "U8": "uint8"}  # of all that our adapters hold


def in_one_order(saved: bytes) -> bytes:
    """A safetensors file with its metadata sorted, so that equal tensors and metadata are equal bytes.

    safetensors itself writes metadata in an order that it draws anew each time.
    """
    start = 8 + int.from_bytes(saved[:8], "little")
    header = json.loads(saved[8:start])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + saved[start:]


@dataclass(frozen=True)
class TensorInfo:
    """Type and shape of one tensor in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    start: int = field(default=0, compare=False)
    """Where its numbers begin in the file, in bytes."""

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

    @property
    def n_bytes(self) -> int:
        return BYTES[self.dtype] * math.prod(self.shape)


class OpenTensors:
    """Reads tensors of an open safetensors file, which may be removed meanwhile; nothing of it is mapped.

    Mapped pages count as memory of the process for as long as the file is open, all that was ever read.
    """

    def __init__(self, path: Path):
        """Raises OSError where the file cannot be opened. Its header must have been checked (`read_header`)."""
        self.header, _ = read_header(path)
        self._file = path.open("rb")
        self._lock = threading.Lock()  # a file has one place at which it is read

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        info = self.header[name]
        return self._read(info, 0, math.prod(info.shape)).view(info.shape)

    def items(self, name: str, wanted: Sequence[int]) -> Tensor:
        """Items of a tensor [n, ...] by their numbers: [wanted, ...]."""
        import torch

        info = self.header[name]
        size = math.prod(info.shape[1:])
        read = [self._read(info, i * size, (i + 1) * size) for i in wanted]
        return torch.cat(read).view(len(wanted), *info.shape[1:])

    def _read(self, info: TensorInfo, first: int, end: int) -> Tensor:
        """The numbers from `first` up to `end` of a tensor."""
        import torch

        dtype = getattr(torch, _TORCH_NAMES[info.dtype])
        if end == first:
            return torch.empty(0, dtype=dtype)
        with self._lock:
            self._file.seek(info.start + first * BYTES[info.dtype])
            read = bytearray(self._file.read((end - first) * BYTES[info.dtype]))
        if len(read) < (end - first) * BYTES[info.dtype]:
            raise AdapterError(f"{self._file.name} was cut short after it was opened; {LEARN_AGAIN}")
        return torch.frombuffer(read, dtype=dtype)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors that a file's header lists (none where it is no safetensors file), and the faults of the file.

    No tensor is read.
    """
    from safetensors import SafetensorError, safe_open

    faults: list[str] = []
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return {}, [f"{path.name} is not a file"]
        with safe_open(path, "np"), path.open("rb") as file:  # safetensors checks the header and the layout
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=lambda pairs: _without_doubles(pairs, faults))
    except OSError as error:
        return {}, [f"{path.name} cannot be read: {error.strerror or error}"]
    except SafetensorError as error:
        return {}, [f"{path.name} is no whole safetensors file: {error}"]
    header.pop("__metadata__", None)
    found = {
        name: TensorInfo(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }
    faults += [f"{name[:200]}: unknown type {i.dtype!r}" for name, i in found.items() if i.dtype not in BYTES]
    return found, faults


def _without_doubles(pairs: list[tuple[str, Any]], faults: list[str]) -> dict[str, Any]:
    """An object of JSON; a name that it has twice, of which safetensors takes the last, is a fault."""
    faults += [f"{name[:200]} is in the header {n} times" for name, n in Counter(n for n, _ in pairs).items() if n > 1]
    return dict(pairs)


def number_faults(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The tensors that hold numbers which are not finite, or larger than MAX_ABS."""
    faults = []
    for name, value in tensors:
        if value.numel():
            low, high = (m.item() for m in value.aminmax())  # without a copy: every question comes by here
            if not (math.isfinite(low) and math.isfinite(high)):
                faults.append(f"{name} holds numbers that are not finite")
            elif max(-low, high) > MAX_ABS:
                faults.append(f"{name} holds numbers up to {max(-low, high):.2g}, which no factor has")
    return faults
