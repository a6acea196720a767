"""`loracast eval`: measure beside baselines. Every command writes results.json and table.md into --out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loracast.cli.commands import config_from, seconds
from loracast.cli.options import BaseChoice, Json, Library, Models, Seeing, loading, open_base, open_model
from loracast.cli.terminal import print_json, progress_bar, say, stdout

if TYPE_CHECKING:
    from loracast.lab.evaluation.ablations import AblationConfig
    from loracast.lab.evaluation.capacity import CapacityConfig
    from loracast.lab.evaluation.cost import LatencyConfig, MemoryConfig
    from loracast.lab.evaluation.harness import HarnessConfig
    from loracast.lab.evaluation.images import ImagesConfig
    from loracast.lab.evaluation.interference import InterferenceConfig
    from loracast.lab.evaluation.likelihood import TeacherForcedConfig
    from loracast.lab.evaluation.overlap import OverlapConfig
    from loracast.lab.evaluation.qa import QaConfig
    from loracast.lab.evaluation.query_cost import CostConfig
    from loracast.lab.evaluation.reader import ReaderEvalConfig
    from loracast.lab.evaluation.refining import RefiningConfig
    from loracast.lab.evaluation.report import Report
    from loracast.lab.evaluation.synthetic import (
        ChatsConfig,
        CorrectionsConfig,
        EverydayConfig,
        FactsConfig,
        NearMissesConfig,
        NeedleConfig,
        TablesConfig,
    )
    from loracast.lab.evaluation.tasks import TasksConfig, TaskSetup
    from loracast.lab.evaluation.whole_library import LibraryConfig


@dataclass(frozen=True, kw_only=True)
class Results:
    """Where the results go, and how they are shown."""

    out: Annotated[Path, "Folder for results.json and table.md."]
    as_json: Json = False

    def of(self, unit: str, evaluate: Callable[..., Report], *arguments: Any) -> Report:
        """Run an evaluation with its arguments, the folder and a progress bar in `unit`; show its report."""
        with progress_bar(unit, is_kept=True) as progress:
            report = evaluate(*arguments, self.out, progress)
        self.show(report)
        return report

    def show(self, report: Report) -> None:
        if self.as_json:
            print_json(report.to_dict())
        else:
            report.show(stdout())
            say(f"written to {self.out}")


Change = Annotated[list[str] | None, "Change a key of the recipe. Repeatable."]
Texts = Annotated[list[str] | None, "Prose that needles hide in: JSONL(.gz) or text. Repeatable."]
Documents = Annotated[list[str] | None, "Documents with questions: JSONL(.gz) rows. Repeatable."]


@config_from("loracast.lab.evaluation.qa")
def qa(config: QaConfig, models: Models, results: Results) -> None:
    """Questions that people asked about real documents: an adapter against (parts of) the document in the prompt."""
    from loracast.lab.evaluation.qa import evaluate_qa

    results.of("documents", evaluate_qa, open_model(models), config)


@config_from("loracast.lab.evaluation.synthetic")
def needle(config: NeedleConfig, models: Models, results: Results) -> None:
    """Needle in a haystack: a value hidden at any depth of a document, asked for in wordings unseen in training."""
    from loracast.lab.evaluation.synthetic import evaluate_needle

    results.of("documents", evaluate_needle, open_model(models), config)


@config_from("loracast.lab.evaluation.synthetic")
def facts(config: FactsConfig, models: Models, results: Results) -> None:
    """Sheets of facts about invented entities, every fact asked for in wordings that no training has seen."""
    from loracast.lab.evaluation.synthetic import evaluate_facts

    results.of("sheets", evaluate_facts, open_model(models), config)


@config_from("loracast.lab.evaluation.synthetic")
def everyday(config: EverydayConfig, models: Models, results: Results) -> None:
    """E-mails, contracts, recipes, price lists and others, in layouts and wordings that no training has seen."""
    from loracast.lab.evaluation.synthetic import evaluate_everyday

    results.of("documents", evaluate_everyday, open_model(models), config)


@config_from("loracast.lab.evaluation.synthetic")
def tables(config: TablesConfig, models: Models, results: Results) -> None:
    """Tables in all formats, of themes that no training has seen: cells by row and column, and what is not there."""
    from loracast.lab.evaluation.synthetic import evaluate_tables

    results.of("tables", evaluate_tables, open_model(models), config)


@config_from("loracast.lab.evaluation.synthetic")
def corrections(config: CorrectionsConfig, models: Models, results: Results) -> None:
    """Notices that correct themselves and chats in which facts change: is the newest value the answer?"""
    from loracast.lab.evaluation.synthetic import evaluate_corrections

    results.of("documents", evaluate_corrections, open_model(models), config)


@config_from("loracast.lab.evaluation.synthetic")
def chats(config: ChatsConfig, models: Models, results: Results) -> None:
    """Conversations of two friends: what each said, who and when it was, what changed, what nobody said."""
    from loracast.lab.evaluation.synthetic import evaluate_chats

    results.of("documents", evaluate_chats, open_model(models), config)


@config_from("loracast.lab.evaluation.synthetic")
def near_misses(config: NearMissesConfig, models: Models, results: Results) -> None:
    """Questions that a document nearly answers: for another name, a sentence that was taken out, its other part."""
    from loracast.lab.evaluation.synthetic import evaluate_near_misses

    results.of("documents", evaluate_near_misses, open_model(models), config)


@config_from("loracast.lab.evaluation.capacity")
def capacity(config: CapacityConfig, models: Models, results: Results) -> None:
    """How many generated facts one merged LoRA tells apart, by their number and the length of their values."""
    from loracast.lab.evaluation.capacity import evaluate_capacity

    results.of("documents", evaluate_capacity, open_model(models), config)


@config_from("loracast.lab.evaluation.reader")
def reader(config: ReaderEvalConfig, models: Models, results: Results) -> None:
    """The reader beside BM25: is the right unit first, and is what a document does not say refused?"""
    from loracast.lab.evaluation.reader import evaluate_reader

    results.of("documents", evaluate_reader, open_model(models), config)


@config_from("loracast.lab.evaluation.interference")
def interference(config: InterferenceConfig, models: Models, results: Results) -> None:
    """General-knowledge questions while unrelated documents are learned: do adapters harm what the base knows?"""
    from loracast.lab.evaluation.interference import evaluate_interference

    results.of("questions", evaluate_interference, open_model(models), config)


@config_from("loracast.lab.evaluation.whole_library")
def library(config: LibraryConfig, models: Models, results: Results) -> None:
    """Questions to a library of many documents, none named: is the right one found, the answer as good as by name?"""
    from loracast.lab.evaluation.whole_library import evaluate_library

    results.of("documents", evaluate_library, open_model(models), config)


@config_from("loracast.lab.evaluation.likelihood", without=("data",))
def teacher_forced(
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe of a training, whose table [data] says what episodes look like.")
    ] = None,
    *,
    change: Change = None,
    texts: Texts = None,
    documents: Documents = None,
    config: partial[TeacherForcedConfig],
    models: Models,
    results: Results,
) -> None:
    """Teacher-forced accuracy of the answers' tokens, on episodes like those of training."""
    from loracast.lab.evaluation.likelihood import evaluate_teacher_forced
    from loracast.lab.training.doc import DocRecipe
    from loracast.lab.training.recipe import file_overrides, read_recipe

    settings = read_recipe(DocRecipe(), recipe, [*(change or []), *file_overrides(texts=texts, documents=documents)])
    results.of("steps", evaluate_teacher_forced, open_model(models), config(data=settings.data))


