"""`loracast eval`: measure, with the rivals in the same run. Every command writes results.json and table.md into --out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, get_args

import typer

from loracast.cli import options
from loracast.cli.output import print_json, say, stderr, stdout
from loracast.cli.session import open_answerer, open_model
from loracast.routing import DEFAULT_ROUTE

if TYPE_CHECKING:
    from loracast.evaluation.report import Report
    from loracast.tasks import DescriptionKind

Number = TypeVar("Number", int, float)

app = typer.Typer(
    help="Measure adapters beside their rivals: needles, fact sheets, latency, memory.", no_args_is_help=True
)

Out = Annotated[Path, typer.Option(help="Folder for results.json, table.md and pictures.")]
Texts = Annotated[
    list[str] | None, typer.Option(help="Prose that no training has seen: JSONL(.gz) or plain text. Repeatable.")
]
Systems = Annotated[
    str, typer.Option(help="Rivals to run, with commas: merged, routed, none, other, window, bm25, bm25k; or all.")
]
Route = Annotated[int, typer.Option(help="Chunks that a question is given when routed.", min=1)]
ChunkTokens = Annotated[int, typer.Option(help="Longest chunk, in tokens.", min=16)]
Seed = Annotated[int, typer.Option(help="Seed of documents and questions.")]
Budget = Annotated[float | None, typer.Option("--budget-s", help="Stop drawing documents after this many seconds.")]
Tasks = Annotated[Path, typer.Option(help="Tasks: a folder of JSON files, or a JSONL(.gz) file of examples.")]
OptionalTasks = Annotated[
    Path | None, typer.Option(help="Tasks: a folder of JSON files, or a JSONL(.gz) file of examples.")
]
Benchmarks = Annotated[
    list[Path] | None,
    typer.Option(help="File of a benchmark (bench_NAME_test.jsonl.gz), in place of --tasks. Repeatable."),
]
Trained = Annotated[bool, typer.Option("--trained", help="The tasks of the training, in place of those held out.")]
TaskHypernetwork = Annotated[
    str | None,
    typer.Option("--hypernetwork", help="Folder or hub id of a text-to-LoRA hypernetwork; the shipped one by default."),
]
Descriptions = Annotated[str, typer.Option(help="Kind of description: heldout, train or paraphrase.")]
Split = Annotated[str, typer.Option(help="Wordings and entities: dev to choose between settings, test to report.")]


@app.callback()
def main() -> None:
    """Measure adapters beside their rivals."""


@app.command()
def needle(
    out: Out,
    texts: Texts = None,
    lengths: Annotated[str, typer.Option(help="Tokens of a document, with commas.")] = "256,1024,4096,8192,32768",
    samples: Annotated[int, typer.Option(help="Documents of each length.", min=1)] = 400,
    samples_long: Annotated[int, typer.Option(help="The same, past 8192 tokens.", min=1)] = 100,
    samples_window: Annotated[int, typer.Option(help="Of them, put into the window from 4096 tokens on.", min=1)] = 50,
    depths: Annotated[str, typer.Option(help="uniform, or depths from 0 to 1 with commas.")] = "uniform",
    kind: Annotated[str, typer.Option(help="Kind of value (number4, word, person ...), or any.")] = "number4",
    route: Route = DEFAULT_ROUTE,
    chunk_tokens: ChunkTokens = 256,
    storage: options.StorageOption = "bf16",
    systems: Systems = "all",
    split: Split = "test",
    seed: Seed = 0,
    hypernetwork: options.Hypernetwork = None,
    base: options.Base = None,
    device: options.Device = None,
    budget_s: Budget = None,
    as_json: options.Json = False,
) -> None:
    """A sentence with a value, hidden at any depth of a document, asked for in wordings that no training has seen."""
    from loracast.evaluation.needle import NeedleConfig, evaluate_needle

    config = NeedleConfig(
        texts=tuple(texts or ()),
        lengths=_numbers(lengths, int),
        samples=samples,
        samples_long=samples_long,
        samples_window=samples_window,
        depths=() if depths == "uniform" else _numbers(depths, float),
        kind=None if kind == "any" else kind,
        route=route,
        chunk_tokens=chunk_tokens,
        storage=storage,
        systems=_systems(systems),
        split=_split(split),
        seed=seed,
        budget_s=budget_s,
    )
    model = open_model(base, hypernetwork, None, device)
    with _progress("documents") as progress:
        report = evaluate_needle(model, config, out, progress)
    _show(report, out, as_json)


@app.command()
def facts(
    out: Out,
    facts: Annotated[str, typer.Option(help="Facts on a sheet, with commas.")] = "5,20",
    sheets: Annotated[int, typer.Option(help="Sheets of each size; all their questions are asked.", min=1)] = 50,
    route: Route = DEFAULT_ROUTE,
    chunk_tokens: ChunkTokens = 256,
    storage: options.StorageOption = "bf16",
    systems: Systems = "all",
    split: Split = "test",
    seed: Seed = 0,
    hypernetwork: options.Hypernetwork = None,
    base: options.Base = None,
    device: options.Device = None,
    budget_s: Budget = None,
    as_json: options.Json = False,
) -> None:
    """Sheets of facts about invented entities, every fact asked for in wordings that no training has seen."""
    from loracast.evaluation.facts import FactsConfig, evaluate_facts

    config = FactsConfig(
        facts=_numbers(facts, int),
        sheets=sheets,
        route=route,
        chunk_tokens=chunk_tokens,
        storage=storage,
        systems=_systems(systems),
        split=_split(split),
        seed=seed,
        budget_s=budget_s,
    )
    model = open_model(base, hypernetwork, None, device)
    with _progress("sheets") as progress:
        report = evaluate_facts(model, config, out, progress)
    _show(report, out, as_json)


@app.command()
def qa(
    out: Out,
    documents: Annotated[list[str], typer.Option(help="Documents with questions: JSONL(.gz) rows. Repeatable.")],
    sources: Annotated[str | None, typer.Option(help="Of rows with a source, only these, with commas.")] = None,
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
    chunk_tokens: ChunkTokens = 256,
    split: Annotated[str, typer.Option(help="Of rows with a split, only this one.")] = "test",
    seed: Seed = 0,
    hypernetwork: options.Hypernetwork = None,
    base: options.Base = None,
    device: options.Device = None,
    budget_s: Budget = None,
    as_json: options.Json = False,
) -> None:
    """Questions that people asked about real documents: an adapter beside the document, or parts of it, in the window."""
    from loracast.evaluation.plots import require_matplotlib
    from loracast.evaluation.qa.evaluate import QaConfig, draw, evaluate_qa
    from loracast.evaluation.qa.rivals import Setup
    from loracast.training.reader import read_reader

    config = QaConfig(
        documents=tuple(documents),
        sources=_names(sources),
        max_documents=max_documents,
        max_questions=max_questions,
        spans_only=spans_only,
        systems=_names(systems),
        route=route,
        chunk_tokens=chunk_tokens,
        split=split,
        seed=seed,
        budget_s=budget_s,
    )
    require_matplotlib()
    model = open_model(base, hypernetwork, None, device)
    ceiling = read_reader(reader, model.base.fingerprint).to(model.base.device) if reader else None
    setup = Setup(model, route, chunk_tokens, ceiling)
    with _progress("documents") as progress:
        report = evaluate_qa(setup, config, out, progress)
    draw(report, out)
    _show(report, out, as_json)


@app.command()
def interference(
    out: Out,
    benchmark: Annotated[
        list[str], typer.Option(help="File of questions with choices (bench_NAME_test.jsonl.gz). Repeatable.")
    ],
    documents: Annotated[
        list[str], typer.Option(help="Documents to learn: JSONL(.gz) rows with questions. Repeatable.")
    ],
    sources: Annotated[str | None, typer.Option(help="Of documents with a source, only these, with commas.")] = None,
    counts: Annotated[str, typer.Option(help="Documents learned at once, with commas.")] = "0,1,4,16",
    questions: Annotated[int, typer.Option(help="Questions of each benchmark.", min=1)] = 200,
    route: Route = DEFAULT_ROUTE,
    chunk_tokens: ChunkTokens = 256,
    split: Annotated[str, typer.Option(help="Of documents with a split, only this one.")] = "test",
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
        sources=_names(sources),
        counts=_numbers(counts, int),
        questions=questions,
        route=route,
        chunk_tokens=chunk_tokens,
        split=split,
        seed=seed,
    )
    model = open_model(base, hypernetwork, None, device)
    with _progress("questions") as progress:
        report = evaluate_interference(model, config, out, progress)
    _show(report, out, as_json)


@app.command()
def latency(
    out: Out,
    texts: Texts = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the document.", min=64)] = 8192,
    repetitions: Annotated[int, typer.Option(help="Questions, each asked of every rival in turn.", min=1)] = 20,
    route: Route = DEFAULT_ROUTE,
    seed: Seed = 0,
    hypernetwork: options.Hypernetwork = None,
    base: options.Base = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Time to the first token: the bare base, an adapter, and the same document in the window."""
    from loracast.evaluation.cost import LatencyConfig, evaluate_latency

    config = LatencyConfig(tuple(texts or ()), tokens, repetitions, route, seed)
    model = open_model(base, hypernetwork, None, device)
    with _progress("questions") as progress:
        report = evaluate_latency(model, config, out, progress)
    _show(report, out, as_json)


