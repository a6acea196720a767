"""`loracast learn` and `task`: a document, an image or the description of a task becomes an adapter.

It is kept in the library, or with --out in PEFT folders that vLLM and Ray Serve load. A running server with the same
base and library learns in place of this process.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loracast.base.embedded import DEFAULT_BASE
from loracast.cli import options, terminal
from loracast.cli.client import Learner, Tasks
from loracast.cli.commands import seconds
from loracast.cli.folder import FolderLearner, exit_unless_all_done, learn_files, made_by
from loracast.cli.options import open_model
from loracast.cli.terminal import plural, print_json, print_result, print_table, printable, progress_bar, say, size
from loracast.files import library_dir
from loracast.library.index import read_chunks
from loracast.lora.quantize import DEFAULT_STORAGE

if TYPE_CHECKING:
    from loracast.cast.bulk import BulkCast, Casting, FolderCaster, Line
    from loracast.library.adapter import Adapter
    from loracast.library.library import Library


_MAX_ERRORS_PRINTED = 20


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Options for casting into PEFT folders in place of the library."""

    out: str | None = None
    """Cast into PEFT folders here, a folder or a URL (s3://, gs://, ...), in place of the library."""
    rank: options.Rank = None
    served_base: str | None = None
    """With --out: name of the base on the server that will load the adapters; that of --base by default."""
    ray: Annotated[str | None, typer.Option(metavar="ADDRESS|local")] = None
    """With --out: cast with Ray, on a cluster or here."""
    actors: options.OptionalCount = None
    """With --ray: how many processes cast; one per GPU, or per CPU if there is none."""

    def check(self) -> None:
        """Refuse options that would have no effect."""
        for name, needed in {"rank": "out", "served_base": "out", "ray": "out", "actors": "ray"}.items():
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise typer.BadParameter(f"it needs --{needed}", param_hint=f"--{name.replace('_', '-')}")


def cast_into_folders(
    source: str, out: str, folders: Folders, learning: options.Learning, *, again: bool, as_json: bool
) -> None:
    """Cast what is new at a URL, and report. Exits with 1 if a document failed."""
    from loracast.cast.bulk import REPORT, Casting, cast_all, cast_with_ray, write_parquet

    started = time.perf_counter()
    # Ray's processes have another working folder.
    where = {"base": learning.base, "hypernetwork": learning.hypernetwork}
    there = {name: Path(path) for name, path in where.items() if path and Path(path).exists()}
    in_full: dict[str, Any] = {name: str(path.resolve()) for name, path in there.items()}
    learning = dataclasses.replace(learning, **in_full)
    served = folders.served_base or learning.base or DEFAULT_BASE
    casting = Casting(out, made_by(learning), served, learning.chunk_tokens, folders.rank)
    load = partial(load_models, casting, learning)
    with_ray = cast_with_ray(folders.ray, load, actors=folders.actors) if folders.ray is not None else None

    def cast(todo: Sequence[Line]) -> Iterable[Line]:
        return map(load(), todo) if with_ray is None else with_ray(todo)

    with progress_bar("documents", source) as progress:

        def on_line(done: int, total: int, line: Line) -> None:
            progress(done, total)
            if line.error:
                say(f"failed: {line.url}: {line.error}")

        run = cast_all(source, casting, cast, again=again, on_line=on_line)
    if folders.ray is not None and run.has_written:
        write_parquet(out)
    _print(run, source, f"{out.rstrip('/')}/{REPORT}", time.perf_counter() - started, as_json)
    exit_unless_all_done(run)


def load_models(casting: Casting, learning: options.Learning) -> FolderCaster:
    """Load base and hypernetwork, in this process or in one of Ray's."""
    from loracast.cast.bulk import FolderCaster

    model = open_model(learning)
    return FolderCaster(casting, model.documents, model.base)


