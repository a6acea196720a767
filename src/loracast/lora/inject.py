"""Has a base compute with the factors of LoRAs for a while: `algebra.inject` takes the LoRAs themselves.

A forward hook on each target module adds `(x A') B'` to the output: two small matmuls for each LoRA and row, no copy
of a factor per token, the weights of the base untouched. Works under autograd and under generation with a KV cache.

Every question about a document has the static LoRA of its hypernetwork in the same modules. What all rows of a batch
have of one is added once to copies of the weights, which take the weights' places meanwhile: of the products that a
LoRA adds to a pass, those are most. The copies of the last static LoRA are kept with the model, 69 MB for the shipped
hypernetwork in bf16. They are rounded to the type of the weights.

Both are seen by every thread that runs the model, so each model has a lock: it is held while LoRAs are applied, and
whoever reads the model without one takes it too.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, Protocol, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from loracast.errors import AdapterError
from loracast.lora.factors import Factors


class FairLock:
    """As `threading.RLock`, but first come, first served.

    A thread that runs a model step after step takes its lock again at once, and with an RLock others could wait for
    ever.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()  # a ticket for each thread that waits
        self._owner: int | None = None
        self._depth = 0

    def acquire(self) -> bool:
        """Wait for the lock and take it."""
        with self._changed:
            if not self.is_owned():
                self._wait()
            self._depth += 1
        return True

    def give_way(self) -> None:
        """Let the threads that wait now have the lock first, and take it again; quick where there are none.

        Raises RuntimeError for any but the owner.
        """
        with self._changed:
            self._check_owned()
            if not self._waiting:
                return
            self._owner, depth, self._depth = None, self._depth, 0
            try:
                self._wait()
            except BaseException:
                self._wait()  # the caller gives it back
                raise
            finally:
                self._depth = depth

    def release(self) -> None:
        """Give the lock back, to the thread that has waited longest. Raises RuntimeError for any but the owner."""
        with self._changed:
            self._check_owned()
            self._depth -= 1
            if not self._depth:
                self._owner = None
                self._changed.notify_all()

    def is_owned(self) -> bool:
        """Whether the calling thread holds the lock."""
        return self._owner == threading.get_ident()

    def _check_owned(self) -> None:
        if not self.is_owned():
            raise RuntimeError("this thread does not hold the lock")

    def _wait(self) -> None:
        """Become the owner behind all who wait already."""
        ticket = object()
        self._waiting.append(ticket)
        self._changed.notify_all()  # of a lock that is free now
        try:
            self._changed.wait_for(lambda: self._owner is None and self._waiting[0] is ticket)
            self._owner = threading.get_ident()
        finally:
            self._waiting.remove(ticket)
            self._changed.notify_all()  # after an interruption it may be another thread's turn

    def __enter__(self) -> FairLock:
        self.acquire()
        return self

    def __exit__(self, *failure: object) -> None:
        self.release()


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear module of a base."""
    return {n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def check_fits(model: nn.Module, shapes: Iterable[tuple[str, tuple[int, int]]]) -> dict[str, nn.Linear]:
    """The base's modules that a LoRA of these shapes, (module, (out, in)), touches.

    Raises AdapterError, with all faults, where they do not exist or have other shapes.
    """
    modules: dict[str, nn.Linear] = {}
    problems, found = [], dict(model.named_modules(remove_duplicate=False))
    for name, (d_out, d_in) in shapes:
        module = found.get(name)
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


class WithStatic(Protocol):
    """What is needed of a LoRA to add its static part to copies of weights."""

    @property
    def factors(self) -> Mapping[str, Factors]: ...
    @property
    def static(self) -> frozenset[str]: ...


class _Copy(NamedTuple):
    """A copy of a module's weight with the factors of a static LoRA added."""

    module: nn.Linear
    factors: Factors
    own: nn.Parameter
    """The module's own weight."""
    state: tuple[object, ...]
    """Of the module's own weight when the copy was made (`_state`)."""
    weight: nn.Parameter

    def is_of(self, module: nn.Linear, factors: Factors) -> bool:
        """Whether it is of these factors, and of the weight that the module has now."""
        own = module._parameters["weight"]
        return (
            self.module is module
            and self.own is own
            and self.state == _state(own)
            and equal_factors(self.factors, factors)
        )


_KEPT: WeakKeyDictionary[nn.Module, dict[str, _Copy]] = WeakKeyDictionary()
"""By model, the copies of the last static LoRA, by module."""
_MERGED_NOW: WeakSet[nn.Module] = WeakSet()


