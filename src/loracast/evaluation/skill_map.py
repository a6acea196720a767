"""`loracast eval map`: the LoRAs of all tasks in two dimensions, and how well families of tasks separate.

LoRAs are compared by the cosine of their deltas over all modules (`LoRABatch.cosines`). The map is for the eye (t-SNE:
van der Maaten and Hinton, 2008); the figures are silhouettes (Rousseeuw, 1987) of the distances themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loracast.cast.task import TaskCaster
from loracast.data.tasks import DescriptionKind, read_tasks
from loracast.errors import ConfigError, LoracastError
from loracast.evaluation.plots import require_matplotlib, skills
from loracast.evaluation.report import Report, ReportWriter, columns

COLUMNS = columns(
    label="what is compared", n=("descriptions", 0), n_tasks=("tasks", 0), n_groups=("families", 0),
    by_task=("silhouette by task", 3), by_group=("by family", 3), by_group_by_chance=("by family, by chance", 3),
)  # fmt: skip

_N_DEALS = 100


@dataclass(frozen=True)
class MapConfig:
    """What `loracast eval map` draws."""

    tasks: str
    """A folder of task files, or a file of examples."""
    descriptions: DescriptionKind = "heldout"
    """Kind of the descriptions, each of which is a point."""
    seed: int = 0
    """Seed of the map and of the families by chance."""


def evaluate_map(caster: TaskCaster, config: MapConfig, out: Path) -> Report:
    """Draw the map, and measure how well tasks and families of them separate; held-out tasks and others alike.

    Raises:
        ConfigError: there are fewer than two families of at least two tasks.
        LoracastError: what draws is not installed.
    """
    require_matplotlib()
    if find_spec("sklearn") is None:
        raise LoracastError("the map needs scikit-learn: pip install 'loracast[eval]'")
    tasks = [task for task in read_tasks(config.tasks) if task.descriptions.get(config.descriptions)]
    sizes = Counter(task.group for task in tasks if task.group)
    families = {group for group, n in sizes.items() if n > 1}
    if len(families) < 2:
        raise ConfigError(
            f"{config.tasks} has {len(families)} families (`group`) of at least two tasks; two are needed"
        )
    points = [(task, said) for task in tasks for said in task.descriptions[config.descriptions]]
    texts = [said for _, said in points]
    names = [task.name for task, _ in points]
    groups = [task.group if task.group in families else "" for task, _ in points]
    embeddings = torch.nn.functional.normalize(caster.embeddings(texts).double(), dim=-1)
    weights = caster.caster.loras_of(caster.caster.encode(texts))
    distances = {"embeddings": 1 - embeddings @ embeddings.T, "weights": 1 - weights.cosines()}
    rows: list[dict[str, Any]] = []
    for name, between in distances.items():
        table = between.clamp_min(0).fill_diagonal_(0).numpy()
        places = _in_two_dimensions(table, config.seed)
        rows.append(
            {
                "baseline": name,
                "label": {"embeddings": "embeddings of the descriptions", "weights": "generated weights"}[name],
                "n": len(points),
                "n_tasks": len(tasks),
                "n_groups": len(families),
                "by_task": _silhouette(table, names),
                "by_group": _silhouette(table, groups),
                "by_group_by_chance": _by_chance(table, names, groups, config.seed),
                "points": [
                    {"task": task, "group": group, "x": float(x), "y": float(y)}
                    for task, group, (x, y) in zip(names, groups, places, strict=True)
                ],
            }
        )
    report = ReportWriter(out, "map of skills", COLUMNS, config, None, caster.caster.id).write(rows)
    skills(out / "map.png", rows)
    return report


def _by_chance(distances: np.ndarray, names: Sequence[str], groups: Sequence[str], seed: int) -> float | None:
    """The 95th percentile of the silhouette by family when whole tasks are assigned to families at random."""
    rng = np.random.default_rng(seed)
    of_task = dict(zip(names, groups, strict=True))
    scores = []
    for _ in range(_N_DEALS):
        dealt = dict(zip(of_task, rng.permutation(list(of_task.values())), strict=True))
        scores.append(_silhouette(distances, [dealt[name] for name in names]))
    known = [score for score in scores if score is not None]
    return float(np.percentile(known, 95)) if known else None


def _silhouette(distances: np.ndarray, labels: Sequence[str]) -> float | None:
    """The mean silhouette of the points that have a label; None where all labels are distinct, or all the same."""
    from sklearn.metrics import silhouette_score

    kept = [i for i, label in enumerate(labels) if label]
    if not 2 <= len({labels[i] for i in kept}) < len(kept):
        return None
    return float(silhouette_score(distances[np.ix_(kept, kept)], [labels[i] for i in kept], metric="precomputed"))


def _in_two_dimensions(distances: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE of a table of distances [n, n] -> [n, 2]."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(distances) - 1) / 3)
    return TSNE(metric="precomputed", init="random", perplexity=perplexity, random_state=seed).fit_transform(distances)
