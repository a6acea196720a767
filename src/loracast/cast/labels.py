"""Casts labels with probabilities into an adapter: a sentence each by the document hypernetwork, its rows weighed.

No hypernetwork sees what the labels are of. A sentence is a chunk of its own, whose rows are the same wherever its name
comes up: they are cast once (`CachedRecast`).
"""

from __future__ import annotations

import time

import torch

from loracast.cast.document import CachedRecast
from loracast.documents.labels import Labels
from loracast.errors import ConfigError
from loracast.library.adapter import SENTENCE, STATIC, Adapter, join_chunks
from loracast.library.library import Library
from loracast.library.save import save_single, tensors_of
from loracast.lora.algebra import LoRA
from loracast.lora.factors import Rows
from loracast.lora.merge import row_lengths, row_weights
from loracast.lora.quantize import DEFAULT_STORAGE, Storage


def cast_labels(recast: CachedRecast, labels: Labels) -> LoRA:
    """Cast labels into a LoRA and keep nothing."""
    hypernetwork = recast.caster.hypernetwork
    static = tensors_of(hypernetwork.static_rows(), STATIC)
    return join_chunks(hypernetwork.config.target, tensors_of(_weighed(recast, labels)), static, hypernetwork.merging)


def learn_labels(
    recast: CachedRecast,
    labels: Labels,
    library: Library,
    name: str,
    *,
    storage: Storage = DEFAULT_STORAGE,
    replace: bool = False,
) -> Adapter:
    """Cast labels into an adapter and keep it under `name`.

    Raises:
        AdapterError: the name is taken or not allowed.
        ConfigError: the storage `text`, which is for documents.
    """
    if storage == "text":
        raise ConfigError("only documents can be kept as text: choose int4, int8 or bf16")
    started, hypernetwork = time.perf_counter(), recast.caster.hypernetwork
    rows = _weighed(recast, labels)
    return save_single(
        rows, hypernetwork.config.target, library, name, title=labels.title, text=labels.text,
        static=hypernetwork.static_rows(), kind=labels.kind, source=labels.file_name, source_sha256=labels.sha256,
        made_for=recast.base.fingerprint, hypernetwork=recast.caster.id, memory_kinds=hypernetwork.memory_kinds,
        storage=storage, learn_s=round(time.perf_counter() - started, 4), replace=replace,
    )  # fmt: skip


def _weighed(recast: CachedRecast, labels: Labels) -> Rows:
    """The rows of all sentences as those of one chunk, each multiplied with its sentence's weight."""
    sentences, weights = [*labels.weighted], [(weight,) for weight in labels.weighted.values()]
    cast, found = recast(sentences, [[(0, len(one))] for one in sentences]), {}
    for kind in recast.caster.hypernetwork.config.target.kinds:
        a, b = cast[f"{kind}.a"], cast[f"{kind}.b"]  # [sentences, modules or 1, r, d]
        owners = cast.get(f"{kind}{SENTENCE}", torch.zeros(len(a), a.shape[2], dtype=torch.int16))
        picked = row_weights([*owners], [row_lengths(side) for side in b], weights)
        keys = [side[:, rows] for side, (rows, _) in zip(a, picked, strict=True)]
        values = [side[:, rows] * by.to(side)[:, None] for side, (rows, by) in zip(b, picked, strict=True)]
        found[kind] = torch.cat(keys, 1)[None], torch.cat(values, 1)[None]
    return found
