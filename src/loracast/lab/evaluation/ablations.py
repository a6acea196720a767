"""`loracast eval ablations`: variants of a recipe, each trained from nothing for the same time, then measured.

The measurement is teacher-forced, on documents that no variant has seen. A finished run leaves
`NAME/seed-K/results.json` with its recipe and is skipped from then on: the same command goes on where it was stopped,
and two processes with other seeds may fill one folder together.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from pydantic import TypeAdapter

from loracast.answering.model import Model
from loracast.base.load import Base
from loracast.errors import ConfigError
from loracast.files import write_atomically
from loracast.lab.evaluation.documents import DocumentSetup
from loracast.lab.evaluation.likelihood import TeacherForcedConfig, evaluate_teacher_forced
from loracast.lab.evaluation.report import Column, Progress, Report, columns, no_progress
from loracast.lab.training.doc import DocRecipe, train_doc
from loracast.lab.training.document_source import EpisodeKind
from loracast.lab.training.recipe import read_recipe
from loracast.library.manifest import name_from

Variants = Mapping[str, Sequence[str]]
"""By name, what a variant changes in the recipe (`hypernetwork.rank=16`)."""


@dataclass(frozen=True)
class AblationConfig:
    """Settings of `loracast eval ablations`."""

    recipe: str
    """File of the recipe."""
    variants: Variants
    """Changes of the recipe, by the variant's name."""
    overrides: tuple[str, ...] = ()
    """Changes of the recipe that all variants share, such as files and the budget."""
    held_out: tuple[str, ...] = ()
    """Files of the documents to measure on; those trained on if empty."""
    held_out_sources: tuple[str, ...] = ()
    """Sources to take of these documents; all if empty."""
    kinds: tuple[EpisodeKind, ...] = ("facts", "questions", "reading")
    """Kinds of episodes to measure on."""
    steps: int = 4
    """Steps of each kind in the measurement."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of weights and data alike."""

    def __post_init__(self) -> None:
        if not self.held_out and not self.held_out_sources:
            raise ConfigError(
                "give documents to measure on that are not trained on: --held-out FILE, or --held-out-sources NAMES"
            )

    def recipe_of(self, variant: str, seed: int) -> DocRecipe:
        """The recipe of one run. Raises ConfigError for a change that the recipe does not have."""
        own = [*self.overrides, *self.variants[variant], f"training.seed={seed}", f"data.seed={seed}"]
        return read_recipe(DocRecipe(), Path(self.recipe), own)


