"""`loracast train`: train a hypernetwork, or a LoRA that one is measured by, from a recipe."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loracast.cli.commands import CommandGroup, add, seconds
from loracast.cli.options import BaseChoice, Benchmarks, Json, OptionalTasks, Tasks
from loracast.cli.output import print_result, say

if TYPE_CHECKING:
    from loracast.base.load import Base
    from loracast.training.loop import TrainConfig

Change = Annotated[list[str] | None, "Change a key of the recipe: training.lr=2e-4. Repeatable."]
_documents = typer.Option("--documents", help="Documents with questions: JSONL(.gz) rows. Repeatable.")
Unrelated = Annotated[
    list[str] | None, "Unrelated questions, whose answers stay the plain base's: JSONL(.gz). Repeatable."
]


@dataclass(frozen=True, kw_only=True)
class Run(BaseChoice):
    """What every training takes."""

    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="TOML file with the settings of the training.")
    ] = None
    out: Annotated[Path, "Folder for what is trained; a run found there goes on."]
    change: Change = None
    budget: Annotated[
        float | None,
        typer.Option("--budget", parser=seconds, metavar="TIME", help="Stop after this time: 90s, 45m, 2h."),
    ] = None
    as_json: Json = False

    @property
    def overrides(self) -> list[str]:
        """What `--set` changes in the recipe."""
        return list(self.change or ())

    def command(self, what: str, *flags: str, **files: Path | None) -> str:
        """The command for a checkpoint's provenance, with the names of files but not where they lie on this machine."""
        parts = ["loracast", "train", what, *([self.recipe.name] if self.recipe else [])]
        parts += [part for override in self.overrides for part in ("--set", override)]
        named = {f"--{option.replace('_', '-')}": file.name for option, file in files.items() if file}
        return shlex.join([*parts, *(part for pair in named.items() for part in pair), *flags])


@dataclass(frozen=True, kw_only=True)
class HypernetworkRun(Run):
    """What every training of a hypernetwork takes."""

    init_from: Annotated[Path | None, "Start from this hypernetwork's weights."] = None

    @property
    def overrides(self) -> list[str]:
        """What `--set` and `--budget` change in the recipe."""
        return [*super().overrides, *([f"training.budget_s={self.budget}"] if self.budget is not None else [])]


def doc(
    run: HypernetworkRun,
    *,
    texts: Annotated[list[str] | None, "Prose that needles hide in: JSONL(.gz) or text. Repeatable."] = None,
    documents: Annotated[list[str] | None, _documents] = None,
    unrelated: Unrelated = None,
    teacher: Annotated[
        Path | None, "LoRA of `loracast train reader`: the teacher of distillation (objective.distillation_weight)."
    ] = None,
) -> None:
    """Train Doc-to-LoRA on needles, fact sheets and questions about real documents.

    It saves every few minutes and stops cleanly on Ctrl-C and SIGTERM; the same command goes on from there. The same
    command runs under `torchrun` and `accelerate launch`.
    """
    from loracast.training.doc import read_doc_recipe, train_doc
    from loracast.training.reader import read_reader
    from loracast.training.recipe import file_overrides

    files = file_overrides(texts=texts, documents=documents, unrelated=unrelated)
    settings = read_doc_recipe(run.recipe, [*run.overrides, *files])

    def train(base, workers, on_metrics):
        return train_doc(
            base, settings, run.out,
            init_from=run.init_from, teacher=read_reader(teacher, base.fingerprint) if teacher else None,
            command=run.command("doc", init_from=run.init_from), workers=workers, on_metrics=on_metrics,
        )  # fmt: skip

    _train(run, settings.training, train)


