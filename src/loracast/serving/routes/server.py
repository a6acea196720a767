"""What this server is: its base, what a token of a prompt costs there, export formats, and the folders it watches."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter

from loracast import __version__
from loracast.export import FORMATS, MERGED
from loracast.lora.target import target_from_config
from loracast.serving.guard import needs
from loracast.serving.schema import ChatRequest
from loracast.serving.service import Shared

if TYPE_CHECKING:
    from loracast.base.load import Base

router = APIRouter()


@router.get("/v1/server", dependencies=[needs("read")])
def describe_server(service: Shared) -> dict[str, Any]:
    """The base, and what else a client has to know to show what a request costs and what can be asked for."""
    base = service.model.base
    return {
        "object": "server",
        "version": __version__,
        "base": service.names.base,
        "window": base.window,
        "kv_bytes_per_token": kv_bytes_per_token(base),
        "export_formats": [{"name": name, "label": label} for name, label in FORMATS.items() if name != MERGED],
        "has_memory": "memory" in ChatRequest.model_fields,
        "has_styles": "style" in ChatRequest.model_fields,
        "watched": [asdict(folder) for folder in service.watcher.states],
    }


def kv_bytes_per_token(base: Base) -> int:
    """Bytes that the base's cache holds for a token: keys and values of every layer, in the dtype of the weights."""
    target = target_from_config(base.model.config, ("k_proj", "v_proj"))
    return sum(module.d_out for module in target.modules) * base.model.dtype.itemsize
