"""`loracast learn` and `task`: a document, an image or the description of a task becomes an adapter in the library."""

from __future__ import annotations

import shlex
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loracast.base.embedded import DEFAULT_BASE
from loracast.cli import options
from loracast.cli.bulk import Folders, cast_into_folders
from loracast.cli.commands import seconds
from loracast.cli.folder import FolderLearner, learn_files
from loracast.cli.output import plural, print_result, progress_bar, say, size, warn
from loracast.cli.session import learn_visibly, open_model, server_for
from loracast.library.manifest import name_for, name_for_task
from loracast.lora.quantize import DEFAULT_STORAGE
from loracast.paths import library_dir

if TYPE_CHECKING:
    from loracast.data.task_examples import TaskSpec
    from loracast.documents import Document
    from loracast.library.adapter import Adapter
    from loracast.serving.found import Running


def learn(
    file: Annotated[
        str,
        "Document (PDF, DOCX, HTML, Markdown, CSV or text; - for standard input), folder of documents, or image; with "
        "--out also a URL.",
    ],
    *,
    naming: options.Naming,
    again: options.Again = False,
    learning: options.Learning,
    local: options.Local = False,
    folders: Folders,
    as_json: options.Json = False,
) -> None:
    """Learn a document, all documents of a folder, or an image.

    It is cast into an adapter in one pass, without training. In a folder, unchanged files are skipped, and a file that
    cannot be read does not stop the others; adapters are named after the files' paths. With --out, documents at any URL
    become PEFT folders at another URL, one per document, which vLLM and Ray Serve load.
    """
    folders.check()
    if folders.out is not None:
        if naming.name is not None or naming.replace or learning.storage is not None:
            raise typer.BadParameter("it cannot be combined with --name, --replace or --storage", param_hint="--out")
        cast_into_folders(file, folders.out, folders, learning, again=again, as_json=as_json)
        return
    if Path(file).is_dir():
        if naming.name is not None:
            raise typer.BadParameter("adapters of a folder are named after its files", param_hint="--name")
        learn_files(FolderLearner(Path(file), learning, again=again, local=local), as_json=as_json)
        return
    from loracast.documents import read_document
    from loracast.documents.images import is_image_file

    started = time.perf_counter()
    if is_image_file(file):
        adapter = _learn_image(file, naming, learning)
    else:
        adapter = (None if local or file == "-" else _learn_served(file, naming, learning)) or _learn(
            read_document(file), naming, learning
        )
    total_s = round(time.perf_counter() - started, 3)
    print_result(as_json, {**report(adapter), "total_s": total_s}, learned(adapter, learning.library))


def _learn(document: Document, naming: options.Naming, learning: options.Learning) -> Adapter:
    name = naming.checked(learning.library, name_for(document), document.sha256)
    return learn_visibly(
        open_model(learning, learning.library), document, name,
        max_chunk_tokens=learning.chunk_tokens, storage=learning.document_storage, replace=naming.replace,
    )  # fmt: skip


def _learn_served(file: str, naming: options.Naming, learning: options.Learning) -> Adapter | None:
    """Have a running server learn a document; None where there is none, or it does not take the document."""
    server = server_for(learning, learning.library, "document", learning.hypernetwork, local=False)
    if server is None:
        return None
    from loracast.cli.served import learn_file

    with progress_bar("chunks", f"learning {file}") as progress:
        adapter = learn_file(server, file, naming.name, learning, replace=naming.replace, progress=progress)
    for warning in adapter.manifest.warnings if adapter else ():
        warn(warning)
    return adapter


def _learn_image(file: str, naming: options.Naming, learning: options.Learning) -> Adapter:
    """Learn an image: this takes an image encoder and a hypernetwork; the base is not loaded."""
    from loracast.cast.image import learn_image
    from loracast.cast.load import load_caster, shipped_hypernetwork
    from loracast.documents.images import read_image_file

    if learning.storage not in (None, "bf16"):
        raise typer.BadParameter("an image's adapter is kept in bf16", param_hint="--storage")
    image = read_image_file(file)
    name = naming.checked(learning.library, name_for(image), image.sha256)
    where = learning.hypernetwork or shipped_hypernetwork(learning.base or DEFAULT_BASE, "image")
    return learn_image(load_caster(where, "image", say=say), image, learning.library, name, replace=naming.replace)


