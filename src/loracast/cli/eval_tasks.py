"""`loracast eval` for tasks: tasks, refining, cost, map, harness and overlap."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loracast.cli.commands import config_from
from loracast.cli.eval_results import Results
from loracast.cli.options import BaseChoice, Library, Models
from loracast.cli.output import say
from loracast.cli.session import loading, open_base

if TYPE_CHECKING:
    from loracast.base.load import Base
    from loracast.cast.task import TaskCaster
    from loracast.evaluation.harness import HarnessConfig
    from loracast.evaluation.overlap import OverlapConfig
    from loracast.evaluation.query_cost import CostConfig
    from loracast.evaluation.refining import RefiningConfig
    from loracast.evaluation.tasks import TasksConfig


@config_from("loracast.evaluation.tasks")
def tasks(
    config: TasksConfig,
    *,
    oracles: Annotated[
        Path | None,
        typer.Option("--oracles", help="Library of `loracast train oracle`, for the baselines oracle and average."),
    ] = None,
    multitask: Annotated[
        Path | None, typer.Option("--multitask", help="LoRA of `loracast train multitask`, a baseline.")
    ] = None,
    multitask_described: Annotated[
        Path | None,
        typer.Option("--multitask-described", help="LoRA of `loracast train multitask --described`, a baseline."),
    ] = None,
    models: Models,
    results: Results,
) -> None:
    """Descriptions as adapters, on tasks that no training has seen, beside descriptions and examples in the prompt."""
    from loracast.base.embedded import DEFAULT_BASE
    from loracast.evaluation.task_baselines import TaskSetup
    from loracast.evaluation.tasks import evaluate_tasks
    from loracast.training.oracle import average_of_oracles, read_multitask

    base = open_base(models)
    made_for = base.fingerprint
    described = read_multitask(multitask_described, made_for, True) if multitask_described else None
    setup = TaskSetup(
        base,
        caster=_caster(models, base) if models.hypernetwork or base.name == DEFAULT_BASE else None,
        oracles=oracles,
        multitask=read_multitask(multitask, made_for, False) if multitask else None,
        multitask_described=described,
        average=average_of_oracles(oracles, made_for) if oracles else None,
    )
    results.of("rows", evaluate_tasks, setup, config)


@config_from("loracast.evaluation.refining")
def refining(
    config: RefiningConfig,
    *,
    multitask: Annotated[
        Path | None, typer.Option("--multitask", help="LoRA of `loracast train multitask`, a further starting point.")
    ] = None,
    models: Models,
    results: Results,
) -> None:
    """Gradient descent on a task's examples, measured second by second: from the cast adapter and from scratch."""
    from loracast.evaluation.refining import evaluate_refining
    from loracast.evaluation.task_baselines import TaskSetup
    from loracast.training.oracle import read_multitask

    base = open_base(models)
    start = read_multitask(multitask, base.fingerprint, False) if multitask else None
    setup = TaskSetup(base, caster=_caster(models, base), multitask=start)
    results.of("rows", evaluate_refining, setup, config)


@config_from("loracast.evaluation.query_cost")
def cost(config: CostConfig, models: Models, results: Results) -> None:
    """What a query costs with an adapter, and with a description, examples or a document in the prompt.

    Cost is counted in tokens, operations and seconds.
    """
    from loracast.evaluation.query_cost import evaluate_cost
    from loracast.evaluation.task_baselines import TaskSetup

    base = open_base(models)
    results.of("tasks", evaluate_cost, TaskSetup(base, caster=_caster(models, base)), config)


def _caster(models: Models, base: Base | None = None) -> TaskCaster:
    """Load what casts descriptions; the base is loaded only for a hypernetwork that needs it."""
    from loracast.base.embedded import DEFAULT_BASE
    from loracast.cast.load import load_caster, shipped_hypernetwork
    from loracast.cast.task import TaskCaster

    where = models.hypernetwork or shipped_hypernetwork(base or models.base or DEFAULT_BASE, "task")
    return TaskCaster(load_caster(where, "task", base or (lambda: open_base(models)), say=say))


@config_from("loracast.evaluation.harness")
def harness(config: HarnessConfig, choice: BaseChoice, *, library: Library, results: Results) -> None:
    """The lm-evaluation-harness on the base, without and with adapters of the library."""
    from loracast.evaluation.harness import evaluate_harness

    with loading(choice.device) as tell:
        from loracast.model import load

        answerer = load(choice.base, library=library, **choice.how, say=tell, eager=False)
    results.show(evaluate_harness(answerer, config, results.out))


@config_from("loracast.evaluation.overlap")
def overlap(config: OverlapConfig, results: Results) -> None:
    """What held-out tasks or documents share with training ones: rows, near-duplicates, descriptions, passages."""
    from loracast.evaluation.overlap import evaluate_overlap

    results.of("tasks" if config.tasks else "documents", evaluate_overlap, config)
