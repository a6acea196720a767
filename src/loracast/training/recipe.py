"""Recipes: TOML files that fix a training run, changed by overrides on the command line."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from loracast.errors import ConfigError
from loracast.training.loop import TrainConfig

R = TypeVar("R")

Tables = dict[str, dict[str, Any]]
"""The tables of a recipe; lists have become tuples, as frozen configs have them."""


def read_tables(path: Path | None, overrides: Sequence[str], known: Mapping[str, Collection[str]]) -> Tables:
    """The tables of a recipe, those that it leaves out empty.

    Args:
        overrides: such as `training.lr=2e-4`.
        known: by table the keys that may be in it.

    Raises:
        ConfigError: the file cannot be read, or holds a table or key that nobody knows (all of them in one message).
    """
    tables: dict[str, Any] = {}
    if path is not None:
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"cannot read the recipe {path}: {error}") from error
    for override in overrides:
        key, separator, value = override.partition("=")
        table, dot, name = key.strip().partition(".")
        if not separator or not dot:
            raise ConfigError(f"{override!r} is not an override; write table.key=value, such as training.lr=2e-4")
        tables.setdefault(table, {})[name] = _value(value.strip())
    problems = [f"unknown table [{table}]" for table in sorted(tables.keys() - known.keys())]
    for table, names in known.items():
        problems += [f"unknown key {table}.{name}" for name in sorted(tables.get(table, {}).keys() - set(names))]
    if problems:
        raise ConfigError("bad recipe: " + "; ".join(problems))
    return {
        table: {k: tuple(v) if isinstance(v, list) else v for k, v in tables.get(table, {}).items()} for table in known
    }


def read_recipe_as(
    recipe: Callable[..., R],
    path: Path | None,
    overrides: Sequence[str],
    *,
    architecture: Collection[str],
    ours: Collection[str],
    objective: Collection[str],
    data: type,
) -> R:
    """A recipe of one of the trainings, from the four tables that they all have.

    Args:
        architecture: keys of `[hypernetwork]` that are the hypernetwork's own options.
        ours: its other keys, which are fields of the recipe.
        objective: keys of `[objective]`, fields of the recipe too.
        data: the dataclass of `[data]`.

    Raises:
        ConfigError: as `read_tables`.
    """
    known = {
        "hypernetwork": {*architecture, *ours},
        "objective": objective,
        "data": keys_of(data),
        "training": keys_of(TrainConfig),
    }
    tables = read_tables(path, overrides, known)
    options = tables["hypernetwork"]
    return recipe(
        **{name: value for name, value in options.items() if name in ours},
        **tables["objective"],
        hypernetwork={name: value for name, value in options.items() if name not in ours},
        data=data(**tables["data"]),
        training=TrainConfig(**tables["training"]),
        asked=frozenset(options),
    )


def file_overrides(**files: Sequence[str] | None) -> list[str]:
    """Overrides that name the data's files: those of `data.texts` for `texts=`, and so on; none where none are given."""
    return [f"data.{key}={json.dumps(list(given))}" for key, given in files.items() if given]


def keys_of(config: type) -> set[str]:
    """The fields of a dataclass."""
    return {field.name for field in dataclasses.fields(config)}


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string
