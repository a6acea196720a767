"""`loracast eval image`: what a text-only base says with the LoRA of an image.

It does without baseline.py and runner.py: most of its rows are classifiers or rankings of names, which no prompt gives.

Baselines are chance, the base alone, LoRAs of other examples, and two classifiers on the hypernetwork's features: the
nearest centroid and a linear probe, which is the ceiling. Some names are likely whatever is shown, above all those that
were never trained on; so names are also compared by what an example's LoRA adds to their log-likelihood over the
mean of training examples' LoRAs (as in Holtzman et al., arXiv 2104.08315).
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loracast.base.generate import Sampling, answer, answers
from loracast.base.load import Base
from loracast.errors import ConfigError
from loracast.hypernets.encoders import Features
from loracast.hypernets.protocol import Caster
from loracast.lab.data.answer_metrics import is_exact
from loracast.lab.data.labelled import Labelled
from loracast.lab.evaluation.likelihood import negative_log_likelihood
from loracast.lab.evaluation.report import Progress, Report, ReportWriter, columns, mean, no_progress, wilson
from loracast.lab.training.modality import Attribute, encode, encoded, wordings
from loracast.lora.algebra import LoRA

COLUMNS = columns(
    part="part", label="method", n=("n", 0), accuracy=("right %", "%"), low=("95 %", "interval"),
    chance=("chance %", "%"), of_probe=("of the probe's %", "%"),
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
    "frequent": "the most frequent answer",
}
_AT_ONCE = 32
_N_TIMED = 20
_N_REFERENCE = 100  # training examples whose LoRAs tell how likely a name is anyway
_PROBE_STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # scikit-learn's C


@dataclass(frozen=True)
class ModalityEvalConfig:
    """Settings of `loracast eval image`."""

    per_class: int | None = None
    """Most examples of each class; by default all."""
    seed: int = 0
    """Seed of the pairing with other examples' LoRAs, and of the examples where not all are taken."""

    def __post_init__(self) -> None:
        if self.per_class is not None and self.per_class < 1:
            raise ConfigError("per_class must be at least 1")


@dataclass(frozen=True)
class ModalityAnswer:
    """The answers about one example."""

    place: int
    """Its place in the labelled set."""
    name: str
    """The name of its class."""
    is_held_out: bool
    chosen: str
    """The likeliest name: among the classes trained on, or for an example of a held-out class among those."""
    free: str
    """What the base wrote by itself."""


