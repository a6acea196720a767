"""Build commands from functions: each parameter becomes an option, and a dataclass one option for each of its fields.

The name, type and default of an option are the parameter's or the field's. Its help is the text in
`Annotated[type, "help"]`, or the docstring below the field, so that a setting is written once. What has more to say
(bounds, a parser) is `Annotated[type, typer.Option(...), "help"]`. A parameter before the `*` becomes an argument.

A command's module is imported when the command is called or listed, and the command is built only when it is called or
its own --help is asked for: `loracast ask` waits for no other command's imports, and the dataclasses of an evaluation
need torch, which `loracast --help` must not import.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable
from copy import copy
from functools import cache, partial
from importlib import import_module
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape
from typer.core import TyperGroup
from typer.models import OptionInfo

F = TypeVar("F", bound=Callable[..., None])

_SPELLINGS = {
    "adapters": ("-a", "--adapter"),
    "all_documents": ("--all",),
    "allowed_hosts": ("--allowed-host",),
    "as_json": ("--json",),
    "benchmarks": ("--benchmark",),
    "budget_s": ("--budget",),
    "change": ("--set",),
    "cors_origins": ("--cors-origin",),
    "heldout": ("--heldout/--trained",),
    "max_new_tokens": ("--max-tokens",),
    "storage": ("-s", "--storage"),
    "watched": ("--watch",),
}
"""Options whose names differ from those of their fields or parameters."""
_REPEATABLE = {
    "adapters", "allowed_hosts", "benchmarks", "cors_origins", "documents", "held_out", "texts", "unrelated", "watched",
}  # fmt: skip
"""Tuples whose option is repeated for each value; the values of other tuples are separated by commas."""
_OPTION = inspect.Parameter.KEYWORD_ONLY


class CommandGroup(TyperGroup):
    """A group of commands that are listed by their docstrings, and imported and built when they are needed."""

    def get_command(self, ctx: Any, name: str) -> Any:
        command: Any = super().get_command(ctx, name)
        if function := _function_of(command):
            command.help = inspect.getdoc(function)
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if command and (function := _function_of(command)):
            alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            alone.command(command.name)(flattened(function))
            command = typer.main.get_command(alone)
        return name, command, rest


def _function_of(command: Any) -> Callable[..., None] | None:
    """The function of a command that `add` has listed, imported; None for groups."""
    where = getattr(command and command.callback, "where", None)
    if where is None:
        return None
    module, name = where.split(":")
    return getattr(import_module(module), name)


def add(app: typer.Typer, package: str, *places: str, panel: str | None = None) -> None:
    """List functions as commands of `app`, under their names with dashes; a place is "module:function" in `package`."""
    for place in places:

        def listed() -> None: ...

        vars(listed)["where"] = f"{package}.{place}".lstrip(".")
        name = place.partition(":")[2].strip("_").replace("_", "-")
        app.command(name, rich_help_panel=panel)(listed)


def config_from(module: str, *, without: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Say in which module the config of a command stands; it is imported when the command is built.

    Args:
        without: fields that get no option. The function then takes a `functools.partial` of the config and gives them.
    """

    def mark(function: F) -> F:
        vars(function).update(config_module=module, without=without)
        return function

    return mark


def flattened(function: Callable[..., None]) -> Callable[..., None]:
    """The function with an option for each field in place of every parameter that is a dataclass."""
    about = vars(function)
    names = vars(import_module(about["config_module"])) if "config_module" in about else {}
    hints = get_type_hints(function, localns=names, include_extras=True)
    parameters: list[inspect.Parameter] = []
    configs: dict[str, tuple[Any, list[str]]] = {}  # for each dataclass: what makes it, and its fields
    for parameter in inspect.signature(function).parameters.values():
        kind = hints[parameter.name]
        config: Any = get_args(kind)[0] if get_origin(kind) is partial else kind
        if dataclasses.is_dataclass(config):
            made = _options_of(config, about.get("without", ()))
            configs[parameter.name] = config, [option.name for option in made]
            parameters += made
        else:
            parameters.append(_parameter(parameter.replace(annotation=kind)))

    def call(**values: Any) -> None:
        for name, (config, options) in configs.items():
            defaults = {field.name: field.default for field in dataclasses.fields(config)}
            given = {option: values.pop(option) for option in options}
            for option, value in given.items():  # typer gives a list for a tuple, and None for one without values
                if isinstance(value, list):
                    given[option] = tuple(value)
                elif value is None and isinstance(defaults[option], tuple):
                    given[option] = defaults[option]
            values[name] = config(**given) if hints[name] is config else partial(config, **given)
        function(**values)

    call.__name__, call.__doc__ = function.__name__, _reflowed(inspect.getdoc(function) or "")
    call.__annotations__ = {}
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def _reflowed(text: str) -> str:
    """A docstring whose paragraphs are one line each, to be wrapped at the terminal's width; indented lines stay."""
    return re.sub(r"(?<=\S)\n(?=\S)", " ", text)


