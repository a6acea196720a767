"""`loracast eval image`: what a text-only base says with the LoRA of an image.

It does without runner.py: most of its rows are classifiers or rankings of names, which no prompt gives.

Baselines are chance, the base alone, LoRAs of other examples, and two classifiers on the hypernetwork's features: the
nearest centroid and a linear probe, which is the ceiling. Some names are likely whatever is shown, above all those that
were never trained on; so names are also compared by what an example's LoRA adds to their log-likelihood over the
mean of training examples' LoRAs (as in Holtzman et al., arXiv 2104.08315).
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loracast.answering.model import Model
from loracast.base.generate import Sampling
from loracast.base.load import Base
from loracast.errors import ConfigError
from loracast.hypernets.encoders import Features
from loracast.hypernets.protocol import Caster
from loracast.lab.data.answer_metrics import is_exact
from loracast.lab.data.labelled import Labelled
from loracast.lab.evaluation.likelihood import negative_log_likelihood
from loracast.lab.evaluation.report import Progress, Report, columns, no_progress, share_row
from loracast.lab.evaluation.runner import Settings
from loracast.lab.training.modality import encoded, wordings
from loracast.library.library import Library
from loracast.lora.algebra import LoRA

COLUMNS = columns(
    part="part", label="method", n=("n", 0), accuracy=("right %", "%"), low=("95 %", "interval"),
    chance=("chance %", "%"),
)  # fmt: skip
TRAINED, HELD_OUT, ALL = "classes trained on", "held-out classes", "held-out classes, all names"
LABELS = {
    "adapter": "its LoRA, the likeliest name",
    "gain": "the name that gains most by its LoRA",
    "unseen wording": "the same, asked in other words",
    "free": "its LoRA, what it writes",
    "shuffled": "LoRAs of other examples",
    "none": "no LoRA",
    "centroid": "nearest centroid of the features",
    "probe": "linear probe on the features",
}
_AT_ONCE = 32
_N_REFERENCE = 100  # training examples whose LoRAs tell how likely a name is anyway
_PROBE_STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # scikit-learn's C


@dataclass(frozen=True)
class ModalityEvalConfig(Settings):
    """Settings of `loracast eval image`."""

    POSITIVE = ("per_class",)
    per_class: int | None = None
    """Most examples of each class; by default all."""
    seed: int = 0
    """Seed of the pairing with other examples' LoRAs, and of the examples where not all are taken."""