@config_from("loracast.lab.evaluation.ablations", without=("recipe", "variants", "overrides"))
def ablations(
    recipe: Annotated[Path, typer.Argument(help="Recipe of `loracast train doc`, without a checkpoint to start from.")],
    variants: Annotated[
        Path,
        typer.Argument(help='TOML file whose table `variants` has lines such as "rank 16" = ["hypernetwork.rank=16"].'),
    ],
    *,
    only: Annotated[list[str] | None, "Only this one of the variants. Repeatable."] = None,
    documents: Documents = None,
    texts: Texts = None,
    unrelated: Annotated[list[str] | None, "Questions for the KL to the base: JSONL(.gz) rows. Repeatable."] = None,
    budget: Annotated[
        float, typer.Option("--budget", parser=seconds, metavar="TIME", help="Time of each training: 90s, 20m.")
    ] = 1200.0,
    change: Change = None,
    config: partial[AblationConfig],
    choice: BaseChoice,
    results: Results,
) -> None:
    """Train variants of a recipe from scratch for the same time each, and measure them on documents unseen by all."""
    from loracast.lab.evaluation.ablations import read_variants, run_ablations
    from loracast.lab.training.recipe import file_overrides

    files = file_overrides(documents=documents, texts=texts, unrelated=unrelated)
    whole = config(
        recipe=str(recipe),
        variants=read_variants(variants, only or ()),
        overrides=(*(change or ()), f"training.budget_s={budget}", *files),
    )
    results.of("trainings", run_ablations, open_base(choice), whole)


@config_from("loracast.lab.evaluation.cost")
def latency(config: LatencyConfig, models: Models, results: Results) -> None:
    """Time to the first token: the bare base, an adapter, and the same document in the window."""
    from loracast.lab.evaluation.cost import evaluate_latency

    results.of("questions", evaluate_latency, open_model(models), config)


