"""Start a hypernetwork's training from a checkpoint, and record in its checkpoints what it was trained on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from loracast.base.fingerprint import check
from loracast.base.load import Base
from loracast.errors import ConfigError
from loracast.hypernets.store import H, from_pretrained, read_provenance, save_pretrained
from loracast.training.loop import Objective, OnMetrics, TrainConfig, train
from loracast.training.runtime import Workers


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
    hypernet = from_pretrained(folder, architecture)
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
    command: str,
    workers: Workers,
    on_metrics: OnMetrics,
    finish: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Train a hypernetwork, or resume the run in `out_dir`. Returns the last metrics.

    The hypernetwork lies in `out_dir` afterwards (fp32), the metrics in `metrics.jsonl`.

    Args:
        about: what is trained on, for the checkpoint's provenance; a run with other values is not resumed.
        command: recorded in the provenance too.
        finish: last changes to the hypernetwork whenever training stops; it is saved once more after them.
    """
    started_as = read_provenance(init_from) if init_from is not None else {}
    # An average of runs has no history of its own.
    before: list[Any] = started_as.get("history") or ([started_as] if started_as else [])
    provenance = {"history": [*before, {"command": command, **about, "training": dataclasses.asdict(config)}]}
    save_model = functools.partial(save_pretrained, hypernet, storage="float32", provenance=provenance)
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
