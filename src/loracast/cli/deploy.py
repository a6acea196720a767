"""`loracast deploy`: an adapter on a running vLLM server."""

from __future__ import annotations

from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.output import print_json


def deploy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the adapter.")],
    vllm: Annotated[str, typer.Option(help="Address of the server, such as http://localhost:8000.")],
    path_there: Annotated[
        str | None, typer.Option(help="Where the server sees the folder of exports, if under another path.")
    ] = None,
    library: options.Library = None,
    as_json: options.Json = False,
) -> None:
    """Load an adapter into a running vLLM server, and check that the server's answers really change."""
    from loracast.export.deploy import deploy as load_there
    from loracast.library.library import open_adapter
    from loracast.paths import exports_dir, library_dir

    served = load_there(open_adapter(library or library_dir(), name), vllm, exports_dir(), path_there=path_there)
    if as_json:
        print_json({"name": name, "model": served, "server": vllm})
        return
    print(f'{name} is served: ask with "model": "{served}"')