@config_from("loracast.lab.evaluation.cost")
def memory(config: MemoryConfig, models: Models, results: Results) -> None:
    """Memory and time of learning a document, beside the encoder's own time; a fresh process for each length."""
    from loracast.lab.evaluation.cost import evaluate_memory

    loaded = {"model": models.base, "hypernetwork": models.hypernetwork, **models.how}
    results.of("documents", evaluate_memory, open_model(models), loaded, config)


@config_from("loracast.lab.evaluation.tasks")
def tasks(
    config: TasksConfig,
    *,
    oracles: Annotated[Path | None, "Library of `loracast train oracle`, for the baseline oracle."] = None,
    multitask: Annotated[Path | None, "LoRA of `loracast train multitask`, a baseline."] = None,
    multitask_described: Annotated[Path | None, "LoRA of `loracast train multitask --described`, a baseline."] = None,
    models: Models,
    results: Results,
) -> None:
    """Descriptions as adapters, on tasks that no training has seen, beside descriptions and examples in the prompt."""
    from loracast.lab.evaluation.tasks import evaluate_tasks

    loras = {"oracles": oracles, "multitask": multitask, "multitask_described": multitask_described}
    results.of("rows", evaluate_tasks, _task_setup(models, **loras, needs_caster=False), config)


@config_from("loracast.lab.evaluation.refining")
def refining(
    config: RefiningConfig,
    *,
    multitask: Annotated[Path | None, "LoRA of `loracast train multitask`, a further starting point."] = None,
    models: Models,
    results: Results,
) -> None:
    """Gradient descent on a task's examples, measured second by second: from the cast adapter and from scratch."""
    from loracast.lab.evaluation.refining import evaluate_refining

    results.of("rows", evaluate_refining, _task_setup(models, multitask=multitask), config)


@config_from("loracast.lab.evaluation.query_cost")
def cost(config: CostConfig, models: Models, results: Results) -> None:
    """What a query costs with an adapter, and with a description, examples or a document in the prompt.

    Cost is counted in tokens, operations and seconds.
    """
    from loracast.lab.evaluation.query_cost import evaluate_cost

    results.of("tasks", evaluate_cost, _task_setup(models), config)


def _task_setup(models: Models, needs_caster: bool = True, **compared: Path | None) -> TaskSetup:
    """Load the base, the hypernetwork for tasks, and by the names of `TaskSetup` what answers are compared with."""
    from loracast.base.embedded import DEFAULT_BASE
    from loracast.cast.load import load_caster, shipped_hypernetwork
    from loracast.cast.task import TaskCaster
    from loracast.lab.evaluation.tasks import TaskSetup
    from loracast.lab.training.loras import read_multitask

    base = open_base(models)
    has_caster = needs_caster or models.hypernetwork or base.name == DEFAULT_BASE
    given: dict[str, Any] = {name: path for name, path in compared.items() if path is not None}
    for name in given.keys() - {"oracles"}:
        given[name] = read_multitask(given[name], base.fingerprint, name == "multitask_described")
    if not has_caster:
        return TaskSetup(base, None, **given)
    caster = load_caster(models.hypernetwork or shipped_hypernetwork(base, "task"), "task", base, say=say)
    return TaskSetup(base, TaskCaster(caster), **given)


@config_from("loracast.lab.evaluation.harness")
def harness(config: HarnessConfig, choice: BaseChoice, *, library: Library, results: Results) -> None:
    """The lm-evaluation-harness on the base, without and with adapters of the library."""
    from loracast.lab.evaluation.harness import evaluate_harness

    with loading(choice.device) as tell:
        from loracast.answering.model import load

        answerer = load(choice.base, library=library, **choice.how, say=tell, eager=False)
    results.show(evaluate_harness(answerer, config, results.out))


@config_from("loracast.lab.evaluation.overlap")
def overlap(config: OverlapConfig, results: Results) -> None:
    """What held-out tasks or documents share with training ones: rows, near-duplicates, descriptions, passages."""
    from loracast.lab.evaluation.overlap import evaluate_overlap

    results.of("tasks" if config.tasks else "documents", evaluate_overlap, config)


@config_from("loracast.lab.evaluation.images")
def images(
    images: Annotated[Path, "Images to measure on: a folder or zip file with a folder for each class."],
    *,
    seeing: Seeing,
    config: ImagesConfig,
    models: Models,
    results: Results,
) -> None:
    """What the text-only base says of images whose labels became its LoRA, beside the vision model itself."""
    from loracast.lab.data.labelled import read_images
    from loracast.lab.evaluation.images import evaluate_images

    labelled = read_images(images)
    results.of("images", evaluate_images, open_model(models, **seeing.options), labelled, config)