@contextmanager
def static_added(model: nn.Module, loras: Sequence[WithStatic | None]) -> Iterator[Collection[str]]:
    """Have a model compute with the static LoRA that all rows of a batch have, while the context lasts.

    Yields the names of the modules that have it: none with quantized weights, and none at all where the rows have no
    static LoRA in common, where gradients are wanted, and where the model computes with copies right now.

    Raises AdapterError where the static LoRA does not fit the model. Whoever calls this holds the model's lock.
    """
    first = loras[0] if loras else None
    if (
        first is None
        or not first.static
        or torch.is_grad_enabled()
        or model in _MERGED_NOW
        or not all(other is first or (other is not None and _has_static_of(other, first)) for other in loras)
    ):
        yield ()
        return
    static = {name: first.factors[name] for name in first.static}
    modules = check_fits(model, ((name, (b.shape[0], a.shape[1])) for name, (a, b) in static.items()))
    modules = {name: module for name, module in modules.items() if module.weight.is_floating_point()}
    copies = _KEPT.get(model, {})
    if copies.keys() != modules.keys() or not all(copies[n].is_of(m, static[n]) for n, m in modules.items()):
        copies = _KEPT[model] = {name: _copy(module, static[name]) for name, module in modules.items()}
    _MERGED_NOW.add(model)
    try:
        for copy in copies.values():
            copy.module._parameters["weight"] = copy.weight
        yield copies.keys()
    finally:
        for copy in copies.values():
            copy.module._parameters["weight"] = copy.own
        _MERGED_NOW.discard(model)


def _has_static_of(other: WithStatic, first: WithStatic) -> bool:
    return first.static <= other.static and all(equal_factors(first.factors[n], other.factors[n]) for n in first.static)


def _copy(module: nn.Linear, factors: Factors) -> _Copy:
    own = cast(nn.Parameter, module.weight)
    a, b = (side.to(own.device, torch.float32) for side in factors)
    return _Copy(
        module, factors, own, _state(own), nn.Parameter((own.float() + b @ a).to(own.dtype), requires_grad=False)
    )


def _state(weight: Tensor) -> tuple[object, ...]:
    """What changes when a weight is moved, converted or written to."""
    return weight.data_ptr(), weight._version, weight.dtype, weight.device


def equal_factors(one: Factors, other: Factors) -> bool:
    """Whether two pairs of factors hold the same numbers."""
    return one is other or all(
        (x.data_ptr() == y.data_ptr() and x.stride() == y.stride() and x.shape == y.shape and x.dtype == y.dtype)
        or (x.dtype == y.dtype and torch.equal(x, y))
        for x, y in zip(one, other, strict=True)
    )


_LOCKS: WeakKeyDictionary[nn.Module, FairLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def model_lock(model: nn.Module) -> FairLock:
    """The lock of a model, the same one for everybody who has the model; a thread may take it several times."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, FairLock())


@contextmanager
def deltas_added(
    model: nn.Module,
    factors: Mapping[str, Factors],
    dense: Mapping[str, Tensor],
    n_rows: int | None,
    gates: Mapping[str, Tensor],
) -> Iterator[None]:
    """Have the linear modules of a model add deltas to their outputs while the context lasts.

    Args:
        factors: by module, A [n or 1, r, in] and B [n or 1, out, r] of the rows of a batch.
        dense: by module, the deltas [n or 1, out, in] of the rows.
        n_rows: the number of the batch's rows; None for any.
        gates: as in `algebra.inject`.

    Raises AdapterError where the model lacks a module or a shape differs. Whoever calls this holds the model's lock.
    """
    shapes = [(name, (b.shape[1], a.shape[2])) for name, (a, b) in factors.items()]
    shapes += [(name, (delta.shape[1], delta.shape[2])) for name, delta in dense.items()]
    with ExitStack() as hooks:
        for name, module in check_fits(model, shapes).items():
            # On the weight's device and in the type that the base computes in: once, not for every token.
            w = module.weight
            place = w.device, w.dtype if w.is_floating_point() else getattr(model, "dtype", None)
            pair = [side.to(*place).mT for side in factors.get(name, ())]
            delta = dense[name].to(*place).mT if name in dense else None
            hooks.enter_context(module.register_forward_hook(_hook(n_rows, pair, delta, gates.get(name))))
        yield


def _hook(
    n_rows: int | None, pair: Sequence[Tensor], dense: Tensor | None, gate: Tensor | None
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook that adds the deltas of the rows of a batch, of any number if `n_rows` is None.

    Args:
        pair: A' [rows or 1, in, r] and B' [rows or 1, r, out], or nothing.
        dense: dense deltas' [rows or 1, in, out].
        gate: [rows, tokens, r], multiplies what A gives.
    """

    def add_delta(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]  # [rows, tokens, in]
        if n_rows not in (None, x.shape[0]):
            raise AdapterError(
                f"{n_rows} LoRAs were given for a batch of {x.shape[0]} rows; give one for each row, or one for all"
            )
        if pair:
            a, b = pair
            y = _product(x, a)  # [rows, tokens, r]
            output = output + _product(y if gate is None else y * gate.to(y.dtype), b)
        return output if dense is None else output + _product(x, dense)

    return add_delta


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """The rows [rows, tokens, in] times a matrix each, or one for all [rows or 1, in, out]."""
    matrix = matrix.to(x.dtype)
    return torch.bmm(x, matrix) if len(matrix) == len(x) else x @ matrix[0]
