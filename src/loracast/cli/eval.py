"""`loracast eval`: measure beside baselines. Every command writes results.json and table.md into --out."""

from __future__ import annotations

import typer

from loracast.cli.commands import CommandGroup, add

app = typer.Typer(
    cls=CommandGroup,
    help="Measure adapters beside baselines: answers about documents, tasks, images, cost, side effects.",
    no_args_is_help=True,
)


@app.callback()
def main() -> None:
    """Measure adapters beside baselines."""


_DOCUMENTS = "qa needle facts everyday library gate interference teacher_forced ablations"
add(app, *(f".eval_documents:{name}" for name in _DOCUMENTS.split()), panel="Documents")
add(app, *(f".eval_tasks:{name}" for name in ("tasks", "refining", "overlap", "harness")), panel="Tasks")
add(app, ".eval_modality:image", panel="Images")
add(app, ".eval_documents:latency", ".eval_documents:memory", ".eval_tasks:cost", panel="Cost")
