"""`loracast eval images`: what a text-only base says with the LoRA of an image, beside the vision model it comes from.

It does without runner.py: its rows are rankings of names, which no prompt gives. The vision model is the ceiling: no
LoRA knows more than the probabilities that it was made of.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loracast.answering.model import Model
from loracast.base.generate import Sampling
from loracast.documents.labels import Labels
from loracast.errors import ConfigError
from loracast.lab.data.answer_metrics import is_exact
from loracast.lab.data.labelled import Labelled
from loracast.lab.evaluation.likelihood import negative_log_likelihood
from loracast.lab.evaluation.report import Progress, Report, columns, no_progress, share_row
from loracast.lab.evaluation.runner import Settings
from loracast.lora.algebra import LoRA

QUESTION = "What does the picture show?"
COLUMNS = columns(
    label="method", n=("n", 0), accuracy=("right %", "%"), low=("95 %", "interval"), chance=("chance %", "%")
)
LABELS = {
    "classifier": "the vision model, the likeliest of the classes",
    "adapter": "its LoRA, the likeliest of the classes",
    "other": "another image's LoRA",
    "none": "no LoRA",
    "first": "the vision model, the first of all of its names",
    "free": "its LoRA, what it writes",
}
_AT_ONCE = 16


@dataclass(frozen=True)
class ImagesConfig(Settings):
    """Settings of `loracast eval images`."""

    POSITIVE = ("per_class",)
    classes: tuple[str, ...] = ()
    """Only these classes; by default all."""
    per_class: int | None = None
    """Most images of each class; by default all."""
    seed: int = 0
    """Seed of the order, by which images get others' LoRAs, and of the images where not all are taken."""


def evaluate_images(
    model: Model, images: Labelled, config: ImagesConfig, out: Path, progress: Progress = no_progress
) -> Report:
    """Run the evaluation; results.json, table.md and answers.jsonl are in `out` at the end.

    Raises ConfigError for a class that is not there, or whose name is none of the vision model's labels.
    """
    report, seen_as = Report(out, "images", COLUMNS, config, model.base, model.documents.id), model.vision.labels
    names = config.classes or images.names
    places = _places(seen_as, names)
    rng, order = random.Random(config.seed), list[int]()
    for name in names:
        of_class = [i for i, label in enumerate(images.labels) if images.names[label] == name]
        order += rng.sample(of_class, min(len(of_class), config.per_class or len(of_class)))
    rng.shuffle(order)
    prompt, others = model.base.chat.prompt(QUESTION, ""), list[LoRA]()
    hits: dict[str, list[bool]] = {key: [] for key in LABELS}

    def losses(loras: Sequence[LoRA | None]) -> list[Tensor]:
        n = len(loras)
        return negative_log_likelihood(model.base, [prompt] * n, [names] * n, loras)

    (none,) = losses([None])
    for first in range(0, len(order), _AT_ONCE):
        batch = order[first : first + _AT_ONCE]
        seen = model.vision.probabilities([images.load(i) for i in batch])
        loras = [model.cast(Labels(model.vision.named(row))) for row in seen]
        others = (others or loras[::-1])[: len(batch)]  # of the batch before
        own, other = losses(loras), losses(others)
        said = model.ask([QUESTION] * len(batch), loras, sampling=Sampling(max_new_tokens=16))
        others, lines = loras, list[dict[str, str]]()
        for i, row, of_own, of_other, free in zip(batch, seen, own, other, said, strict=True):
            name, first_name = images.names[images.labels[i]], int(row.argmax())
            place = places[names.index(name)]
            scores = {"classifier": row[places], "adapter": -of_own, "other": -of_other, "none": -none}
            chosen = {key: names[int(score.argmax())] for key, score in scores.items()}
            is_right = {key: one == name for key, one in chosen.items()} | {"first": first_name == place}
            is_right["free"] = any(is_exact(free, synonym) for synonym in seen_as[place].split(", "))
            for key, hit in is_right.items():
                hits[key].append(hit)
            about = {"file": images.files[i].name, "name": name, "seen": seen_as[first_name], "free": free}
            lines.append(about | {"adapter": chosen["adapter"]})
        report.add_answers(lines)
        progress(min(first + _AT_ONCE, len(order)), len(order))
    chances = {key: 1 / len(seen_as if key in ("first", "free") else names) for key in LABELS}
    rows: list[dict[str, Any]] = []
    for key, right in hits.items():
        row = {"baseline": key, "label": LABELS[key], "n": len(right), "chance": chances[key]}
        rows.append(row | share_row("accuracy", sum(right), len(right)))
    return report.write(rows)


def _places(labels: Sequence[str], names: Sequence[str]) -> list[int]:
    """The vision model's label that each class is, by any of its synonyms."""
    by_name = {name.casefold(): i for i, label in reversed([*enumerate(labels)]) for name in label.split(", ")}
    if missing := [name for name in names if name.casefold() not in by_name]:
        raise ConfigError(f"the vision model has no labels {', '.join(missing)}: name the folders after its labels")
    return [by_name[name.casefold()] for name in names]
