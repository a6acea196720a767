"""`loracast learn`: a document becomes an adapter in the library."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loracast.cli import options
from loracast.cli.folder import FolderLearner, learn_files
from loracast.cli.output import print_json, printable, say, size
from loracast.cli.session import learn_visibly, open_model
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.lora.quantize import DEFAULT_STORAGE

if TYPE_CHECKING:
    from loracast.library.adapter import Adapter


def learn(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="PDF, DOCX, HTML, Markdown, CSV or text; - for standard input; or a folder of them; or an image.",
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Name of the adapter; made from the file's by default.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Let an adapter of that name give way.")] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Of a folder, learn also what has not changed, and what failed before.")
    ] = False,
    chunk_tokens: options.ChunkTokens = DEFAULT_CHUNK_TOKENS,
    storage: options.StorageOption | None = None,
    base: options.Base = None,
    hypernetwork: options.Hypernetwork = None,
    library: options.Library = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Learn a document, all documents of a folder, or an image.

    It is cast into an adapter in one pass, without training. Of a folder, files that have not changed since are left alone, and one that cannot be
    read holds up no other; adapters are named after the files' paths.
    """
    if Path(file).is_dir():
        if name is not None:
            raise typer.BadParameter("adapters of a folder are named after its files", param_hint="--name")
        learner = FolderLearner(
            Path(file), again=again, chunk_tokens=chunk_tokens, storage=storage or DEFAULT_STORAGE,
            base=base, hypernetwork=hypernetwork, library=library, device=device,
        )  # fmt: skip
        learn_files(learner, as_json=as_json)
        return
    from loracast.documents import read_document
    from loracast.documents.images import is_image_file
    from loracast.library.library import check_free
    from loracast.library.manifest import check_name, name_for
    from loracast.paths import library_dir

    started = time.perf_counter()
    if is_image_file(file):
        if storage not in (None, "bf16"):
            raise typer.BadParameter("an image's adapter is kept in bf16", param_hint="--storage")
        adapter = _learn_picture(file, name, replace, base, hypernetwork, library or library_dir(), device)
    else:
        document = read_document(file)
        name = check_name(name or name_for(document))
        if not replace:  # before a model is loaded for nothing
            check_free(library or library_dir(), name, unless_from=document.sha256)
        model = open_model(base, hypernetwork, library, device)
        kept = storage or DEFAULT_STORAGE
        adapter = learn_visibly(model, document, name, max_chunk_tokens=chunk_tokens, storage=kept, replace=replace)
    if as_json:
        print_json({**report(adapter), "total_s": round(time.perf_counter() - started, 3)})
    else:
        print_learned(adapter)


def _learn_picture(
    file: str,
    name: str | None,
    replace: bool,
    base: str | None,
    hypernetwork: str | None,
    library: Path,
    device: str | None,
) -> Adapter:
    """It takes an image encoder and a hypernetwork; the base is not loaded."""
    from loracast.base.load import DEFAULT_BASE
    from loracast.cast.image import learn_image
    from loracast.cast.load import load_caster, shipped_hypernetwork
    from loracast.documents.images import read_image_file
    from loracast.library.library import check_free
    from loracast.library.manifest import check_name, name_for

    picture = read_image_file(file)
    name = check_name(name or name_for(picture))
    if not replace:
        check_free(library, name, unless_from=picture.sha256)
    where = hypernetwork or shipped_hypernetwork(base or DEFAULT_BASE, "image")
    return learn_image(load_caster(where, "image", say=say), picture, library, name, replace=replace)


def report(adapter: Adapter) -> dict[str, Any]:
    manifest = adapter.manifest
    return {
        "name": adapter.name,
        "version": manifest.version,
        "title": manifest.title,
        "n_tokens": manifest.n_tokens,
        "n_chunks": manifest.n_chunks,
        "ranks": manifest.ranks,
        "n_bytes": adapter.n_bytes,
        "learn_s": manifest.learn_s,
        "warnings": list(manifest.warnings),
        "folder": str(adapter.folder),
    }


def print_learned(adapter: Adapter) -> None:
    manifest = adapter.manifest
    title = f" ({printable(manifest.title)})" if manifest.title else ""
    print(f"learned {adapter.name}{title}")
    if manifest.kind == "image":
        print(f"an image, rank {manifest.rank_text}, {size(adapter.n_bytes)}, {1000 * manifest.learn_s:.0f} ms")
        print(f'ask it: loracast ask "What does the picture show?" -a {adapter.name}')
        return
    chunks = f"{manifest.n_chunks:,} chunk{'s' * (manifest.n_chunks != 1)}"
    print(
        f"{manifest.n_tokens:,} tokens in {chunks}, rank {manifest.rank_text}, {size(adapter.n_bytes)}, {manifest.learn_s:.1f} s"
    )
    print(f'ask it: loracast ask "..." -a {adapter.name}')
