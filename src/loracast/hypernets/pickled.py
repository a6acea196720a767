"""Reads the pickled checkpoints of published hypernetworks without running any of their code.

PyTorch's weights-only unpickler rebuilds tensors and plain containers, and refuses every other name. The configs in
such a checkpoint are objects of packages that need not be installed here: each becomes a `Record`, which has their
attributes and none of their code. Tensors stay mapped to the file until they are used.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from loracast.errors import HypernetworkError

_MODULES = frozenset(
    {
        "ctx_to_lora.configs", "ctx_to_lora.modeling.aggregator", "ctx_to_lora.modeling.ctx_encoder",
        "ctx_to_lora.modeling.hypernet", "peft.tuners.lora.config", "peft.utils.peft_types",
    }
)  # fmt: skip
"""Modules whose classes become records: the configs in a published checkpoint."""


class Record:
    """Stands in for a pickled config object or enum: its attributes, or the values it was made from."""

    def __init__(self, *values: Any) -> None:
        self.values = values


def read_pickled(path: Path) -> dict[str, Any]:
    """The dictionary in a pickled checkpoint: mapped tensors, numbers, strings, and records for config objects.

    Raises:
        HypernetworkError: it is no such checkpoint, is damaged, or names anything but tensors and known configs.
    """
    if not zipfile.is_zipfile(path):
        raise HypernetworkError(f"{path} is not a checkpoint that torch.save of PyTorch 1.6 or newer has written")
    try:
        named = get_unsafe_globals_in_checkpoint(path)
        if refused := sorted(name for name in named if name.rpartition(".")[0] not in _MODULES):
            raise HypernetworkError(
                f"{path} is refused: it names {', '.join(refused)}, which a checkpoint of a hypernetwork does not need "
                "and which could run code"
            )
        records: list[Any] = [(type(name.rpartition(".")[2], (Record,), {}), name) for name in named]
        with safe_globals(records):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except HypernetworkError:
        raise
    except Exception as error:  # damage makes the unpickler raise nearly anything
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise HypernetworkError(f"{path} is damaged, or no checkpoint of a hypernetwork ({reason})") from error
    if not isinstance(content, dict):
        raise HypernetworkError(f"{path} holds a {type(content).__name__}, not the dictionary of a checkpoint")
    for name, value in content.items():
        if isinstance(value, torch.Tensor) and value.nbytes > value.untyped_storage().nbytes():
            raise HypernetworkError(f"{path} is refused: {name} claims more numbers than the file holds for it")
    return content
