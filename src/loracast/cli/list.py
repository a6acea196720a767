"""`loracast list`: the adapters of the library."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.output import print_json, printable, say, size, stdout


def list_(
    like: Annotated[
        str, typer.Argument(metavar="[TEXT]", help="Only those with this in their name, title or note.")
    ] = "",
    tag: Annotated[str, typer.Option(help="Only those with this tag.")] = "",
    owner: Annotated[str, typer.Option(help="Only those of this owner.")] = "",
    kind: Annotated[str, typer.Option(help="Only those of a kind: document, task, combined or imported.")] = "",
    page: Annotated[int, typer.Option(min=1, help="Which page.")] = 1,
    per_page: Annotated[int, typer.Option(min=1, help="Adapters on a page.")] = 100,
    library: options.Library = None,
    as_json: options.Json = False,
) -> None:
    """List the adapters of the library, by name and with their newest versions."""
    from loracast.library.library import entries
    from loracast.paths import library_dir

    folder = library or library_dir()
    wanted = {"like": like, "tag": tag, "owner": owner, "kind": kind}
    found, n_found = entries(folder, **wanted, limit=per_page, offset=(page - 1) * per_page)
    if as_json:
        listed = [{**asdict(entry), "tags": list(entry.tags)} for entry in found]
        print_json({"library": str(folder), "n_adapters": n_found, "page": page, "adapters": listed})
        return
    if not n_found:
        is_filtered = any(wanted.values())
        say(
            f"no such adapter in {folder}"
            if is_filtered
            else f"no adapters in {folder}; `loracast learn FILE` makes one"
        )
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", overflow="fold")
    table.add_column("version", no_wrap=True)
    table.add_column("from", no_wrap=True)
    table.add_column("title", max_width=48)
    for column in ("tokens", "chunks", "size"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("learned", no_wrap=True)
    if any(entry.tags for entry in found):
        table.add_column("tags")
    for entry in found:
        is_document = entry.kind == "document"
        row: list[str | Text] = [
            entry.name,
            entry.version[:8] + (f" of {entry.n_versions}" if entry.n_versions > 1 else ""),
            entry.kind,
            Text(printable(entry.title)),
            f"{entry.n_tokens:,}" if is_document else "",
            f"{entry.n_chunks:,}" if is_document else "",
            size(entry.n_bytes),
            entry.created[:16].replace("T", " "),
        ]
        table.add_row(*row, *([", ".join(entry.tags)] if len(table.columns) > len(row) else []))
    stdout().print(table)
    n_pages = -(-n_found // per_page)
    if n_pages > 1:
        say(f"page {page} of {n_pages}, {n_found:,} adapters; --page shows another")
