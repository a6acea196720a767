"""Another sense: does the text-only base say what an image (or a signal) shows, with the LoRA that was cast from it?

Rivals in the same run: chance, the base alone, the LoRA of a thing of another class, and two classifiers that see the same features as the
hypernetwork: the nearest centroid and a linear probe, which is the ceiling.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loracast.base import Base
from loracast.encoders.features import Features
from loracast.errors import ConfigError
from loracast.evaluation.choice import likeliest
from loracast.evaluation.metrics import is_exact, wilson
from loracast.evaluation.report import Column, Progress, Report, environment, interval, number, percent, text
from loracast.generate import Sampling, answer, answer_batch
from loracast.labelled import Labelled
from loracast.lora import LoRA
from loracast.senses import SenseCaster
from loracast.training.sense_source import Attribute, encode, encoded, wordings

COLUMNS: tuple[Column, ...] = (
    text("part", "part"),
    text("label", "what answers"),
    number("n", "n"),
    percent("accuracy", "right %"),
    interval("low", "high", "95 %"),
    percent("chance", "chance %"),
    percent("of_probe", "of the probe's %"),
)
SEEN, SPARE, ALL = "classes trained on", "spare classes", "spare classes, all names"
_AT_ONCE = 32
_N_TIMED = 20
_PROBE_STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # scikit-learn's C


@dataclass(frozen=True)
class SenseEvalConfig:
    """What is measured."""

    per_class: int | None = None
    """Most things of each class; all if None."""
    seed: int = 0
    """Seed of the pairing with others' LoRAs, and of the things where not all are taken."""

    def __post_init__(self) -> None:
        if self.per_class is not None and self.per_class < 1:
            raise ConfigError("per_class must be at least 1")


@dataclass(frozen=True)
class Saw:
    """What was answered about one thing."""

    place: int
    """In the labelled set."""
    name: str
    """Its class."""
    is_spare: bool
    chosen: str
    """The likeliest name: among the classes trained on, or for a thing of a spare class among those."""
    free: str
    """What the base wrote by itself."""