def text(
    run: HypernetworkRun,
    *,
    tasks: Tasks,
    oracles: Annotated[
        Path | None,
        "Library of `loracast train oracle`: learn to give its LoRAs, in place of doing the tasks' examples.",
    ] = None,
    shared_from: Annotated[Path | None, "LoRA of `loracast train multitask`: the static LoRA starts from it."] = None,
) -> None:
    """Train Text-to-LoRA on the tasks that are not held out.

    It saves every few minutes and stops cleanly on Ctrl-C and SIGTERM; the same command goes on from there.
    """
    from loracast.data.tasks import read_tasks
    from loracast.training.text import read_text_recipe, train_text

    settings = read_text_recipe(run.recipe, run.overrides)
    found = read_tasks(tasks)
    command = run.command("text", init_from=run.init_from, oracles=oracles, shared_from=shared_from)

    def train(base, workers, on_metrics):
        return train_text(
            base, settings, found, run.out,
            oracles=oracles, init_from=run.init_from, shared_from=shared_from,
            command=command, workers=workers, on_metrics=on_metrics,
        )  # fmt: skip

    _train(run, settings.training, train)


def image(
    run: HypernetworkRun,
    *,
    images: Annotated[Path, "Folder or zip file with a folder of images for each class."],
    encoder: Annotated[
        str | None, "Embedded image encoder, or folder or hub id of a vision model; EfficientNet-lite0 by default."
    ] = None,
    unrelated: Unrelated = None,
) -> None:
    """Train Doc-to-LoRA to see: one image becomes one LoRA, and the text-only base says what it shows.

    The features of all images are computed once and kept in the cache. It saves, stops and goes on as `train doc` does.
    """
    from loracast.data.labelled import read_images
    from loracast.encoders.image import DEFAULT_IMAGE_ENCODER, load_image_encoder
    from loracast.training.modality import read_modality_recipe, train_modality
    from loracast.training.recipe import file_overrides

    labelled = read_images(images)
    sees = load_image_encoder(encoder or DEFAULT_IMAGE_ENCODER, run.device, say)
    settings = read_modality_recipe(run.recipe, [*run.overrides, *file_overrides(unrelated=unrelated)])

    def say_encoded(done: int, total: int) -> None:
        if done == total or done % 512 == 0:
            say(f"encoded {done:,} of {total:,} images")

    def train(base, workers, on_metrics):
        return train_modality(
            base, settings, labelled, sees, run.out,
            init_from=run.init_from, command=run.command("image", init_from=run.init_from), workers=workers,
            on_encoded=say_encoded, on_metrics=on_metrics,
        )  # fmt: skip

    _train(run, settings.training, train)


def oracle(
    run: Run,
    *,
    tasks: OptionalTasks = None,
    benchmark: Benchmarks = None,
    only: Annotated[list[str] | None, "Train for this task only. Repeatable."] = None,
    heldout: Annotated[
        bool | None,
        typer.Option("--heldout/--trained", help="Only held-out tasks, or only the others; both by default."),
    ] = None,
) -> None:
    """Train a LoRA for each task on its own examples, with PEFT: the upper reference for descriptions.

    One task after the other, each in a folder of its name in --out; it stops cleanly at the budget, on Ctrl-C and
    SIGTERM, and the same command goes on from there.
    """
    from loracast.errors import ConfigError
    from loracast.evaluation.benchmarks import tasks_or_benchmarks
    from loracast.training.oracle import read_oracle_recipe, train_oracles

    settings = read_oracle_recipe(run.recipe, run.overrides)
    found = [task for task in tasks_or_benchmarks(tasks, benchmark or ()) if heldout in (None, task.is_heldout)]
    if unknown := sorted(set(only or ()) - {task.name for task in found}):
        raise ConfigError(f"there are no such tasks: {', '.join(unknown)}")
    chosen = [task for task in found if not only or task.name in only]
    done = train_oracles(
        _open_base(run), settings, chosen, run.out,
        command=run.command("oracle"), budget_s=run.budget, on_metrics=_show_lora,
    )  # fmt: skip
    _say_done(run, {"done": done, "wanted": len(chosen)}, f"{len(done)} of {len(chosen)} oracles are in {run.out}")


def multitask(
    run: Run,
    *,
    tasks: Tasks,
    described: Annotated[bool, "With a description of the task in every prompt."] = False,
) -> None:
    """Train one LoRA on all tasks that are not held out: what is left of Text-to-LoRA without descriptions."""
    from loracast.data.tasks import read_tasks
    from loracast.training.oracle import MULTITASK, read_oracle_recipe, train_multitask

    settings = read_oracle_recipe(run.recipe, run.overrides, MULTITASK)
    found = read_tasks(tasks)
    command = run.command("multitask", *(["--described"] if described else []))
    done = train_multitask(
        _open_base(run), settings, found, run.out,
        described=described, command=command, budget_s=run.budget, on_metrics=_show_lora,
    )  # fmt: skip
    _say_lora(run, done)


