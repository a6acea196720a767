"""Training episodes of another sense: features of things that were sensed, computed once, and questions about them."""

from __future__ import annotations

import hashlib
import os
import random
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from loracast.base.chat import ChatFormat
from loracast.data.labelled import Labelled
from loracast.data.unrelated import read_unrelated
from loracast.encoders.features import Encoder, Features
from loracast.errors import ConfigError, TrainingError
from loracast.paths import features_dir
from loracast.scoring.episodes import Episode, Question
from loracast.training.episode_maker import UNRELATED_SHARE

_AT_ONCE = 16


@dataclass(frozen=True)
class Attribute:
    """What can be asked of a thing besides what it is."""

    name: str
    train: tuple[str, ...]
    """Wordings of the question."""
    test: str
    answers: Mapping[str, str]
    """By class."""

    @property
    def choices(self) -> tuple[str, ...]:
        """All answers that there are."""
        return tuple(dict.fromkeys(self.answers.values()))


@dataclass(frozen=True)
class Wordings:
    """What is asked about a sense."""

    train: tuple[str, ...]
    test: str
    unseen: str
    """A wording that no training has."""
    attributes: tuple[Attribute, ...]


@cache
def wordings(sense: str) -> Wordings:
    """Of content/senses.toml."""
    text = (files("loracast.data") / "content" / "senses.toml").read_text(encoding="utf-8")
    of = tomllib.loads(text)[sense]
    attributes = [
        Attribute(
            name,
            tuple(given["train"]),
            given["test"],
            {cls: answer for answer, classes in given["answers"].items() for cls in classes},
        )
        for name, given in of.get("attributes", {}).items()
    ]
    return Wordings(tuple(of["train"]), of["test"], of["unseen_wording"], tuple(attributes))


@dataclass(frozen=True)
class ModalityDataConfig:
    """What the episodes of a training look like."""

    seed: int = 0
    """Seed of the data."""
    examples_per_step: int = 32
    """Images (or signals) in one step, each with a LoRA of its own."""
    questions_per_example: int = 2
    """Questions about each."""
    attribute_share: float = 0.5
    """Share of the questions after the first one that ask for an attribute, where there are any, in place of the class."""
    with_held_out_classes: bool = False
    """Train on spare classes too."""
    unrelated: tuple[str, ...] = ()
    """Files of questions that have nothing to do with any image, which the base shall answer as it does without one."""

    def __post_init__(self) -> None:
        if min(self.examples_per_step, self.questions_per_example) < 1 or not 0 <= self.attribute_share <= 1:
            raise ConfigError(
                "examples_per_step and questions_per_example must be at least 1, attribute_share between 0 and 1"
            )


def encoded(
    labelled: Labelled,
    places: Sequence[int],
    encoder: Encoder,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """The features of some things [n, t, d] in bf16, computed once and kept in the cache: mapped from there, not held in memory."""
    from safetensors.torch import load_file, save_file

    which = hashlib.sha256(f"{encoder.fingerprint}/{labelled.fingerprint}/{list(places)}".encode()).hexdigest()[:16]
    path = features_dir() / f"{labelled.sense}-{which}.safetensors"
    if not path.is_file():
        rows = []
        for first in range(0, len(places), _AT_ONCE):
            things = [labelled.load(i) for i in places[first : first + _AT_ONCE]]
            rows.append(encode(encoder, things).states.bfloat16().cpu())
            progress(min(first + _AT_ONCE, len(places)), len(places))
        if len({row.shape[1:] for row in rows}) != 1:
            raise TrainingError(
                f"the encoder {encoder.name!r} gives different numbers of features for different things"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"states": torch.cat(rows)}, scratch)
        os.replace(scratch, path)
    return load_file(path)["states"]


def encode(encoder: Encoder, things: Sequence[Any]) -> Features:
    """Some things, as the encoder takes several at once."""
    return encoder(torch.stack(list(things)) if isinstance(things[0], Tensor) else things)


class ModalitySource:
    """Draws the things of a step and what is asked about them; it depends on the seed and the step's number alone."""

    def __init__(
        self, config: ModalityDataConfig, labelled: Labelled, encoder: Encoder, chat: ChatFormat, **options: Any
    ):
        """
        Args:
            options: of `encoded`.
        """
        self.config, self.chat = config, chat
        self.wordings = wordings(labelled.sense)
        places = list(range(len(labelled))) if config.with_held_out_classes else labelled.of(spare=False)
        if len({labelled.labels[i] for i in places}) < 2:
            raise TrainingError("things of at least two classes are needed to tell them apart")
        self.states = encoded(labelled, places, encoder, **options)
        self.names = [labelled.names[labelled.labels[i]] for i in places]
        self._unrelated = read_unrelated(config.unrelated)

    def step(self, number: int, worker: int = 0) -> tuple[Features, list[Episode]]:
        """The features of a step's things, and for each of them the questions."""
        rng = random.Random(f"{self.config.seed}/{worker}/{number}")
        drawn = rng.sample(range(len(self.names)), min(self.config.examples_per_step, len(self.names)))
        has_unrelated = bool(self._unrelated) and rng.random() < UNRELATED_SHARE
        episodes = [self._episode(rng, self.names[i], has_unrelated) for i in drawn]
        return Features(self.states[drawn].float()), episodes

    def _episode(self, rng: random.Random, name: str, has_unrelated: bool) -> Episode:
        known = [attribute for attribute in self.wordings.attributes if name in attribute.answers]
        questions: dict[str, Question] = {}
        while len(questions) < min(self.config.questions_per_example, len(self.wordings.train)):
            if known and questions and rng.random() < self.config.attribute_share:
                attribute = rng.choice(known)
                asked, answer = rng.choice(attribute.train), attribute.answers[name]
            else:
                asked, answer = rng.choice(self.wordings.train), name
            questions[asked] = Question(tuple(self.chat.prompt(asked, "")), tuple(self.chat.answer(answer)))
        if has_unrelated:
            asked, answer = rng.choice(self._unrelated)
            reply = tuple(self.chat.reply(answer))
            questions[asked] = Question(tuple(self.chat.prompt(asked, "")), reply, is_unrelated=True)
        return Episode((), tuple(questions.values()))
