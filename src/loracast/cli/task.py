"""`loracast task`: the description of a task becomes an adapter in the library."""

from __future__ import annotations

import time
from typing import Annotated

from loracast.cli import options
from loracast.cli.output import print_result, say, size, warn


def task(
    description: Annotated[str, "What the model shall do, in a sentence."],
    *,
    name: options.Name = None,
    replace: options.Replace = False,
    strength: Annotated[float, "Factor on the LoRA: 1 as it was trained, 0 for none."] = 1.0,
    hypernetwork: options.Hypernetwork = None,
    encoder: options.Encoder = None,
    base: options.Base = None,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Cast the description of a task into an adapter.

    The base is loaded only for hypernetworks that read the description with it, as the shipped one does.
    """
    from loracast.base.load import DEFAULT_BASE
    from loracast.cast.load import load_base_for, load_caster, shipped_hypernetwork
    from loracast.cast.task import TaskCaster
    from loracast.library.library import check_free
    from loracast.library.manifest import check_name, name_from
    from loracast.library.save import source_of

    started = time.perf_counter()
    name = check_name(name or name_from(description))
    if not replace:  # before a model is loaded for nothing
        check_free(library, name, unless_from=source_of(description.strip()))
    where = hypernetwork or shipped_hypernetwork(base or DEFAULT_BASE, "task")
    load = lambda: load_base_for(base, [where], say=say)  # noqa: E731
    caster = TaskCaster(load_caster(where, "task", load, encoder=encoder, say=say), library)
    adapter = caster.task(description, name, strength=strength, replace=replace)
    manifest = adapter.manifest
    for warning in manifest.warnings:
        warn(warning)
    print_result(
        as_json,
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
        },
        f"cast {adapter.name} ({manifest.title})\n"
        f"rank {manifest.rank_text}, {size(adapter.n_bytes)}, {1000 * manifest.learn_s:.0f} ms\n"
        f'use it: loracast ask "..." -a {adapter.name}',
    )