def _print(run: BulkCast, source: str, report: str, seconds: float, as_json: bool) -> None:
    failed = run.failed()
    counts: dict[str, Any] = {
        **{outcome: run.count(outcome) for outcome in ("learned", "unchanged", "failed")},
        "ignored": run.ignored,
        "max_rank": max((line.rank or 0 for line in run.lines.values()), default=0),
        "seconds": round(seconds, 2),
        "documents_per_s": round(run.count("learned") / seconds, 2),
    }
    if as_json:
        errors = [{"url": line.url, "error": line.error} for line in failed]
        print_json({"source": source, "is_complete": run.is_complete, **counts, "report": report, "errors": errors})
        return
    print_table([f">{name}" for name in counts], [[f"{value:,}" for value in counts.values()]])
    if failed:
        print_table(["failed", "text"], [(line.url, line.error) for line in failed[:_MAX_ERRORS_PRINTED]])
    if len(failed) > _MAX_ERRORS_PRINTED:
        say(f"and {plural(len(failed) - _MAX_ERRORS_PRINTED, 'document')} more")
    say(f"report: {report}")


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
    seeing: options.Seeing,
    photos: Annotated[bool, "Learn what the pictures of a PDF or Word file show, too."] = False,
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
    started = time.perf_counter()
    adapter = Learner(learning, local=local or file == "-", seeing=seeing, photos=photos).learn(
        file, naming, shows_progress=True
    )
    for warning in adapter.manifest.warnings:
        terminal.warn(warning)
    total_s = round(time.perf_counter() - started, 3)
    print_result(as_json, {**report(adapter), "total_s": total_s}, summary(adapter, learning.library))


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
        typer.Option(parser=seconds, metavar="TIME"),
        "Time for refining it by gradient descent on the examples: 30s, 2m.",
    ] = None,
    naming: options.Naming,
    strength: Annotated[float, "Scale of the LoRA: 1 as in training, 0 turns it off."] = 1.0,
    storage: Annotated[
        Literal["int4", "int8", "bf16"] | None,
        typer.Option(show_default=DEFAULT_STORAGE),
        "Storage of factors: int4, int8 (twice as big), bf16.",
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
    from loracast.documents.task_spec import TaskSpec, read_examples

    spec = TaskSpec(description.strip(), () if examples is None else read_examples(examples))
    if not spec.title:
        raise typer.BadParameter("say what the model should do, or give examples", param_hint="DESCRIPTION, --examples")
    if refine is not None:
        from loracast.cast.refine import check_enough

        check_enough(spec.examples)
    started = time.perf_counter()
    tasks = Tasks(choice, library, hypernetwork, encoder, strength, storage, refine)
    adapter = tasks.cast(spec, naming, local=local or as_json)  # a server tells no distance, for --json
    manifest = adapter.manifest
    for warning in manifest.warnings:
        terminal.warn(warning)
    if refine is not None and not manifest.is_refined:
        terminal.warn(
            "refining made the LoRA no better on the examples kept for validation: it is cast as without --refine"
        )
    if as_json:
        print_json({
            **_made(adapter), "description": spec.description, "n_examples": manifest.n_examples,
            "is_refined": manifest.is_refined, "distance": tasks.caster.distances([spec])[0],
            "ood_threshold": tasks.caster.ood_threshold, "strength": strength, "ranks": manifest.ranks,
            "cast_s": manifest.learn_s, "total_s": round(time.perf_counter() - started, 3),
        })  # fmt: skip
        return
    print(printable(summary(adapter, library)))
    if not spec.examples:
        say(
            "five examples make it two to four times as good on new tasks: --examples FILE (lines `input => output`,"
            " CSV or JSONL)"
        )


def report(adapter: Adapter) -> dict[str, Any]:
    """The fields that --json prints of an adapter that was learned."""
    fields = ("version", "title", "n_tokens", "n_chunks", "ranks", "learn_s")
    return _made(adapter) | {field: getattr(adapter.manifest, field) for field in fields}


def _made(adapter: Adapter) -> dict[str, Any]:
    """The fields that --json prints of every new adapter."""
    warnings = list(adapter.manifest.warnings)
    return {"name": adapter.name, "n_bytes": adapter.n_bytes, "warnings": warnings, "folder": str(adapter.folder)}


def summary(adapter: Adapter, library: Library) -> str:
    """What is printed about a new adapter: its name, its size, and the command that uses it."""
    manifest = adapter.manifest
    about = [manifest.title] if manifest.title else []
    about += [plural(manifest.n_examples, "example")] if manifest.n_examples else []
    about += ["refined"] if manifest.is_refined else []
    facts = [f"rank {manifest.rank_text}", size(adapter.n_bytes), f"{1000 * manifest.learn_s:.0f} ms"]
    made, use, question = "learned", "ask", "..."
    if manifest.kind == "task":
        made, use = "cast", "use"
    elif manifest.kind == "image":
        likeliest = read_chunks(adapter.index)[0].text.partition("\n")[0]
        facts, question = [likeliest, *facts], "What does the picture show?"
    else:
        read = f"{manifest.n_tokens:,} tokens in {plural(manifest.n_chunks, 'chunk')}"
        facts = [read, *facts[:2], f"{manifest.learn_s:.1f} s"]
    # The next command needs the library where that is not the user's own.
    is_own = library.folder.resolve() == library_dir().resolve()
    where = "" if is_own else f" --library {shlex.quote(str(library))}"
    title = f" ({', '.join(about)})" if about else ""
    return (
        f"{made} {adapter.name}{title}\n{', '.join(facts)}\n"
        f'{use} it: loracast ask "{question}" -a {adapter.name}{where}'
    )
