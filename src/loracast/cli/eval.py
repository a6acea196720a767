"""`loracast eval`: measure beside baselines. Every command writes results.json and table.md into --out."""

from __future__ import annotations

import typer

from loracast.cli import eval_documents, eval_modality, eval_tasks
from loracast.cli.commands import CommandGroup, add

app = typer.Typer(
    cls=CommandGroup,
    help="Measure adapters beside baselines: answers about documents, tasks, images, cost, side effects.",
    no_args_is_help=True,
)


@app.callback()
def main() -> None:
    """Measure adapters beside baselines."""


add(
    app,
    *(eval_documents.qa, eval_documents.needle, eval_documents.facts, eval_documents.everyday),
    *(eval_documents.library, eval_documents.verbatim, eval_documents.interference),
    *(eval_documents.teacher_forced, eval_documents.ablations),
    panel="Documents",
)
add(app, eval_tasks.tasks, eval_tasks.overlap, eval_tasks.map_, eval_tasks.harness, panel="Tasks")
add(app, eval_modality.image, panel="Images")
add(app, eval_documents.latency, eval_documents.memory, eval_tasks.cost, panel="Cost")
