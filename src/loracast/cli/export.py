"""`loracast export` and `export-base`: adapters and the base for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.output import loss, print_result, say, size
from loracast.export.format import FORMATS


def export(
    name: options.Adapter,
    *,
    to: Annotated[
        str, typer.Option("--to", help=", ".join(f"{name} ({label})" for name, label in FORMATS.items()) + ".")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; NAME-FORMAT by default.")] = None,
    rank: options.Rank = None,
    each_chunk: Annotated[
        bool,
        typer.Option("--each-chunk", help="Write a document's chunks one by one, with chunks.json and their index."),
    ] = False,
    questions: Annotated[
        Path | None,
        typer.Option(
            "--questions", exists=True, dir_okay=False, help="File with one question per line: export a LoRA for them."
        ),
    ] = None,
    base: options.Base = None,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Write an adapter for another runtime."""
    from loracast.base.load import load_base
    from loracast.errors import ConfigError
    from loracast.export.adapter import export_adapter
    from loracast.library.library import open_adapter

    asked = (
        []
        if questions is None
        else [line for line in questions.read_text(encoding="utf-8").splitlines() if line.strip()]
    )
    if questions is not None and not asked:
        raise ConfigError(f"{questions} holds no question; give one per line")
    folder = out or Path(f"{name}-{to}")
    made = export_adapter(
        open_adapter(library, name), to, folder,
        max_rank=rank, each_chunk=each_chunk, base=base, say=say,
        questions=asked,
        load=lambda wanted: load_base(wanted, dtype="bfloat16", say=say),
    )  # fmt: skip
    n_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    text = f"exported {f'{len(made)} chunks' if each_chunk else name} to {folder} ({size(n_bytes)})"
    if made[0].rank is not None:
        text += f"\nrank {max(one.rank or 0 for one in made)}, {loss(max(one.error for one in made))}"
    exported = [{"path": str(one.path), "rank": one.rank, "error": one.error} for one in made]
    print_result(
        as_json, {"name": name, "to": to, "folder": str(folder), "n_bytes": n_bytes, "exported": exported}, text
    )


def export_base(
    *,
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    base: options.Base = None,
    as_json: options.Json = False,
) -> None:
    """Write the base itself as a Hugging Face folder, for whoever loads exported adapters elsewhere.

    Where it came from a GGUF file, that file is written too.
    """
    from loracast.export.base import write_base

    files = write_base(base, out, say)
    n_bytes = sum(path.stat().st_size for path in files)
    print_result(
        as_json,
        {"folder": str(out), "files": [path.name for path in files], "n_bytes": n_bytes},
        f"the base is in {out}: {len(files)} files, {size(n_bytes)}",
    )
