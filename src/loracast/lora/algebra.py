"""The LoRA, applied to a model, saved and read, and its algebra: sum, scale, compression, norms, batches.

Where many chunks have been merged, the factors of a module can outweigh the dense delta that they stand for (past rank
in*out/(in+out)); such a module keeps the exact dense sum instead.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.errors import AdapterError
from loracast.files import folder_of
from loracast.lora.factors import Factors, Rows, is_past_break_even
from loracast.lora.inject import deltas_added, model_lock, static_added
from loracast.lora.peft_format import PEFT_FILES, peft_model, read_peft, write_peft_folder
from loracast.lora.target import Target


@dataclass(frozen=True)
class LoRA:
    """One LoRA: for each module its factors or, where that is smaller, its dense delta [out, in]."""

    factors: Mapping[str, Factors] = field(default_factory=dict)
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    static: frozenset[str] = field(default=frozenset(), compare=False)
    """Modules whose factors are those of a hypernetwork's static LoRA alone, so that many LoRAs have the same ones."""

    def __post_init__(self) -> None:
        problems = [f"{name}: both factors and a dense delta" for name in self.factors.keys() & self.dense.keys()]
        for name, (a, b) in self.factors.items():
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                problems.append(f"{name}: A {tuple(a.shape)} and B {tuple(b.shape)} do not share a rank")
        problems += [
            f"{name}: dense delta of {delta.ndim} dimensions" for name, delta in self.dense.items() if delta.ndim != 2
        ]
        if problems:
            raise AdapterError("not a LoRA: " + "; ".join(sorted(problems)))

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.factors, *self.dense)

    @property
    def rank(self) -> int:
        """The largest rank of any module (0 for an empty LoRA; a dense delta counts as its smaller side)."""
        ranks = [f.rank for f in self.factors.values()] + [min(delta.shape) for delta in self.dense.values()]
        return max(ranks, default=0)

    @property
    def n_bytes(self) -> int:
        tensors = [t for f in self.factors.values() for t in f] + list(self.dense.values())
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """`module -> (out, in)`."""
        shapes = {name: (f.b.shape[0], f.a.shape[1]) for name, f in self.factors.items()}
        return shapes | {name: (delta.shape[0], delta.shape[1]) for name, delta in self.dense.items()}

    def delta(self, name: str) -> Tensor:
        """The dense update [out, in] of one module. Raises KeyError for a module that this LoRA does not touch."""
        return self.dense[name] if name in self.dense else self.factors[name].delta()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LoRA:
        wanted = None if device is None else torch.device(device)
        sides = (*chain(*self.factors.values()), *self.dense.values())
        if all(wanted in (None, one.device) and dtype in (None, one.dtype) for one in sides):
            return self  # the same tensors, and what was made of them before can be recognised
        return LoRA(*_each_tensor(self, lambda tensor: tensor.to(device=device, dtype=dtype)), self.static)

    def without(self, names: Collection[str]) -> LoRA:
        """The LoRA of the other modules."""
        if not names:
            return self
        factors = {name: pair for name, pair in self.factors.items() if name not in names}
        return LoRA(factors, {name: delta for name, delta in self.dense.items() if name not in names})

    def scale(self, strength: float) -> LoRA:
        """The same LoRA with its delta multiplied by `strength` (0 switches it off, a negative one subtracts it)."""
        return LoRA(
            {name: Factors(a, b * strength) for name, (a, b) in self.factors.items()},
            {name: delta * strength for name, delta in self.dense.items()},
        )

    def norms(self) -> dict[str, float]:
        """Frobenius norm of each module's delta; of factors by the Gram identity |BA|^2 = <B'B, AA'>, never dense."""
        norms = {name: delta.double().norm().item() for name, delta in self.dense.items()}
        for name, (a, b) in self.factors.items():
            a, b = a.double(), b.double()
            norms[name] = ((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt().item()
        return norms

    def applied(self, model: torch.nn.Module) -> AbstractContextManager[torch.nn.Module]:
        """Apply the LoRA to a transformers model while a `with` block lasts.

            with lora.applied(hf_model):
                hf_model.generate(**prompt)

        The weights stay untouched, and other threads that use the model through loracast wait until the block ends.
        Raises AdapterError where the LoRA does not fit the model.
        """
        return inject(model, self)

    def to_peft(self, model: Any, name: str = "default") -> Any:
        """A `peft.PeftModel` around a transformers model with this LoRA as the adapter `name`.

        PEFT puts its layers into the model that is given; `unload()` of what is returned takes them out. A PeftModel
        gets the LoRA as one more adapter. Raises AdapterError where the LoRA does not fit, PackageError without PEFT.
        """
        return peft_model(uniform(self).lora.factors, self.shapes, model, name)

    def save_pretrained(self, folder: str | Path, base: str | None = None) -> Path:
        """Write the LoRA in PEFT's format, which `PeftModel.from_pretrained` loads; returns the folder.

        Nothing is lost: modules get one rank, smaller ones padded with zeros, and dense deltas become factors of full
        rank. `base` names the base for whoever finds the folder.
        """
        return write_peft_folder(uniform(self).lora.factors, Path(folder), base)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> LoRA:
        """The LoRA in a folder or hub repository in PEFT's format, its scale folded into B.

        Raises AdapterError where there is none, or more than a LoRA on linear modules; with every fault that there is.
        """
        return cls(read_peft(folder_of(source, PEFT_FILES, "adapter in PEFT's format", AdapterError, revision)))


def _each_tensor(
    lora: LoRA | LoRABatch, change: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """The factors and dense deltas of a LoRA or batch, each tensor changed."""
    factors = {name: Factors(change(a), change(b)) for name, (a, b) in lora.factors.items()}
    return factors, {name: change(delta) for name, delta in lora.dense.items()}


def _check_same_shapes(loras: Sequence[LoRA]) -> None:
    """Raise AdapterError where LoRAs have other shapes for one module: they were made for different bases."""
    if len(loras) == 1:
        return
    seen: dict[str, set[tuple[int, int]]] = {}
    for lora in loras:
        for name, shape in lora.shapes.items():
            seen.setdefault(name, set()).add(shape)
    problems = [f"{name} is {' and '.join(map(str, sorted(s)))}" for name, s in sorted(seen.items()) if len(s) > 1]
    if problems:
        raise AdapterError("these LoRAs are for different bases, (out, in) of " + "; ".join(problems))


def concat(loras: Sequence[LoRA], dense_past_break_even: bool = True) -> LoRA:
    """The exact sum of LoRAs: factors are concatenated along the rank, and become dense past the break-even rank.

    Doc-to-LoRA merges the chunks of a document like this (arXiv 2602.15902, section on long documents), without a 1/K
    scale.

    Raises:
        AdapterError: the LoRAs have other shapes for the same module.
    """
    _check_same_shapes(loras)
    parts: dict[str, list[Factors]] = {}
    dense: dict[str, Tensor] = {}
    for lora in loras:
        for name, factors in lora.factors.items():
            parts.setdefault(name, []).append(factors)
        for name, delta in lora.dense.items():
            dense[name] = dense[name] + delta if name in dense else delta
    joined: dict[str, Factors] = {}
    for name, pieces in parts.items():
        a, b = pieces[0]  # one alone needs no copy
        if len(pieces) > 1:
            a = torch.cat([piece.a for piece in pieces], dim=0)  # [sum r, in]
            b = torch.cat([piece.b for piece in pieces], dim=1)  # [out, sum r]
        d_in, d_out = a.shape[1], b.shape[0]
        if name in dense:
            dense[name] = dense[name] + b @ a
        elif dense_past_break_even and is_past_break_even(a.shape[0], d_in, d_out):
            dense[name] = b @ a
        else:
            joined[name] = Factors(a, b)
    # Of several LoRAs one has the static part, as a rule; a module that others add to is static no more.
    static = frozenset(name for lora in loras for name in lora.static if len(parts.get(name, ())) == 1)
    return LoRA(joined, dense, static & joined.keys())


def compress(lora: LoRA, rank: int) -> tuple[LoRA, float]:
    """The best LoRA of at most `rank` (Eckart-Young, module by module) and its relative error.

    A and B each get the square roots of the kept singular values.

    Returns:
        the compressed LoRA, and |delta - compressed|_F / |delta|_F over all modules together (0 for a zero LoRA).
    """
    if rank < 1:
        raise AdapterError(f"a rank budget must be at least 1, not {rank}")
    kept: dict[str, Factors] = {}
    lost_energy, energy = 0.0, 0.0
    for name in lora.names:
        dtype = lora.dense[name].dtype if name in lora.dense else lora.factors[name].a.dtype
        u, s, vh = svd(lora, name)
        squares = s.double().square()
        energy += squares.sum().item()
        lost_energy += squares[rank:].sum().item()
        root = s[:rank].sqrt()
        kept[name] = Factors((root[:, None] * vh[:rank]).to(dtype), (u[:, :rank] * root).to(dtype))
    return LoRA(kept), (lost_energy / energy) ** 0.5 if energy > 0 else 0.0


def svd(lora: LoRA, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of one module's delta, U [out, k], the singular values [k], falling, and V^T [k, in], in fp32."""
    if name in lora.dense:
        return torch.linalg.svd(lora.dense[name].float(), full_matrices=False)
    return lora.factors[name].svd()


@dataclass(frozen=True)
class Uniform:
    """A LoRA whose modules all have the same rank, as factors only, the scale folded into B."""

    lora: LoRA
    """In the adapter's own dtype where nothing was computed, in fp32 where it was compressed."""
    rank: int
    error: float
    """|delta - kept|_F / |delta|_F over all modules: 0 where nothing had to be given up."""


def uniform(lora: LoRA, max_rank: int | None = None, allowed: Sequence[int] | None = None) -> Uniform:
    """Give all modules of a LoRA one rank: smaller ones are padded with zeros, larger ones compressed by SVD.

    Args:
        max_rank: the largest rank to keep; None keeps all that a module's shape has room for.
        allowed: the rank becomes the smallest of these that is large enough; the largest is a limit like `max_rank`.

    Raises:
        AdapterError: the LoRA is empty.
    """
    if not lora.names:
        raise AdapterError("this LoRA touches no module; there is nothing to export")
    limit = max(min(shape) for shape in lora.shapes.values())  # many chunks together have more rows than they need
    limit = min([limit, *([] if max_rank is None else [max_rank]), *([] if allowed is None else [max(allowed)])])
    if max_rank is not None and allowed is not None:
        limit = max((size for size in allowed if size <= limit), default=limit)
    error = 0.0
    if lora.dense or lora.rank > limit:
        lora, error = compress(lora.to(dtype=torch.float32), limit)
    rank = lora.rank if allowed is None else min(size for size in allowed if size >= lora.rank)
    padded = {}
    for name, (a, b) in lora.factors.items():
        missing = rank - a.shape[0]
        padded[name] = Factors(functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing)))
    return Uniform(LoRA(padded), rank, error)


@dataclass(frozen=True)
class LoRABatch:
    """The LoRAs of a batch's rows, stacked for a forward pass.

    `n` is the number of rows, or 1 when all rows share the same LoRA. A module that all rows share may have one row
    where others have n. Factors are zero-padded to the largest rank.
    """

    n: int
    factors: Mapping[str, Factors]  # A [n or 1, r, in], B [n or 1, out, r]
    dense: Mapping[str, Tensor]  # [n or 1, out, in]

    def to(self, place: torch.device | torch.dtype | str) -> LoRABatch:
        """The batch on a device, or in a dtype."""
        return LoRABatch(self.n, *_each_tensor(self, lambda tensor: tensor.to(place)))

    def take(self, rows: Sequence[int]) -> LoRABatch:
        """Some rows, in this order, as a batch of their own."""
        order = list(rows)
        return LoRABatch(
            len(order), *_each_tensor(self, lambda tensor: tensor if tensor.shape[0] == 1 else tensor[order])
        )

    def only(self, names: Collection[str]) -> LoRABatch:
        """The batch on the modules of these names alone."""
        factors = {name: pair for name, pair in self.factors.items() if name in names}
        return LoRABatch(self.n, factors, {name: delta for name, delta in self.dense.items() if name in names})

    def squared_norms(self) -> Tensor:
        """The squared Frobenius norm of each row's delta, over all modules [n], differentiable."""
        return self.inner(self)

    def inner(self, other: LoRABatch) -> Tensor:
        """The Frobenius inner product of each row's delta with the other batch's, over all modules [n], differentiable.

        By the Gram identity <B A, D C> = <B' D, A C'>, never dense; ranks may differ. Modules that one of them lacks
        count nothing. For LoRAs that are trained, which have no dense deltas.
        """
        products = [
            ((b.mT @ other.factors[name].b).float() * (a @ other.factors[name].a.mT).float()).sum((1, 2))
            for name, (a, b) in self.factors.items()
            if name in other.factors
        ]
        return torch.stack(products).sum(0) if products else torch.zeros(self.n)

    def row(self, i: int) -> LoRA:
        """One row as a LoRA, views and not copies."""
        return LoRA(*_each_tensor(self, lambda tensor: tensor[i]))


def stack(loras: Sequence[LoRA | None]) -> LoRABatch:
    """Stack the LoRAs of a batch's rows, None for a row without one, into a LoRABatch.

    Raises:
        AdapterError: the LoRAs have other shapes for the same module.
    """
    rows = [LoRA() if lora is None else lora for lora in loras]
    _check_same_shapes(rows)
    if len({id(lora) for lora in loras}) == 1:  # the same for all rows: nothing to pad, nothing to copy
        return LoRABatch(1, *_each_tensor(rows[0], lambda tensor: tensor[None]))
    factors: dict[str, Factors] = {}
    for name in dict.fromkeys(name for lora in rows for name in lora.factors):
        per_row = [lora.factors.get(name) for lora in rows]
        present = [f for f in per_row if f is not None]
        rank = max(f.rank for f in present)
        a = present[0].a.new_zeros(len(rows), rank, present[0].a.shape[1])
        b = present[0].b.new_zeros(len(rows), present[0].b.shape[0], rank)
        for i, f in enumerate(per_row):
            if f is not None:
                a[i, : f.rank] = f.a
                b[i, :, : f.rank] = f.b
        factors[name] = Factors(a, b)
    dense: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for lora in rows for name in lora.dense):
        zeros = torch.zeros_like(next(lora.dense[name] for lora in rows if name in lora.dense))
        dense[name] = torch.stack([lora.dense.get(name, zeros) for lora in rows])
    return LoRABatch(len(rows), factors, dense)


def rows_of(lora: LoRA, target: Target) -> Rows:
    """The rows of a LoRA (n = 1) by kind; lower ranks of a kind, and missing modules, are padded with zeros."""
    like = next((pair.a for pair in lora.factors.values()), torch.zeros(0))
    rows: Rows = {}
    for kind in target.kinds:
        modules = target.of_kind(kind)
        pairs = {i: lora.factors[module.name] for i, module in enumerate(modules) if module.name in lora.factors}
        shape = (1, len(modules), max((pair.rank for pair in pairs.values()), default=0))
        a, b = rows[kind] = like.new_zeros(*shape, modules[0].d_in), like.new_zeros(*shape, modules[0].d_out)
        for i, pair in pairs.items():
            a[0, i, : pair.rank], b[0, i, : pair.rank] = pair.a, pair.b.T
    return rows


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
    with model_lock(model), ExitStack() as applied:
        if isinstance(loras, LoRABatch):
            batch = loras
        else:
            rows = loras if isinstance(loras, Sequence) else [loras]
            merged = () if gates else applied.enter_context(static_added(model, rows))
            others = {id(lora): None if lora is None else lora.without(merged) for lora in rows}
            batch = stack([others[id(lora)] for lora in rows])
        # A list holds one for each row, also where all of them are the same and were stacked once.
        n_rows = len(loras) if isinstance(loras, Sequence) else batch.n if batch.n > 1 else None
        applied.enter_context(deltas_added(model, batch.factors, batch.dense, n_rows, gates))
        yield model
