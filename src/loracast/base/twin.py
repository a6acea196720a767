"""A second tree of modules around a base's weights, so that hooks on one of them do not run in the other."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def twin(module: Module) -> Module:
    """The same module with the same parameters and buffers, and without any hook.

    A module that accelerate spreads over devices is given back itself: its `forward` belongs to its own tree.
    """
    return module if any(hasattr(part, "_hf_hook") for part in module.modules()) else _twin(module)


def _twin(module: Module) -> Module:
    made = copy.copy(module)
    for name, value in vars(made).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, OrderedDict):
            setattr(made, name, OrderedDict())
    made._modules = {name: None if part is None else _twin(part) for name, part in module._modules.items()}
    return made
