"""`loracast eval ablations`: variants of a recipe, each trained for the same time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.eval_common import Out, names, numbers, show
from loracast.cli.output import progress_bar
from loracast.cli.session import loading
from loracast.cli.train import OptionalDocuments, Unrelated, overrides_of


def ablations(
    out: Out,
    recipe: Annotated[Path, typer.Argument(help="Recipe of `loracast train doc`, without a checkpoint to start from.")],
    variants: Annotated[
        Path,
        typer.Argument(help='TOML file whose table `variants` has lines such as "rank 16" = ["hypernetwork.rank=16"].'),
    ],
    only: Annotated[list[str] | None, typer.Option(help="Of the variants only this one. Repeatable.")] = None,
    documents: OptionalDocuments = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            help="Documents to measure on; those of --documents if left out, of --held-out-sources. Repeatable."
        ),
    ] = None,
    held_out_sources: Annotated[
        str | None,
        typer.Option(help="Sources of the documents to measure on, with commas; not among those trained on."),
    ] = None,
    texts: Annotated[list[str] | None, typer.Option(help="Prose that needles hide in. Repeatable.")] = None,
    unrelated: Unrelated = None,
    kinds: Annotated[
        str, typer.Option(help="Kinds of episodes to measure on, with commas.")
    ] = "facts,questions,reading",
    steps: Annotated[int, typer.Option(help="Steps of each kind in the measurement.", min=1)] = 4,
    seeds: Annotated[str, typer.Option(help="Seeds of weights and data, with commas.")] = "0,1",
    budget: Annotated[str, typer.Option(help="Wall-clock time of each training: 90s, 20m.")] = "20m",
    change: Annotated[list[str] | None, typer.Option("--set", help="Change a key in all variants. Repeatable.")] = None,
    base: options.Base = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Which choices pay: variants of a recipe, each trained from nothing for the same time, then measured on documents that none has seen."""
    from loracast.evaluation.ablations import AblationConfig, read_variants, run_ablations
    from loracast.training.recipe import file_overrides

    files = file_overrides(documents=documents, texts=texts, unrelated=unrelated)
    config = AblationConfig(
        recipe=str(recipe),
        variants=read_variants(variants, only or ()),
        overrides=(*overrides_of(change, budget), *files),
        held_out=tuple(held_out or ()),
        held_out_sources=names(held_out_sources),
        kinds=names(kinds),  # type: ignore[arg-type]
        steps=steps,
        seeds=numbers(seeds, int),
    )
    with loading(device) as tell:
        from loracast.base.load import load_base

        loaded = load_base(base, device=device, say=tell)
    with progress_bar("trainings") as progress:
        report = run_ablations(loaded, config, out, progress)
    show(report, out, as_json)
