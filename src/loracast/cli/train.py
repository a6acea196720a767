"""`loracast train`: train a hypernetwork from a recipe."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loracast.cli.options import Benchmarks, OptionalTasks, Tasks

if TYPE_CHECKING:
    from loracast.training.loop import TrainConfig

app = typer.Typer(help="Train hypernetworks.", no_args_is_help=True)

_UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds(text: str) -> float:
    """A duration such as 90, 45m or 2.5h, in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if not match:
        raise typer.BadParameter("write a duration as 90, 90s, 45m or 2.5h")
    return float(match[1]) * _UNITS[match[2] or "s"]


Out = Annotated[Path, typer.Option(help="Folder for checkpoints and metrics; a run found there goes on.")]
Recipe = Annotated[Path | None, typer.Argument(help="TOML file: tables hypernetwork, objective, data, training.")]
Change = Annotated[list[str] | None, typer.Option("--set", help="Change a key: training.lr=2e-4. Repeatable.")]
InitFrom = Annotated[Path | None, typer.Option(help="Start from this hypernetwork's weights.")]
Base = Annotated[str | None, typer.Option(help="Embedded base, folder or hub id.")]
Budget = Annotated[str | None, typer.Option(help="Stop after this wall-clock time: 90s, 45m, 2h.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; the fastest there is by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the last metrics as JSON.")]

_documents = typer.Option("--documents", help="Documents with questions: JSONL(.gz) rows. Repeatable.")
Documents = Annotated[list[str], _documents]
OptionalDocuments = Annotated[list[str] | None, _documents]
Unrelated = Annotated[
    list[str] | None,
    typer.Option(help="Unrelated questions, whose answers stay the plain base's: JSONL(.gz). Repeatable."),
]
LoRARecipe = Annotated[Path | None, typer.Argument(help="TOML file: tables lora, data, training.")]


@app.callback()
def main() -> None:
    """Train hypernetworks."""


@app.command()
def doc(
    out: Out,
    recipe: Recipe = None,
    change: Change = None,
    texts: Annotated[
        list[str] | None, typer.Option(help="Prose that needles hide in: JSONL(.gz) or text. Repeatable.")
    ] = None,
    documents: OptionalDocuments = None,
    unrelated: Unrelated = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="LoRA of `loracast train reader` as the teacher of context distillation (objective.distillation_weight)."
        ),
    ] = None,
    init_from: InitFrom = None,
    base: Base = None,
    budget: Budget = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train Doc-to-LoRA on needles, fact sheets and questions about real documents.

    Saves every few minutes, stops cleanly on Ctrl-C and SIGTERM; the same command goes on from there. The same command runs
    under `torchrun` and `accelerate launch`.
    """
    from loracast.training.doc import read_doc_recipe, train_doc
    from loracast.training.reader import read_reader
    from loracast.training.recipe import file_overrides

    files = file_overrides(texts=texts, documents=documents, unrelated=unrelated)
    settings = read_doc_recipe(recipe, [*overrides_of(change, budget), *files])
    command = _command("doc", recipe, change, init_from)

    def run(loaded, workers, on_metrics):
        return train_doc(
            loaded, settings, out,
            init_from=init_from, teacher=read_reader(teacher, loaded.fingerprint) if teacher else None,
            command=command, workers=workers, on_metrics=on_metrics,
        )  # fmt: skip

    _train(run, settings.training, out, base, device, as_json)


@app.command()
def text(
    out: Out,
    tasks: Tasks,
    recipe: Recipe = None,
    change: Change = None,
    oracles: Annotated[
        Path | None,
        typer.Option(
            help="Library of `loracast train oracle`: learn to give its LoRAs, in place of doing the tasks' examples."
        ),
    ] = None,
    shared_from: Annotated[
        Path | None,
        typer.Option(help="LoRA of `loracast train multitask`, as which what all descriptions share starts."),
    ] = None,
    init_from: InitFrom = None,
    base: Base = None,
    budget: Budget = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train Text-to-LoRA on the tasks that are not held out.

    Saves every few minutes, stops cleanly on Ctrl-C and SIGTERM; the same command goes on from there.
    """
    from loracast.data.tasks import read_tasks
    from loracast.training.text import read_text_recipe, train_text

    settings = read_text_recipe(recipe, overrides_of(change, budget))
    found = read_tasks(tasks)
    command = _command("text", recipe, change, init_from) + (f" --oracles {oracles.name}" if oracles else "")
    command += f" --shared-from {shared_from.name}" if shared_from else ""

    def run(loaded, workers, on_metrics):
        return train_text(
            loaded, settings, found, out,
            oracles=oracles, init_from=init_from, shared_from=shared_from, command=command, workers=workers, on_metrics=on_metrics,
        )  # fmt: skip

    _train(run, settings.training, out, base, device, as_json)


