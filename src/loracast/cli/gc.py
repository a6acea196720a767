"""`loracast gc`: delete what no name leads to."""

from __future__ import annotations

from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.output import plural, print_result, size


def gc(
    *,
    keep: Annotated[
        int | None, typer.Option("--keep", min=1, help="Keep only the newest N versions of each name; all by default.")
    ] = None,
    dry_run: Annotated[bool, "Only say what would be deleted."] = False,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Delete adapters that have no name any more, and what killed processes left behind."""
    from loracast.library.upkeep import collect_garbage

    gone = collect_garbage(library, keep=keep, dry_run=dry_run)
    print_result(
        as_json,
        {"versions": list(gone.versions), "n_bytes": gone.n_bytes, "dry_run": dry_run},
        f"{'would delete' if dry_run else 'deleted'} {plural(len(gone.versions), 'version')}, {size(gone.n_bytes)}",
    )
