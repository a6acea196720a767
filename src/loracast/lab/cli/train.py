"""`loracast train`: train a hypernetwork, or a LoRA that one is measured by, from a recipe."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from loracast.base.load import load_base
from loracast.cli.commands import seconds
from loracast.cli.options import BaseChoice, Device, Json
from loracast.cli.terminal import advice, plural, print_result, progress_bar, say

Change = Annotated[list[str] | None, "Change a key of the recipe: training.lr=2e-4. Repeatable."]
_TASKS = "Tasks: a folder of JSON files, or a JSONL(.gz) file of examples."
_DOCUMENTS = "Documents with questions: JSONL(.gz) rows. Repeatable."
_STOPPED = "stopped at once; the same command resumes from the last save (SIGTERM, unlike Ctrl-C, saves first)"
Unrelated = Annotated[
    list[str] | None, "Unrelated questions, whose answers stay the plain base's: JSONL(.gz). Repeatable."
]


@dataclass(frozen=True, kw_only=True)
class Run(BaseChoice):
    """What every training takes."""

    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="TOML file with the settings of the training.")
    ] = None
    out: Annotated[Path, "Output folder; a run found there is resumed."]
    change: Change = None
    budget: Annotated[
        float | None, typer.Option(parser=seconds, metavar="TIME", help="Stop after this time: 90s, 45m, 2h.")
    ] = None
    as_json: Json = False

    def settings(self, default: Any, **files: list[str] | None) -> Any:
        """The recipe, with what the options change in it.

        Args:
            default: the recipe with values for missing keys.
            files: data files that options name, by their keys in the table `[data]`.
        """
        from loracast.lab.training.recipe import file_overrides, read_recipe

        return read_recipe(default, self.recipe, [*self.overrides, *file_overrides(**files)])

    @property
    def overrides(self) -> list[str]:
        """What `--set` and `--budget` change in the recipe."""
        return [*(self.change or ()), *([f"training.budget_s={self.budget}"] if self.budget is not None else [])]

    def command(self, what: str, options: dict[str, Any]) -> str:
        """The command for a checkpoint's provenance, with the names of files but not where they lie on this machine."""
        parts = ["loracast", "train", what, *([self.recipe.name] if self.recipe else [])]
        parts += [part for override in self.overrides for part in ("--set", override)]
        for name, value in options.items():
            if isinstance(value, Path):
                parts += [f"--{name.replace('_', '-')}", value.name]
            elif value is True:
                parts.append(f"--{name}")
        return shlex.join(parts)


@dataclass(frozen=True, kw_only=True)
class HypernetworkRun(Run):
    """What every training of a hypernetwork or a reader takes."""

    init_from: Annotated[Path | None, "Start from the weights in this folder."] = None


def doc(
    run: HypernetworkRun,
    *,
    texts: Annotated[list[str] | None, "Prose that needles hide in: JSONL(.gz) or text. Repeatable."] = None,
    documents: Annotated[list[str] | None, _DOCUMENTS] = None,
    unrelated: Unrelated = None,
    teacher: Annotated[
        Path | None, "LoRA of `loracast train window`: the teacher of distillation (objective.distillation_weight)."
    ] = None,
) -> None:
    """Train Doc-to-LoRA on needles, fact sheets and questions about real documents.

    It saves every few minutes, at the end of --budget and on SIGTERM, and the same command resumes from there. Ctrl-C
    stops it at once, without saving. The same command runs under `torchrun` and `accelerate launch`.
    """
    from loracast.lab.training.doc import DocRecipe, train_doc

    settings = run.settings(DocRecipe(), texts=texts, documents=documents, unrelated=unrelated)
    _train_hypernetwork(run, "doc", train_doc, settings, teacher=teacher)


def text(
    run: HypernetworkRun,
    *,
    tasks: Annotated[Path, _TASKS],
    oracles: Annotated[
        Path | None,
        "Library of `loracast train oracle`: train to reconstruct its LoRAs, not to solve the tasks' examples.",
    ] = None,
    shared_from: Annotated[Path | None, "LoRA of `loracast train multitask`: initialises the shared factors."] = None,
) -> None:
    """Train Text-to-LoRA on the tasks that are not held out.

    It saves every few minutes, at the end of --budget and on SIGTERM, and the same command resumes from there. Ctrl-C
    stops it at once, without saving.
    """
    from loracast.lab.data.tasks import read_tasks
    from loracast.lab.training.text import TextRecipe, train_text

    files = {"oracles": oracles, "shared_from": shared_from}
    _train_hypernetwork(run, "text", train_text, run.settings(TextRecipe()), read_tasks(tasks), **files)


