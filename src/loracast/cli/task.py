"""`loracast task`: the description of a task becomes an adapter in the library."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.output import print_json, printable, say, size, warn


def task(
    description: Annotated[str, typer.Argument(metavar="DESCRIPTION", help="What the model shall do, in a sentence.")],
    name: Annotated[str | None, typer.Option(help="Name of the adapter; made from the description by default.")] = None,
    hypernetwork: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of a text-to-LoRA hypernetwork (`loracast train text`); the shipped one by default."
        ),
    ] = None,
    strength: Annotated[float, typer.Option(help="Factor on the adapter: 0 for none, 1 as trained.")] = 1.0,
    replace: Annotated[bool, typer.Option("--replace", help="Let an adapter of that name give way.")] = False,
    encoder: Annotated[
        str | None, typer.Option(help="Text encoder, if it does not lie where it lay in training.")
    ] = None,
    base: options.Base = None,
    library: options.Library = None,
    as_json: options.Json = False,
) -> None:
    """Cast the description of a task into an adapter.

    It takes a text encoder and the hypernetwork; the base is loaded only where it is what reads the description, as the shipped hypernetwork has it.
    """
    from loracast.base.load import DEFAULT_BASE, load_base
    from loracast.cast.load import load_caster, shipped_hypernetwork
    from loracast.cast.task import TaskCaster
    from loracast.library.library import check_free
    from loracast.library.manifest import check_name, name_from
    from loracast.library.save import source_of
    from loracast.paths import library_dir

    started = time.perf_counter()
    name = check_name(name or name_from(description))
    if not replace:
        check_free(
            library or library_dir(), name, unless_from=source_of(description.strip())
        )  # before a model is loaded for nothing
    where = hypernetwork or shipped_hypernetwork(base or DEFAULT_BASE, "task")
    bound = load_caster(where, "task", lambda: load_base(base, say=say), encoder=encoder, say=say)
    caster = TaskCaster(bound, library)
    adapter = caster.task(description, name, strength=strength, replace=replace)
    manifest = adapter.manifest
    for warning in manifest.warnings:
        warn(warning)
    if as_json:
        print_json(
            {
                "name": adapter.name,
                "description": manifest.title,
                "distance": caster.distances([description])[0],
                "ood_threshold": caster.ood_threshold,
                "strength": strength,
                "ranks": manifest.ranks,
                "n_bytes": adapter.n_bytes,
                "cast_s": manifest.learn_s,
                "total_s": round(time.perf_counter() - started, 3),
                "warnings": list(manifest.warnings),
                "folder": str(adapter.folder),
            }
        )
        return
    print(f"cast {adapter.name} ({printable(manifest.title)})")
    print(f"rank {manifest.rank_text}, {size(adapter.n_bytes)}, {1000 * manifest.learn_s:.0f} ms")
    print(f'use it: loracast ask "..." -a {adapter.name}')
