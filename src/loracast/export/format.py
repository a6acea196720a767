"""The table of export formats, and what a format is given to write: it loads neither torch nor a format's module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracast.errors import AdapterError

if TYPE_CHECKING:
    from loracast.lora.algebra import Uniform

MERGED = "merged"
"""The one format that needs the base's weights: it writes them, with the LoRA added (merged.py)."""
FORMATS = {
    "peft": "PEFT, SGLang",
    "vllm": "vLLM",
    "gguf": "llama.cpp",
    "mlx": "mlx-lm",
    "ollama": "Ollama",
    MERGED: "into the base's weights",
}
"""Name of each format, which is also that of its module in this package -> what it is for."""


@dataclass(frozen=True)
class Request:
    """One LoRA to write, with all that a format may need to know of it."""

    made: Uniform
    out: Path
    """The folder."""
    name: str
    """Name of the adapter, with the chunk's number where chunks are written one by one."""
    version: str
    """`name@hash`, which never means other weights."""
    base: str
    """Name, folder or hub id of the base, as the user gave it."""
    about: Mapping[str, str]
    """Provenance: names, hashes, the base's fingerprints."""
    config: Any = None
    """The base's config, transformers' own; None for a format that does not need it."""
    base_gguf: Path | None = None
    """The base as a GGUF file, where it is an embedded base that has been fetched."""


@dataclass(frozen=True)
class Format:
    """How one format is written."""

    write: Callable[[Request], Path]
    """Writes the LoRA and returns the folder or file that the runtime loads."""
    ranks: Sequence[int] | None = None
    """The ranks that the runtime takes; None for any."""
    needs_config: bool = False
    """Whether `Request.config` must be there."""
    holds_base: bool = False
    """Whether the base is written beside each LoRA."""


def load_format(name: str) -> Format:
    """The format of a name, from its module. Raises AdapterError for an unknown name."""
    if name not in FORMATS:
        raise AdapterError(f"unknown format {name!r}; one of {', '.join(FORMATS)}")
    return import_module(f"loracast.export.{name}").FORMAT