def task(
    description: Annotated[
        str, typer.Argument(metavar="DESCRIPTION", help="What the model should do, in a sentence.")
    ] = "",
    *,
    examples: Annotated[
        str | None, "File of examples, - for standard input: JSONL, CSV, or lines `input => output`."
    ] = None,
    refine: Annotated[
        float | None,
        typer.Option(
            parser=seconds, metavar="TIME", help="Time for refining it by gradient descent on the examples: 30s, 2m."
        ),
    ] = None,
    naming: options.Naming,
    strength: Annotated[float, "Scale of the LoRA: 1 as in training, 0 turns it off."] = 1.0,
    storage: Annotated[
        Literal["int4", "int8", "bf16"] | None,
        typer.Option(
            "-s", "--storage", show_default=DEFAULT_STORAGE, help="Storage of factors: int4, int8 (twice as big), bf16."
        ),
    ] = None,
    hypernetwork: options.Hypernetwork = None,
    encoder: options.Encoder = None,
    choice: options.BaseChoice,
    local: options.Local = False,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Cast a task into an adapter, from its description, examples of it, or both.

    The base is loaded only for hypernetworks that read the description with it, as the shipped one does.
    """
    from loracast.base.load import Base, load_base
    from loracast.cast.load import check_default_base, load_caster, shipped_hypernetwork
    from loracast.cast.task import Refine, TaskCaster
    from loracast.data.example_files import read_examples
    from loracast.data.task_examples import TaskSpec

    spec = TaskSpec(description.strip(), () if examples is None else read_examples(examples))
    if not spec.title:
        raise typer.BadParameter(
            "say what the model should do, or give examples", param_hint="DESCRIPTION or --examples"
        )
    if refine is not None:
        from loracast.training.refine import check_enough

        check_enough(spec.examples)
    started = time.perf_counter()
    # A server's API takes none of these, and tells no distance.
    if not (as_json or encoder or refine or storage or strength != 1.0):
        server = server_for(choice, library, "task", hypernetwork, local=local)
        if server is not None and (cast := _cast_served(server, library, spec, naming)) is not None:
            print_result(False, {}, _task_summary(cast, library))
            return
    name = naming.checked(library, name_for_task(spec.title), spec.sha256)
    where = hypernetwork or shipped_hypernetwork(choice.base or DEFAULT_BASE, "task")

    @cache
    def load() -> Base:
        if choice.base is None:
            check_default_base([where])
        return load_base(choice.base, **choice.how, say=say)

    caster = TaskCaster(load_caster(where, "task", load, encoder=encoder, say=say), library)
    descent: Refine | None = None
    if refine is not None:
        from loracast.training.refine import RefineConfig, refiner

        descent = refiner(load(), RefineConfig(seconds=refine))
    (adapter,) = caster.tasks(
        [spec], [name], strength=strength, refine=descent, storage=storage or DEFAULT_STORAGE, replace=naming.replace
    )
    manifest = adapter.manifest
    for warning in manifest.warnings:
        warn(warning)
    if refine is not None and not manifest.is_refined:
        warn("refining made the LoRA no better on the examples kept for validation: it is cast as without --refine")
    facts = {
        **_made(adapter),
        "description": spec.description,
        "n_examples": manifest.n_examples,
        "is_refined": manifest.is_refined,
        "distance": caster.distances([spec])[0] if as_json else None,
        "ood_threshold": caster.ood_threshold,
        "strength": strength,
        "ranks": manifest.ranks,
        "cast_s": manifest.learn_s,
        "total_s": round(time.perf_counter() - started, 3),
    }
    print_result(as_json, facts, _task_summary(adapter, library))


def _cast_served(server: Running, library: Path, spec: TaskSpec, naming: options.Naming) -> Adapter | None:
    """Have a running server cast a task; None where it does not."""
    from loracast.cli.served import cast_task

    adapter = cast_task(server, library, spec, naming.name, replace=naming.replace)
    for warning in adapter.manifest.warnings if adapter else ():
        warn(warning)
    return adapter


def _task_summary(adapter: Adapter, library: Path) -> str:
    """What is printed about a task that was cast."""
    manifest = adapter.manifest
    read = f", {plural(manifest.n_examples, 'example')}" if manifest.n_examples else ""
    read += ", refined" * manifest.is_refined
    return (
        f"cast {adapter.name} ({manifest.title}{read})\n"
        f"rank {manifest.rank_text}, {size(adapter.n_bytes)}, {1000 * manifest.learn_s:.0f} ms\n"
        f'use it: loracast ask "..." -a {named(adapter, library)}'
    )


def report(adapter: Adapter) -> dict[str, Any]:
    """What --json says about an adapter that was learned."""
    fields = ("version", "title", "n_tokens", "n_chunks", "ranks", "learn_s")
    return _made(adapter) | {field: getattr(adapter.manifest, field) for field in fields}


def _made(adapter: Adapter) -> dict[str, Any]:
    """What --json says about every new adapter."""
    warnings = list(adapter.manifest.warnings)
    return {"name": adapter.name, "n_bytes": adapter.n_bytes, "warnings": warnings, "folder": str(adapter.folder)}


def named(adapter: Adapter, library: Path) -> str:
    """An adapter for the next command, with its library where that is not the user's own."""
    is_own = library.resolve() == library_dir().resolve()
    return adapter.name if is_own else f"{adapter.name} --library {shlex.quote(str(library))}"


def learned(adapter: Adapter, library: Path) -> str:
    """What is printed about an adapter that was learned."""
    manifest = adapter.manifest
    title = f" ({manifest.title})" if manifest.title else ""
    if manifest.kind == "image":
        what, took, question = "an image", f"{1000 * manifest.learn_s:.0f} ms", "What does the picture show?"
    else:
        what = f"{manifest.n_tokens:,} tokens in {plural(manifest.n_chunks, 'chunk')}"
        took, question = f"{manifest.learn_s:.1f} s", "..."
    return (
        f"learned {adapter.name}{title}\n"
        f"{what}, rank {manifest.rank_text}, {size(adapter.n_bytes)}, {took}\n"
        f'ask it: loracast ask "{question}" -a {named(adapter, library)}'
    )