def evaluate_sense(
    base: Base,
    caster: SenseCaster,
    trained_on: Labelled,
    test: Labelled,
    config: SenseEvalConfig,
    out: Path,
    progress: Progress = lambda done, total: None,
) -> tuple[Report, list[Saw]]:
    """Run the evaluation; results.json, table.md and answers.jsonl are in `out` at the end.

    Args:
        trained_on: what the classifiers learn from.
        test: things that were never trained on.
    """
    about = environment(base, caster.hypernet_hash)
    asked = wordings(test.sense)
    places = _chosen(test, config)
    states = encoded(test, places, caster.encoder)
    names = [test.names[test.labels[i]] for i in places]
    spare = [test.is_spare[test.labels[i]] for i in places]
    seen_names = tuple(n for n, is_spare in zip(test.names, test.is_spare, strict=True) if not is_spare)
    spare_names = tuple(n for n, is_spare in zip(test.names, test.is_spare, strict=True) if is_spare)
    others = _others(names, spare, config.seed)

    def choose(question: str, choices: Sequence[Sequence[str]], rows: Sequence[int], whose: str) -> list[str]:
        """The likeliest choice for each of some things, with a LoRA of its own, another's or none."""
        chosen: list[str] = []
        prompt = base.chat.prompt(question, "")
        for first in range(0, len(rows), _AT_ONCE):
            some = rows[first : first + _AT_ONCE]
            loras: list[LoRA | None] = [None] * len(some)
            if whose != "none":
                loras = list(_cast(caster, states, [others[i] if whose == "other" else i for i in some]))
            offered = choices[first : first + _AT_ONCE]
            found = likeliest(base, [prompt] * len(some), offered, loras)
            chosen += [of[choice.by_sum] for of, choice in zip(offered, found, strict=True)]
            tick(len(some))
        return chosen

    every = list(range(len(places)))
    n_attributes = len(asked.attributes)
    total = len(every) * (5 + 3 * n_attributes)
    done = 0

    def tick(n: int) -> None:
        nonlocal done
        done = min(total, done + n)
        progress(done, total)

    own_choices = [spare_names if is_spare else seen_names for is_spare in spare]
    right: dict[tuple[str, str], list[bool]] = {}
    chance: dict[str, float] = {SEEN: 1 / len(seen_names)}
    if spare_names:
        chance |= {SPARE: 1 / len(spare_names), ALL: 1 / len(test.names)}

    def count(system: str, answers: Sequence[str], rows: Sequence[int], part: str | None = None) -> None:
        for i, given in zip(rows, answers, strict=True):
            right.setdefault((part or (SPARE if spare[i] else SEEN), system), []).append(is_exact(given, names[i]))

    own = choose(asked.test, own_choices, every, "own")
    count("adapter", own, every)
    count("unseen wording", choose(asked.unseen, own_choices, every, "own"), every)
    count("other", choose(asked.test, own_choices, every, "other"), every)
    count("none", choose(asked.test, own_choices, every, "none"), every)
    spare_rows = [i for i in every if spare[i]]
    count("adapter", choose(asked.test, [test.names] * len(spare_rows), spare_rows, "own"), spare_rows, ALL)
    free = _free_answers(base, caster, states, asked.test, tick)
    count("free", free, every)
    seen_rows = [i for i in every if not spare[i]]
    for system, answers in _classifiers(caster, trained_on, states[seen_rows], config).items():
        count(system, answers, seen_rows)
    rows = [_row(part, system, hits, chance[part]) for (part, system), hits in right.items()]
    for attribute in asked.attributes:
        rows += _attribute_rows(attribute, names, spare, choose)
    probe = next((row["accuracy"] for row in rows if row["system"] == "probe"), None)
    for row in rows:
        if row["part"] == SEEN and probe:
            row["of_probe"] = row["accuracy"] / probe
    timings = _timings(base, caster, test, places[0], asked.test)
    report = Report(test.sense, COLUMNS, rows, {**asdict(config), **timings}, about)
    report.write(out)
    saw = [Saw(*parts) for parts in zip(places, names, spare, own, free, strict=True)]
    with open(out / "answers.jsonl", "w", encoding="utf-8") as file:
        for one in saw:
            file.write(json.dumps({"title": test.titles[one.place], **asdict(one)}, ensure_ascii=False) + "\n")
    return report, saw


LABELS = {
    "adapter": "its LoRA, the likeliest name",
    "unseen wording": "the same, asked in other words",
    "free": "its LoRA, what it writes",
    "other": "the LoRA of another class",
    "none": "no LoRA",
    "centroid": "nearest centroid of the features",
    "probe": "linear probe on the features",
    "frequent": "the most frequent answer",
}


def _row(part: str, system: str, hits: Sequence[bool], chance: float) -> dict[str, Any]:
    low, high = wilson(sum(hits), len(hits))
    return {
        "part": part,
        "system": system,
        "label": LABELS[system],
        "n": len(hits),
        "accuracy": sum(hits) / len(hits),
        "low": low,
        "high": high,
        "chance": chance,
    }


def _chosen(test: Labelled, config: SenseEvalConfig) -> list[int]:
    """The places of what is measured, the same number of each class."""
    rng = random.Random(config.seed)
    chosen = []
    for label in range(len(test.names)):
        mine = [i for i, its in enumerate(test.labels) if its == label]
        chosen += mine if config.per_class is None else sorted(rng.sample(mine, min(config.per_class, len(mine))))
    if not chosen:
        raise ConfigError("the set to measure on is empty")
    return chosen


def _others(names: Sequence[str], spare: Sequence[bool], seed: int) -> list[int]:
    """For each thing one of another class: of a spare one for those of spare classes, where there are several."""
    rng = random.Random(f"{seed}/others")
    found = []
    for name, is_spare in zip(names, spare, strict=True):
        others = [i for i, other in enumerate(names) if other != name]
        if not others:
            raise ConfigError("things of at least two classes are needed")
        found.append(rng.choice([i for i in others if spare[i] == is_spare] or others))
    return found


def _cast(caster: SenseCaster, states: Tensor, rows: Sequence[int]) -> list[LoRA]:
    batch = caster.loras_of(Features(states[list(rows)].float()))
    return [batch.row(i) for i in range(batch.n)]


