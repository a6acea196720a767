"""The commands of `loracast eval` for documents: qa, needle, facts, everyday and others, latency and memory too."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loracast.cli.commands import config_from, seconds
from loracast.cli.eval_results import Results
from loracast.cli.options import BaseChoice, Models
from loracast.cli.session import open_base, open_model

if TYPE_CHECKING:
    from loracast.evaluation.ablations import AblationConfig
    from loracast.evaluation.cost import LatencyConfig, MemoryConfig
    from loracast.evaluation.everyday import EverydayConfig
    from loracast.evaluation.facts import FactsConfig
    from loracast.evaluation.gate import GateConfig
    from loracast.evaluation.interference import InterferenceConfig
    from loracast.evaluation.needle import NeedleConfig
    from loracast.evaluation.qa import QaConfig
    from loracast.evaluation.teacher_forced import TeacherForcedConfig
    from loracast.evaluation.whole_library import LibraryConfig

Change = Annotated[list[str] | None, typer.Option("--set", help="Change a key of the recipe. Repeatable.")]
Texts = Annotated[
    list[str] | None, typer.Option("--texts", help="Prose that needles hide in: JSONL(.gz) or text. Repeatable.")
]
Documents = Annotated[
    list[str] | None, typer.Option("--documents", help="Documents with questions: JSONL(.gz) rows. Repeatable.")
]


@config_from("loracast.evaluation.qa")
def qa(
    config: QaConfig,
    models: Models,
    results: Results,
) -> None:
    """Questions that people asked about real documents: an adapter against (parts of) the document in the prompt."""
    from loracast.evaluation.plots import require_matplotlib
    from loracast.evaluation.qa import draw, evaluate_qa

    require_matplotlib()
    draw(results.of("documents", evaluate_qa, open_model(models), config), results.out)


@config_from("loracast.evaluation.needle")
def needle(config: NeedleConfig, models: Models, results: Results) -> None:
    """Needle in a haystack: a value hidden at any depth of a document, asked for in wordings unseen in training."""
    from loracast.evaluation.needle import evaluate_needle

    results.of("documents", evaluate_needle, open_model(models), config)


@config_from("loracast.evaluation.facts")
def facts(config: FactsConfig, models: Models, results: Results) -> None:
    """Sheets of facts about invented entities, every fact asked for in wordings that no training has seen."""
    from loracast.evaluation.facts import evaluate_facts

    results.of("sheets", evaluate_facts, open_model(models), config)


@config_from("loracast.evaluation.everyday")
def everyday(config: EverydayConfig, models: Models, results: Results) -> None:
    """E-mails, contracts, recipes, price lists and others, in layouts and wordings that no training has seen."""
    from loracast.evaluation.everyday import evaluate_everyday

    results.of("documents", evaluate_everyday, open_model(models), config)


@config_from("loracast.evaluation.gate")
def gate(config: GateConfig, results: Results) -> None:
    """Questions about a document and about something else: which does `ask` take to be about it? No model is loaded."""
    from loracast.evaluation.gate import evaluate_gate

    results.of("runs", evaluate_gate, config)


@config_from("loracast.evaluation.interference")
def interference(config: InterferenceConfig, models: Models, results: Results) -> None:
    """General-knowledge questions while unrelated documents are learned: do adapters harm what the base knows?"""
    from loracast.evaluation.interference import evaluate_interference

    results.of("questions", evaluate_interference, open_model(models), config)


@config_from("loracast.evaluation.whole_library")
def library(config: LibraryConfig, models: Models, results: Results) -> None:
    """Questions to a library of many documents, none named: is the right one found, the answer as good as by name?"""
    from loracast.evaluation.whole_library import evaluate_library

    results.of("documents", evaluate_library, open_model(models), config)


@config_from("loracast.evaluation.teacher_forced", without=("data",))
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
    from loracast.evaluation.teacher_forced import evaluate_teacher_forced
    from loracast.training.doc import read_doc_recipe
    from loracast.training.recipe import file_overrides

    settings = read_doc_recipe(recipe, [*(change or []), *file_overrides(texts=texts, documents=documents)])
    results.of("steps", evaluate_teacher_forced, open_model(models), config(data=settings.data))


@config_from("loracast.evaluation.ablations", without=("recipe", "variants", "overrides"))
def ablations(
    recipe: Annotated[Path, typer.Argument(help="Recipe of `loracast train doc`, without a checkpoint to start from.")],
    variants: Annotated[
        Path,
        typer.Argument(help='TOML file whose table `variants` has lines such as "rank 16" = ["hypernetwork.rank=16"].'),
    ],
    *,
    only: Annotated[list[str] | None, typer.Option("--only", help="Only this one of the variants. Repeatable.")] = None,
    documents: Documents = None,
    texts: Texts = None,
    unrelated: Annotated[
        list[str] | None,
        typer.Option("--unrelated", help="Questions for the KL to the base: JSONL(.gz) rows. Repeatable."),
    ] = None,
    budget: Annotated[
        float, typer.Option("--budget", parser=seconds, metavar="TIME", help="Time of each training: 90s, 20m.")
    ] = 1200.0,
    change: Change = None,
    config: partial[AblationConfig],
    choice: BaseChoice,
    results: Results,
) -> None:
    """Train variants of a recipe from scratch for the same time each, and measure them on documents unseen by all."""
    from loracast.evaluation.ablations import read_variants, run_ablations
    from loracast.training.recipe import file_overrides

    files = file_overrides(documents=documents, texts=texts, unrelated=unrelated)
    whole = config(
        recipe=str(recipe),
        variants=read_variants(variants, only or ()),
        overrides=(*(change or ()), f"training.budget_s={budget}", *files),
    )
    results.of("trainings", run_ablations, open_base(choice), whole)


@config_from("loracast.evaluation.cost")
def latency(config: LatencyConfig, models: Models, results: Results) -> None:
    """Time to the first token: the bare base, an adapter, and the same document in the window."""
    from loracast.evaluation.cost import evaluate_latency

    results.of("questions", evaluate_latency, open_model(models), config)


@config_from("loracast.evaluation.cost")
def memory(config: MemoryConfig, models: Models, results: Results) -> None:
    """Memory and time of learning a document, beside the encoder's own time; a fresh process for each length."""
    from loracast.evaluation.cost import evaluate_memory

    results.of("documents", evaluate_memory, open_model(models), models.base, models.hypernetwork, models.how, config)
