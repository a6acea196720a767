"""`loracast eval`: measure, with the rivals in the same run. Every command writes results.json and table.md into --out."""

from __future__ import annotations

import typer

from loracast.cli import eval_ablations, eval_real, eval_synthetic, eval_tasks
from loracast.cli import eval_modality as eval_sense

app = typer.Typer(
    help="Measure adapters beside their rivals: questions about real documents, needles, tasks, cost, harm.",
    no_args_is_help=True,
)


@app.callback()
def main() -> None:
    """Measure adapters beside their rivals."""


app.command()(eval_synthetic.needle)
app.command()(eval_synthetic.facts)
app.command()(eval_real.qa)
app.command()(eval_real.verbatim)
app.command()(eval_real.interference)
app.command()(eval_real.forced)
app.command()(eval_ablations.ablations)
app.command()(eval_sense.image)
app.command()(eval_synthetic.latency)
app.command()(eval_synthetic.memory)
app.command()(eval_tasks.tasks)
app.command()(eval_tasks.cost)
app.command(name="map")(eval_tasks.skill_map)
app.command()(eval_tasks.harness)
app.command()(eval_tasks.overlap)
