"""Which tensors factors.safetensors holds, of which type and shape (docs/adapter-format.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from loracast.lora.quantize import packed, static_storage, storage_of
from loracast.lora.tensor_file import TensorInfo

if TYPE_CHECKING:
    from loracast.library.manifest import Manifest
    from loracast.lora.quantize import Storage
    from loracast.lora.target import Target

SENTENCE = ".sentence"
"""Suffix of the tensor that holds the sentence of each row of a memory."""
STATIC = ".shared."
"""Part of the names of the tensors that hold the static LoRA, which all documents of a hypernetwork have in common."""
YES = f"{STATIC}yes."
"""The same of a row that older versions stored to answer Yes or No by a rule; it is ignored."""


def static_storage_of(manifest: Manifest) -> Storage:
    """How an adapter keeps its static LoRA: as it came up to format 3, and from then on in a byte a number."""
    return static_storage(manifest.storage) if manifest.format > 3 else "bf16"


def layout(m: Manifest, static: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    """Type and shape of each tensor in factors.safetensors, in order; `static` has the shapes of the static LoRA's."""
    found = {}
    for kind in m.target.kinds:
        modules = m.target.of_kind(kind)
        in_memory = kind in m.memory_kinds
        sides = ("a", len(modules), modules[0].d_in), ("b", 1 if in_memory else len(modules), modules[0].d_out)
        for side, n, d in sides:
            for suffix, (dtype, size) in packed(d, storage_of(m.storage, in_memory)).items():
                found[f"{kind}.{side}{suffix}"] = TensorInfo(dtype, (m.n_chunks, n, m.ranks[kind], size))
        if in_memory:
            found[f"{kind}{SENTENCE}"] = TensorInfo("I16", (m.n_chunks, m.ranks[kind]))
    for name, (*rows, d) in static.items():
        for suffix, (dtype, size) in packed(d, static_storage_of(m)).items():
            found[f"{name}{suffix}"] = TensorInfo(dtype, (*rows, size))
    return found


def static_shapes(target: Target, stored: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """The shapes that the numbers of a static LoRA must have: of each kind it is there or not, of any rank."""
    shapes: dict[str, tuple[int, ...]] = {}
    for kind in target.kinds:
        modules = target.of_kind(kind)
        for part in (STATIC, YES):
            names = {f"{kind}{part}a": modules[0].d_in, f"{kind}{part}b": modules[0].d_out}
            if there := [stored[name].shape for name in names if name in stored]:
                shapes |= {name: (len(modules), *there[0][1:2], d) for name, d in names.items()}
    return shapes