@app.command()
def memory(
    out: Out,
    texts: Texts = None,
    lengths: Annotated[str, typer.Option(help="Tokens of a document, with commas.")] = "8192,32768,131072",
    chunk_tokens: ChunkTokens = 256,
    seed: Seed = 0,
    hypernetwork: options.Hypernetwork = None,
    base: options.Base = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Memory and time of learning a document, beside the encoder's own time; a fresh process for each length."""
    from loracast.evaluation.cost import MemoryConfig, evaluate_memory

    config = MemoryConfig(tuple(texts or ()), _numbers(lengths, int), chunk_tokens, seed)
    model = open_model(base, hypernetwork, None, device)
    with _progress("documents") as progress:
        report = evaluate_memory(model, base, hypernetwork, config, out, progress)
    _show(report, out, as_json)


@app.command()
def tasks(
    out: Out,
    tasks: OptionalTasks = None,
    benchmark: Benchmarks = None,
    hypernetwork: TaskHypernetwork = None,
    oracles: Annotated[
        Path | None, typer.Option(help="Library of `loracast train oracle`: the rivals oracle and average.")
    ] = None,
    only_oracles: Annotated[
        bool, typer.Option("--only-oracles", help="Of the tasks only those that have an oracle.")
    ] = False,
    multitask: Annotated[Path | None, typer.Option(help="LoRA of `loracast train multitask`.")] = None,
    multitask_described: Annotated[
        Path | None, typer.Option(help="LoRA of `loracast train multitask --described`.")
    ] = None,
    systems: Annotated[
        str,
        typer.Option(
            help="Rivals to run, with commas: none, described, shots3, shots5, described_shots3, described_shots5, average, multitask, "
            "multitask_described, adapter, other, gibberish, shuffled, constant, oracle; or all for which there is what they need."
        ),
    ] = "all",
    rows: Annotated[int, typer.Option(help="Most test rows of a task.", min=1)] = 50,
    seeds: Annotated[str, typer.Option(help="Seeds of descriptions and examples, with commas.")] = "0,1",
    trained: Trained = False,
    descriptions: Descriptions = "heldout",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Longest answer, in tokens; by default 32, or 256 where a number is worked out.", min=1),
    ] = None,
    base: options.Base = None,
    device: options.Device = None,
    budget_s: Annotated[
        float | None, typer.Option("--budget-s", help="Begin no further task after this many seconds.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Descriptions as adapters, on tasks that no training has seen, beside descriptions and examples in the prompt."""
    from loracast.describe import load_caster
    from loracast.evaluation.task_rivals import Given
    from loracast.evaluation.tasks import TasksConfig, evaluate_tasks
    from loracast.model import SHIPPED, shipped_hypernetwork
    from loracast.training.oracle import average_of_oracles, read_multitask

    config = TasksConfig(
        tasks=str(tasks) if tasks else None,
        benchmarks=tuple(map(str, benchmark or ())),
        heldout=not trained,
        descriptions=_kind(descriptions),
        rows=rows,
        seeds=_numbers(seeds, int),
        systems=None if systems == "all" else tuple(name.strip() for name in systems.split(",")),
        only_oracles=only_oracles,
        max_new_tokens=max_new_tokens,
        budget_s=budget_s,
    )
    loaded = open_answerer(base, None, device).base
    given = Given(
        loaded,
        caster=load_caster(hypernetwork or shipped_hypernetwork(loaded.name, "text"), base=loaded, say=say)
        if hypernetwork or ("text", loaded.name) in SHIPPED
        else None,
        oracles=oracles,
        multitask=read_multitask(multitask, loaded.fingerprint, False) if multitask else None,
        multitask_described=read_multitask(multitask_described, loaded.fingerprint, True)
        if multitask_described
        else None,
        average=average_of_oracles(oracles, loaded.fingerprint) if oracles else None,
    )
    with _progress("rows") as progress:
        report = evaluate_tasks(given, config, out, progress)
    _show(report, out, as_json)


@app.command()
def cost(
    out: Out,
    hypernetwork: TaskHypernetwork = None,
    tasks: OptionalTasks = None,
    benchmark: Benchmarks = None,
    texts: Annotated[
        list[str] | None, typer.Option(help="Prose for a document in the window: JSONL(.gz) or plain text. Repeatable.")
    ] = None,
    document_tokens: Annotated[int, typer.Option(help="Tokens of that document.", min=1)] = 4096,
    queries: Annotated[int, typer.Option(help="Queries of each task, asked of every rival in turn.", min=1)] = 4,
    watts: Annotated[float, typer.Option(help="Power that the machine is taken to draw.")] = 15.0,
    trained: Trained = False,
    seed: Seed = 0,
    base: options.Base = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """What a query costs with an adapter, and with a description, examples or a document in the prompt: tokens, operations, seconds."""
    from loracast.describe import load_caster
    from loracast.evaluation.query_cost import CostConfig, evaluate_cost
    from loracast.evaluation.task_rivals import Given
    from loracast.model import shipped_hypernetwork

    config = CostConfig(
        tasks=str(tasks) if tasks else None,
        benchmarks=tuple(map(str, benchmark or ())),
        heldout=not trained,
        queries=queries,
        texts=tuple(texts or ()),
        document_tokens=document_tokens,
        watts=watts,
        seed=seed,
    )
    loaded = open_answerer(base, None, device).base
    where = hypernetwork or shipped_hypernetwork(loaded.name, "text")
    given = Given(loaded, caster=load_caster(where, base=loaded, say=say))
    with _progress("tasks") as progress:
        report = evaluate_cost(given, config, out, progress)
    _show(report, out, as_json)


@app.command(name="map")
def skill_map(
    out: Out,
    tasks: Tasks,
    hypernetwork: TaskHypernetwork = None,
    descriptions: Descriptions = "heldout",
    seed: Seed = 0,
    base: options.Base = None,
    as_json: options.Json = False,
) -> None:
    """The map of skills: the LoRAs of all tasks in two dimensions, and how well families of tasks part."""
    from loracast.base import DEFAULT_BASE
    from loracast.describe import load_caster
    from loracast.evaluation.skill_map import MapConfig, evaluate_map
    from loracast.model import shipped_hypernetwork

    config = MapConfig(str(tasks), _kind(descriptions), seed)
    where = hypernetwork or shipped_hypernetwork(base or DEFAULT_BASE, "text")
    caster = load_caster(where, base=lambda: open_answerer(base, None, None).base, say=say)
    report = evaluate_map(caster, config, out)
    _show(report, out, as_json)


@app.command()
def harness(
    out: Out,
    tasks: Annotated[str, typer.Option(help="Tasks of the lm-evaluation-harness, with commas.")],
    adapters: options.Adapters = None,
    include: Annotated[Path | None, typer.Option(help="Folder with task files (YAML) of your own.")] = None,
    shots: Annotated[int | None, typer.Option(help="Examples in the prompt; as the task says by default.")] = None,
    limit: Annotated[int | None, typer.Option(help="Most rows of a task.", min=1)] = None,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Questions as turns of a chat.")] = True,
    batch_size: Annotated[int, typer.Option(help="Rows of one forward pass.", min=1)] = 8,
    seed: Seed = 0,
    base: options.Base = None,
    library: options.Library = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """The lm-evaluation-harness on the base, without and with adapters of the library."""
    from loracast.evaluation.harness import HarnessConfig, evaluate_harness

    config = HarnessConfig(
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
        adapters=tuple(adapters or ()),
        include=str(include) if include else None,
        shots=shots,
        limit=limit,
        chat=chat,
        batch_size=batch_size,
        seed=seed,
    )
    report = evaluate_harness(open_answerer(base, library, device), config, out)
    _show(report, out, as_json)


@app.command()
def overlap(
    out: Out,
    tasks: Tasks,
    near: Annotated[float, typer.Option(help="Share of common words from which two inputs are nearly the same.")] = 0.8,
    as_json: options.Json = False,
) -> None:
    """What held-out tasks share with those of the training: the same rows, nearly the same inputs, descriptions that say the same."""
    from loracast.evaluation.overlap import OverlapConfig, evaluate_overlap

    with _progress("tasks") as progress:
        report = evaluate_overlap(OverlapConfig(str(tasks), near), out, progress)
    _show(report, out, as_json)


def _numbers(text: str, kind: type[Number]) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers with commas between them") from None


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text else ()


def _systems(text: str) -> tuple[str, ...]:
    from loracast.evaluation.systems import SYSTEMS, check_systems

    return tuple(SYSTEMS) if text == "all" else check_systems([name.strip() for name in text.split(",")])


def _kind(text: str) -> DescriptionKind:
    from loracast.tasks import DescriptionKind

    if text not in get_args(DescriptionKind):
        raise typer.BadParameter(f"give one of {', '.join(get_args(DescriptionKind))}")
    return text  # type: ignore[return-value]


def _split(text: str) -> Literal["dev", "test"]:
    if text not in ("dev", "test"):
        raise typer.BadParameter("give dev or test; what was trained on tells nothing")
    return "dev" if text == "dev" else "test"


@contextmanager
def _progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(unit), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr(), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show(report: Report, out: Path, as_json: bool) -> None:
    if as_json:
        print_json(report.to_dict())
    else:
        report.show(stdout())
        say(f"written to {out}")
