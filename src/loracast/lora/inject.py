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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from loracast.errors import AdapterError
from loracast.lora.algebra import LoRA, LoRABatch, stack
from loracast.lora.fits import check_fits
from loracast.lora.lock import FairLock
from loracast.lora.merged_weights import copies_for, merged

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
        copies = None
        if isinstance(loras, LoRABatch):
            batch = loras
        else:
            rows = loras if isinstance(loras, Sequence) else [loras]
            copies = None if gates else copies_for(model, rows)
            merged_in = () if copies is None else copies.own.keys()
            others = {id(lora): None if lora is None else lora.without(merged_in) for lora in rows}
            batch = stack([others[id(lora)] for lora in rows])
        # A list holds one for each row, also where all of them are the same and were stacked once.
        n_rows = len(loras) if isinstance(loras, Sequence) else batch.n if batch.n > 1 else None
        shapes = [(name, (b.shape[1], a.shape[2])) for name, (a, b) in batch.factors.items()]
        shapes += [(name, (delta.shape[1], delta.shape[2])) for name, delta in batch.dense.items()]
        modules = check_fits(model, shapes)
        with nullcontext() if copies is None else merged(model, copies):
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
