"""`loracast train`: train a hypernetwork, or a LoRA that one is measured by, from a recipe."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from loracast.base.load import Base, load_base
from loracast.cli.commands import seconds
from loracast.cli.options import TASKS, BaseChoice, Json, Tasks
from loracast.cli.terminal import advice, print_result, print_table, say

Change = Annotated[list[str] | None, "Change a key of the recipe: training.lr=2e-4. Repeatable."]
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

    def say_done(self, facts: dict[str, Any], text: str) -> None:
        """Print the last metrics as one line of JSON, or say where the result lies."""
        if self.as_json:
            print(json.dumps({"out": str(self.out), **facts}))
        else:
            say(text)


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
    from loracast.lab.training.doc import read_doc_recipe, train_doc
    from loracast.lab.training.recipe import file_overrides
    from loracast.lab.training.window import read_window_lora

    files = file_overrides(texts=texts, documents=documents, unrelated=unrelated)
    settings = read_doc_recipe(run.recipe, [*run.overrides, *files])

    def train(base: Base, *arguments: Any, **options: Any) -> dict[str, float]:
        taught_by = read_window_lora(teacher, base.fingerprint) if teacher else None
        return train_doc(base, *arguments, teacher=taught_by, **options)

    _train_hypernetwork(run, "doc", train, settings)


def text(
    run: HypernetworkRun,
    *,
    tasks: Tasks,
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
    from loracast.lab.training.text import read_text_recipe, train_text

    settings = read_text_recipe(run.recipe, run.overrides)
    files = {"oracles": oracles, "shared_from": shared_from}
    _train_hypernetwork(run, "text", train_text, settings, read_tasks(tasks), files=files)


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

    The features of all images are computed once and kept in the cache. It saves, stops and resumes as `train doc` does.
    """
    from loracast.base.embedded import DEFAULT_IMAGE_ENCODER
    from loracast.hypernets.encoders import load_image_encoder
    from loracast.lab.data.labelled import read_images
    from loracast.lab.training.modality import read_modality_recipe, train_modality
    from loracast.lab.training.recipe import file_overrides

    labelled = read_images(images)
    sees = load_image_encoder(encoder or DEFAULT_IMAGE_ENCODER, run.device, say)
    settings = read_modality_recipe(run.recipe, [*run.overrides, *file_overrides(unrelated=unrelated)])

    def say_encoded(done: int, total: int) -> None:
        if done == total or done % 512 == 0:
            say(f"encoded {done:,} of {total:,} images")

    _train_hypernetwork(run, "image", train_modality, settings, labelled, sees, on_encoded=say_encoded)


