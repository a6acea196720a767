"""Another sense: does the text-only base say what an image (or a signal) shows, with the LoRA that was cast from it?

Rivals in the same run: chance, the base alone, LoRAs dealt out at random, and two classifiers that see the same features as the
hypernetwork: the nearest centroid and a linear probe, which is the ceiling.

Some names are likely whatever is seen, above all among those that were never trained on. So names are also compared by what the thing's LoRA adds
to their log-likelihood over the mean of training things' LoRAs (as in Holtzman et al., arXiv 2104.08315).
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

from loracast.base.generate import Sampling, answer, answer_batch
from loracast.base.load import Base
from loracast.data.answer_metrics import is_exact
from loracast.data.labelled import Labelled
from loracast.encoders.features import Features
from loracast.errors import ConfigError
from loracast.evaluation.choice import negative_log_likelihood
from loracast.evaluation.intervals import wilson
from loracast.evaluation.report import Column, Progress, Report, environment, interval, number, percent, text
from loracast.hypernets.protocol import Caster
from loracast.lora.algebra import LoRA
from loracast.training.modality_source import Attribute, encode, encoded, wordings

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
_N_REFERENCE = 100  # things of the training whose LoRAs tell how likely a name is anyway
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
    is_held_out: bool
    chosen: str
    """The likeliest name: among the classes trained on, or for a thing of a spare class among those."""
    free: str
    """What the base wrote by itself."""


def evaluate_sense(
    base: Base,
    caster: Caster,
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
    about = environment(base, caster.id)
    asked = wordings(test.modality)
    places = _chosen(test, config)
    states = encoded(test, places, caster.encoder)
    things = _Things(
        tuple(test.names[test.labels[i]] for i in places), tuple(test.is_held_out[test.labels[i]] for i in places)
    )
    every = range(len(places))
    shuffled = _shuffled(things, config.seed)
    total = len(places) * (3 + len(asked.attributes)) + _N_REFERENCE
    done = 0

    def ask(question: str, answers: Sequence[str], rows: Sequence[int] | None, of: Tensor = states) -> np.ndarray:
        """How unlikely each answer is with the LoRA of each of some things, or with none [rows or 1, answers]."""
        nonlocal done
        prompt = base.chat.prompt(question, "")
        if rows is None:
            return torch.stack(negative_log_likelihood(base, [prompt], [answers], None)).cpu().numpy()
        found: list[Tensor] = []
        for first in range(0, len(rows), _AT_ONCE):
            some = rows[first : first + _AT_ONCE]
            found += negative_log_likelihood(base, [prompt] * len(some), [answers] * len(some), _cast(caster, of, some))
            done += len(some)
            progress(min(done, total), total)
        return torch.stack(found).cpu().numpy()

    right: dict[tuple[str, str], list[bool]] = {}
    offered = {part: [test.names.index(name) for name in names] for part, names in _offered(test).items()}
    chance = {part: 1 / len(classes) for part, classes in offered.items()}

    def likeliest(unlikely: np.ndarray, i: int, part: str) -> str:
        """The likeliest name for a thing of those on offer in a part."""
        return test.names[offered[part][int(np.argmin(unlikely[i, offered[part]]))]]

    def count(system: str, unlikely: np.ndarray, parts: Sequence[str]) -> None:
        """Of each thing that a part is about, whether its own name is the likeliest of those on offer."""
        for part in parts:
            for i in things.of(part):
                right.setdefault((part, system), []).append(likeliest(unlikely, i, part) == things.names[i])

    parts = tuple(chance)
    own = ask(asked.test, test.names, every)
    count("adapter", own, parts)
    known_states = encoded(trained_on, trained_on.of(held_out=False), caster.encoder)
    reference = known_states[:: max(1, len(known_states) // _N_REFERENCE)]
    usual = ask(asked.test, test.names, range(len(reference)), reference)
    count("gain", own - usual.mean(0), parts)
    count("unseen wording", ask(asked.unseen, test.names, every), parts[:2])
    count("shuffled", ask(asked.test, test.names, shuffled), parts[:2])
    count("none", np.repeat(ask(asked.test, test.names, None), len(places), axis=0), parts[:2])
    free = _free_answers(base, caster, states, asked.test)
    for part in parts[:2]:
        right[part, "free"] = [is_exact(free[i], things.names[i]) for i in things.of(part)]
    seen = things.of(SEEN)
    for system, answers in _classifiers(known_states, trained_on, states[seen], config).items():
        right[SEEN, system] = [answer == things.names[i] for i, answer in zip(seen, answers, strict=True)]
    order = {part: place for place, part in enumerate(parts)}
    rows = [_row(part, system, hits, chance[part]) for (part, system), hits in right.items()]
    rows.sort(key=lambda row: order[row["part"]])
    for attribute in asked.attributes:
        rows += _attribute_rows(attribute, things, ask)
    probe = next((row["accuracy"] for row in rows if row["system"] == "probe"), None)
    for row in rows:
        if row["part"] == SEEN and probe:
            row["of_probe"] = row["accuracy"] / probe
    timings = _timings(base, caster, test, places[0], asked.test)
    report = Report(test.modality, COLUMNS, rows, {**asdict(config), **timings}, about)
    report.write(out)
    saw = []
    for i, place in enumerate(places):
        chosen = likeliest(own, i, SPARE if things.is_held_out[i] else SEEN)
        saw.append(Saw(place, things.names[i], things.is_held_out[i], chosen, free[i]))
    with open(out / "answers.jsonl", "w", encoding="utf-8") as file:
        for one in saw:
            file.write(json.dumps({"title": test.titles[one.place], **asdict(one)}, ensure_ascii=False) + "\n")
    return report, saw


LABELS = {
    "adapter": "its LoRA, the likeliest name",
    "gain": "the name that gains most by its LoRA",
    "unseen wording": "the same, asked in other words",
    "free": "its LoRA, what it writes",
    "shuffled": "LoRAs dealt out at random",
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


@dataclass(frozen=True)
class _Things:
    """What is measured: by thing, the name of its class and whether that is spare."""

    names: tuple[str, ...]
    is_held_out: tuple[bool, ...]

    def of(self, part: str) -> list[int]:
        """The places of the things that a part of the table is about."""
        return [i for i, is_held_out in enumerate(self.is_held_out) if is_held_out == (part != SEEN)]


def _offered(test: Labelled) -> dict[str, tuple[str, ...]]:
    """By part of the table, the names that are on offer."""
    named = list(zip(test.names, test.is_held_out, strict=True))
    offered = {SEEN: tuple(name for name, is_held_out in named if not is_held_out)}
    if any(test.is_held_out):
        offered |= {SPARE: tuple(name for name, is_held_out in named if is_held_out), ALL: test.names}
    return offered


def _shuffled(things: _Things, seed: int) -> list[int]:
    """For each thing one at random, of a spare class for those of spare classes."""
    rng = random.Random(f"{seed}/shuffled")
    dealt = list(range(len(things.names)))
    for part in (SEEN, SPARE):
        mine = things.of(part)
        for i, other in zip(mine, rng.sample(mine, len(mine)), strict=True):
            dealt[i] = other
    return dealt


def _cast(caster: Caster, states: Tensor, rows: Sequence[int]) -> list[LoRA]:
    batch = caster.loras_of(Features(states[list(rows)].float()))
    return [batch.row(i) for i in range(batch.n)]


def _free_answers(base: Base, caster: Caster, states: Tensor, question: str) -> list[str]:
    prompt = base.chat.prompt(question, "")
    answers: list[str] = []
    for first in range(0, len(states), _AT_ONCE):
        rows = range(first, min(first + _AT_ONCE, len(states)))
        answers += answer_batch(base, [prompt] * len(rows), _cast(caster, states, rows), Sampling(max_new_tokens=16))
    return answers


def _classifiers(
    known_states: Tensor, trained_on: Labelled, states: Tensor, config: SenseEvalConfig
) -> dict[str, list[str]]:
    """What two classifiers on the mean of the same features say, trained on what the hypernetwork was trained on."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    known = _means(known_states)
    labels = np.array([trained_on.names[trained_on.labels[i]] for i in trained_on.of(held_out=False)])
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
    attribute: Attribute, things: _Things, ask: Callable[[str, Sequence[str], Sequence[int] | None], np.ndarray]
) -> list[dict[str, Any]]:
    """Answers to a question that is about something else than the class."""
    rows = [i for i, name in enumerate(things.names) if name in attribute.answers]
    if not rows:
        return []
    wanted = [attribute.answers[things.names[i]] for i in rows]
    frequent = Counter(answer for i, answer in zip(rows, wanted, strict=True) if not things.is_held_out[i])
    answers = {
        "adapter": [attribute.choices[i] for i in ask(attribute.test, attribute.choices, rows).argmin(1)],
        "none": [attribute.choices[int(np.argmin(ask(attribute.test, attribute.choices, None)))]] * len(rows),
        "frequent": [frequent.most_common(1)[0][0]] * len(rows),
    }
    made = []
    for part in (SEEN, SPARE):
        about = set(things.of(part))
        for system, given in answers.items():
            hits = [a == w for i, a, w in zip(rows, given, wanted, strict=True) if i in about]
            if hits:
                made.append(_row(f"{attribute.name}, {part}", system, hits, 1 / len(attribute.choices)))
    return made


def _timings(base: Base, caster: Caster, test: Labelled, place: int, question: str) -> dict[str, float]:
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