def oracle(
    run: Run,
    *,
    tasks: Annotated[Path | None, _TASKS] = None,
    benchmark: Annotated[
        list[Path] | None, "File of a benchmark (bench_NAME_test.jsonl.gz), in place of --tasks. Repeatable."
    ] = None,
    only: Annotated[list[str] | None, "Train for this task only. Repeatable."] = None,
    heldout: Annotated[bool | None, "Only held-out tasks, or only the others; both by default."] = None,
) -> None:
    """Train a LoRA for each task on its own examples, with PEFT: an upper bound for LoRAs cast from descriptions.

    One task after the other, each in a folder of its name in --out. It saves, stops and resumes as `train doc` does.
    """
    from loracast.errors import ConfigError
    from loracast.lab.data.tasks import tasks_or_benchmarks
    from loracast.lab.training.loras import OracleRecipe, train_oracles

    settings = run.settings(OracleRecipe())
    found = [task for task in tasks_or_benchmarks(tasks, benchmark or ()) if heldout in (None, task.is_heldout)]
    if unknown := sorted(set(only or ()) - {task.name for task in found}):
        raise ConfigError(f"there are no such tasks: {', '.join(unknown)}")
    chosen = [task for task in found if not only or task.name in only]
    shown = partial(_show, settings.training.steps)
    done = _train(run, "oracle", train_oracles, settings, chosen, on_metrics=shown)
    facts = {"out": str(run.out), "done": done, "wanted": len(chosen)}
    print_result(run.as_json, facts, f"{len(done)} of {len(chosen)} oracles are in {run.out}")


def multitask(
    run: Run,
    *,
    tasks: Annotated[Path, _TASKS],
    described: Annotated[bool, "With a description of the task in every prompt."] = False,
) -> None:
    """Train one LoRA on all tasks that are not held out: a baseline without descriptions, unless --described."""
    from loracast.lab.data.tasks import read_tasks
    from loracast.lab.training.loras import MULTITASK, train_multitask

    settings = run.settings(MULTITASK)
    _say_lora(run, _train(run, "multitask", train_multitask, settings, read_tasks(tasks), described=described))


def window(run: Run, *, documents: Annotated[list[str], _DOCUMENTS]) -> None:
    """Train the window LoRA, which answers with the document in the prompt: the rival of document adapters."""
    from loracast.lab.training.loras import WindowRecipe, train_window

    settings = run.settings(WindowRecipe(), documents=documents)
    _say_lora(run, _train(run, "window", train_window, settings))


def reader(
    run: HypernetworkRun,
    *,
    documents: Annotated[list[str], _DOCUMENTS],
    hypernetwork: Annotated[
        str | None, "The hypernetwork of documents beside which it stands; the shipped one."
    ] = None,
) -> None:
    """Train the reader, which finds the units of a document that answer a question, or that nothing there does."""
    from loracast.cast.load import load_caster, shipped_hypernetwork
    from loracast.hypernets.reader import READER_FILE
    from loracast.lab.data.rows import read_questioned
    from loracast.lab.training.loop import keep_freed_memory
    from loracast.lab.training.reader import ReaderRecipe, train_reader

    keep_freed_memory()
    recipe = run.settings(ReaderRecipe())
    base = load_base(run.base, **run.how)
    beside: Any = load_caster(hypernetwork or shipped_hypernetwork(base, "document"), "document", base).hypernetwork
    people = read_questioned(documents, recipe.data.sources)
    command = run.command("reader", {"documents": documents, "init_from": run.init_from})
    with progress_bar("tokens") as progress, advice(_STOPPED):
        found = train_reader(
            base, recipe, beside, people, run.out, init_from=run.init_from, command=command, progress=progress,
            on_metrics=partial(_show, recipe.training.steps, run.out.name),
        )  # fmt: skip
    where = run.out / READER_FILE
    print_result(run.as_json, {"out": str(where), "refusing": found.refusing.item()}, f"the reader is in {where}")


