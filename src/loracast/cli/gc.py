"""`loracast gc`: what no name has is deleted."""

from __future__ import annotations

from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.output import print_json, size


def gc(
    keep: Annotated[
        int | None, typer.Option(min=1, help="Of each name, keep the newest N versions; all by default.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    library: options.Library = None,
    as_json: options.Json = False,
) -> None:
    """Delete what no name has, and what killed processes left behind."""
    from loracast.library.upkeep import collect_garbage
    from loracast.paths import library_dir

    gone = collect_garbage(library or library_dir(), keep=keep, dry_run=dry_run)
    if as_json:
        print_json({"versions": list(gone.versions), "n_bytes": gone.n_bytes, "dry_run": dry_run})
    else:
        verb = "would delete" if dry_run else "deleted"
        print(f"{verb} {len(gone.versions):,} versions, {size(gone.n_bytes)}")
