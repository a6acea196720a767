"""loracast casts a document or a task description into a LoRA for a frozen language model, in one forward pass.

The names below load on first use, so that `import loracast` itself costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loracast.errors import LoracastError

if TYPE_CHECKING:
    from loracast.answering.model import Model as Model
    from loracast.answering.model import load as load
    from loracast.base.generate import Sampling as Sampling
    from loracast.base.load import load_base as load_base
    from loracast.documents import Document as Document
    from loracast.documents import read_document as read_document
    from loracast.documents.labels import Labels as Labels
    from loracast.hypernets.protocol import Hypernetwork as Hypernetwork
    from loracast.library.adapter import Adapter as Adapter
    from loracast.library.library import Library as Library
    from loracast.lora.algebra import LoRA as LoRA

__version__ = "0.2.0"
_HOMES = {
    "Adapter": "loracast.library.adapter",
    "Document": "loracast.documents",
    "Hypernetwork": "loracast.hypernets.protocol",
    "Library": "loracast.library.library",
    "Labels": "loracast.documents.labels",
    "LoRA": "loracast.lora.algebra",
    "Model": "loracast.answering.model",
    "Sampling": "loracast.base.generate",
    "load": "loracast.answering.model",
    "load_base": "loracast.base.load",
    "read_document": "loracast.documents",
}
__all__ = ["LoracastError", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loracast' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