def reader(run: Run, *, documents: Annotated[list[str], _documents]) -> None:
    """Train one LoRA to answer questions with the document in the window: the ceiling for adapters of documents."""
    from loracast.training.reader import read_reader_recipe, train_reader
    from loracast.training.recipe import file_overrides

    settings = read_reader_recipe(run.recipe, [*run.overrides, *file_overrides(documents=documents)])
    done = train_reader(
        _open_base(run), settings, run.out,
        command=run.command("reader"), budget_s=run.budget, on_metrics=partial(_show_lora, run.out.name),
    )  # fmt: skip
    _say_lora(run, done)


def export(
    run: Annotated[Path, "Folder of a training run, or any hypernetwork."],
    *,
    out: Annotated[Path, "Folder to write."],
    average_with: Annotated[
        list[Path] | None,
        "A run that this one started from, or a sibling: write the mean of the runs' weights. Repeatable.",
    ] = None,
    change: Annotated[
        list[str] | None,
        "Change the config where no weight depends on it: hypernetwork.key_decorrelation=3.0. Repeatable.",
    ] = None,
    storage: Annotated[
        str, typer.Option("-s", "--storage", help="float32, bfloat16, or int8 for the large matrices.")
    ] = "int8",
    as_json: Json = False,
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
    print_result(
        as_json,
        {"out": str(out), "bytes": n_bytes, "parameters": n_parameters, "storage": storage},
        f"{n_parameters / 1e6:.1f}M parameters, {n_bytes / 1e6:.1f} MB as {storage} in {out}",
    )


def _train(run: HypernetworkRun, config: TrainConfig, train: Callable[[Base, Any, Any], dict[str, float]]) -> None:
    """Load the base, call `train` (base, workers, on_metrics), draw the curve and say where it lies."""
    from loracast.training.plots import plot_metrics
    from loracast.training.progress import ProgressLine
    from loracast.training.runtime import Workers

    workers = Workers.join(run.device)
    base = _open_base(run, str(workers.device))
    with ProgressLine(config, enabled=workers.is_first) as line:
        last = train(base, workers, line.show)
    if workers.is_first:
        has_curve = plot_metrics(run.out / "metrics.jsonl", run.out / "curve.png")
        files = "hypernetwork, metrics.jsonl and curve.png" if has_curve else "hypernetwork"
        _say_done(run, last, f"{files}: in {run.out}")


def _open_base(run: Run, device: str | None = None) -> Base:
    from loracast.base.load import load_base
    from loracast.training.runtime import keep_freed_memory

    keep_freed_memory()
    return load_base(run.base, device=device or run.device)


def _show_lora(task: str, figures: dict[str, float]) -> None:
    """Print a line of figures for the task that is being trained."""
    named = "  ".join(f"{name} {figures[name]:.3f}" for name in ("loss", "exact"))
    say(f"{task}  step {figures['step']:.0f}  {figures['elapsed_s']:.0f} s  {named}")


def _say_lora(run: Run, done: bool) -> None:
    where = f"the LoRA is in {run.out}" if done else f"not done yet; the same command goes on in {run.out}"
    _say_done(run, {"done": done}, where)


def _say_done(run: Run, facts: dict[str, Any], text: str) -> None:
    """Print the last metrics as one line of JSON, or say where the result lies."""
    if run.as_json:
        print(json.dumps({"out": str(run.out), **facts}))
    else:
        say(text)


app = typer.Typer(
    cls=CommandGroup, help="Train hypernetworks, and the LoRAs that they are measured by.", no_args_is_help=True
)


@app.callback()
def main() -> None:
    """Train hypernetworks, and the LoRAs that they are measured by."""


add(app, doc, text, image, panel="Hypernetworks")
add(app, oracle, multitask, reader, panel="LoRAs to compare with")
add(app, export, panel="To ship")
