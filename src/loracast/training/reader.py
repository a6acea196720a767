"""Train the reader, the ceiling of question answering: a LoRA that answers with the document in the window.

A row is a document once with all its questions as branches (scoring/episodes.py), so ten thousand questions cost as
much as their documents.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loracast.base.chat import encode_text
from loracast.base.fingerprint import Fingerprint
from loracast.base.load import Base
from loracast.data.qa import read_questioned
from loracast.errors import AdapterError, ConfigError, TrainingError
from loracast.lora.algebra import LoRA
from loracast.lora.peft_format import read_peft
from loracast.scoring.episodes import Episode, Question
from loracast.training.document_source import answered_questions
from loracast.training.episode_maker import reading_prompt
from loracast.training.loop import OnMetrics, TrainConfig
from loracast.training.peft_training import PeftConfig, read_about, train_lora
from loracast.training.recipe import read_lora_recipe, recorded


@dataclass(frozen=True)
class ReaderDataConfig:
    """Documents and questions of one step."""

    seed: int = 0
    """Seed of the data."""
    documents: tuple[str, ...] = ()
    """Files of documents with questions."""
    document_sources: tuple[str, ...] = ()
    """Of rows with a `source` field, take only these sources."""
    max_document_tokens: int = 512
    """Longest document."""
    questions_per_step: int = 32
    """Questions in one step, over all its documents."""
    max_questions: int = 8
    """Most questions about one document in a step."""


@dataclass(frozen=True)
class ReaderRecipe:
    """One training run, as the tables `[lora]`, `[data]` and `[training]` of a TOML file."""

    data: ReaderDataConfig = field(default_factory=ReaderDataConfig)
    lora: PeftConfig = field(default_factory=lambda: PeftConfig(("q_proj", "v_proj", "o_proj", "down_proj"), rank=16))
    training: TrainConfig = field(default_factory=lambda: TrainConfig(steps=320, lr=5e-4, warmup_steps=20))


def read_reader_recipe(path: Path | None, overrides: Sequence[str] = ()) -> ReaderRecipe:
    """Read a recipe from a TOML file, changed by overrides. Raises ConfigError as `read_tables`."""
    return read_lora_recipe(ReaderRecipe(), path, overrides)


class ReaderSource:
    """Draws documents, in proportion to their numbers of questions, with questions whose answers stand there."""

    def __init__(self, config: ReaderDataConfig, base: Base):
        """Raises ConfigError without documents, TrainingError if no document fits."""
        if not config.documents:
            raise ConfigError("a reader needs documents with questions: give a file of them (--documents FILE)")
        self.config, self.chat = config, base.chat
        most = config.max_document_tokens
        self.documents = [
            document
            for document in read_questioned(config.documents, config.document_sources, "train")
            if document.spans and len(encode_text(base.tokenizer, document.text)) <= most
        ]
        if not self.documents:
            raise TrainingError(f"no document of at most {most} tokens has a question whose answer stands in it")
        self._weights = [min(config.max_questions, len(document.spans)) for document in self.documents]

    def episodes(self, number: int) -> list[Episode]:
        """The rows of step `number`."""
        rng = random.Random(f"{self.config.seed}/{number}")
        rows: list[Episode] = []
        while sum(len(row.questions) for row in rows) < self.config.questions_per_step:
            (document,) = rng.choices(self.documents, self._weights)
            questions = []
            for question, answer, _ in answered_questions(rng, document, self.config.max_questions):
                prompt = reading_prompt(self.chat, document.full_text, question)
                questions.append(Question(tuple(prompt), tuple(self.chat.answer(answer))))
            rows += [Episode((), tuple(questions), "reader")] if questions else []
        return rows


def train_reader(
    base: Base,
    recipe: ReaderRecipe,
    out_dir: Path,
    *,
    command: str = "",
    budget_s: float | None = None,
    on_metrics: OnMetrics = lambda figures: None,
) -> bool:
    """Train the reader, or resume. Returns whether it is finished."""
    source = ReaderSource(recipe.data, base)
    return train_lora(
        base, recipe.lora, recipe.training, source.episodes, out_dir,
        about={"data": recorded(recipe.data), "is_reader": True},
        command=command, budget_s=budget_s, on_metrics=on_metrics,
    )  # fmt: skip


def read_reader(folder: Path, base: Fingerprint) -> LoRA:
    """Read the LoRA that `train_reader` made for a base. Raises AdapterError if there is none, or it is unfinished."""
    about = read_about(folder, base, "loracast train reader")
    if not about["settings"].get("is_reader"):
        raise AdapterError(f"{folder} holds another LoRA; give what `loracast train reader` makes")
    return read_peft(folder)