def labels(
    images: Annotated[Path, "Folder or zip file with a folder of images for each name."],
    *,
    out: Annotated[Path, "File to write, LABELS.safetensors, which `learn --labels` reads."],
    encoder: Annotated[str | None, "Vision model: folder or hub id; EfficientNet-lite0 by default."] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Fit labels of your own for images: a linear probe on a vision model's features. No base is loaded."""
    from loracast.lab.data.labelled import read_images
    from loracast.lab.training.labels import train_labels

    with progress_bar("images", is_kept=True) as progress:
        found = read_images(images)
        right = train_labels(found, out, encoder, device=device, say=say, progress=progress)
    text = f"{plural(len(found.names), 'name')} in {out}; of images held back {right:.1%} are named rightly"
    print_result(as_json, {"out": str(out), "names": found.names, "right": right}, text)


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
    from loracast.hypernets.store import read_provenance
    from loracast.lab.training.checkpoint import average, with_config
    from loracast.lab.training.recipe import keys_of, read_tables

    hypernet = Hypernetwork.from_pretrained(run)
    provenance = read_provenance(run)
    if average_with:
        average(hypernet, [Hypernetwork.from_pretrained(other) for other in average_with])
        provenance = {"average_of": [provenance, *map(read_provenance, average_with)]}
    if change:
        tables = read_tables(None, change, {"hypernetwork": keys_of(type(hypernet.config))})
        hypernet = with_config(hypernet, tables["hypernetwork"])
    hypernet.save_pretrained(out, storage=storage, provenance=provenance)
    n_bytes = (out / "model.safetensors").stat().st_size
    n_parameters = sum(parameter.numel() for parameter in hypernet.parameters())
    facts = {"out": str(out), "bytes": n_bytes, "parameters": n_parameters, "storage": storage}
    text = f"{n_parameters / 1e6:.1f}M parameters, {n_bytes / 1e6:.1f} MB as {storage} in {out}"
    print_result(as_json, facts, text)


def _train_hypernetwork(run: HypernetworkRun, what: str, train: Any, settings: Any, *data: Any, **options: Any) -> None:
    """Train a hypernetwork, draw the curve and say where it lies; the arguments are those of `_train`."""
    from loracast.lab.training.loop import Workers, plot_metrics, require_matplotlib

    require_matplotlib()
    last = _train(run, what, train, settings, *data, init_from=run.init_from, **options)
    if Workers.join(run.device).is_first:
        has_curve = plot_metrics(run.out / "metrics.jsonl", run.out / "curve.png")
        text = f"hypernetwork{', metrics.jsonl and curve.png' * has_curve}: in {run.out}"
        print_result(run.as_json, {"out": str(run.out), **last}, text)


def _train(run: Run, what: str, train: Any, settings: Any, *data: Any, **options: Any) -> Any:
    """Load the base and train on it. Returns what `train` does.

    Args:
        what: the command's name, for the record of how the result was made, which also names files among the options.
        train: called with the base, the settings, the data, the folder, and the options.
    """
    from loracast.lab.training.loop import Workers, keep_freed_memory

    keep_freed_memory()
    workers = Workers.join(run.device)
    device = str(workers.device) if workers.n > 1 else run.device
    base = load_base(run.base, **{**run.how, "device": None if run.device_map else device})
    shown = {"on_metrics": partial(_show, settings.training.steps, run.out.name), **options}
    with advice(_STOPPED):
        return train(base, settings, *data, run.out, command=run.command(what, options), **shown)


def _show(steps: int, name: str, figures: dict[str, float]) -> None:
    """Print a line of figures of what is being trained."""
    shown = ("loss", "exact", "token_accuracy", "relative_error", "grad_norm")
    named = "  ".join(f"{key} {figures[key]:.3f}" for key in shown if key in figures)
    say(f"{name}  step {figures['step']:.0f}/{steps}  {figures['elapsed_s']:.0f} s  {named}")


def _say_lora(run: Run, done: bool) -> None:
    where = f"the LoRA is in {run.out}" if done else f"not done yet; the same command goes on in {run.out}"
    print_result(run.as_json, {"out": str(run.out), "done": done}, where)
