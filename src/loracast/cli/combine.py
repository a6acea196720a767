"""`loracast combine` and `import`: one adapter from several, or from another tool's LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.output import loss, print_result, say, size
from loracast.library.library import open_adapter
from loracast.library.manifest import name_from


def combine(
    parts: Annotated[
        list[str],
        typer.Argument(metavar="NAME[:WEIGHT]...", help="Adapters with their weights: 0.5 for half, -1 to subtract."),
    ],
    *,
    name: Annotated[str, "Name of the new adapter."],
    rank: options.Rank = None,
    replace: options.Replace = False,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Add adapters up into one.

    All chunks of a document are merged: questions are no longer routed to a few of them. To answer with several
    adapters as they are, give `ask` several `-a`.
    """
    from loracast.library.combine import Part, combined
    from loracast.library.save import save_lora

    options.Naming(name=name, replace=replace).checked(library, name)
    chosen = [Part(open_adapter(library, one), weight) for one, weight in map(_part, parts)]
    made_of = combined(chosen, rank)
    title = " + ".join(map(str, chosen))
    made_for = chosen[0].adapter.manifest.made_for
    made = save_lora(
        made_of.lora, library, name, kind="combined",
        title=title, made_for=made_for, static=made_of.static, replace=replace,
    )  # fmt: skip
    print_result(
        as_json,
        {"name": name, "parts": [str(part) for part in chosen], "ranks": made.manifest.ranks, "error": made_of.error},
        f"combined {title} into {name}\nrank {made.manifest.rank_text}, {loss(made_of.error)}, {size(made.n_bytes)}",
    )


def import_(
    folder: Annotated[Path, "Folder in PEFT's format."],
    *,
    naming: options.Naming,
    base: options.Base = None,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Take a LoRA that another tool trained into the library.

    It is checked against the base: every module must be there, with the same shape.
    """
    from loracast.base.load import load_base
    from loracast.library.save import save_lora
    from loracast.lora.inject import linear_shapes
    from loracast.lora.peft_format import read_peft

    source = folder.resolve().name
    name = naming.checked(library, name_from(source))
    loaded = load_base(base, device="cpu", say=say)
    made = save_lora(
        read_peft(folder, linear_shapes(loaded.model)), library, name, kind="imported",
        title=f"LoRA from {source}", made_for=loaded.fingerprint, source=source, replace=naming.replace,
    )  # fmt: skip
    print_result(
        as_json,
        {"name": name, "source": made.manifest.source, "ranks": made.manifest.ranks, "n_bytes": made.n_bytes},
        f"imported {name} ({made.manifest.source})\nrank {made.manifest.rank_text}, {size(made.n_bytes)}",
    )


def _part(text: str) -> tuple[str, float]:
    """NAME or NAME:WEIGHT."""
    name, colon, weight = text.partition(":")
    try:
        return name, float(weight) if colon else 1.0
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no adapter with a weight; write NAME:0.5") from None
