"""`loracast combine` and `import`: one adapter from several, or from another tool's LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.output import print_json, say, size


def combine(
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME[:WEIGHT]...", help="Adapters, each with what it counts: 0.5 for half, -1 to subtract."
        ),
    ],
    name: Annotated[str, typer.Option(help="Name of the new adapter.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Largest rank: what has more is compressed, and the error is said.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Let an adapter of that name give way.")] = False,
    library: options.Library = None,
    as_json: options.Json = False,
) -> None:
    """Add adapters up into one.

    All chunks of a document are merged: questions are no longer routed to a few of them. To answer with several adapters as they are, give `ask`
    several `-a`.
    """
    from loracast.library.combine import Part, combined
    from loracast.library.library import check_free, open_adapter
    from loracast.library.save import save_lora
    from loracast.paths import library_dir

    folder = library or library_dir()
    if not replace:
        check_free(folder, name)
    chosen = [Part(open_adapter(folder, one), weight) for one, weight in map(_part, parts)]
    made_of = combined(chosen, rank)
    title = " + ".join(map(str, chosen))
    made_for = chosen[0].adapter.manifest.made_for
    made = save_lora(
        made_of.lora,
        folder,
        name,
        kind="combined",
        title=title,
        made_for=made_for,
        static=made_of.static,
        replace=replace,
    )
    if as_json:
        print_json(
            {
                "name": name,
                "parts": [str(part) for part in chosen],
                "ranks": made.manifest.ranks,
                "error": made_of.error,
            }
        )
        return
    lost = f"compressed: {100 * made_of.error:.2g} % of the delta is lost" if made_of.error else "nothing lost"
    print(f"combined {title} into {name}\nrank {made.manifest.rank_text}, {lost}, {size(made.n_bytes)}")


def import_(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder in PEFT's format.")],
    name: Annotated[str | None, typer.Option(help="Name of the adapter; the folder's by default.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Let an adapter of that name give way.")] = False,
    base: options.Base = None,
    library: options.Library = None,
    as_json: options.Json = False,
) -> None:
    """Take a LoRA that another tool trained into the library.

    It is checked against the base: every module must be there, with the same shape.
    """
    from loracast.base.load import load_base
    from loracast.library.library import check_free
    from loracast.library.manifest import check_name, name_from
    from loracast.library.save import save_lora
    from loracast.lora.inject import linear_shapes
    from loracast.lora.peft_format import read_peft
    from loracast.paths import library_dir

    folder = library or library_dir()
    name = check_name(name or name_from(source.resolve().name))
    if not replace:
        check_free(folder, name)
    loaded = load_base(base, device="cpu", say=say)
    lora = read_peft(source, linear_shapes(loaded.model))
    title = f"LoRA from {source.resolve().name}"
    made = save_lora(
        lora,
        folder,
        name,
        kind="imported",
        title=title,
        made_for=loaded.fingerprint,
        source=source.resolve().name,
        replace=replace,
    )
    if as_json:
        print_json(
            {"name": name, "source": made.manifest.source, "ranks": made.manifest.ranks, "n_bytes": made.n_bytes}
        )
        return
    print(f"imported {name} ({made.manifest.source})\nrank {made.manifest.rank_text}, {size(made.n_bytes)}")


def _part(text: str) -> tuple[str, float]:
    """NAME or NAME:WEIGHT."""
    name, colon, weight = text.partition(":")
    try:
        return name, float(weight) if colon else 1.0
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no adapter with a weight; write NAME:0.5") from None
