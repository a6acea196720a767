"""`loracast learn ... --out`: documents become PEFT folders that vLLM and Ray Serve load, in place of the library."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loracast.base.embedded import DEFAULT_BASE
from loracast.cli import options
from loracast.cli.folder import made_by
from loracast.cli.output import plural, print_json, print_table, progress_bar, say
from loracast.cli.session import open_model

if TYPE_CHECKING:
    from loracast.cast.bulk import Casting, FolderCaster, Found, Line
    from loracast.cast.bulk_run import BulkCast

_MOST_TOLD = 20


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where adapters go in place of the library, and what casts them."""

    out: Annotated[
        str | None, "Cast into PEFT folders here, a folder or a URL (s3://, gs://, ...), in place of the library."
    ] = None
    rank: options.Rank = None
    served_base: Annotated[
        str | None, "With --out: name of the base on the server that will load the adapters; that of --base by default."
    ] = None
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS|local", help="With --out: cast with Ray, on a cluster or here.")
    ] = None
    actors: Annotated[
        int | None,
        typer.Option(min=1, help="With --ray: how many processes cast; one per GPU, or per CPU if there is none."),
    ] = None  # fmt: skip

    def check(self) -> None:
        """Refuse options that would have no effect."""
        if self.out is None:
            for name in ("rank", "served_base", "ray"):
                if getattr(self, name) is not None:
                    raise typer.BadParameter("it needs --out", param_hint=f"--{name.replace('_', '-')}")
        if self.ray is None and self.actors is not None:
            raise typer.BadParameter("it needs --ray", param_hint="--actors")


def cast_into_folders(
    source: str, out: str, folders: Folders, learning: options.Learning, *, again: bool, as_json: bool
) -> None:
    """Cast what is new at a URL, and report. Exits with 1 if a document failed."""
    from loracast.cast.bulk import Casting
    from loracast.cast.bulk_run import REPORT, cast_all

    started = time.perf_counter()
    learning = dataclasses.replace(
        learning, base=_absolute(learning.base), hypernetwork=_absolute(learning.hypernetwork)
    )
    served = folders.served_base or learning.base or DEFAULT_BASE
    casting = Casting(out, made_by(learning), served, learning.chunk_tokens, folders.rank)
    load = partial(load_models, casting, learning)
    cast: Callable[[Sequence[Found]], Iterable[Line]]
    if folders.ray is None:

        def cast(todo: Sequence[Found]) -> Iterable[Line]:
            return map(load(), todo)

    else:
        from loracast.cast.bulk_ray import cast_with_ray, write_parquet

        cast = cast_with_ray(folders.ray, load, actors=folders.actors)

    with progress_bar("documents", source) as progress:

        def on_line(done: int, total: int, line: Line) -> None:
            progress(done, total)
            if line.error:
                say(f"failed: {line.url}: {line.error}")

        run = cast_all(source, casting, cast, again=again, on_line=on_line)
    if folders.ray is not None and run.has_written:
        write_parquet(out)
    _print(run, source, f"{out.rstrip('/')}/{REPORT}", time.perf_counter() - started, as_json)
    if not run.is_complete:
        raise typer.Exit(130)
    if run.count("failed"):
        raise typer.Exit(1)


def load_models(casting: Casting, learning: options.Learning) -> FolderCaster:
    """Load base and hypernetwork, in this process or in one of Ray's."""
    from loracast.cast.bulk import FolderCaster

    model = open_model(learning)
    return FolderCaster(casting, model.documents, model.base)


def _absolute(where: str | None) -> str | None:
    """A path in full: Ray's processes have another working folder."""
    return str(Path(where).resolve()) if where and Path(where).exists() else where


def _print(run: BulkCast, source: str, report: str, seconds: float, as_json: bool) -> None:
    lines = run.lines.values()
    failed = run.failed()
    counts: dict[str, Any] = {
        **{outcome: run.count(outcome) for outcome in ("learned", "unchanged", "failed")},
        "ignored": run.ignored,
        "max_rank": max((line.rank or 0 for line in lines), default=0),
        "seconds": round(seconds, 2),
        "documents_per_s": round(run.count("learned") / seconds, 2),
    }
    if as_json:
        errors = [{"url": line.url, "error": line.error} for line in failed]
        print_json({"source": source, "is_complete": run.is_complete, **counts, "report": report, "errors": errors})
        return
    print_table([f">{name}" for name in counts], [[f"{value:,}" for value in counts.values()]])
    if failed:
        print_table(["failed", "text"], [(line.url, line.error) for line in failed[:_MOST_TOLD]])
    if len(failed) > _MOST_TOLD:
        say(f"and {plural(len(failed) - _MOST_TOLD, 'document')} more")
    say(f"report: {report}")
