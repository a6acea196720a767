"""Fingerprints of a base, by which hypernetworks and adapters name it: one of its shapes and two of its weights.

A chat template that a user gave for a base goes along, so that whoever opens the adapter asks in the same form.

Norm weights are left alone by every quantisation and changed by every training, so their hash tells models apart; the
hash of a sample of the matrices tells quantisations of one model apart.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loracast.base.footprint import is_plain
from loracast.errors import BaseModelError
from loracast.lora.target import module_shapes, text_config


@dataclass(frozen=True)
class Fingerprint:
    """Three short hashes of a base, and its name for messages."""

    base: str
    """The name under which the base was loaded; it is not compared."""
    config: str
    """Hash of the shapes; it must match."""
    norms: str
    """Hash of the norm weights; another one means another model."""
    matrices: str
    """Hash of a sample of the matrices; another one means another quantisation of the same model."""
    chat_template: str = ""
    """The chat template that was given for it, in place of its tokenizer's own; it is not compared."""

    def to_dict(self) -> dict[str, str]:
        return {key: value for key, value in asdict(self).items() if key != "chat_template" or value}


def config_fingerprint(config: Any) -> str:
    """Hash of the shapes of a base, from its config alone."""
    config = text_config(config)
    shapes = {"layers": config.num_hidden_layers, "vocabulary": config.vocab_size, **module_shapes(config)}
    return hashlib.sha256(json.dumps([config.model_type, shapes], sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(model: Any, name: str) -> Fingerprint:
    """The fingerprint of a loaded base; it reads a few thousand numbers, however large the base is."""
    return _of_weights(model.config, sorted(model.get_decoder().state_dict().items()), name)


def fingerprint_of_files(config: Any, folder: Path, name: str) -> Fingerprint:
    """The fingerprint of a base that lies in a folder, one matrix in memory at a time.

    Raises:
        BaseModelError: the folder lacks weights of the base, or has them in another format than safetensors.
    """
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    wanted = sorted(decoder.state_dict())
    try:
        with ExitStack() as files:
            opened = [files.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("*.safetensors"))]
            stored = {key: file for file in opened for key in file.keys()}  # noqa: SIM118  (not a dict)
            weights = ((key, stored[f"{prefix}.{key}"].get_tensor(f"{prefix}.{key}")) for key in wanted)
            return _of_weights(config, weights, name)
    except (KeyError, OSError, SafetensorError) as error:
        raise BaseModelError(
            f"the folder of the base {name!r} has no safetensors with all of its weights (missing or damaged: {error})"
        ) from error


def _of_weights(config: Any, weights: Iterable[tuple[str, Any]], name: str) -> Fingerprint:
    """The fingerprint from the decoder's weights in the order of their names."""
    import torch

    norms, matrices = hashlib.sha256(), hashlib.sha256()
    for key, weight in weights:
        if not is_plain(weight):  # quantized: without it the hash of the matrices is another one
            continue
        values = weight.detach().flatten()
        if weight.ndim == 1 and "norm" in key:
            norms.update(values.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
        elif weight.ndim == 2:
            sample = values[:: max(1, values.numel() // 97)]
            matrices.update(sample.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return Fingerprint(name, config_fingerprint(config), norms.hexdigest()[:16], matrices.hexdigest()[:16])


def check(made_for: Fingerprint, base: Fingerprint, what: str) -> None:
    """Check that an adapter or hypernetwork was made for this base; warn where only the quantisation differs.

    Raises:
        BaseModelError: other shapes or another model; the message says which base to load.
    """
    if made_for.config != base.config or made_for.norms != base.norms:
        differs = "shapes" if made_for.config != base.config else "weights"
        raise BaseModelError(
            f"{what} was made for the base {made_for.base!r}, not for {base.base!r}: the {differs} differ; give --base"
        )
    if made_for.matrices != base.matrices:
        warnings.warn(
            f"{what} was made for another quantisation of this base ({made_for.base!r}); answers may be a little worse",
            stacklevel=2,
        )