def oracle(
    run: Run,
    *,
    tasks: Annotated[Path | None, TASKS] = None,
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
    from loracast.lab.training.oracle import read_oracle_recipe, train_oracles

    settings = read_oracle_recipe(run.recipe, run.overrides)
    found = [task for task in tasks_or_benchmarks(tasks, benchmark or ()) if heldout in (None, task.is_heldout)]
    if unknown := sorted(set(only or ()) - {task.name for task in found}):
        raise ConfigError(f"there are no such tasks: {', '.join(unknown)}")
    chosen = [task for task in found if not only or task.name in only]
    done = _train_lora(run, ["oracle"], train_oracles, settings, chosen)
    run.say_done({"done": done, "wanted": len(chosen)}, f"{len(done)} of {len(chosen)} oracles are in {run.out}")


def multitask(
    run: Run, *, tasks: Tasks, described: Annotated[bool, "With a description of the task in every prompt."] = False
) -> None:
    """Train one LoRA on all tasks that are not held out: a baseline without descriptions, unless --described."""
    from loracast.lab.data.tasks import read_tasks
    from loracast.lab.training.oracle import MULTITASK, read_oracle_recipe, train_multitask

    settings = read_oracle_recipe(run.recipe, run.overrides, MULTITASK)
    what = ["multitask", *(["--described"] if described else [])]
    _say_lora(run, _train_lora(run, what, train_multitask, settings, read_tasks(tasks), described=described))


def window(run: Run, *, documents: Annotated[list[str], _DOCUMENTS]) -> None:
    """Train the window LoRA, which answers with the document in the prompt: the rival of document adapters."""
    from loracast.lab.training.recipe import file_overrides
    from loracast.lab.training.window import read_window_recipe, train_window

    settings = read_window_recipe(run.recipe, [*run.overrides, *file_overrides(documents=documents)])
    show = partial(_show_lora, run.out.name)
    _say_lora(run, _train_lora(run, ["window"], train_window, settings, on_metrics=show))


def relevance(
    *,
    out: Annotated[Path, "File to write: the relevance.toml that the package reads."],
    documents: Annotated[list[str], _DOCUMENTS],
    unrelated: Annotated[list[str], "Questions that are about no document: JSONL(.gz). Repeatable."],
    source: Annotated[list[str] | None, "Take only documents of this source. Repeatable."] = None,
    dev_documents: Annotated[list[str] | None, "Measure on these documents with questions. Repeatable."] = None,
    dev_unrelated: Annotated[list[str] | None, "Measure with these unrelated questions. Repeatable."] = None,
    as_json: Json = False,
) -> None:
    """Fit the classifier by which `ask` decides if a question is about a document: minutes on one core, no base."""
    from loracast.lab.data.rows import read_questioned
    from loracast.lab.training.relevance import measure, read_unrelated_files, train_relevance

    fit = train_relevance(read_questioned(documents, source or ()), read_unrelated_files(unrelated))
    fit.write(out)
    kinds: list[dict[str, Any]] = []
    points: list[dict[str, float]] = []
    if dev_documents and dev_unrelated:
        kinds, points = measure(fit, read_questioned(dev_documents), read_unrelated_files(dev_unrelated))
    if as_json:
        print(json.dumps({"out": str(out), "kinds": kinds, "points": points}))
        return
    say(f"{out.stat().st_size / 1e3:.1f} kB in {out}")
    rows = [
        (row["group"], row["source"], "yes" if row["is_about"] else "no", row["n"], f"{row['passed']:.1%}")
        for row in kinds
    ]
    print_table(("question", "source", "about", ">n", ">taken to be about it"), rows)
    shares = [[f"{value:.3f}" for value in point.values()] for point in points]
    print_table((">refused", ">threshold", ">unrelated pass", ">another product's pass"), shares)


def words(
    *,
    out: Annotated[Path, "File to write: the word_vectors.safetensors that the package reads."],
    documents: Annotated[list[str], _DOCUMENTS],
    source: Annotated[list[str] | None, "Take only documents of this source. Repeatable."] = None,
    as_json: Json = False,
) -> None:
    """Train the word vectors by which routing finds where an answer stands: minutes on one core, no base."""
    from dataclasses import asdict

    from loracast.lab.data.rows import read_questioned
    from loracast.lab.training.word_vectors import train_word_vectors

    found = train_word_vectors(read_questioned(documents, source or ()), out, say=say)
    if as_json:
        print(json.dumps({"out": str(out), "right": {name: asdict(one) for name, one in found.items()}}))
        return
    say(f"{out.stat().st_size / 1e3:.0f} kB in {out}")
    rows = [(name, x.n, f"{x.sentence:.1%}", f"{x.bm25:.1%}", f"{x.place:.1%}") for name, x in found.items()]
    print_table(("documents", ">questions", ">right sentence first", ">by BM25 alone", ">right word first"), rows)


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
    from loracast.hypernets.store import average, read_provenance, with_config
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


def _train_hypernetwork(
    run: HypernetworkRun,
    what: str,
    train: Callable[..., dict[str, float]],
    settings: Any,
    *data: Any,
    files: dict[str, Path | None] | None = None,
    **options: Any,
) -> None:
    """Load the base, train a hypernetwork on it, draw the curve and say where it lies.

    Args:
        what: the command's name, for the checkpoint's record of how it was made.
        files: further files that `train` takes by these names; the record names them too.
    """
    from loracast.lab.training.loop import Workers
    from loracast.lab.training.progress import ProgressLine, plot_metrics, require_matplotlib

    require_matplotlib()
    files = {"init_from": run.init_from, **(files or {})}
    workers = Workers.join(run.device)
    base = _open_base(run, str(workers.device))
    with advice(_STOPPED), ProgressLine(settings.training, enabled=workers.is_first) as line:
        last = train(
            base, settings, *data, run.out,
            **files, command=run.command(what, **files), workers=workers, on_metrics=line.show, **options,
        )  # fmt: skip
    if workers.is_first:
        has_curve = plot_metrics(run.out / "metrics.jsonl", run.out / "curve.png")
        run.say_done(last, f"hypernetwork{', metrics.jsonl and curve.png' * has_curve}: in {run.out}")


def _train_lora(
    run: Run, what: Sequence[str], train: Callable[..., Any], settings: Any, *data: Any, **options: Any
) -> Any:
    """Load the base and train one or more LoRAs on it. Returns what `train` does: whether, or which, are finished."""
    shown = {"on_metrics": _show_lora, **options}
    base = _open_base(run)
    with advice(_STOPPED):
        return train(base, settings, *data, run.out, command=run.command(*what), budget_s=run.budget, **shown)


def _open_base(run: Run, device: str | None = None) -> Base:
    from loracast.lab.training.loop import keep_freed_memory

    keep_freed_memory()
    return load_base(run.base, **{**run.how, "device": None if run.device_map else device or run.device})


def _show_lora(task: str, figures: dict[str, float]) -> None:
    """Print a line of figures for the task that is being trained."""
    named = "  ".join(f"{name} {figures[name]:.3f}" for name in ("loss", "exact"))
    say(f"{task}  step {figures['step']:.0f}  {figures['elapsed_s']:.0f} s  {named}")


def _say_lora(run: Run, done: bool) -> None:
    where = f"the LoRA is in {run.out}" if done else f"not done yet; the same command goes on in {run.out}"
    run.say_done({"done": done}, where)
