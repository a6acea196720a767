"""Read recipes, TOML files that fix a training run, and start a hypernetwork's training as one says."""

from __future__ import annotations

import dataclasses
import functools
import json
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from loracast.base.fingerprint import check
from loracast.base.load import Base
from loracast.errors import ConfigError
from loracast.files import frozen, value_faults
from loracast.hypernets.store import H, read_provenance
from loracast.lab.training.loop import Objective, OnMetrics, TrainConfig, Workers, train
from loracast.lora.target import Target, target_from_config, text_config

R = TypeVar("R")
Layers = Sequence[int | float] | float | None
"""Which layers of a base: their numbers; or where they are, as shares of the depth, so that it fits any base. One share
alone stands for all layers from there on, None for all."""


def read_tables(
    path: Path | None, overrides: Sequence[str], known: Mapping[str, Collection[str]]
) -> dict[str, dict[str, Any]]:
    """Read the tables of a recipe, changed by overrides (`training.lr=2e-4`); a table that the file lacks is empty.

    Lists become tuples, as in frozen configs.

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
        tables.setdefault(table, {})[name] = value.strip()
        with suppress(tomllib.TOMLDecodeError):  # a bare word is a string
            tables[table][name] = tomllib.loads(f"value = {value}")["value"]
    problems = [f"unknown table [{table}]" for table in sorted(tables.keys() - known.keys())]
    for table, names in known.items():
        problems += [f"unknown key {table}.{name}" for name in sorted(tables.get(table, {}).keys() - set(names))]
    if problems:
        raise ConfigError("bad recipe: " + "; ".join(problems))
    return {table: {name: frozen(value) for name, value in tables.get(table, {}).items()} for table in known}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HypernetRecipe:
    """What the training runs of all hypernetworks take: a TOML file with the tables `[hypernetwork]`, `[objective]`,
    `[data]` and `[training]`. Subclasses have a field `data`, and a field for each other key of the first two tables.
    """

    OPTIONS: ClassVar[Collection[str]]
    """The keys of `[hypernetwork]` that are options of the hypernetwork's config, and no fields of the recipe."""
    OBJECTIVE: ClassVar[Collection[str]]
    """The fields that stand in `[objective]`."""
    hypernetwork: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Options of the hypernetwork's config."""
    training: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    given: frozenset[str] = frozenset()
    """Keys that the table `[hypernetwork]` has; `--init-from` refuses those that the checkpoint fixes."""

    @property
    def objective(self) -> dict[str, Any]:
        """The table `[objective]`, as a run records it."""
        return {name: getattr(self, name) for name in self.OBJECTIVE}


def read_recipe(default: R, path: Path | None, overrides: Sequence[str] = ()) -> R:
    """Read a recipe from a TOML file, changed by overrides. Raises ConfigError as `read_tables`.

    Args:
        default: the recipe with values for missing keys: a `HypernetRecipe`, or another dataclass, whose fields are
            tables.
    """
    configs: dict[str, Any] = {name: value for name, value in vars(default).items() if dataclasses.is_dataclass(value)}
    known = {name: keys_of(type(value)) for name, value in configs.items()}
    fields: set[str] = set()
    if isinstance(default, HypernetRecipe):
        fields = keys_of(type(default)) - {*configs, "hypernetwork", "given", *default.OBJECTIVE}
        known = {"hypernetwork": {*default.OPTIONS, *fields}, "objective": {*default.OBJECTIVE}, **known}
    tables = read_tables(path, overrides, known)
    given = tables.pop("hypernetwork", {})
    changes = {name: value for name, value in given.items() if name in fields} | tables.pop("objective", {})
    check_values(type(default), changes)
    for name, values in tables.items():
        check_values(type(configs[name]), values)
        changes[name] = dataclasses.replace(configs[name], **values)
    if isinstance(default, HypernetRecipe):
        options = {name: value for name, value in given.items() if name not in fields}
        changes |= {"hypernetwork": options, "given": frozenset(given)}
    return dataclasses.replace(default, **changes)  # type: ignore[type-var]


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


def start_from(
    folder: Path,
    architecture: type[H],
    base: Base,
    recipe: HypernetRecipe,
    changeable: Callable[[H], Collection[str]] = lambda hypernet: (),
) -> H:
    """The hypernetwork whose weights a fresh run starts from, checked against the base.

    Raises ConfigError if the recipe's table `[hypernetwork]` has other keys than those that can be changed in it.
    """
    hypernet = architecture.from_pretrained(folder)
    if fixed := (recipe.given | recipe.hypernetwork.keys()) - set(changeable(hypernet)):
        raise ConfigError(
            "--init-from takes the architecture from the checkpoint; "
            f"leave {', '.join(sorted(fixed))} out of [hypernetwork]"
        )
    if hypernet.made_for is not None:
        check(hypernet.made_for, base.fingerprint, f"the hypernetwork in {folder}")
    hypernet.requires_grad_(True)
    return hypernet


def train_hypernet(
    hypernet: H,
    objective: Objective,
    config: TrainConfig,
    out_dir: Path,
    *,
    base: Base,
    init_from: Path | None,
    about: Mapping[str, Any],
    finish: Callable[[], None] | None = None,
    command: str = "",
    on_metrics: OnMetrics = lambda metrics: None,
) -> dict[str, float]:
    """Train a hypernetwork, or resume the run in `out_dir`. Returns the last metrics.

    The hypernetwork lies in `out_dir` afterwards (fp32), the metrics in `metrics.jsonl`.

    Args:
        about: what is trained on, for the checkpoint's provenance; a run with other values is not resumed.
        finish: last changes to the hypernetwork whenever training stops; it is saved once more after them.
        command: the command, for the checkpoint's provenance.
        on_metrics: receives each line of metrics.
    """
    started_as = read_provenance(init_from) if init_from is not None else {}
    # An average of runs has no history of its own.
    before: list[Any] = started_as.get("history") or ([started_as] if started_as else [])
    provenance = {"history": [*before, {"command": command, **about, "training": dataclasses.asdict(config)}]}
    save_model = functools.partial(hypernet.save_pretrained, storage="float32", provenance=provenance)
    hypernet.made_for = base.fingerprint
    settings = {**about, "hypernetwork": dataclasses.asdict(hypernet.config), "base": base.fingerprint.norms}
    metrics = train(
        hypernet, objective, config, out_dir, save_model=save_model, settings=settings, on_metrics=on_metrics
    )
    if finish is not None and Workers.join(base.device.type).is_first:
        finish()
        save_model(out_dir)
    return metrics


def layers_at(where: Layers, n_layers: int) -> list[int]:
    """The numbers of layers of a base of `n_layers`, in order. Raises ConfigError for a share outside of 0..1."""
    if where is None:
        return list(range(n_layers))
    given = [where] if isinstance(where, float) else list(where)
    if bad := [share for share in given if isinstance(share, float) and not 0 <= share <= 1]:
        raise ConfigError(f"layers as shares of the depth must be from 0.0 to 1.0, not {', '.join(map(str, bad))}")
    if isinstance(where, float):
        return list(range(min(round(where * n_layers), n_layers - 1), n_layers))
    numbers = [min(round(n * n_layers), n_layers - 1) if isinstance(n, float) else n for n in given]
    return sorted(set(numbers))


def target_at(base_config: Any, kinds: Collection[str], layers: Layers) -> Target:
    """The modules of these kinds in some layers of a base; arguments and errors as in `target_from_config`."""
    return target_from_config(base_config, kinds, layers_at(layers, text_config(base_config).num_hidden_layers))
