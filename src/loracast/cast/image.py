"""Casts an image into an adapter. The base is not needed."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from loracast.documents.images import ImageFile
from loracast.hypernets.protocol import Caster
from loracast.library.adapter import Adapter
from loracast.library.save import save_single
from loracast.library.writer import check_finite
from loracast.lora.algebra import LoRA


def cast_image(caster: Caster, image: ImageFile) -> LoRA:
    """Cast an image into a LoRA and keep nothing."""
    return caster.loras_of(caster.encode([image.image])).row(0).to(dtype=torch.bfloat16)


def learn_image(caster: Caster, image: ImageFile, library: Path, name: str, *, replace: bool = False) -> Adapter:
    """Cast an image into an adapter and keep it under `name`.

    Raises:
        AdapterError: the name is taken or not allowed, or the factors are not finite; nothing is kept then.
    """
    started = time.perf_counter()
    hypernetwork = caster.hypernetwork
    rows = caster.cast(caster.encode([image.image])).rows
    check_finite(rows, "this image")
    return save_single(
        rows,
        hypernetwork.config.target,
        library,
        name,
        static=hypernetwork.static_rows(),
        kind="image",
        title=image.title,
        source=image.file_name,
        source_sha256=image.sha256,
        made_for=caster.made_for,
        hypernetwork=caster.id,
        seconds=time.perf_counter() - started,
        replace=replace,
    )
