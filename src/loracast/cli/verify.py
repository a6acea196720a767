"""`loracast verify`: check that everything in the library is whole."""

from __future__ import annotations

from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.output import plural, print_result


def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these adapters; all by default.")
    ] = None,
    *,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Compare adapters with their hashes, and check the register. Exits with 1 if anything is wrong."""
    from loracast.library.library import adapter_names
    from loracast.library.upkeep import verify as verify_library

    problems = verify_library(library, names or ())
    whole = plural(len(names) if names else len(adapter_names(library)), "adapter") + " whole"
    print_result(as_json, {"library": str(library), "problems": problems}, "\n".join(problems) or whole)
    if problems:
        raise typer.Exit(1)
