"""`loracast deploy`: an adapter on a running vLLM server."""

from __future__ import annotations

from typing import Annotated

from loracast.cli import options
from loracast.cli.output import print_result


def deploy(
    name: options.Adapter,
    *,
    vllm: Annotated[str, "Address of the server, such as http://localhost:8000."],
    path_there: Annotated[str | None, "Where the server sees the folder of exports, if under another path."] = None,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Load an adapter into a running vLLM server, and check that the server's answers really change."""
    from loracast.export.deploy import deploy as load_there
    from loracast.library.library import open_adapter
    from loracast.paths import exports_dir

    served = load_there(open_adapter(library, name), vllm, exports_dir(), path_there=path_there)
    print_result(
        as_json,
        {"name": name, "model": served, "server": vllm},
        f'{name} is served: ask with "model": "{served}"',
    )
