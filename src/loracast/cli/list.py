"""`loracast list`: the adapters of the library."""

from __future__ import annotations

from loracast.cli import options
from loracast.cli.output import print_json, printable, say, size, stdout, warn


def list_(library: options.Library = None, as_json: options.Json = False) -> None:
    """List the adapters of the library."""
    from loracast.adapter import Adapter
    from loracast.errors import AdapterError
    from loracast.library import adapter_names
    from loracast.paths import library_dir

    folder = library or library_dir()
    found: list[Adapter] = []
    damaged: list[str] = []
    for name in adapter_names(folder):
        try:
            found.append(Adapter(folder / name))
        except AdapterError as error:
            damaged.append(name)
            warn(str(error))
    if as_json:
        entries = [
            {
                "name": adapter.name,
                "kind": adapter.manifest.kind,
                "title": adapter.manifest.title,
                "source": adapter.manifest.source,
                "base": adapter.manifest.made_for.base,
                "n_tokens": adapter.manifest.n_tokens,
                "n_chunks": adapter.manifest.n_chunks,
                "ranks": adapter.manifest.ranks,
                "n_bytes": adapter.n_bytes,
                "created": adapter.manifest.created,
            }
            for adapter in found
        ]
        print_json({"library": str(folder), "adapters": entries, "damaged": damaged})
        return
    if not found:
        say(f"no adapters in {folder}; `loracast learn FILE` makes one")
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", overflow="fold")
    table.add_column("from", no_wrap=True)
    table.add_column("title", max_width=48)
    for column in ("tokens", "chunks", "size"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("learned", no_wrap=True)
    for adapter in found:
        manifest = adapter.manifest
        table.add_row(
            adapter.name,
            manifest.kind,
            Text(printable(manifest.title)),
            f"{manifest.n_tokens:,}" if manifest.kind == "document" else "",
            f"{manifest.n_chunks:,}" if manifest.kind == "document" else "",
            size(adapter.n_bytes),
            manifest.created[:16].replace("T", " "),
        )
    stdout().print(table)
