"""vLLM's /v1/load_lora_adapter and /v1/unload_lora_adapter: LoRAs that other tools trained come and go at run time.

Loading reads a folder in PEFT's format and keeps the LoRA in the library under the name that is given. Which folders
there are is said when the server starts: the path of a request only chooses among them.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from loracast.errors import NoSuchAdapterError
from loracast.library.library import find, remove_adapter
from loracast.library.manifest import check_name
from loracast.library.save import import_lora
from loracast.serving.errors import ApiError
from loracast.serving.guard import needs
from loracast.serving.schema import LoadAdapterRequest, UnloadAdapterRequest
from loracast.serving.service import Shared

router = APIRouter(dependencies=[needs("admin")], default_response_class=PlainTextResponse)


@router.post("/v1/load_lora_adapter")
def load_lora_adapter(body: LoadAdapterRequest, service: Shared) -> str:
    """Keep the LoRA of a folder under a name. Errors: 400 where the name is in use, 404 where there is no folder."""
    name = check_name(body.lora_name)
    folder = _folders(service.settings.lora_folder).get(body.lora_path)
    if folder is None:
        raise ApiError(404, "there is no such folder among the server's LoRAs (--lora-folder)", param="lora_path")
    with suppress(NoSuchAdapterError):
        is_imported = find(service.model.library, name).kind == "imported"
        if not (is_imported and body.load_inplace):
            raise ApiError(400, f"The lora adapter '{name}' has already been loaded.", param="lora_name")
    import_lora(service.model.base, folder, service.model.library, name, replace=body.load_inplace)
    return f"Success: LoRA adapter '{name}' added successfully."


@router.post("/v1/unload_lora_adapter")
def unload_lora_adapter(body: UnloadAdapterRequest, service: Shared) -> str:
    """Forget a LoRA that was loaded. What was learned here is deleted with DELETE /v1/adapters/{name} instead."""
    name, library = body.lora_name, service.model.library
    try:
        entry = find(library, check_name(name))
    except NoSuchAdapterError as error:
        raise ApiError(404, f"The lora adapter '{name}' cannot be found.", param="lora_name") from error
    if entry.kind != "imported":
        raise ApiError(400, f"'{name}' was not loaded but made here: DELETE /v1/adapters/{name} deletes it")
    remove_adapter(library, name)
    return f"Success: LoRA adapter '{name}' removed successfully."


def _folders(root: Path | None) -> dict[str, Path]:
    """The folders that may be read, by their names and by their whole paths."""
    if root is None or not root.is_dir():
        return {}
    found = [path for path in root.resolve().iterdir() if path.is_dir() and not path.is_symlink()]
    return {path.name: path for path in found} | {str(path): path for path in found}