@app.command()
def image(
    out: Out,
    images: Annotated[Path, typer.Option(help="Folder or zip file with a folder of images for each class.")],
    recipe: Recipe = None,
    change: Change = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Embedded image encoder, or folder or hub id of a vision model; EfficientNet-lite0 by default."
        ),
    ] = None,
    unrelated: Unrelated = None,
    init_from: InitFrom = None,
    base: Base = None,
    budget: Budget = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train Doc-to-LoRA to see: one image becomes one LoRA, and the text-only base says what it shows.

    The features of all images are computed once and kept in the cache. Saves, stops and goes on as `train doc` does.
    """
    from loracast.data.labelled import read_images
    from loracast.encoders.image import DEFAULT_IMAGE_ENCODER, load_image_encoder
    from loracast.training.modality import read_modality_recipe, train_modality
    from loracast.training.recipe import file_overrides

    settings = read_modality_recipe(recipe, [*overrides_of(change, budget), *file_overrides(unrelated=unrelated)])
    labelled = read_images(images)
    name = encoder or DEFAULT_IMAGE_ENCODER
    image_encoder = load_image_encoder(name, device, lambda text: typer.echo(text, err=True))
    command = _command("image", recipe, change, init_from)

    def say_encoded(done: int, total: int) -> None:
        if done == total or done % 512 == 0:
            typer.echo(f"encoded {done:,} of {total:,} images", err=True)

    def run(loaded, workers, on_metrics):
        return train_modality(
            loaded, settings, labelled, image_encoder, out,
            init_from=init_from, command=command, workers=workers, on_encoded=say_encoded, on_metrics=on_metrics,
        )  # fmt: skip

    _train(run, settings.training, out, base, device, as_json)


@app.command()
def oracle(
    out: Annotated[Path, typer.Option(help="Library: a folder with a LoRA for each task. Those that are done stay.")],
    tasks: OptionalTasks = None,
    benchmark: Benchmarks = None,
    recipe: LoRARecipe = None,
    change: Change = None,
    only: Annotated[list[str] | None, typer.Option(help="Train for this task only. Repeatable.")] = None,
    heldout: Annotated[
        bool | None,
        typer.Option("--heldout/--trained", help="Only held-out tasks, or only the others; both by default."),
    ] = None,
    base: Base = None,
    budget: Budget = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train a LoRA for each task on its own examples, with PEFT: what descriptions are measured by.

    One task after the other; stops cleanly at the budget, on Ctrl-C and SIGTERM, and the same command goes on from there.
    """
    from loracast.errors import ConfigError
    from loracast.evaluation.benchmarks import tasks_or_benchmarks
    from loracast.training.oracle import read_oracle_recipe, train_oracles

    settings = read_oracle_recipe(recipe, change or [])
    found = [task for task in tasks_or_benchmarks(tasks, benchmark or ()) if heldout in (None, task.is_heldout)]
    if unknown := sorted(set(only or ()) - {task.name for task in found}):
        raise ConfigError(f"there are no such tasks: {', '.join(unknown)}")
    chosen = [task for task in found if not only or task.name in only]
    loaded = _open_base(base, device)
    command = _command("oracle", recipe, change, None)
    limit_s = seconds(budget) if budget else None
    done = train_oracles(loaded, settings, chosen, out, command=command, budget_s=limit_s, on_metrics=_show_lora)
    if as_json:
        print(json.dumps({"out": str(out), "done": done, "wanted": len(chosen)}))
    else:
        typer.echo(f"{len(done)} of {len(chosen)} oracles are in {out}", err=True)


@app.command()
def multitask(
    out: Out,
    tasks: Tasks,
    recipe: LoRARecipe = None,
    change: Change = None,
    described: Annotated[
        bool, typer.Option("--described", help="With a description of the task in every prompt.")
    ] = False,
    base: Base = None,
    budget: Budget = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train one LoRA on all tasks that are not held out: what is left of Text-to-LoRA without descriptions."""
    from loracast.data.tasks import read_tasks
    from loracast.training.oracle import MULTITASK, read_oracle_recipe, train_multitask

    settings = read_oracle_recipe(recipe, change or [], MULTITASK)
    found = read_tasks(tasks)
    loaded = _open_base(base, device)
    command = _command("multitask", recipe, change, None) + (" --described" if described else "")
    limit_s = seconds(budget) if budget else None
    done = train_multitask(
        loaded, settings, found, out, described=described, command=command, budget_s=limit_s, on_metrics=_show_lora
    )
    _say_lora(out, done, as_json)


@app.command()
def reader(
    out: Out,
    documents: Documents,
    recipe: LoRARecipe = None,
    change: Change = None,
    base: Base = None,
    budget: Budget = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train one LoRA to answer questions with the document in the window: the ceiling that adapters of documents are measured by."""
    from loracast.training.reader import read_reader_recipe, train_reader
    from loracast.training.recipe import file_overrides

    settings = read_reader_recipe(recipe, [*(change or []), *file_overrides(documents=documents)])
    loaded = _open_base(base, device)
    command = _command("reader", recipe, change, None)
    limit_s = seconds(budget) if budget else None
    done = train_reader(
        loaded, settings, out, command=command, budget_s=limit_s, on_metrics=partial(_show_lora, out.name)
    )
    _say_lora(out, done, as_json)


def _say_lora(out: Path, done: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"out": str(out), "done": done}))
    else:
        typer.echo(f"the LoRA is in {out}" if done else f"not done yet; the same command goes on in {out}", err=True)


