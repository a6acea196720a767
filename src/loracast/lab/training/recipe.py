"""Read recipes, TOML files that fix a training run, and start a hypernetwork's training as one says."""

from __future__ import annotations

import dataclasses
import functools
import json
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack, get_type_hints

from loracast.base.fingerprint import check
from loracast.base.load import Base
from loracast.errors import ConfigError
from loracast.files import value_faults
from loracast.hypernets.store import H, read_provenance
from loracast.lab.training.loop import Objective, OnMetrics, TrainConfig, Workers, train

R = TypeVar("R")

Tables = dict[str, dict[str, Any]]
"""The tables of a recipe; lists have become tuples, as in frozen configs."""


def read_tables(path: Path | None, overrides: Sequence[str], known: Mapping[str, Collection[str]]) -> Tables:
    """Read the tables of a recipe, changed by overrides (`training.lr=2e-4`); a table that the file lacks is empty.

    Raises ConfigError if the file cannot be read, or has tables or keys that are not `known` (all in one message).
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
    hypernetwork: Collection[str],
    fields: Collection[str],
    objective: Collection[str],
) -> R:
    """Read a hypernetwork's recipe: the tables `[hypernetwork]`, `[objective]`, `[data]` and `[training]`.

    Args:
        recipe: a dataclass with the fields `hypernetwork`, `data`, `training` and `given`.
        hypernetwork: keys of `[hypernetwork]` that are options of the hypernetwork's config.
        fields: its other keys, which are fields of the recipe; so are those of `[objective]`.
    """
    data = get_type_hints(recipe)["data"]
    known = {
        "hypernetwork": {*hypernetwork, *fields},
        "objective": objective,
        "data": keys_of(data),
        "training": keys_of(TrainConfig),
    }
    tables = read_tables(path, overrides, known)
    options = tables["hypernetwork"]
    own = {name: value for name, value in options.items() if name in fields} | tables["objective"]
    check_values(recipe, own)
    check_values(data, tables["data"])
    check_values(TrainConfig, tables["training"])
    return recipe(
        **own,
        hypernetwork={name: value for name, value in options.items() if name not in fields},
        data=data(**tables["data"]),
        training=TrainConfig(**tables["training"]),
        given=frozenset(options),
    )


def read_lora_recipe(default: R, path: Path | None, overrides: Sequence[str]) -> R:
    """Read a LoRA's recipe, the tables `[lora]`, `[data]` and `[training]`; `default` has values for missing keys."""
    known = {name: keys_of(type(getattr(default, name))) for name in ("lora", "data", "training")}
    tables = read_tables(path, overrides, known)
    for name, given in tables.items():
        check_values(type(getattr(default, name)), given)
    changed = {name: dataclasses.replace(getattr(default, name), **given) for name, given in tables.items()}
    return dataclasses.replace(default, **changed)  # type: ignore[type-var]


def check_values(config: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Raise ConfigError for a recipe's values that are not of the types of a config's fields; all in one message."""
    if faults := value_faults(config, values):
        raise ConfigError(f"bad recipe: {'; '.join(faults)}; each of another type than its option")


def file_overrides(**files: Sequence[str] | None) -> list[str]:
    """Overrides that name data files: `texts=` sets `data.texts`, and so on; a list that is not given is left alone."""
    return [f"data.{key}={json.dumps(list(given))}" for key, given in files.items() if given]


def recorded(data: Any) -> dict[str, Any]:
    """A data config as a run records it: with the names of its files, not their folders on this machine."""
    files = {"texts", "documents", "unrelated"}
    values = dataclasses.asdict(data).items()
    return {key: [Path(name).name for name in value] if key in files else value for key, value in values}


def keys_of(config: type) -> set[str]:
    """The fields of a dataclass."""
    return {field.name for field in dataclasses.fields(config)}


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string


def check_not_given(given: Collection[str]) -> None:
    """Raise ConfigError if the recipe's `[hypernetwork]` table has keys that the checkpoint of --init-from fixes."""
    if given:
        raise ConfigError(
            "--init-from takes the architecture from the checkpoint; "
            f"leave {', '.join(sorted(given))} out of [hypernetwork]"
        )


def start_from(folder: Path, architecture: type[H], base: Base, given: Collection[str] = ()) -> H:
    """The hypernetwork whose weights a fresh run starts from, checked against the base; ConfigError as above."""
    check_not_given(given)
    hypernet = architecture.from_pretrained(folder)
    if hypernet.made_for is not None:
        check(hypernet.made_for, base.fingerprint, f"the hypernetwork in {folder}")
    hypernet.requires_grad_(True)
    return hypernet


class Reporting(TypedDict, total=False):
    """Options for the record of a training and its metrics."""

    command: str
    """The command, for the checkpoint's provenance."""
    on_metrics: OnMetrics
    """Receives each line of metrics."""


def train_hypernet(
    hypernet: H,
    objective: Objective,
    config: TrainConfig,
    out_dir: Path,
    *,
    base: Base,
    init_from: Path | None,
    about: Mapping[str, Any],
    workers: Workers,
    finish: Callable[[], None] | None = None,
    **reporting: Unpack[Reporting],
) -> dict[str, float]:
    """Train a hypernetwork, or resume the run in `out_dir`. Returns the last metrics.

    The hypernetwork lies in `out_dir` afterwards (fp32), the metrics in `metrics.jsonl`.

    Args:
        about: what is trained on, for the checkpoint's provenance; a run with other values is not resumed.
        finish: last changes to the hypernetwork whenever training stops; it is saved once more after them.
    """
    started_as = read_provenance(init_from) if init_from is not None else {}
    # An average of runs has no history of its own.
    before: list[Any] = started_as.get("history") or ([started_as] if started_as else [])
    command, on_metrics = reporting.get("command", ""), reporting.get("on_metrics", lambda metrics: None)
    provenance = {"history": [*before, {"command": command, **about, "training": dataclasses.asdict(config)}]}
    save_model = functools.partial(hypernet.save_pretrained, storage="float32", provenance=provenance)
    hypernet.made_for = base.fingerprint
    settings = {**about, "hypernetwork": dataclasses.asdict(hypernet.config), "base": base.fingerprint.norms}
    metrics = train(
        hypernet, objective, config, out_dir,
        settings=settings, save_model=save_model, on_metrics=on_metrics, workers=workers,
    )  # fmt: skip
    if finish is not None and workers.is_first:
        finish()
        save_model(out_dir)
    return metrics
