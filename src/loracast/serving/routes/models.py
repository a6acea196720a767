"""The models of a server as OpenAI and vLLM list them: the base, and each adapter as a model whose parent it is."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from fastapi import APIRouter

from loracast.library.manifest import VERSION_DIGITS
from loracast.serving.guard import needs
from loracast.serving.service import Service, Shared

router = APIRouter(prefix="/v1/models", dependencies=[needs("read")])


@router.get("")
def list_models(service: Shared) -> dict[str, Any]:
    """The base, and the newest version of each adapter that was made for it."""
    found = [_card(service, service.names.base, None, 0)]
    for entry in service.names.adapters():
        root = f"{entry.name}@{entry.version[:VERSION_DIGITS]}"
        found.append(_card(service, entry.name, root, _seconds(entry.created)))
    return {"object": "list", "data": found}


@router.get("/{model:path}")
def find_model(model: str, service: Shared) -> dict[str, Any]:
    """One model, by any name that requests may give. Errors: 404."""
    adapters = service.names.resolve(model).adapters
    created = max((_seconds(adapter.manifest.created) for adapter in adapters), default=0)
    return _card(service, model, "+".join(adapter.version for adapter in adapters) or None, created)


def _card(service: Service, id: str, root: str | None, created: int) -> dict[str, Any]:
    """A model as vLLM tells it. `root` is the version that the name stands for; the base is its own."""
    base = service.names.base
    return {
        "id": id,
        "object": "model",
        "created": created,
        "owned_by": "loracast",
        "root": root or base,
        "parent": base if root else None,
        "max_model_len": service.model.base.window,
    }


def _seconds(created: str) -> int:
    return int(datetime.fromisoformat(created).timestamp())
