"""Has a base compute with the factors of LoRAs for a while: `algebra.inject` takes the LoRAs themselves.

Hooks add the products of the factors, others for every row of the batch. A static LoRA that all rows share is added to
copies of the weights, which take the weights' places meanwhile. Each model has a lock, under which both happen.

A base's weights with a static LoRA added: copies, which take the weights' places while a question is answered.

Every question about a document has the static LoRA of its hypernetwork in the same modules. Added once, it costs
nothing afterwards: of the products that a LoRA adds to a pass, those are most. The copies of the last static LoRA are
kept with the model, 69 MB for the shipped hypernetwork in bf16. They are rounded to the type of the weights.

Applies LoRAs to a base during its forward passes, another LoRA for every row of the batch, or none.

What all rows have of a static LoRA is added to copies of the weights. A forward hook on each other
target module adds `(x A') B'` to the module's output: two small matmuls for each LoRA and row,
no copy of a factor per token, the base's weights untouched. Works under autograd and under generation with a KV
cache.

The hooks are seen by every thread that runs the model, so each model has a lock: it is held while LoRAs are applied,
and whoever reads the model without one takes it too.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast
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
        self._mutex = threading.Lock()
        self._waiting: deque[tuple[int, threading.Lock]] = deque()
        self._owner: int | None = None
        self._depth = 0

    def acquire(self) -> bool:
        """Wait for the lock and take it."""
        me = threading.get_ident()
        with self._mutex:
            if self._owner in (None, me):
                self._owner = me
                self._depth += 1
                return True
            turn = self._queue(me)
        self._wait(turn)
        return True

    def give_way(self) -> None:
        """Let the threads that wait now have the lock first, and take it again; quick where there are none.

        Raises RuntimeError for any but the owner.
        """
        with self._mutex:
            self._check_owned()
            if not self._waiting:
                return
            depth, turn = self._depth, self._queue(threading.get_ident())
            self._hand_over()
        try:
            self._wait(turn)
        except BaseException:
            self.acquire()  # the caller gives it back
            raise
        finally:
            self._depth = depth

    def release(self) -> None:
        """Give the lock back, to the thread that has waited longest. Raises RuntimeError for any but the owner."""
        with self._mutex:
            self._check_owned()
            self._depth -= 1
            if not self._depth:
                self._hand_over()

    def is_owned(self) -> bool:
        """Whether the calling thread holds the lock."""
        return self._owner == threading.get_ident()

    def _check_owned(self) -> None:
        if not self.is_owned():
            raise RuntimeError("this thread does not hold the lock")

    def _hand_over(self) -> None:
        """Give the lock to the thread that has waited longest, if any."""
        self._owner = None
        if self._waiting:
            self._owner, turn = self._waiting.popleft()
            self._depth = 1
            turn.release()

    def _queue(self, me: int) -> tuple[int, threading.Lock]:
        turn = (me, threading.Lock())
        turn[1].acquire()
        self._waiting.append(turn)
        return turn

    def _wait(self, turn: tuple[int, threading.Lock]) -> None:
        try:
            turn[1].acquire()  # until `_hand_over`
        except BaseException:  # the wait was interrupted
            with self._mutex:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                    raise
            self.release()
            raise

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


class WithStatic(Protocol):
    """What is needed of a LoRA to add its static part to copies of weights."""

    @property
    def factors(self) -> Mapping[str, Factors]: ...
    @property
    def static(self) -> frozenset[str]: ...


@dataclass(frozen=True, eq=False)
class Copies:
    """Copies of some weights of a model, with a static LoRA added."""

    factors: Mapping[str, Factors]
    """Of the static LoRA, in the modules that have copies: not in those with quantized weights."""
    modules: Mapping[str, nn.Linear]
    """All of the static LoRA."""
    own: Mapping[str, nn.Parameter]
    """The model's own weights that there are copies of."""
    states: Mapping[str, tuple[object, ...]]
    """Of these, when the copies were made (`_state`)."""
    weights: Mapping[str, nn.Parameter]

    def are_of(self, lora: WithStatic, modules: Mapping[str, nn.Linear]) -> bool:
        """Whether they are of this LoRA's static part, and of the modules and weights that the model has now."""
        return self.modules == modules and all(
            modules[name]._parameters["weight"] is weight
            and _state(weight) == self.states[name]
            and _equal(self.factors[name], lora.factors[name])
            for name, weight in self.own.items()
        )


