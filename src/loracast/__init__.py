"""loracast casts a document or a task description into a LoRA for a frozen language model, in one forward pass.

The names below load on first use, so that `import loracast` itself costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loracast.errors import LoracastError

if TYPE_CHECKING:
    from loracast.answering.model import Model, load
    from loracast.base.generate import Sampling
    from loracast.base.load import load_base
    from loracast.documents import Document, read_document
    from loracast.hypernets.protocol import Hypernetwork
    from loracast.library.adapter import Adapter
    from loracast.library.library import Library
    from loracast.lora.algebra import LoRA

__version__ = "0.2.0"
__all__ = [
    "Adapter",
    "Document",
    "Hypernetwork",
    "Library",
    "LoRA",
    "LoracastError",
    "Model",
    "Sampling",
    "load",
    "load_base",
    "read_document",
]

_HOMES = {
    "Adapter": "loracast.library.adapter",
    "Document": "loracast.documents",
    "Hypernetwork": "loracast.hypernets.protocol",
    "Library": "loracast.library.library",
    "LoRA": "loracast.lora.algebra",
    "Model": "loracast.answering.model",
    "Sampling": "loracast.base.generate",
    "load": "loracast.answering.model",
    "load_base": "loracast.base.load",
    "read_document": "loracast.documents",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loracast' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
