"""Who answers a question about a document: what each rival gives the base to answer with. One file for each way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loracast.data.qa import DocumentQuestion, QuestionedDocument
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.errors import ConfigError
from loracast.evaluation.in_memory import InMemoryAdapter
from loracast.library.routing import DEFAULT_ROUTE
from loracast.lora.algebra import LoRA
from loracast.model import ASK_SYSTEM_TURN, Model

MAX_NEW_TOKENS = 32
"""Longest answer: no right one has more than 20 words."""


@dataclass(frozen=True)
class Setup:
    """What all rivals share."""

    model: Model
    route: int = DEFAULT_ROUTE
    """Chunks that a question is given."""
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    """Longest chunk of an adapter."""
    reader: LoRA | None = None
    """The ceiling: trained to answer with the document in the window (`loracast train reader`)."""


@dataclass(frozen=True, eq=False)
class Given:
    """A document that is asked about, and another one of the same source."""

    document: QuestionedDocument
    adapter: InMemoryAdapter
    other: InMemoryAdapter
    loras: dict[str, LoRA] = field(default_factory=dict)
    """What rivals have made of the document, by their names."""


@dataclass(frozen=True)
class Request:
    """A prompt and the LoRA that it is answered with, if any."""

    prompt: tuple[int, ...]
    lora: LoRA | None = None


@dataclass(frozen=True)
class Baseline:
    """One way to answer."""

    label: str
    ask: Callable[[Setup, Given, DocumentQuestion], Request]
    learn: Callable[[Setup, Sequence[Given]], None] = lambda setup, given: None
    """What a document costs once, for some documents: its seconds are the update time."""
    needs_reader: bool = False
    is_optional: bool = False
    """Run only where it is asked for by name."""


def plain(setup: Setup, question: str) -> tuple[int, ...]:
    """The question alone, as `loracast ask` puts it."""
    return tuple(setup.model.base.chat.prompt(question, ASK_SYSTEM_TURN))


def check_baselines(names: Sequence[str], known: dict[str, Baseline], has_reader: bool) -> dict[str, Baseline]:
    """The rivals of these names, in the tables' order; without names, those that are not optional and have what they need.

    Raises:
        ConfigError: a name that nobody knows, or a rival that lacks what it needs.
    """
    if unknown := sorted(set(names) - known.keys()):
        raise ConfigError(f"unknown systems: {', '.join(unknown)}; choose from {', '.join(known)}")
    lacking = [name for name, rival in known.items() if rival.needs_reader and not has_reader]
    if asked := [name for name in lacking if name in names]:
        raise ConfigError(f"{', '.join(asked)} needs a LoRA of `loracast train reader` (--reader FOLDER)")
    if names:
        return {name: rival for name, rival in known.items() if name in names}
    return {name: rival for name, rival in known.items() if name not in lacking and not rival.is_optional}