def evaluate_modality(
    base: Base,
    caster: Caster,
    trained_on: Labelled,
    test: Labelled,
    config: ModalityEvalConfig,
    out: Path,
    progress: Progress = no_progress,
) -> Report:
    """Run the evaluation; results.json, table.md and answers.jsonl are in `out` at the end.

    Args:
        trained_on: the examples of the training, which the classifiers learn from.
        test: examples that were never trained on.
    """
    report = Report(out, test.modality, COLUMNS, config, base, caster.id)
    asked, places = wordings(test.modality), _chosen(test, config)
    labels, is_held_out = np.array([test.labels[i] for i in places]), np.array(test.is_held_out)
    # By part of the table, the classes whose names are on offer, and the examples that it is about.
    offered = {TRAINED: np.flatnonzero(~is_held_out)}
    about = {TRAINED: np.flatnonzero(~is_held_out[labels])}
    if is_held_out.any():
        offered |= {HELD_OUT: np.flatnonzero(is_held_out), ALL: np.arange(len(is_held_out))}
        about |= dict.fromkeys((HELD_OUT, ALL), np.flatnonzero(is_held_out[labels]))
    parts = tuple(offered)
    states = encoded(test, places, caster.encoder)
    known = encoded(trained_on, trained_on.of(held_out=False), caster.encoder)
    reference = known[:: max(1, len(known) // _N_REFERENCE)]
    every = range(len(places))
    classified = _classifiers(known, trained_on, states[about[TRAINED]], config)
    scorer = _Scorer(base, caster, progress, len(every) * 3 + _N_REFERENCE)
    right: dict[tuple[str, str], list[bool]] = {}

    def likeliest(losses: np.ndarray, part: str) -> np.ndarray:
        """The likeliest class of those on offer, for each example of a part."""
        return offered[part][losses[about[part]][:, offered[part]].argmin(1)]

    def count(baseline: str, losses: np.ndarray, parts: Sequence[str] = parts[:2]) -> None:
        """For each example of a part, whether its own name is the likeliest of those on offer."""
        for part in parts:
            right[part, baseline] = (likeliest(losses, part) == labels[about[part]]).tolist()

    own = scorer.losses(asked["test"], test.names, states, every)
    paired = _shuffled([about[part].tolist() for part in parts[:2]], config.seed)
    count("adapter", own, parts)
    count("gain", own - scorer.losses(asked["test"], test.names, reference, range(len(reference))).mean(0), parts)
    count("unseen wording", scorer.losses(asked["unseen_wording"], test.names, states, every))
    count("shuffled", scorer.losses(asked["test"], test.names, states, paired))
    count("none", np.repeat(scorer.losses_with(asked["test"], test.names, [None]), len(every), axis=0))
    free = scorer.free_answers(asked["test"], states)
    names = [test.names[label] for label in labels]
    for part in parts[:2]:
        right[part, "free"] = [is_exact(free[i], names[i]) for i in about[part]]
    for baseline, answers in classified.items():
        right[TRAINED, baseline] = [said == names[i] for i, said in zip(about[TRAINED], answers, strict=True)]
    rows = [_row(part, baseline, hits, 1 / len(offered[part])) for (part, baseline), hits in right.items()]
    rows.sort(key=lambda row: parts.index(row["part"]))
    chosen = dict(pair for part in parts[:2] for pair in zip(about[part].tolist(), likeliest(own, part), strict=True))
    report.add_answers(
        {"title": test.titles[place], "place": place, "name": names[i], "is_held_out": bool(is_held_out[labels[i]]),
         "chosen": test.names[chosen[i]], "free": free[i]}
        for i, place in enumerate(places)
    )  # fmt: skip
    return report.write(rows)


class _Scorer:
    """Scores answers to a question with the LoRAs of examples, and tells how far it is."""

    def __init__(self, base: Base, caster: Caster, progress: Progress, total: int):
        self.base, self.caster, self.progress, self.total = base, caster, progress, total
        self._done = 0

    def losses(self, question: str, answers: Sequence[str], states: Tensor, rows: Sequence[int]) -> np.ndarray:
        """The negative log-likelihood of each answer with the LoRA of each example [rows, answers]."""
        found: list[np.ndarray] = []
        for loras in self._loras(states, rows):
            found.append(self.losses_with(question, answers, loras))
            self._done += len(loras)
            self.progress(min(self._done, self.total), self.total)
        return np.concatenate(found)

    def losses_with(self, question: str, answers: Sequence[str], loras: Sequence[LoRA | None]) -> np.ndarray:
        """The same with given LoRAs, or with none [loras, answers]."""
        n, prompt = len(loras), self.base.chat.prompt(question, "")
        return torch.stack(negative_log_likelihood(self.base, [prompt] * n, [answers] * n, loras)).cpu().numpy()

    def free_answers(self, question: str, states: Tensor) -> list[str]:
        """What the base writes with the LoRA of each example."""
        model, answers = Model(self.base, Library()), list[str]()
        for loras in self._loras(states, range(len(states))):
            answers += model.ask([question] * len(loras), loras, sampling=Sampling(max_new_tokens=16))
        return answers

    def _loras(self, states: Tensor, rows: Sequence[int]) -> Iterator[list[LoRA]]:
        """The LoRAs of these examples, a few at a time."""
        for first in range(0, len(rows), _AT_ONCE):
            batch = self.caster.loras_of(Features(states[list(rows[first : first + _AT_ONCE])].float()))
            yield [batch.row(i) for i in range(batch.n)]


def _row(part: str, baseline: str, hits: Sequence[bool], chance: float) -> dict[str, Any]:
    named: dict[str, Any] = {"part": part, "baseline": baseline, "label": LABELS[baseline], "n": len(hits)}
    return {**named, **share_row("accuracy", sum(hits), len(hits)), "chance": chance}


def _chosen(test: Labelled, config: ModalityEvalConfig) -> list[int]:
    """The places of the examples to measure, the same number of each class."""
    rng = random.Random(config.seed)
    chosen = []
    for label in range(len(test.names)):
        mine = [i for i, its in enumerate(test.labels) if its == label]
        chosen += mine if config.per_class is None else sorted(rng.sample(mine, min(config.per_class, len(mine))))
    if not chosen:
        raise ConfigError("the set to measure on is empty")
    return chosen


def _shuffled(parts: Sequence[Sequence[int]], seed: int) -> list[int]:
    """For each example another one at random, of a held-out class for those of held-out classes."""
    rng = random.Random(f"{seed}/shuffled")
    paired = {i: j for part in parts for i, j in zip(part, rng.sample(part, len(part)), strict=True)}
    return [paired[i] for i in sorted(paired)]


def _classifiers(
    known_states: Tensor, trained_on: Labelled, states: Tensor, config: ModalityEvalConfig
) -> dict[str, list[str]]:
    """The answers of two classifiers on the mean of the same features, fitted to the examples of the training."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.neighbors import NearestCentroid
    from sklearn.preprocessing import StandardScaler

    known = _means(known_states)
    labels = np.array([trained_on.names[trained_on.labels[i]] for i in trained_on.of(held_out=False)])
    scaler = StandardScaler().fit(known)
    known, asked = scaler.transform(known), scaler.transform(_means(states))
    counts = Counter(labels.tolist())
    n_held = max(len(counts), math.ceil(len(labels) / 5))
    if min(counts.values()) < 2 or len(labels) - n_held < len(counts):
        raise ConfigError("the linear probe takes at least two images of each class that was trained on (--trained-on)")
    fit, held, fit_labels, held_labels = train_test_split(
        known, labels, test_size=n_held, random_state=config.seed, stratify=labels
    )

    def probe(strength: float) -> Any:
        return LogisticRegression(C=strength, max_iter=1000)

    # Its only setting, chosen on a fifth of the training examples.
    best = max(_PROBE_STRENGTHS, key=lambda strength: probe(strength).fit(fit, fit_labels).score(held, held_labels))
    fitted = {"centroid": NearestCentroid().fit(known, labels), "probe": probe(best).fit(known, labels)}
    return {name: classifier.predict(asked).tolist() for name, classifier in fitted.items()}


def _means(states: Tensor) -> np.ndarray:
    """The mean features of each example [n, t, d] -> [n, d], piece by piece: a training set is large."""
    return torch.cat([some.float().mean(1) for some in states.split(256)]).numpy()
