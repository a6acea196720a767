"""`loracast serve` and `stop`: the HTTP API and the page for a base with its library."""

from __future__ import annotations

import ctypes
import os
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from loracast.cli import options
from loracast.cli.commands import config_from
from loracast.cli.options import open_model, what_loads
from loracast.cli.terminal import print_json, say, stderr, warn
from loracast.errors import ConfigError, HypernetworkError, LoracastError
from loracast.files import servers_dir

if TYPE_CHECKING:
    from loracast.answering.model import Model
    from loracast.serving.client import Running
    from loracast.serving.settings import ServerSettings

_STOP_TIMEOUT_S = 5.0
"""Seconds that a server may take to end, beyond the time for pending answers."""
_M_ARENA_MAX = -8
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
"""Options of mallopt (malloc.h): how many heaps there are at most, the size from which on a block has pages of its own,
and how much a heap keeps free at its end."""


@config_from("loracast.serving.settings", without=("keys", "instance", "max_body_bytes", "body_timeout_s"))
def serve(
    config: partial[ServerSettings],
    *,
    keys: Annotated[
        Path | None, "File of the API keys that requests may use, one SCOPE:KEY per line; or set LORACAST_API_KEYS."
    ] = None,
    models: options.Models,
    task_hypernetwork: Annotated[str | None, "Folder or hub id of the hypernetwork for tasks."] = None,
    seeing: options.Seeing,
    library: options.Library,
    background: Annotated[bool, "Run in the background; return when ready. `loracast stop` ends it."] = False,
    status: Annotated[bool, "Say which servers of the library are running; exits with 1 if there are none."] = False,
    as_json: options.Json = False,
) -> None:
    """Serve the base with the library: OpenAI's API at /v1, and a page to try it on at /.

    While it runs, `ask`, `chat`, `learn`, `task`, `sync` and `watch` use it and answer at once. Ctrl-C ends it;
    SIGTERM lets running answers finish first.
    """
    if status:
        _say_status(library, as_json)
        return
    if as_json:
        raise typer.BadParameter("it needs --status", param_hint="--json")
    given = {"document": models.hypernetwork, "task": task_hypernetwork, **seeing.options}
    loaded = what_loads(models, library, given)
    if background:
        server, log = in_background([argument for argument in sys.argv[1:] if argument != "--background"])
        say(f"{_addresses(server.url)}\nlog    {log}\n`loracast stop` ends it")
        return

    from loracast.serving.client import UNIX, Running
    from loracast.serving.settings import VARIABLE, ApiKey, keys_in, keys_in_file

    share_heaps()
    allowed = (*keys_in(os.environ.get(VARIABLE, "")), *(keys_in_file(keys) if keys else ()))
    own_key = secrets.token_urlsafe(32) if allowed else ""
    settings = config(keys=(*allowed, ApiKey.read(f"admin:{own_key}")) if own_key else ())
    for folder in filter(None, (*settings.watched, settings.lora_folder)):
        if not Path(folder).is_dir():
            warn(f"there is no folder {folder} yet: nothing is read from it until it is there")
    with settings.bound() as socket:  # a port that is taken is reported before anything is loaded
        from loracast.serving.app import create_app, make_engine, run
        from loracast.serving.resolve import served_name

        others = {"task_hypernetwork": task_hypernetwork, **seeing.options}
        model = open_model(models, library, eager=False, **others)
        engine = make_engine(model.base, settings)
        if not settings.is_loopback:
            warn(f"{settings.host} can be reached from other machines; whoever has a key can ask, and learn or delete")
        where = settings.unix_socket
        url = f"{UNIX}{where.absolute()}" if where else local_url(settings.host, socket.getsockname()[1])
        about = Running(
            settings.instance, url, loaded, served_name(model.base), model.base.fingerprint.to_dict(), own_key,
            settings.drain_timeout_s,
        )  # fmt: skip

        def on_start() -> None:
            about.write()
            say(f"{_addresses(url)}\nCtrl-C ends it")

        Thread(target=_warm_up, args=(model,), daemon=True).start()
        run(create_app(model, engine, settings), settings, socket, on_start, about.remove)


def share_heaps() -> None:
    """Keep the server's memory from growing: all threads share two of glibc's heaps, and large blocks are given back.

    Nothing is done where MALLOC_ARENA_MAX is set.

    With one for each thread, a heap keeps the pages of the largest LoRA that its thread ever read: under mixed load
    (benchmarks/load.py) the resident size grew by 6 % from the second to the fifth minute, and by 1 % with two.
    Blocks from 1 MiB on have pages of their own, which took 100 MiB less after three minutes.
    """
    if platform.libc_ver()[0] == "glibc" and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_M_ARENA_MAX, 2), (_M_MMAP_THRESHOLD, 1 << 20), (_M_TRIM_THRESHOLD, 32 << 20)):
            mallopt(option, value)


def _warm_up(model: Model) -> None:
    """Load the hypernetwork in advance for the first document. It may be missing: answers do not need it."""
    with suppress(HypernetworkError):
        _ = model.documents


def local_url(host: str, port: int) -> str:
    """The URL under which this machine reaches a server that listens on `host`."""
    reached = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def _addresses(url: str) -> str:
    """Where a server's page and API are; the socket, where it listens on one."""
    return f"page   {url}/\nAPI    {url}/v1" if url.startswith("http") else f"API    {url}"


def in_background(arguments: Sequence[str]) -> tuple[Running, Path]:
    """Start `loracast` with these arguments, which serve, in a process without a terminal; it, and its log.

    Raises LoracastError where it ends before it answers.
    """
    from loracast.serving.client import of_process

    folder = servers_dir()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = folder / "background.log"
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "loracast", *arguments],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    try:
        with stderr().status("starting") as status:
            while (server := of_process(child.pid)) is None:
                has_ended = child.poll() is not None
                last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
                if has_ended:
                    raise LoracastError(last.removeprefix("error: ") or "the server ended at once")
                status.update(Text(last or "starting"))  # such as that the base is downloaded
                time.sleep(0.05)
    except BaseException:
        child.kill()
        raise
    return server, log


def _say_status(library: options.Library, as_json: bool) -> None:
    from loracast.serving.client import running

    servers = running(library)
    if as_json:
        shown = [{key: value for key, value in asdict(server).items() if key != "key"} for server in servers]
        print_json({"library": str(library), "servers": shown})
    else:
        for server in servers:
            print(f"{server.url} serves {server.fingerprint['base']} (process {server.pid})")
        if not servers:
            say(f"no server of the library {library} is running")
    if not servers:
        raise typer.Exit(1)


def stop(*, library: options.Library) -> None:
    """Stop the running servers of a library, those in the background too, once they have finished pending answers."""
    from loracast.serving.client import running

    servers = running(library)
    if not servers:
        raise ConfigError(f"no server of the library {library} is running")
    for server in servers:
        server.terminate()
    for server in servers:
        with stderr().status(f"{server.url} finishes its answers"):
            is_gone = server.wait(server.drain_timeout_s + _STOP_TIMEOUT_S)
        if not is_gone:
            raise LoracastError(f"the server at {server.url} (process {server.pid}) has not stopped")
        print(f"stopped {server.url}")
