"""The commands of the lab, `train`, `eval`, `plan` and `make-questions`: the program finds them by an entry point."""

from __future__ import annotations

import typer

from loracast.cli.commands import CommandGroup, add

_PACKAGE = "loracast.lab.cli"
_PANEL = "Research"

_train = typer.Typer(
    cls=CommandGroup, help="Train hypernetworks, and the LoRAs that they are compared with.", no_args_is_help=True
)
add(_train, _PACKAGE, "train:doc", "train:text", panel="Hypernetworks")
add(_train, _PACKAGE, "train:oracle", "train:multitask", "train:window", panel="LoRAs to compare with")
add(_train, _PACKAGE, "train:export", "train:reader", panel="To ship")
add(_train, _PACKAGE, "train:labels", panel="Images")

_eval = typer.Typer(
    cls=CommandGroup,
    help="Measure adapters beside baselines: answers about documents, tasks, images, cost, side effects.",
    no_args_is_help=True,
)
_GENERATED = ("needle", "facts", "everyday", "tables", "corrections", "chats", "near_misses", "capacity")
_DOCUMENTS = ("qa", *_GENERATED, "reader", "library", "interference", "teacher_forced", "ablations")
add(_eval, _PACKAGE, *(f"eval:{name}" for name in _DOCUMENTS), panel="Documents")
add(_eval, _PACKAGE, *(f"eval:{name}" for name in ("tasks", "refining", "overlap", "harness")), panel="Tasks")
add(_eval, _PACKAGE, "eval:images", panel="Images")
add(_eval, _PACKAGE, "eval:latency", "eval:memory", "eval:cost", panel="Cost")


@_eval.callback()
def main() -> None:
    """Measure adapters beside baselines."""


def register(app: typer.Typer) -> None:
    """Add the lab's commands to the program's."""
    add(app, _PACKAGE, "research:plan", "research:make_questions", panel=_PANEL)
    app.add_typer(_train, name="train", rich_help_panel=_PANEL)
    app.add_typer(_eval, name="eval", rich_help_panel=_PANEL)
