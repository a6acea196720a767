"""Whether a LoRA fits a base: the linear modules that it touches, and their shapes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from loracast.errors import AdapterError


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear module of a base."""
    return {n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def check_fits(model: nn.Module, shapes: Iterable[tuple[str, tuple[int, int]]]) -> dict[str, nn.Linear]:
    """The base's modules that a LoRA of these shapes, (module, (out, in)), touches.

    Raises AdapterError, with all faults, where they do not exist or have other shapes.
    """
    modules: dict[str, nn.Linear] = {}
    problems = []
    found: dict[str, nn.Module | None] = {"": model}

    def submodule(name: str) -> nn.Module | None:
        """As `model.get_submodule`, but parents that several modules have in common are looked up once."""
        if name not in found:
            parent, _, last = name.rpartition(".")
            module = submodule(parent)
            found[name] = None if module is None else module._modules.get(last)  # getattr takes five times as long
        return found[name]

    for name, (d_out, d_in) in shapes:
        module = submodule(name)
        if not isinstance(module, nn.Linear):
            problems.append(f"{name}: the base has no such linear module")
        elif (module.out_features, module.in_features) != (d_out, d_in):
            problems.append(
                f"{name}: the LoRA is for [{d_out}, {d_in}], the base has [{module.out_features}, {module.in_features}]"
            )
        else:
            modules[name] = module
    if problems:
        raise AdapterError("this LoRA does not fit this base: " + "; ".join(problems))
    return modules
