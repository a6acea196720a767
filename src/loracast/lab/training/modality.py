"""Train the document hypernetwork on another modality: an image's features become a LoRA of the text-only base."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracast.base.chat import ChatFormat
from loracast.base.load import Base
from loracast.errors import ConfigError, TrainingError
from loracast.files import cache_dir, write_with
from loracast.hypernets.doc_to_lora import DocToLoRA, DocToLoRAConfig
from loracast.hypernets.encoders import Encoder, Features, check_encoder
from loracast.lab.data.labelled import Labelled
from loracast.lab.data.rows import read_content, read_unrelated
from loracast.lab.training.doc import cast_documents, standardise
from loracast.lab.training.document_source import UNRELATED_SHARE
from loracast.lab.training.loop import Workers
from loracast.lab.training.losses import Distillation, Teacher
from loracast.lab.training.recipe import (
    HypernetRecipe,
    Layers,
    check_values,
    recorded,
    start_from,
    target_at,
    train_hypernet,
)
from loracast.lab.training.scoring import Episode, Question, pack, score_answers

_BATCH = 16  # examples that are encoded at once


def wordings(modality: str) -> dict[str, Any]:
    """The questions about examples of a modality, and about their attributes: a table of content/modalities.toml."""
    return read_content("modalities")[modality]


def answer_about(attribute: Mapping[str, Any], name: str) -> str | None:
    """What is true of an attribute for the examples of a class; None where it is not known."""
    return next((answer for answer, names in attribute["answers"].items() if name in names), None)


@dataclass(frozen=True)
class ModalityDataConfig:
    """Settings of the examples and questions of a step."""

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
    path = cache_dir("features") / f"{labelled.modality}-{which}.safetensors"
    if not path.is_file():
        rows = []
        for first in range(0, len(indices), _BATCH):
            examples = [labelled.load(i) for i in indices[first : first + _BATCH]]
            inputs = torch.stack(examples) if isinstance(examples[0], Tensor) else examples
            rows.append(encoder(inputs).states.bfloat16().cpu())
            progress(min(first + _BATCH, len(indices)), len(indices))
        if len({row.shape[1:] for row in rows}) != 1:
            raise TrainingError(
                f"the encoder {encoder.name!r} gives different numbers of features for different examples"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_with(path, lambda temporary: save_file({"states": torch.cat(rows)}, temporary))
    return load_file(path)["states"]


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
        attributes = [one for one in self.wordings.get("attributes", {}).values() if answer_about(one, name)]
        questions: dict[str, Question] = {}
        while len(questions) < min(self.config.questions_per_example, len(self.wordings["train"])):
            if attributes and questions and rng.random() < self.config.attribute_share:
                attribute = rng.choice(attributes)
                question, answer = rng.choice(attribute["train"]), answer_about(attribute, name) or ""
            else:
                question, answer = rng.choice(self.wordings["train"]), name
            questions[question] = Question(tuple(self.chat.prompt(question, "")), tuple(self.chat.answer(answer)))
        if has_unrelated:
            question, answer = rng.choice(self._unrelated)
            reply = tuple(self.chat.reply(answer))
            questions[question] = Question(tuple(self.chat.prompt(question, "")), reply, is_unrelated=True)
        return Episode((), tuple(questions.values()))


_EXAMPLES_FOR_UNITS = 256


@dataclass(frozen=True, kw_only=True)
class ModalityRecipe(HypernetRecipe):
    """One training run of Doc-to-LoRA on another modality."""

    OPTIONS = (
        "width", "rank", "n_heads", "n_kv_heads", "head_dim", "n_decoder_blocks", "head_shared_rank", "static_rank",
        "static_modules_rank", "scale",
    )  # fmt: skip
    OBJECTIVE = ("kl_to_base_weight",)
    kinds: tuple[str, ...] = ("down_proj",)
    """Module kinds that receive a LoRA."""
    layers: Layers = None
    """Layers that receive a LoRA; by default all."""
    kl_to_base_weight: float = 1.0
    """Weight of the divergence from the plain base on unrelated questions."""
    data: ModalityDataConfig = field(default_factory=ModalityDataConfig)


def build_modality_hypernet(base: Base, recipe: ModalityRecipe, encoder: Encoder, source: ModalitySource) -> DocToLoRA:
    """A fresh hypernetwork for a base and an encoder, its input units measured on the data."""
    torch.manual_seed(recipe.training.seed)
    check_values(DocToLoRAConfig, recipe.hypernetwork)
    target = target_at(base.model.config, recipe.kinds, recipe.layers)
    config = DocToLoRAConfig.for_target(
        target, encoder.d_features,
        encoder=encoder.name, encoder_fingerprint=encoder.fingerprint, reader_layers=(0,), **recipe.hypernetwork,
    )  # fmt: skip
    hypernet = DocToLoRA(config)
    n = len(source.states)
    chosen = torch.linspace(0, n - 1, min(_EXAMPLES_FOR_UNITS, n)).long()
    standardise(hypernet, source.states[chosen].float().flatten(0, 1))
    return hypernet


def train_modality(
    base: Base,
    recipe: ModalityRecipe,
    labelled: Labelled,
    encoder: Encoder,
    out: Path,
    *,
    init_from: Path | None = None,
    on_encoded: Callable[[int, int], None] = lambda done, total: None,
    **record: Any,
) -> dict[str, float]:
    """Train a hypernetwork for `base` and `encoder`, or resume the run in `out`. Returns the last metrics.

    Args:
        init_from: hypernetwork that a fresh run starts from; the recipe's `[hypernetwork]` must be empty.
        on_encoded: receives (done, total) while examples are encoded for the first time.
        record: `command` and `on_metrics` of `train_hypernet`.
    """
    workers = Workers.join(base.device.type)
    made = ModalitySource(recipe.data, labelled, encoder, base.chat, progress=on_encoded) if workers.is_first else None
    workers.any(False)  # the others wait for the features
    source = made or ModalitySource(recipe.data, labelled, encoder, base.chat)
    if init_from is not None:
        c = (hypernet := start_from(init_from, DocToLoRA, base, recipe)).config
        check_encoder(c.encoder, c.encoder_fingerprint, c.d_features, encoder)
    else:
        hypernet = build_modality_hypernet(base, recipe, encoder, source)
    hypernet.to(base.device).train()
    distillation = Distillation(Teacher(base.model, base.pad_id), None)

    def objective(number: int) -> tuple[Tensor, dict[str, float]]:
        features, episodes = source.step(number)
        batch = pack(distillation.with_soft_targets(episodes), base.pad_id).to(base.device)
        with recipe.training.autocast(base.device):
            loras = cast_documents(hypernet, features.to(base.device)).loras
            scores = score_answers(base.model, loras, batch, passes=recipe.training.passes)
        loss, kl = scores.loss, scores.kl_to_base
        figures = {"answer_loss": loss.item(), "exact": scores.exact, "token_accuracy": scores.token_accuracy}
        if kl is not None:
            loss = loss + recipe.kl_to_base_weight * kl
            figures["kl_to_base"] = kl.item()
        return loss, {**figures, "questions": batch.n_questions, "tokens": batch.n_tokens}

    about = {
        "data": recorded(recipe.data),
        "objective": recipe.objective,
        "examples": labelled.fingerprint,
        "encoder": encoder.fingerprint,
    }
    return train_hypernet(
        hypernet, objective, recipe.training, out, base=base, init_from=init_from, about=about, **record
    )