def _free_answers(
    base: Base, caster: SenseCaster, states: Tensor, question: str, tick: Callable[[int], None]
) -> list[str]:
    prompt = base.chat.prompt(question, "")
    answers: list[str] = []
    for first in range(0, len(states), _AT_ONCE):
        rows = range(first, min(first + _AT_ONCE, len(states)))
        answers += answer_batch(base, [prompt] * len(rows), _cast(caster, states, rows), Sampling(max_new_tokens=16))
        tick(len(rows))
    return answers


def _classifiers(
    caster: SenseCaster, trained_on: Labelled, states: Tensor, config: SenseEvalConfig
) -> dict[str, list[str]]:
    """What two classifiers on the mean of the same features say, trained on what the hypernetwork was trained on."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    places = trained_on.of(spare=False)
    known = _means(encoded(trained_on, places, caster.encoder))
    labels = np.array([trained_on.names[trained_on.labels[i]] for i in places])
    scaler = StandardScaler().fit(known)
    known, asked = scaler.transform(known), scaler.transform(_means(states))
    fit, held, fit_labels, held_labels = train_test_split(
        known, labels, test_size=0.2, random_state=config.seed, stratify=labels
    )

    def probe(strength: float) -> Any:
        return LogisticRegression(C=strength, max_iter=1000)

    # Its only setting, chosen on a fifth of the training things.
    best = max(_PROBE_STRENGTHS, key=lambda strength: probe(strength).fit(fit, fit_labels).score(held, held_labels))
    classes = sorted(set(labels))
    centroids = np.stack([known[labels == name].mean(0) for name in classes])
    nearest = np.linalg.norm(asked[:, None] - centroids[None], axis=-1).argmin(1)
    return {
        "centroid": [classes[i] for i in nearest],
        "probe": [str(name) for name in probe(best).fit(known, labels).predict(asked)],
    }


def _means(states: Tensor) -> np.ndarray:
    """[n, t, d] -> [n, d], piece by piece: the features of a training set are large."""
    return torch.cat([some.float().mean(1) for some in states.split(256)]).numpy()


def _attribute_rows(
    attribute: Attribute,
    names: Sequence[str],
    spare: Sequence[bool],
    choose: Callable[[str, Sequence[Sequence[str]], Sequence[int], str], list[str]],
) -> list[dict[str, Any]]:
    """Answers to a question that is about something else than the class."""
    rows = [i for i, name in enumerate(names) if name in attribute.answers]
    if not rows:
        return []
    frequent = Counter(attribute.answers[names[i]] for i in rows if not spare[i]).most_common(1)[0][0]
    choices = [attribute.choices] * len(rows)
    answers = {
        "adapter": choose(attribute.test, choices, rows, "own"),
        "other": choose(attribute.test, choices, rows, "other"),
        "none": choose(attribute.test, choices, rows, "none"),
        "frequent": [frequent] * len(rows),
    }
    made = []
    for is_spare in (False, True):
        for system, given in answers.items():
            hits = [
                answer == attribute.answers[names[i]]
                for i, answer in zip(rows, given, strict=True)
                if spare[i] == is_spare
            ]
            if hits:
                part = f"{attribute.name}, {SPARE if is_spare else SEEN}"
                made.append(_row(part, system, hits, 1 / len(attribute.choices)))
    return made


def _timings(base: Base, caster: SenseCaster, test: Labelled, place: int, question: str) -> dict[str, float]:
    """Seconds from one thing in memory to its LoRA, and to an answer's first token with it and without."""
    thing, prompt = test.load(place), base.chat.prompt(question, "")
    one_token = Sampling(max_new_tokens=1)
    to_lora, with_lora, without = [], [], []
    for _ in range(_N_TIMED):
        started = time.perf_counter()
        lora = caster.loras_of(encode(caster.encoder, [thing])).row(0)
        to_lora.append(time.perf_counter() - started)
        with_lora.append(answer(base, prompt, lora, one_token).first_token_s)
        without.append(answer(base, prompt, None, one_token).first_token_s)
    named = {"to_lora_s": to_lora, "first_token_s": with_lora, "first_token_of_base_s": without}
    return {name: round(statistics.median(values), 4) for name, values in named.items()}
