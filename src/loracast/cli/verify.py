"""`loracast verify`: is everything in the library whole?"""

from __future__ import annotations

from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.output import print_json, printable


def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these adapters; all by default.")
    ] = None,
    library: options.Library = None,
    as_json: options.Json = False,
) -> None:
    """Compare adapters with their hashes, and look the register over. Exits with 1 if anything is wrong."""
    from loracast.library.library import adapter_names
    from loracast.library.upkeep import verify as verify_library
    from loracast.paths import library_dir

    folder = library or library_dir()
    problems = verify_library(folder, names or ())
    if as_json:
        print_json({"library": str(folder), "problems": problems})
    elif problems:
        for problem in problems:
            print(printable(problem))
    else:
        n = len(names) if names else len(adapter_names(folder))
        print(f"{n:,} adapter{'s' * (n != 1)} whole")
    if problems:
        raise typer.Exit(1)
