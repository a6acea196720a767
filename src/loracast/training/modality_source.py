"""Training episodes of another modality: features of labelled examples, computed once, and questions about them."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from loracast.base.chat import ChatFormat
from loracast.data.labelled import Labelled
from loracast.data.rows import read_content, read_unrelated
from loracast.encoders.features import Encoder, Features
from loracast.errors import ConfigError, TrainingError
from loracast.paths import features_dir
from loracast.scoring.episodes import Episode, Question
from loracast.training.episode_maker import UNRELATED_SHARE

_BATCH = 16  # examples that are encoded at once


@dataclass(frozen=True)
class Attribute:
    """A property that can be asked for besides the class."""

    name: str
    train: tuple[str, ...]  # wordings of the question
    test: str
    answers: Mapping[str, str]  # by class

    @property
    def choices(self) -> tuple[str, ...]:
        """All different answers."""
        return tuple(dict.fromkeys(self.answers.values()))


@dataclass(frozen=True)
class Wordings:
    """The questions about examples of a modality."""

    train: tuple[str, ...]
    test: str
    unseen: str  # a wording that training never has
    attributes: tuple[Attribute, ...]


@cache
def wordings(modality: str) -> Wordings:
    """Read the questions about a modality from content/modalities.toml."""
    table = read_content("modalities")[modality]
    attributes = []
    for name, given in table.get("attributes", {}).items():
        answers = {cls: answer for answer, classes in given["answers"].items() for cls in classes}
        attributes.append(Attribute(name, tuple(given["train"]), given["test"], answers))
    return Wordings(tuple(table["train"]), table["test"], table["unseen_wording"], tuple(attributes))


@dataclass(frozen=True)
class ModalityDataConfig:
    """What the steps of a training look like."""

    seed: int = 0
    """Seed of the data."""
    examples_per_step: int = 32
    """Examples in one step, each cast into its own LoRA."""
    questions_per_example: int = 2
    """Questions about each example."""
    attribute_share: float = 0.5
    """Share of the questions after the first one that ask for an attribute, if there is one, instead of the class."""
    unrelated: tuple[str, ...] = ()
    """Files of questions unrelated to any example; the base shall answer them as it does without a LoRA."""

    def __post_init__(self) -> None:
        if min(self.examples_per_step, self.questions_per_example) < 1 or not 0 <= self.attribute_share <= 1:
            raise ConfigError(
                "examples_per_step and questions_per_example must be at least 1, attribute_share between 0 and 1"
            )


def encoded(
    labelled: Labelled,
    indices: Sequence[int],
    encoder: Encoder,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Features of some examples [n, t, d] in bf16, computed once and memory-mapped from the cache."""
    from safetensors.torch import load_file, save_file

    which = hashlib.sha256(f"{encoder.fingerprint}/{labelled.fingerprint}/{list(indices)}".encode()).hexdigest()[:16]
    path = features_dir() / f"{labelled.modality}-{which}.safetensors"
    if not path.is_file():
        rows = []
        for first in range(0, len(indices), _BATCH):
            examples = [labelled.load(i) for i in indices[first : first + _BATCH]]
            rows.append(encode(encoder, examples).states.bfloat16().cpu())
            progress(min(first + _BATCH, len(indices)), len(indices))
        if len({row.shape[1:] for row in rows}) != 1:
            raise TrainingError(
                f"the encoder {encoder.name!r} gives different numbers of features for different examples"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"states": torch.cat(rows)}, scratch)
        os.replace(scratch, path)
    return load_file(path)["states"]


def encode(encoder: Encoder, examples: Sequence[Any]) -> Features:
    """Encode a batch of examples; tensors are stacked first."""
    return encoder(torch.stack(list(examples)) if isinstance(examples[0], Tensor) else examples)


class ModalitySource:
    """Draws the examples of a step and questions about them; a step depends on the seed and its number alone."""

    def __init__(
        self, config: ModalityDataConfig, labelled: Labelled, encoder: Encoder, chat: ChatFormat, **options: Any
    ):
        """`options` are those of `encoded`."""
        self.config, self.chat = config, chat
        self.wordings = wordings(labelled.modality)
        indices = labelled.of(held_out=False)
        if len({labelled.labels[i] for i in indices}) < 2:
            raise TrainingError("examples of at least two classes are needed")
        self.states = encoded(labelled, indices, encoder, **options)
        self.names = [labelled.names[labelled.labels[i]] for i in indices]
        self._unrelated = read_unrelated(config.unrelated)

    def step(self, number: int) -> tuple[Features, list[Episode]]:
        """The features of a batch's examples, and an episode of questions for each."""
        rng = random.Random(f"{self.config.seed}/0/{number}")  # the 0 keeps what recipes drew before
        drawn = rng.sample(range(len(self.names)), min(self.config.examples_per_step, len(self.names)))
        has_unrelated = bool(self._unrelated) and rng.random() < UNRELATED_SHARE
        episodes = [self._episode(rng, self.names[i], has_unrelated) for i in drawn]
        return Features(self.states[drawn].float()), episodes

    def _episode(self, rng: random.Random, name: str, has_unrelated: bool) -> Episode:
        attributes = [attribute for attribute in self.wordings.attributes if name in attribute.answers]
        questions: dict[str, Question] = {}
        while len(questions) < min(self.config.questions_per_example, len(self.wordings.train)):
            if attributes and questions and rng.random() < self.config.attribute_share:
                attribute = rng.choice(attributes)
                question, answer = rng.choice(attribute.train), attribute.answers[name]
            else:
                question, answer = rng.choice(self.wordings.train), name
            questions[question] = Question(tuple(self.chat.prompt(question, "")), tuple(self.chat.answer(answer)))
        if has_unrelated:
            question, answer = rng.choice(self._unrelated)
            reply = tuple(self.chat.reply(answer))
            questions[question] = Question(tuple(self.chat.prompt(question, "")), reply, is_unrelated=True)
        return Episode((), tuple(questions.values()))