def evaluate_modality(
    base: Base,
    caster: Caster,
    trained_on: Labelled,
    test: Labelled,
    config: ModalityEvalConfig,
    out: Path,
    progress: Progress = no_progress,
) -> tuple[Report, list[ModalityAnswer]]:
    """Run the evaluation; results.json, table.md and answers.jsonl are in `out` at the end.

    Args:
        trained_on: the examples of the training, which the classifiers learn from.
        test: examples that were never trained on.
    """
    writer = ReportWriter(out, test.modality, COLUMNS, config, base, caster.id)
    asked = wordings(test.modality)
    examples = _Examples(test, _chosen(test, config))
    states = encoded(test, examples.places, caster.encoder)
    known = encoded(trained_on, trained_on.of(held_out=False), caster.encoder)
    reference = known[:: max(1, len(known) // _N_REFERENCE)]
    every, trained = range(len(examples.places)), examples.of(TRAINED)
    classified = _classifiers(known, trained_on, states[trained], config)
    scorer = _Scorer(base, caster, progress, len(every) * (3 + len(asked.attributes)) + _N_REFERENCE)
    offered = _offered(test)
    right: dict[tuple[str, str], list[bool]] = {}

    def count(baseline: str, losses: np.ndarray, parts: Sequence[str]) -> None:
        """For each example of a part of the table, whether its own name is the likeliest of those on offer."""
        for part in parts:
            hits = [_likeliest(test, losses[i], offered[part]) == examples.names[i] for i in examples.of(part)]
            right[part, baseline] = hits

    parts = tuple(offered)
    own = scorer.losses(asked.test, test.names, states, every)
    count("adapter", own, parts)
    count("gain", own - scorer.losses(asked.test, test.names, reference, range(len(reference))).mean(0), parts)
    count("unseen wording", scorer.losses(asked.unseen, test.names, states, every), parts[:2])
    count("shuffled", scorer.losses(asked.test, test.names, states, examples.shuffled(config.seed)), parts[:2])
    count("none", np.repeat(scorer.of_base(asked.test, test.names), len(every), axis=0), parts[:2])
    free = scorer.free_answers(asked.test, states)
    for part in parts[:2]:
        right[part, "free"] = [is_exact(free[i], examples.names[i]) for i in examples.of(part)]
    for baseline, classes in classified.items():
        right[TRAINED, baseline] = [said == examples.names[i] for i, said in zip(trained, classes, strict=True)]
    rows = [_row(part, baseline, hits, 1 / len(offered[part])) for (part, baseline), hits in right.items()]
    rows.sort(key=lambda row: parts.index(row["part"]))
    for attribute in asked.attributes:
        rows += _attribute_rows(attribute, examples, scorer, states)
    probe = next((row["accuracy"] for row in rows if row["baseline"] == "probe"), None)
    for row in rows:
        if row["part"] == TRAINED and probe:
            row["of_probe"] = row["accuracy"] / probe
    writer.settings |= _timings(base, caster, test, examples.places[0], asked.test)
    answered = []
    for i, place in enumerate(examples.places):
        chosen = _likeliest(test, own[i], offered[HELD_OUT if examples.is_held_out[i] else TRAINED])
        answered.append(ModalityAnswer(place, examples.names[i], examples.is_held_out[i], chosen, free[i]))
    writer.add_answers({"title": test.titles[one.place], **asdict(one)} for one in answered)
    return writer.write(rows), answered


class _Scorer:
    """Scores answers to a question with the LoRAs of examples, and tells how far it is."""

    def __init__(self, base: Base, caster: Caster, progress: Progress, total: int):
        self.base, self.caster, self.progress, self.total = base, caster, progress, total
        self._done = 0

    def losses(self, question: str, answers: Sequence[str], states: Tensor, rows: Sequence[int]) -> np.ndarray:
        """The negative log-likelihood of each answer with the LoRA of each example [rows, answers]."""
        prompt = self.base.chat.prompt(question, "")
        found: list[Tensor] = []
        for loras in self._loras(states, rows):
            found += negative_log_likelihood(self.base, [prompt] * len(loras), [answers] * len(loras), loras)
            self._done += len(loras)
            self.progress(min(self._done, self.total), self.total)
        return torch.stack(found).cpu().numpy()

    def of_base(self, question: str, answers: Sequence[str]) -> np.ndarray:
        """The negative log-likelihood of each answer without a LoRA [1, answers]."""
        prompt = self.base.chat.prompt(question, "")
        return torch.stack(negative_log_likelihood(self.base, [prompt], [answers], [None])).cpu().numpy()

    def free_answers(self, question: str, states: Tensor) -> list[str]:
        """What the base writes with the LoRA of each example."""
        prompt = self.base.chat.prompt(question, "")
        given: list[str] = []
        for loras in self._loras(states, range(len(states))):
            found = answers(self.base, [prompt] * len(loras), loras, Sampling(max_new_tokens=16))
            given += [one.text for one in found]
        return given

    def _loras(self, states: Tensor, rows: Sequence[int]) -> Iterator[list[LoRA]]:
        """The LoRAs of these examples, a few at a time."""
        for first in range(0, len(rows), _AT_ONCE):
            batch = self.caster.loras_of(Features(states[list(rows[first : first + _AT_ONCE])].float()))
            yield [batch.row(i) for i in range(batch.n)]


def _row(part: str, baseline: str, hits: Sequence[bool], chance: float) -> dict[str, Any]:
    named: dict[str, Any] = {"part": part, "baseline": baseline, "label": LABELS[baseline], "n": len(hits)}
    low, high = wilson(sum(hits), len(hits))
    return {**named, "accuracy": mean(hits), "low": low, "high": high, "chance": chance}


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


class _Examples:
    """The examples that are measured: of each its class's name and whether that class is held out."""

    def __init__(self, test: Labelled, places: Sequence[int]):
        self.places = places
        self.names = [test.names[test.labels[i]] for i in places]
        self.is_held_out = [test.is_held_out[test.labels[i]] for i in places]

    def of(self, part: str) -> list[int]:
        """The examples that a part of the table is about."""
        return [i for i, is_held_out in enumerate(self.is_held_out) if is_held_out == (part != TRAINED)]

    def shuffled(self, seed: int) -> list[int]:
        """For each example one at random, of a held-out class for those of held-out classes."""
        rng = random.Random(f"{seed}/shuffled")
        paired = list(range(len(self.names)))
        for part in (TRAINED, HELD_OUT):
            mine = self.of(part)
            for i, other in zip(mine, rng.sample(mine, len(mine)), strict=True):
                paired[i] = other
        return paired


def _offered(test: Labelled) -> dict[str, list[int]]:
    """By part of the table, the classes whose names are on offer."""
    held_out = [i for i, is_held_out in enumerate(test.is_held_out) if is_held_out]
    offered = {TRAINED: [i for i, is_held_out in enumerate(test.is_held_out) if not is_held_out]}
    return offered | {HELD_OUT: held_out, ALL: list(range(len(test.names)))} if held_out else offered


def _likeliest(test: Labelled, losses: np.ndarray, offered: Sequence[int]) -> str:
    """The likeliest name of the classes on offer, from the losses of all names [classes]."""
    return test.names[offered[int(np.argmin(losses[offered]))]]


def _classifiers(
    known_states: Tensor, trained_on: Labelled, states: Tensor, config: ModalityEvalConfig
) -> dict[str, list[str]]:
    """The answers of two classifiers on the mean of the same features, fitted to the examples of the training."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
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
    classes = sorted(set(labels))
    centroids = np.stack([known[labels == name].mean(0) for name in classes])
    nearest = np.linalg.norm(asked[:, None] - centroids[None], axis=-1).argmin(1)
    return {
        "centroid": [classes[i] for i in nearest],
        "probe": [str(name) for name in probe(best).fit(known, labels).predict(asked)],
    }


def _means(states: Tensor) -> np.ndarray:
    """The mean features of each example [n, t, d] -> [n, d], piece by piece: a training set is large."""
    return torch.cat([some.float().mean(1) for some in states.split(256)]).numpy()


def _attribute_rows(attribute: Attribute, examples: _Examples, scorer: _Scorer, states: Tensor) -> list[dict[str, Any]]:
    """Answers to a question that is about something else than the class."""
    rows = [i for i, name in enumerate(examples.names) if name in attribute.answers]
    if not rows:
        return []
    wanted = [attribute.answers[examples.names[i]] for i in rows]
    frequent = Counter(answer for i, answer in zip(rows, wanted, strict=True) if not examples.is_held_out[i])
    choices = attribute.choices
    answers = {
        "adapter": [choices[i] for i in scorer.losses(attribute.test, choices, states, rows).argmin(1)],
        "none": [choices[int(np.argmin(scorer.of_base(attribute.test, choices)))]] * len(rows),
        "frequent": [frequent.most_common(1)[0][0]] * len(rows),
    }
    made = []
    for part in (TRAINED, HELD_OUT):
        about = set(examples.of(part))
        for baseline, given in answers.items():
            hits = [a == w for i, a, w in zip(rows, given, wanted, strict=True) if i in about]
            if hits:
                made.append(_row(f"{attribute.name}, {part}", baseline, hits, 1 / len(choices)))
    return made


def _timings(base: Base, caster: Caster, test: Labelled, place: int, question: str) -> dict[str, float]:
    """Median seconds from one example in memory to its LoRA, and to an answer's first token with it and without."""
    example, prompt = test.load(place), base.chat.prompt(question, "")
    one_token = Sampling(max_new_tokens=1)
    to_lora, with_lora, without = [], [], []
    for _ in range(_N_TIMED):
        started = time.perf_counter()
        lora = caster.loras_of(encode(caster.encoder, [example])).row(0)
        to_lora.append(time.perf_counter() - started)
        with_lora.append(answer(base, prompt, lora, one_token).first_token_s)
        without.append(answer(base, prompt, None, one_token).first_token_s)
    named = {"to_lora_s": to_lora, "first_token_s": with_lora, "first_token_of_base_s": without}
    return {name: round(statistics.median(values), 4) for name, values in named.items()}
