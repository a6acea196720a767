"""Applies LoRAs to a base during its forward passes, another LoRA for every row of the batch, or none.

What all rows have of a static LoRA is added to copies of the weights (merged_weights.py). A forward hook on each other
target module adds `(x A') B'` to the module's output: two small matmuls for each LoRA and row,
no copy of a factor per token, the base's weights untouched. Works under autograd and under generation with a KV
cache.

The hooks are seen by every thread that runs the model, so each model has a lock: it is held while LoRAs are applied,
and whoever reads the model without one takes it too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from loracast.errors import AdapterError
from loracast.lora.algebra import LoRA, LoRABatch, stack
from loracast.lora.lock import FairLock
from loracast.lora.merged_weights import is_merged, merged, same_static

_LOCKS: WeakKeyDictionary[nn.Module, FairLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def model_lock(model: nn.Module) -> FairLock:
    """The lock of a model, the same one for everybody who has the model; a thread may take it several times."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, FairLock())


@contextmanager
def inject(
    model: nn.Module,
    loras: LoRA | LoRABatch | Sequence[LoRA | None] | None,
    gates: Mapping[str, Tensor] = MappingProxyType({}),
) -> Iterator[nn.Module]:
    """Apply LoRAs to `model` while the context lasts; other threads that use the model wait until then.

    Args:
        model: the base, a module whose submodules the LoRAs name.
        loras: one LoRA for all rows, a list with one LoRA or None for each row of the batch, or a ready LoRABatch.
        gates: by module, weights [rows, tokens, r] of the LoRA's ranks at each token of the input.

    Raises:
        AdapterError: a LoRA names a module that the base lacks, or has other shapes; all of them in one message.
        In the forward: a batch with another number of rows than there are LoRAs.
    """
    with model_lock(model):
        first, static = LoRA(), {}
        if isinstance(loras, LoRABatch):
            batch = loras
        else:
            rows = loras if isinstance(loras, Sequence) else [loras]
            if not gates and rows and rows[0] is not None and not is_merged(model):
                first, static = rows[0], _static_in_all(model, rows)
            others = {id(lora): None if lora is None else lora.without(static) for lora in rows}
            batch = stack([others[id(lora)] for lora in rows])
        # A list holds one for each row, also where all of them are the same and were stacked once.
        n_rows = len(loras) if isinstance(loras, Sequence) else batch.n if batch.n > 1 else None
        shapes = [(name, (b.shape[1], a.shape[2])) for name, (a, b) in batch.factors.items()]
        shapes += [(name, (delta.shape[1], delta.shape[2])) for name, delta in batch.dense.items()]
        modules = check_fits(model, shapes)
        with merged(model, first, static):
            handles = []
            try:
                for name, module in modules.items():
                    chains: list[Sequence[Tensor]] = [batch.factors[name]] if name in batch.factors else []
                    chains += [[batch.dense[name]]] if name in batch.dense else []
                    # On the weight's device and in the type that the base computes in: once, not for every token.
                    w = module.weight
                    dtype = w.dtype if w.is_floating_point() else getattr(model, "dtype", None)
                    chains = [[matrix.to(w.device, dtype).mT for matrix in chain] for chain in chains]
                    handles.append(module.register_forward_hook(_hook(n_rows, chains, gates.get(name))))
                yield model
            finally:
                for handle in handles:
                    handle.remove()


def _static_in_all(model: nn.Module, rows: Sequence[LoRA | None]) -> dict[str, nn.Linear]:
    """The modules in which all rows have the same static LoRA, to be added to the weights beforehand."""
    first = rows[0]
    if first is None or not first.static:
        return {}
    static = ((name, first.factors[name]) for name in first.factors if name in first.static)
    modules = check_fits(model, ((name, (b.shape[0], a.shape[1])) for name, (a, b) in static))
    return {name: modules[name] for name in same_static(rows, modules)}


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


def _hook(
    n_rows: int | None, chains: Sequence[Sequence[Tensor]], gate: Tensor | None
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook that adds the input times each chain of matrices (A', B' or a dense delta'). `n_rows` None fits any batch.

    A gate [rows, tokens, r] multiplies what A, the first matrix of the first chain, gives.
    """

    def add_delta(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]  # [rows, tokens, in]
        if n_rows not in (None, x.shape[0]):
            raise AdapterError(
                f"{n_rows} LoRAs were given for a batch of {x.shape[0]} rows; give one for each row, or one for all"
            )
        for n_chain, (*firsts, last) in enumerate(chains):
            y = x
            for first in firsts:  # [rows, tokens, in] -> [rows, tokens, r]
                y = _product(y, first)
                if gate is not None and n_chain == 0:
                    y = y * gate.to(y.dtype)
            output = _product(y, last, output)  # [rows, tokens, out]
        return output

    return add_delta


def _product(x: Tensor, matrix: Tensor, plus: Tensor | None = None) -> Tensor:
    """The rows [rows, tokens, in] times a matrix each, or one for all, [rows or 1, in, out]; added to `plus`."""
    matrix = matrix.to(x.dtype)
    if len(matrix) != len(x):
        return x @ matrix[0] if plus is None else plus + x @ matrix[0]
    product = torch.bmm(x, matrix)
    return product if plus is None else plus + product
