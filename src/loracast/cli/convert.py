"""`loracast convert`: a published checkpoint becomes a hypernetwork of loracast's own, once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from loracast.cli import options
from loracast.cli.output import print_result, size

Published = Annotated[Literal["doc-to-lora", "text-to-lora"], "Which of the two systems wrote the checkpoint."]


def convert(
    system: Published,
    source: Annotated[str, "Folder with the checkpoint, or OWNER/NAME/FOLDER on the hub."],
    *,
    out: Annotated[Path, "Folder for the hypernetwork."],
    base: Annotated[str | None, "Folder or hub id of the base; by default the one that the checkpoint names."] = None,
    encoder: Annotated[str | None, "Text encoder of a text-to-lora; by default the one it names."] = None,
    storage: Annotated[
        Literal["float32", "bfloat16", "int8"], "How the weights are kept; float32 as they are."
    ] = "float32",
    as_json: options.Json = False,
) -> None:
    """Convert a published checkpoint of Doc-to-LoRA or Text-to-LoRA into a hypernetwork in safetensors.

    Nothing of the published packages is needed, and no code in the checkpoint runs. `learn` and `task` take the
    published place itself with --hypernetwork and convert it on their own.
    """
    from loracast.cast.published import DOC_FILE, BaseFacts, base_named_in, published_file
    from loracast.cast.published import convert as read
    from loracast.errors import ConfigError, HypernetworkError

    file = published_file(source)
    if file is None:
        raise HypernetworkError(f"{source} holds no published checkpoint (pytorch_model.bin or hypermod.pt)")
    if (file.name == DOC_FILE) != (system == "doc-to-lora"):
        raise ConfigError(f"{source} holds {file.name}, which is not a checkpoint of {system}: name the other system")
    hypernet = read(file, BaseFacts.read(base or base_named_in(file)), encoder)
    hypernet.save_pretrained(out, storage=storage)
    n = sum(parameter.numel() for parameter in hypernet.parameters())
    n_bytes = sum(path.stat().st_size for path in out.iterdir())
    name = hypernet.made_for.base if hypernet.made_for else ""
    print_result(
        as_json,
        {"out": str(out), "architecture": type(hypernet).__name__, "parameters": n, "base": name, "bytes": n_bytes},
        f"{n / 1e6:,.1f}M parameters for {name}, {size(n_bytes)} in {out}",
    )
