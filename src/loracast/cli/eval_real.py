"""`loracast eval qa | interference | verbatim`: real documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.eval_common import (
    Budget,
    ChunkTokens,
    Documents,
    DocumentSplit,
    Out,
    Route,
    Seed,
    Sources,
    Texts,
    names,
    numbers,
    show,
)
from loracast.cli.output import progress_bar
from loracast.cli.session import open_model
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.library.routing import DEFAULT_ROUTE


def qa(
    out: Out,
    documents: Documents,
    sources: Sources = None,
    max_documents: Annotated[int, typer.Option(help="Most documents of each source.", min=1)] = 200,
    max_questions: Annotated[int | None, typer.Option(help="Most questions about one document.", min=1)] = None,
    spans_only: Annotated[
        bool, typer.Option("--spans-only", help="Only questions whose answer stands in the document.")
    ] = False,
    systems: Annotated[
        str | None,
        typer.Option(help="Rivals to run, with commas (docs/evaluation.md); all but other prompts by default."),
    ] = None,
    reader: Annotated[
        Path | None, typer.Option(help="LoRA of `loracast train reader`: the ceiling, with the document in the window.")
    ] = None,
    route: Route = DEFAULT_ROUTE,
    chunk_tokens: ChunkTokens = DEFAULT_CHUNK_TOKENS,
    split: DocumentSplit = "test",
    seed: Seed = 0,
    hypernetwork: options.Hypernetwork = None,
    base: options.Base = None,
    device: options.Device = None,
    budget_s: Budget = None,
    as_json: options.Json = False,
) -> None:
    """Questions that people asked about real documents: an adapter beside the document, or parts of it, in the window."""
    from loracast.evaluation.plots import require_matplotlib
    from loracast.evaluation.qa import QaConfig, draw, evaluate_qa
    from loracast.training.reader import read_reader

    config = QaConfig(
        documents=tuple(documents),
        sources=names(sources),
        max_documents=max_documents,
        max_questions=max_questions,
        spans_only=spans_only,
        baselines=names(systems),
        route=route,
        chunk_tokens=chunk_tokens,
        split=split,
        seed=seed,
        budget_s=budget_s,
    )
    require_matplotlib()
    model = open_model(base, hypernetwork, None, device)
    ceiling = read_reader(reader, model.base.fingerprint).to(model.base.device) if reader else None
    with progress_bar("documents") as progress:
        report = evaluate_qa(model, config, out, progress, ceiling)
    draw(report, out)
    show(report, out, as_json)


def interference(
    out: Out,
    benchmark: Annotated[
        list[str], typer.Option(help="File of questions with choices (bench_NAME_test.jsonl.gz). Repeatable.")
    ],
    documents: Documents,
    sources: Sources = None,
    counts: Annotated[str, typer.Option(help="Documents learned at once, with commas.")] = "0,1,4,16",
    questions: Annotated[int, typer.Option(help="Questions of each benchmark.", min=1)] = 200,
    route: Route = DEFAULT_ROUTE,
    chunk_tokens: ChunkTokens = DEFAULT_CHUNK_TOKENS,
    split: DocumentSplit = "test",
    seed: Seed = 0,
    hypernetwork: options.Hypernetwork = None,
    base: options.Base = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Harm: general-knowledge questions, with documents learned that have nothing to do with them."""
    from loracast.evaluation.interference import InterferenceConfig, evaluate_interference

    config = InterferenceConfig(
        benchmarks=tuple(benchmark),
        documents=tuple(documents),
        sources=names(sources),
        counts=numbers(counts, int),
        questions=questions,
        route=route,
        chunk_tokens=chunk_tokens,
        split=split,
        seed=seed,
    )
    model = open_model(base, hypernetwork, None, device)
    with progress_bar("questions") as progress:
        report = evaluate_interference(model, config, out, progress)
    show(report, out, as_json)


def verbatim(
    out: Out,
    documents: Documents,
    sources: Sources = None,
    max_documents: Annotated[int, typer.Option(help="Documents, drawn at random.", min=1)] = 100,
    passages: Annotated[int, typer.Option(help="Most passages of each.", min=1)] = 4,
    systems: Annotated[
        str, typer.Option(help="Rivals to run: none, adapter, other, window.")
    ] = "none,adapter,other,window",
    chunk_tokens: ChunkTokens = DEFAULT_CHUNK_TOKENS,
    split: DocumentSplit = "test",
    seed: Seed = 0,
    hypernetwork: options.Hypernetwork = None,
    base: options.Base = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Word for word: how much of a document's own continuation is the likeliest, from its first eight tokens on."""
    from loracast.evaluation.verbatim import VerbatimConfig, evaluate_verbatim

    config = VerbatimConfig(
        documents=tuple(documents),
        sources=names(sources),
        max_documents=max_documents,
        passages=passages,
        baselines=names(systems),
        chunk_tokens=chunk_tokens,
        split=split,
        seed=seed,
    )
    model = open_model(base, hypernetwork, None, device)
    with progress_bar("documents") as progress:
        report = evaluate_verbatim(model, config, out, progress)
    show(report, out, as_json)


def forced(
    out: Out,
    recipe: Annotated[
        Path | None, typer.Argument(help="DocRecipe of a training, whose table [data] says what episodes look like.")
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key: data.max_facts=5. Repeatable.")
    ] = None,
    texts: Texts = None,
    documents: Annotated[
        list[str] | None, typer.Option(help="Documents with questions, of no training: JSONL(.gz) rows. Repeatable.")
    ] = None,
    kinds: Annotated[
        str, typer.Option(help="Kinds of episodes, with commas.")
    ] = "facts,needle,questions,cloze,reading",
    steps: Annotated[int, typer.Option(help="Steps of each kind.", min=1)] = 8,
    hypernetwork: options.Hypernetwork = None,
    base: options.Base = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Teacher-forced, in minutes: which tokens of the answers would be right, on episodes like those of the training. To choose between settings."""
    from loracast.evaluation.teacher_forced import TeacherForcedConfig, evaluate_teacher_forced
    from loracast.training.doc import read_doc_recipe
    from loracast.training.recipe import file_overrides

    data = read_doc_recipe(recipe, [*(change or []), *file_overrides(texts=texts, documents=documents)]).data
    config = TeacherForcedConfig(data=data, kinds=names(kinds), steps=steps)  # type: ignore[arg-type]
    model = open_model(base, hypernetwork, None, device)
    with progress_bar("steps") as progress:
        report = evaluate_teacher_forced(model, config, out, progress)
    show(report, out, as_json)
