"""The rivals: what each of them gives the base to answer one question with. One function a rival.

A rival is a prompt and, for adapters, the chunks whose LoRA goes with it. Nothing is computed here but a BM25 look-up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loracast.errors import ConfigError
from loracast.evaluation.cut import without_middle
from loracast.evaluation.in_memory import InMemoryAdapter
from loracast.library.routing import DEFAULT_ROUTE
from loracast.lora.algebra import LoRA
from loracast.model import ASK_SYSTEM_TURN, Model

MAX_NEW_TOKENS = 24
"""Longest answer; values have at most about ten tokens, a sentence around one fits too."""

WINDOW_PROMPT = "Question: {question}\n\n{document}\n\nQuestion: {question}\nShort answer:"
"""The user turn of a document in the window. The question comes first too, so that the base knows what to read for."""

WINDOW_EXAMPLE = (
    "The museum opens at nine. For the record, the door code of the north wing is 9158. It closes at five.",
    "What is the door code of the north wing?",
    "9158",
)
"""A document, question and answer that stand before the real ones: without them the base never answers with the bare value.

Of some fifteen prompts tried on SmolLM2-135M none had more exact matches (docs/evaluation.md)."""


@dataclass(frozen=True)
class Setup:
    """What all rivals share."""

    model: Model
    route: int = DEFAULT_ROUTE
    """Chunks that a question is given."""


@dataclass(frozen=True)
class Case:
    """One question about one document."""

    document: InMemoryAdapter
    other: InMemoryAdapter
    """Another document of the same kind, which does not hold the answer."""
    question: str
    value: str
    chunk: int
    """The document's chunk that holds the answer."""
    depth: float | None = None
    """Where in the document that is, from 0 to 1, if it was put there."""


@dataclass(frozen=True)
class Request:
    """A prompt and the LoRA it is answered with: that of some chunks of a document, or none."""

    prompt: tuple[int, ...]
    source: InMemoryAdapter | None = None
    chunks: tuple[int, ...] = ()
    weights: tuple[float, ...] | None = None
    """What the LoRA of each chunk counts; 1 if None."""
    found: bool | None = None
    """Whether the chunk with the answer was among those picked; None where nothing is picked."""

    def lora(self) -> LoRA | None:
        """What the base answers with."""
        if self.source is None:
            return None
        return self.source.lora(
            self.chunks if self.weights is None else dict(zip(self.chunks, self.weights, strict=True))
        )


def merged(setup: Setup, case: Case) -> Request:
    """The sum of all chunks' LoRAs."""
    return Request(_plain(setup, case), case.document, tuple(range(len(case.document.chunks))))


def routed(setup: Setup, case: Case) -> Request:
    """The LoRAs of the chunks that BM25 picks for the question, as `loracast ask` does."""
    chunks, weights = _picked(case.document, case.question, setup.route)
    return Request(_plain(setup, case), case.document, chunks, weights, case.chunk in chunks)


def no_document(setup: Setup, case: Case) -> Request:
    """The plain base: what it knows or guesses."""
    return Request(_plain(setup, case))


def other_document(setup: Setup, case: Case) -> Request:
    """Another document's adapter, routed: what any adapter does to an answer."""
    return Request(_plain(setup, case), case.other, *_picked(case.other, case.question, setup.route))


def in_window(setup: Setup, case: Case) -> Request:
    """The whole document in the prompt, cut in the middle where the window is too small."""
    return Request(_with_text(setup, case.question, case.document.full_text))


def passage(setup: Setup, case: Case) -> Request:
    """The best chunk's text in the prompt."""
    return _with_passages(setup, case, 1)


def passages(setup: Setup, case: Case) -> Request:
    """The texts of as many chunks in the prompt as a route takes, in the document's order."""
    return _with_passages(setup, case, setup.route)


@dataclass(frozen=True)
class System:
    """A rival's name in tables and what it does."""

    label: str
    request: Callable[[Setup, Case], Request]


SYSTEMS = {
    "merged": System("adapter, one LoRA of all chunks (merged)", merged),
    "routed": System("adapter, routed {route}", routed),
    "none": System("no document", no_document),
    "other": System("another document's adapter", other_document),
    "window": System("in the window", in_window),
    "bm25": System("BM25 passage in the window", passage),
    "bm25k": System("BM25 {route} passages in the window", passages),
}


def check_systems(names: Sequence[str]) -> tuple[str, ...]:
    """The names, without repeats, in the tables' order. Raises ConfigError for one that nobody knows."""
    if unknown := sorted(set(names) - SYSTEMS.keys()):
        raise ConfigError(f"unknown systems: {', '.join(unknown)}; choose from {', '.join(SYSTEMS)}")
    if not names:
        raise ConfigError(f"no system is chosen; choose from {', '.join(SYSTEMS)}")
    return tuple(name for name in SYSTEMS if name in names)


def _plain(setup: Setup, case: Case) -> tuple[int, ...]:
    return tuple(setup.model.base.chat.prompt(case.question, ASK_SYSTEM_TURN))


def _picked(document: InMemoryAdapter, question: str, k: int) -> tuple[tuple[int, ...], tuple[float, ...] | None]:
    """The chunks for a question in the document's order, and what each counts (1 if None)."""
    picked = document.route(question, k).picked
    if picked is None:
        return tuple(range(len(document.chunks))), None
    chunks = tuple(sorted(picked))
    return chunks, tuple(picked[i] for i in chunks)


def _with_passages(setup: Setup, case: Case, k: int) -> Request:
    chunks, _ = _picked(case.document, case.question, k)
    text = "\n\n".join(case.document.chunks[i].prompt for i in chunks)
    return Request(_with_text(setup, case.question, text), found=case.chunk in chunks)


def _with_text(setup: Setup, question: str, text: str) -> tuple[int, ...]:
    """The prompt with a text before the question; the text's middle gives way where the window is too small."""
    base = setup.model.base

    def prompt(document: str) -> list[int]:
        example, example_question, example_answer = WINDOW_EXAMPLE
        return base.chat.conversation(
            [
                {"role": "system", "content": ASK_SYSTEM_TURN},
                {"role": "user", "content": WINDOW_PROMPT.format(document=example, question=example_question)},
                {"role": "assistant", "content": example_answer},
                {"role": "user", "content": WINDOW_PROMPT.format(document=document, question=question)},
            ]
        )

    room = base.window - MAX_NEW_TOKENS - len(prompt("")) - 8  # joints may be encoded otherwise than inside the text
    return tuple(prompt(without_middle(base.tokenizer, text, room)))
