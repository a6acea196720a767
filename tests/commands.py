"""The commands of the command line with all their options, as typer builds them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from loracast.cli import app


def every_command(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that takes options, with all of them, by its words."""
    group = group or typer.main.get_command(app)
    context = typer.Context(group)
    for name in group.list_commands(context):
        _, command, _ = group.resolve_command(context, [name])
        if hasattr(command, "list_commands"):
            yield from every_command(command, (*path, name))
        else:
            yield (*path, name), command


def options_of(command: Any) -> list[set[str]]:
    """The options of a command, each with all of its spellings."""
    options = [option for option in command.params if option.param_type_name == "option"]
    return [{*option.opts, *option.secondary_opts} for option in options]