def _options_of(config: Any, without: tuple[str, ...]) -> list[inspect.Parameter]:
    """A parameter for each field of a dataclass, as typer reads it."""
    hints, documented = get_type_hints(config, include_extras=True), field_docs(config)
    made = []
    for field in sorted(dataclasses.fields(config), key=lambda field: field.kw_only is True):  # inherited: last
        if field.name in without:
            continue
        hint, text = hints[field.name], documented.get(field.name)
        if get_origin(hint) is not Annotated and text is None:
            raise TypeError(f"{config.__name__}.{field.name} has no docstring, so its option has no help")
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        made.append(_parameter(inspect.Parameter(field.name, _OPTION, annotation=hint, default=default), text))
    return made


def _parameter(given: inspect.Parameter, text: str | None = None) -> inspect.Parameter:
    """A parameter as typer reads it, where its annotation may be `Annotated[type, "text of the help"]`.

    Args:
        text: its help where the annotation has none.
    """
    name, hint, default = given.name, given.annotation, given.default
    kind, *about = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    text = next((part for part in about if isinstance(part, str)), text)
    if text is not None and given.kind is _OPTION:
        option = copy(next((part for part in about if isinstance(part, OptionInfo)), typer.Option()))
        option.param_decls = _SPELLINGS.get(name, (f"--{name.replace('_', '-')}",))
        option.help = escape(text)
        if not about:
            kind, default = _typed(name, kind, default, option)
        hint = Annotated[kind, option]
    elif text is not None:
        is_list = list in (get_origin(part) for part in (kind, *get_args(kind)))
        metavar = name.removesuffix("s" * is_list).upper()
        hint = Annotated[kind, typer.Argument(metavar=metavar + "..." * is_list, help=escape(text))]
    return given.replace(annotation=hint, default=default, kind=_OPTION)


def _typed(name: str, hint: Any, default: Any, option: OptionInfo) -> tuple[Any, Any]:
    """The type that typer reads and the default that goes with it, for a field of a config; the option is completed."""
    is_required = default is inspect.Parameter.empty
    kind = next((part for part in get_args(hint) if NoneType in get_args(hint) and part is not NoneType), hint)
    if get_origin(kind) is tuple and name in _REPEATABLE:
        option.help = f"{option.help} Repeatable."
        values: Any = list[get_args(kind)[0]]  # type: ignore[misc]
        return (values, default) if is_required else (values | None, None)
    if get_origin(kind) is tuple:
        each = get_args(kind)[0] if get_args(kind)[0] in (int, float) else str
        option.parser, option.metavar = _listed(each), f"{each.__name__.upper()},..."
        return str | None, default if is_required else ",".join(map(str, default or ())) or None
    if name == "budget_s":
        option.parser, option.metavar = seconds, "TIME"
        return str | None, None if default is None else f"{default:g}s"  # typer parses a default too
    if kind is bool and default is True and name not in _SPELLINGS:
        option.param_decls = (f"--{name.replace('_', '-')}/--no-{name.replace('_', '-')}",)
    return hint, default


def _listed(kind: type) -> Callable[[str], tuple[Any, ...]]:
    """A parser of values that are separated by commas."""

    def read(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not a list of numbers with commas between them") from None

    return read


def seconds(text: str) -> float:
    """A duration such as 90, 45m or 2.5h, in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if not match:
        raise typer.BadParameter("write a duration as 90, 90s, 45m or 2.5h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


@cache
def field_docs(config: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, those of its bases included, in one line each."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
        for line, after in itertools.pairwise(body):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and is_text:
                found[line.target.id] = " ".join(str(after.value.value).split())
    return found