_KEPT: WeakKeyDictionary[nn.Module, Copies] = WeakKeyDictionary()
"""By model, those of the last static LoRA."""
_MERGED_NOW: WeakSet[nn.Module] = WeakSet()


def copies_for(model: nn.Module, loras: Sequence[WithStatic | None]) -> Copies | None:
    """The copies of a model's weights with the static LoRA that all rows of a batch have.

    None where they have none in common, where gradients are wanted, and where the model computes with copies right now:
    a second static LoRA cannot take their places.

    Raises AdapterError where the static LoRA does not fit the model. Whoever calls this holds the model's lock.
    """
    first = loras[0] if loras else None
    if first is None or not first.static or torch.is_grad_enabled() or model in _MERGED_NOW:
        return None
    for other in loras[1:]:
        if other is not first and not (other is not None and _has_static_of(other, first)):
            return None
    static = ((name, first.factors[name]) for name in first.static)
    modules = check_fits(model, ((name, (b.shape[0], a.shape[1])) for name, (a, b) in static))
    kept = _KEPT.get(model)
    if kept is None or not kept.are_of(first, modules):
        kept = _KEPT[model] = _copies(first, modules)
    return kept


def _has_static_of(other: WithStatic, first: WithStatic) -> bool:
    return first.static <= other.static and all(_equal(first.factors[n], other.factors[n]) for n in first.static)


def _copies(lora: WithStatic, modules: Mapping[str, nn.Linear]) -> Copies:
    weights = {name: cast(nn.Parameter, module.weight) for name, module in modules.items()}
    own = {name: weight for name, weight in weights.items() if weight.is_floating_point()}
    factors = {name: lora.factors[name] for name in own}
    copies = {name: _sum(weight, factors[name]) for name, weight in own.items()}
    return Copies(factors, modules, own, {name: _state(weight) for name, weight in own.items()}, copies)


@contextmanager
def merged(model: nn.Module, copies: Copies) -> Iterator[None]:
    """Have a model compute with copies of its weights while the context lasts.

    Whoever calls this holds the model's lock.
    """
    _MERGED_NOW.add(model)
    try:
        for name, weight in copies.weights.items():
            copies.modules[name]._parameters["weight"] = weight
        yield
    finally:
        for name, weight in copies.own.items():
            copies.modules[name]._parameters["weight"] = weight
        _MERGED_NOW.discard(model)


def _state(weight: Tensor) -> tuple[object, ...]:
    """What changes when a weight is moved, converted or written to."""
    return weight.data_ptr(), weight._version, weight.dtype, weight.device


def _sum(weight: Tensor, factors: Factors) -> nn.Parameter:
    a, b = (side.to(weight.device, torch.float32) for side in factors)
    return nn.Parameter((weight.float() + b @ a).to(weight.dtype), requires_grad=False)


def _equal(one: Factors, other: Factors) -> bool:
    return one is other or all(
        (x.data_ptr() == y.data_ptr() and x.stride() == y.stride() and x.shape == y.shape and x.dtype == y.dtype)
        or torch.equal(x, y)
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
    handles = []
    try:
        for name, module in check_fits(model, shapes).items():
            chains: list[Sequence[Tensor]] = [factors[name]] if name in factors else []
            chains += [[dense[name]]] if name in dense else []
            # On the weight's device and in the type that the base computes in: once, not for every token.
            w = module.weight
            dtype = w.dtype if w.is_floating_point() else getattr(model, "dtype", None)
            chains = [[matrix.to(w.device, dtype).mT for matrix in chain] for chain in chains]
            handles.append(module.register_forward_hook(_hook(n_rows, chains, gates.get(name))))
        yield
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
