"""`loracast export` and `export-base`: adapters and the base for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from loracast.cli import options
from loracast.cli.output import print_json, say, size


def export(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the adapter.")],
    to: Annotated[
        str, typer.Option("--to", help="peft, vllm, gguf (llama.cpp), mlx, ollama, or merged (into the base).")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to write to; NAME-FORMAT by default.")] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Largest rank: what has more is compressed, and the error is said.")
    ] = None,
    each_chunk: Annotated[
        bool, typer.Option("--each-chunk", help="A document's chunks one by one, with chunks.json and their index.")
    ] = False,
    base: options.Base = None,
    library: options.Library = None,
    as_json: options.Json = False,
) -> None:
    """Write an adapter for another runtime."""
    from loracast.base.load import load_base
    from loracast.export.adapter import Format, export_adapter
    from loracast.library.library import open_adapter
    from loracast.paths import library_dir

    folder = out or Path(f"{name}-{to}")
    adapter = open_adapter(library or library_dir(), name)
    made = export_adapter(
        adapter,
        cast(Format, to),
        folder,
        max_rank=rank,
        each_chunk=each_chunk,
        base=base,
        load=lambda wanted: load_base(wanted, say=say),
        say=say,
    )
    n_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if as_json:
        print_json(
            {
                "name": name,
                "to": to,
                "folder": str(folder),
                "n_bytes": n_bytes,
                "exported": [{"path": str(one.path), "rank": one.rank, "error": one.error} for one in made],
            }
        )
        return
    what = f"{len(made)} chunks" if each_chunk else name
    print(f"exported {what} to {folder} ({size(n_bytes)})")
    if made[0].rank is not None:
        error = max(one.error for one in made)
        lost = f"compressed: {100 * error:.2g} % of the delta is lost" if error else "nothing lost"
        print(f"rank {max(one.rank or 0 for one in made)}, {lost}")


def export_base(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write to.")],
    base: options.Base = None,
    as_json: options.Json = False,
) -> None:
    """Write the base itself as a Hugging Face folder, and as the GGUF file that it came from where it came from one.

    For whoever loads exported adapters elsewhere.
    """
    from loracast.export.base import write_base

    files = write_base(base, out, say)
    n_bytes = sum(path.stat().st_size for path in files)
    if as_json:
        print_json({"folder": str(out), "files": [path.name for path in files], "n_bytes": n_bytes})
        return
    print(f"the base is in {out}: {len(files)} files, {size(n_bytes)}")