def read_variants(path: Path, only: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """The table `[variants]` of a TOML file: a name and a list of changes each.

    Args:
        only: names of those that are wanted, in this order; all if empty.

    Raises:
        ConfigError: the file cannot be read or has another form, or has no variant of such a name.
    """
    try:
        table = TypeAdapter(dict[Literal["variants"], dict[str, list[str]]])
        variants = table.validate_python(tomllib.loads(path.read_text(encoding="utf-8")), strict=True)["variants"]
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(
            f'cannot read the variants {path}, which hold one table [variants] with lines such as "rank 16" = '
            f'["hypernetwork.rank=16"]: {error}'
        ) from error
    if len({name_from(name) for name in variants}) < len(variants):
        raise ConfigError(f"{path}: two variants would share a folder; their names must differ in letters or digits")
    if unknown := [name for name in only if name not in variants]:
        raise ConfigError(f"{path} has no variants called {', '.join(unknown)}; there are {', '.join(variants)}")
    return {name: tuple(variants[name]) for name in only or variants}


def run_ablations(base: Base, config: AblationConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Train and measure what is missing; the table of all that is there, other seeds included, is in `out` at the end.

    Raises:
        ConfigError: before anything is trained, for an unknown change or a run in `out` that followed another recipe.
    """
    runs = [(variant, seed) for seed in config.seeds for variant in config.variants]
    todo: list[tuple[Path, DocRecipe] | None] = []
    for variant, seed in runs:
        folder, recipe = out / name_from(variant) / f"seed-{seed}", config.recipe_of(variant, seed)
        is_done = (folder / "results.json").exists()
        if is_done and json.loads((folder / "results.json").read_bytes())["followed"] != _followed(config, recipe):
            raise ConfigError(f"{folder} holds a run of another recipe: give another --out, or remove it")
        todo.append(None if is_done else (folder, recipe))
    for done, run in enumerate(todo):
        progress(done, len(runs))
        if run is not None:
            shutil.rmtree(run[0], ignore_errors=True)  # what was stopped half-way would get a second budget
            _run(base, config, run[1], run[0])
    progress(len(runs), len(runs))
    rows = [row for variant in config.variants if (row := _row(config, variant, out))]
    return Report(out, "ablations", _columns(config.kinds), config, base).write(rows)


def _run(base: Base, config: AblationConfig, recipe: DocRecipe, folder: Path) -> None:
    run = folder / "run"
    trained = train_doc(base, recipe, run)
    if not trained:
        raise ConfigError(f"{folder.name}: the budget ended before the first step; give a longer one")
    model = Model(base, folder / "library", run)
    documents = config.held_out or recipe.data.documents
    data = replace(recipe.data, documents=documents, document_sources=config.held_out_sources, unrelated=(), seed=0)
    report = evaluate_teacher_forced(model, TeacherForcedConfig(data, config.kinds, config.steps), folder / "forced")
    shutil.move(run / "metrics.jsonl", folder / "metrics.jsonl")
    shutil.rmtree(run)  # a ranking, not a checkpoint
    figures = {
        "followed": _followed(config, recipe),
        **{
            f"{row['kind']}_{name}": row[name] for row in report.rows if row["baseline"] == "adapter" for name in _NAMES
        },
        "steps": trained["step"],
        "step_s": trained["elapsed_s"] / trained["step"],
        "parameters_m": sum(p.numel() for p in model.documents.hypernetwork.parameters()) / 1e6,
        "chunk_kb": DocumentSetup(model).chunk_bytes / 1000,
    }
    write_atomically(folder / "results.json", json.dumps(figures, indent=1).encode())


_NAMES = ("exact", "accuracy")


def _followed(config: AblationConfig, recipe: DocRecipe) -> dict[str, Any]:
    """What a run's figures depend on, as JSON has it."""
    measured = {name: getattr(config, name) for name in ("held_out", "held_out_sources", "kinds", "steps")}
    return json.loads(json.dumps({"recipe": asdict(recipe), "measured": measured}, default=sorted))


def _row(config: AblationConfig, variant: str, out: Path) -> dict[str, Any] | None:
    """The figures of a variant over its seeds: their mean, and each of them in a list."""
    found = [json.loads(path.read_bytes()) for path in sorted(out.glob(f"{name_from(variant)}/seed-*/results.json"))]
    if not found:
        return None
    row: dict[str, Any] = {"label": variant, "seeds": len(found)}
    for name in (name for name in found[0] if name != "followed"):
        row[name] = mean(one[name] for one in found)
        row[f"{name}_by_seed"] = [one[name] for one in found]
    row["accuracy"] = mean(row[f"{kind}_accuracy"] for kind in config.kinds)
    return row


def _columns(kinds: Sequence[EpisodeKind]) -> tuple[Column, ...]:
    by_kind = {
        f"{kind}_{name}": (f"{kind}: {header} %", "by seed")
        for kind in kinds
        for name, header in zip(_NAMES, ("exact", "tokens"), strict=True)
    }
    return columns(
        label="variant", parameters_m=("M parameters", 1), chunk_kb=("kB a chunk", 0), steps=("steps", 0),
        step_s=("s a step", 2), **by_kind, accuracy=("tokens %, mean of the kinds", "%"),
    )  # fmt: skip