def _open_base(base: str | None, device: str | None) -> Any:
    from loracast.base.load import load_base
    from loracast.training.runtime import keep_freed_memory

    keep_freed_memory()
    return load_base(base, device=device)


def _show_lora(task: str, figures: dict[str, float]) -> None:
    """A line of figures for the task in hand."""
    named = "  ".join(f"{name} {figures[name]:.3f}" for name in ("loss", "exact"))
    typer.echo(f"{task}  step {figures['step']:.0f}  {figures['elapsed_s']:.0f} s  {named}", err=True)


def overrides_of(change: list[str] | None, budget: str | None) -> list[str]:
    """What `--set` and `--budget` change in a recipe."""
    return [*(change or []), *([f"training.budget_s={seconds(budget)}"] if budget else [])]


def _command(what: str, recipe: Path | None, change: list[str] | None, init_from: Path | None) -> str:
    """The command for a checkpoint's provenance, with the names of files but not where they lie on this machine."""
    parts = ["loracast", "train", what, *([recipe.name] if recipe else [])]
    parts += [part for override in change or [] for part in ("--set", override)]
    return shlex.join([*parts, *(["--init-from", init_from.name] if init_from else [])])


def _train(
    run: Callable[[Any, Any, Any], dict[str, float]],
    config: TrainConfig,
    out: Path,
    base: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Load the base, run a training (of base, workers and what is told of its metrics), draw its curve and say where it lies."""
    from loracast.training.plots import plot_metrics
    from loracast.training.progress import ProgressLine
    from loracast.training.runtime import Workers

    workers = Workers.join(device)
    loaded = _open_base(base, str(workers.device))
    with ProgressLine(config, enabled=workers.is_first) as line:
        last = run(loaded, workers, line.show)
    if workers.is_first:
        has_curve = plot_metrics(out / "metrics.jsonl", out / "curve.png")
        if as_json:
            print(json.dumps({"out": str(out), **last}))
        else:
            files = "hypernetwork, metrics.jsonl and curve.png" if has_curve else "hypernetwork"
            typer.echo(f"{files}: in {out}", err=True)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a training run, or any hypernetwork.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    average_with: Annotated[
        list[Path] | None,
        typer.Option(
            help="A run that this one started from, or a sibling: write the mean of the runs' weights. Repeatable."
        ),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change the hypernetwork's config where that fixes no weight: hypernetwork.key_decorrelation=3.0. Repeatable.",
        ),
    ] = None,
    storage: Annotated[str, typer.Option(help="float32, bfloat16, or int8 for the large matrices.")] = "int8",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a trained hypernetwork in a compact form, to ship or share it."""
    from loracast.hypernets.protocol import Hypernetwork
    from loracast.hypernets.store import (
        average,
        from_pretrained,
        read_provenance,
        save_pretrained,
        with_config,
    )
    from loracast.training.recipe import keys_of, read_tables

    hypernet: Hypernetwork = from_pretrained(run)
    provenance = read_provenance(run)
    if average_with:
        average(hypernet, [from_pretrained(other) for other in average_with])
        provenance = {"average_of": [provenance, *map(read_provenance, average_with)]}
    if change:
        tables = read_tables(None, change, {"hypernetwork": keys_of(type(hypernet.config))})
        hypernet = with_config(hypernet, tables["hypernetwork"])
    save_pretrained(hypernet, out, storage=storage, provenance=provenance)
    n_bytes = (out / "model.safetensors").stat().st_size
    n_parameters = sum(parameter.numel() for parameter in hypernet.parameters())
    if as_json:
        print(json.dumps({"out": str(out), "bytes": n_bytes, "parameters": n_parameters, "storage": storage}))
    else:
        typer.echo(f"{n_parameters / 1e6:.1f}M parameters, {n_bytes / 1e6:.1f} MB as {storage} in {out}")
