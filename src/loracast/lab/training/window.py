"""Train the window LoRA, the rival of document adapters: it answers with the document in the prompt.

A row is a document once with all its questions as branches (base/scoring.py), so ten thousand questions cost as
much as their documents.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack

from loracast.base.chat import encode_text
from loracast.base.fingerprint import Fingerprint
from loracast.base.load import Base
from loracast.base.scoring import Episode, Question
from loracast.errors import AdapterError, ConfigError, TrainingError
from loracast.lab.data.everyday import make_document
from loracast.lab.data.facts import make_sheet
from loracast.lab.data.rows import read_questioned
from loracast.lab.training.document_source import answered_questions, reading_prompt
from loracast.lab.training.loop import TrainConfig
from loracast.lab.training.oracle import PeftConfig, read_about, train_lora
from loracast.lab.training.recipe import Reporting, read_lora_recipe, recorded
from loracast.lora.algebra import LoRA
from loracast.lora.peft_format import read_peft


@dataclass(frozen=True)
class WindowDataConfig:
    """Documents and questions of one step."""

    seed: int = 0
    """Seed of the data."""
    documents: tuple[str, ...] = ()
    """Files of documents with questions."""
    document_sources: tuple[str, ...] = ()
    """Of rows with a `source` field, take only these sources."""
    everyday_share: float = 0.0
    """Share of questions about generated everyday documents, with those that a document does not answer."""
    facts_share: float = 0.0
    """Share of questions about generated sheets of facts; the rest are people's questions about real documents."""
    max_document_tokens: int = 512
    """Longest real document."""
    max_facts: int = 20
    """Most facts on one sheet."""
    questions_per_step: int = 32
    """Questions in one step, over all its documents."""
    max_questions: int = 8
    """Most questions about one document in a step."""

    def __post_init__(self) -> None:
        if self.everyday_share + self.facts_share > 1 + 1e-9:
            raise ConfigError("everyday_share and facts_share are more than 1 together")


@dataclass(frozen=True)
class WindowRecipe:
    """One training run, as the tables `[lora]`, `[data]` and `[training]` of a TOML file."""

    data: WindowDataConfig = field(default_factory=WindowDataConfig)
    lora: PeftConfig = field(default_factory=lambda: PeftConfig(("q_proj", "v_proj", "o_proj", "down_proj"), rank=16))
    training: TrainConfig = field(default_factory=lambda: TrainConfig(steps=320, lr=5e-4, warmup_steps=20))


def read_window_recipe(path: Path | None, overrides: Sequence[str] = ()) -> WindowRecipe:
    """Read a recipe from a TOML file, changed by overrides. Raises ConfigError as `read_tables`."""
    return read_lora_recipe(WindowRecipe(), path, overrides)


class WindowSource:
    """Draws documents with questions: real ones in proportion to their questions, everyday documents and sheets."""

    def __init__(self, config: WindowDataConfig, base: Base):
        """Raises ConfigError without documents, TrainingError if no document fits."""
        if not config.documents:
            raise ConfigError("a window LoRA needs documents with questions: give a file of them (--documents FILE)")
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
        n_wanted = self.config.questions_per_step
        shares = {self._everyday: self.config.everyday_share, self._sheet: self.config.facts_share}
        rows: list[Episode] = []
        for draw, share in {**shares, self._real: 1 - sum(shares.values())}.items():
            n_asked = 0
            while n_asked < round(share * n_wanted):
                text, asked = draw(rng)
                questions = [
                    Question(tuple(reading_prompt(self.chat, text, question)), tuple(self.chat.answer(answer)))
                    for question, answer in asked[: self.config.max_questions]
                ]
                n_asked += len(questions)
                rows += [Episode((), tuple(questions), "window")] if questions else []
        return rows

    def _real(self, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
        """A real document as it is shown, with people's questions and their answers in its words."""
        (document,) = rng.choices(self.documents, self._weights)
        answered = answered_questions(rng, document, self.config.max_questions)
        return document.full_text, [(question, answer) for question, answer, _ in answered]

    def _everyday(self, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
        document = make_document(rng, split="train")
        facts = rng.sample(document.facts, len(document.facts))
        return _shown(document.title, document.text), [(fact.question, fact.answer) for fact in facts]

    def _sheet(self, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
        sheet = make_sheet(rng, rng.randint(1, self.config.max_facts), split="train")
        facts = rng.sample(sheet.facts, len(sheet.facts))
        return _shown(sheet.title, sheet.text), [(fact.question, fact.answer) for fact in facts]


def _shown(title: str, text: str) -> str:
    """A document as a prompt shows it: under its title, if it has one."""
    return f"{title}\n\n{text}" if title else text


def train_window(
    base: Base, recipe: WindowRecipe, out_dir: Path, budget_s: float | None = None, **reporting: Unpack[Reporting]
) -> bool:
    """Train the window LoRA, or resume. Returns whether it is finished."""
    source = WindowSource(recipe.data, base)
    return train_lora(
        base, recipe.lora, recipe.training, source.episodes, out_dir,
        about={"data": recorded(recipe.data), "is_window": True},
        budget_s=budget_s, **reporting,
    )  # fmt: skip


def read_window_lora(folder: Path, base: Fingerprint) -> LoRA:
    """Read the LoRA that `train_window` made for a base. Raises AdapterError if there is none, or it is unfinished."""
    about = read_about(folder, base, "loracast train window")
    if not about["settings"].get("is_window"):
        raise AdapterError(f"{folder} holds another LoRA; give what `loracast train window` makes")
    return LoRA(read_peft(folder))
