"""`loracast edit`, `combine`, `import`, `rm`, `gc`, `compact` and `verify`: change or check what the library holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.terminal import loss, plural, print_result, say, size
from loracast.library.manifest import name_from
from loracast.lora.quantize import DEFAULT_STORAGE, Storage


def edit(
    name: options.Adapter,
    *,
    rename: Annotated[str | None, typer.Option(metavar="NEW", help="Another name.")] = None,
    tag: Annotated[list[str] | None, "Add a tag. Repeatable."] = None,
    untag: Annotated[list[str] | None, "Take a tag away. Repeatable."] = None,
    note: Annotated[str | None, 'A note for people; "" for none.'] = None,
    owner: Annotated[str | None, 'Whose it is; "" for nobody.'] = None,
    library: options.Library,
) -> None:
    """Change an adapter's name, tags, note or owner. Its content never changes."""
    if rename is None and not tag and not untag and note is None and owner is None:
        raise typer.BadParameter("say what to change: --rename, --tag, --untag, --note or --owner")
    library.describe(name, owner=owner, note=note, tags=tag or (), untag=untag or ())
    if rename is not None:
        library.rename(name, rename)
        print(f"{name} is now called {rename}")


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
    from loracast.library.combine import Part, save_combined

    if not replace:
        library.check_free(name)
    chosen = [Part(library.open(one), weight) for one, weight in map(_part, parts)]
    made, error = save_combined(chosen, library, name, rank, replace=replace)
    m, parts = made.manifest, [str(part) for part in chosen]
    text = f"combined {m.title} into {name}\nrank {m.rank_text}, {loss(error)}, {size(made.n_bytes)}"
    print_result(as_json, {"name": name, "parts": parts, "ranks": m.ranks, "error": error}, text)


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
    from loracast.library.save import import_lora

    name = naming.checked(library, name_from(folder.resolve().name))
    made = import_lora(load_base(base, device="cpu", say=say), folder, library, name, replace=naming.replace)
    m = made.manifest
    facts = {"name": name, "source": m.source, "ranks": m.ranks, "n_bytes": made.n_bytes}
    print_result(as_json, facts, f"imported {name} ({m.source})\nrank {m.rank_text}, {size(made.n_bytes)}")


def _part(text: str) -> tuple[str, float]:
    """NAME or NAME:WEIGHT."""
    name, colon, weight = text.partition(":")
    try:
        return name, float(weight) if colon else 1.0
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no adapter with a weight; write NAME:0.5") from None


def rm(
    names: Annotated[list[str], "Adapters to delete, with all their versions; or NAME@HASH for one."],
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    library: options.Library,
) -> None:
    """Delete adapters from the library."""
    names = options.distinct(names)
    for name in names:
        library.find(name)  # an unknown name is refused before anything is deleted
    if not yes:
        if not is_terminal():
            raise typer.BadParameter("needed: standard input is not a terminal to confirm on", param_hint="--yes")
        if not typer.confirm(f"Delete {', '.join(names)}?", err=True):
            raise typer.Exit(1)
    for name in names:
        library.remove(name)
        print(f"removed {name}")


def is_terminal() -> bool:
    return sys.stdin.isatty()


def gc(
    *,
    keep: Annotated[options.OptionalCount, "Keep only the newest N versions of each name; all by default."] = None,
    dry_run: Annotated[bool, "Only say what would be deleted."] = False,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Delete adapters that have no name any more, and what killed processes left behind."""
    gone = library.collect_garbage(keep=keep, dry_run=dry_run)
    n_gone = f"{plural(len(gone.versions), 'version')}, {size(gone.n_bytes)}"
    facts = {"versions": list(gone.versions), "n_bytes": gone.n_bytes, "dry_run": dry_run}
    print_result(as_json, facts, f"{'would delete' if dry_run else 'deleted'} {n_gone}")


def compact(
    names: Annotated[list[str], "Adapters."],
    *,
    storage: Annotated[
        Storage, "int8 takes half of bf16's space and int4 less; text keeps no factors: they are cast again."
    ] = DEFAULT_STORAGE,
    library: options.Library,
) -> None:
    """Keep adapters in less space, as new versions; `loracast gc --keep 1` deletes the larger ones."""
    from loracast.cast.compact import compact as make_compact

    for name in options.distinct(names):
        before = library.open(name).n_bytes
        adapter = make_compact(library, name, storage)
        print(f"{adapter.version}: {size(adapter.n_bytes)} as {storage}, {size(before)} before")


def verify(
    names: Annotated[list[str] | None, "Only these adapters; all by default."] = None,
    *,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Compare adapters with their hashes, and check the register. Exits with 1 if anything is wrong."""
    problems = library.verify(names or ())
    whole = plural(len(names) if names else len(library.names()), "adapter") + " whole"
    print_result(as_json, {"library": str(library), "problems": problems}, "\n".join(problems) or whole)
    if problems:
        raise typer.Exit(1)
