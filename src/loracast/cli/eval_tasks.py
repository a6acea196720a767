"""`loracast eval tasks | cost | map | harness | overlap`: adapters of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.eval_common import (
    Descriptions,
    Out,
    Seed,
    TaskHypernetwork,
    Trained,
    kind_of,
    numbers,
    show,
)
from loracast.cli.output import progress_bar, say
from loracast.cli.session import open_answerer


def tasks(
    out: Out,
    tasks: options.OptionalTasks = None,
    benchmark: options.Benchmarks = None,
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
    from loracast.base.load import DEFAULT_BASE
    from loracast.cast.load import load_caster, shipped_hypernetwork
    from loracast.cast.task import TaskCaster
    from loracast.evaluation.task_baselines import TaskSetup
    from loracast.evaluation.tasks import TasksConfig, evaluate_tasks
    from loracast.training.oracle import average_of_oracles, read_multitask

    config = TasksConfig(
        tasks=str(tasks) if tasks else None,
        benchmarks=tuple(map(str, benchmark or ())),
        heldout=not trained,
        descriptions=kind_of(descriptions),
        rows=rows,
        seeds=numbers(seeds, int),
        baselines=None if systems == "all" else tuple(name.strip() for name in systems.split(",")),
        only_oracles=only_oracles,
        max_new_tokens=max_new_tokens,
        budget_s=budget_s,
    )
    loaded = open_answerer(base, None, device).base
    setup = TaskSetup(
        loaded,
        caster=TaskCaster(load_caster(hypernetwork or shipped_hypernetwork(loaded, "task"), "task", loaded, say=say))
        if hypernetwork or loaded.name == DEFAULT_BASE
        else None,
        oracles=oracles,
        multitask=read_multitask(multitask, loaded.fingerprint, False) if multitask else None,
        multitask_described=read_multitask(multitask_described, loaded.fingerprint, True)
        if multitask_described
        else None,
        average=average_of_oracles(oracles, loaded.fingerprint) if oracles else None,
    )
    with progress_bar("rows") as progress:
        report = evaluate_tasks(setup, config, out, progress)
    show(report, out, as_json)


def cost(
    out: Out,
    hypernetwork: TaskHypernetwork = None,
    tasks: options.OptionalTasks = None,
    benchmark: options.Benchmarks = None,
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
    from loracast.cast.load import load_caster, shipped_hypernetwork
    from loracast.cast.task import TaskCaster
    from loracast.evaluation.query_cost import CostConfig, evaluate_cost
    from loracast.evaluation.task_baselines import TaskSetup

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
    where = hypernetwork or shipped_hypernetwork(loaded, "task")
    setup = TaskSetup(loaded, caster=TaskCaster(load_caster(where, "task", loaded, say=say)))
    with progress_bar("tasks") as progress:
        report = evaluate_cost(setup, config, out, progress)
    show(report, out, as_json)


def skill_map(
    out: Out,
    tasks: options.Tasks,
    hypernetwork: TaskHypernetwork = None,
    descriptions: Descriptions = "heldout",
    seed: Seed = 0,
    base: options.Base = None,
    as_json: options.Json = False,
) -> None:
    """The map of skills: the LoRAs of all tasks in two dimensions, and how well families of tasks part."""
    from loracast.base.load import DEFAULT_BASE
    from loracast.cast.load import load_caster, shipped_hypernetwork
    from loracast.cast.task import TaskCaster
    from loracast.evaluation.skill_map import MapConfig, evaluate_map

    config = MapConfig(str(tasks), kind_of(descriptions), seed)
    where = hypernetwork or shipped_hypernetwork(base or DEFAULT_BASE, "task")
    caster = TaskCaster(load_caster(where, "task", lambda: open_answerer(base, None, None).base, say=say))
    report = evaluate_map(caster, config, out)
    show(report, out, as_json)


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
    show(report, out, as_json)


def overlap(
    out: Out,
    tasks: options.Tasks,
    near: Annotated[float, typer.Option(help="Share of common words from which two inputs are nearly the same.")] = 0.8,
    as_json: options.Json = False,
) -> None:
    """What held-out tasks share with those of the training: the same rows, nearly the same inputs, descriptions that say the same."""
    from loracast.evaluation.overlap import OverlapConfig, evaluate_overlap

    with progress_bar("tasks") as progress:
        report = evaluate_overlap(OverlapConfig(str(tasks), near), out, progress)
    show(report, out, as_json)
