"""What becomes of a question: its prompt and adapters, the answer with its sources, or a refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from loracast.base.generate import Answer
from loracast.library.adapter import Adapter
from loracast.reading.matching import Candidate, Route
from loracast.reading.routing import Source

NOT_SAID = "The document does not say."
"""The answer of a refusal, and in training to a question that the document does not answer."""

AnsweredBy = Literal["adapter", "base", "outline", "refusal"]
"""What gave an answer: the model with an adapter, the plain base (no adapter was used), the outline that a document
keeps, or the refusal `NOT_SAID`. The last two ask no model."""


@dataclass(frozen=True)
class SourcedAnswer(Answer):
    """An answer, what it cost, what gave it, and where in which documents it comes from."""

    answered_by: AnsweredBy = "base"
    sources: tuple[Source, ...] = ()
    routed: tuple[tuple[Adapter, Route], ...] = field(default=(), compare=False, repr=False)
    """What the question got of which adapters, those that gave nothing among them."""


@dataclass(frozen=True)
class Prepared:
    """One question, ready to be generated: its prompt, and what of which adapters it is answered with."""

    prompt: list[int]
    routed: list[tuple[Adapter, Route]]
    sources: tuple[Source, ...]
    answer: SourcedAnswer | None = None
    """The answer where no model is needed: from the outlines of the documents (`Model.overview`), or `NOT_SAID`."""
    candidates: tuple[Candidate, ...] = ()
    """What the answer may begin with, by the words of the documents."""
    has_lora: bool = False
    """Whether a LoRA answers that is no adapter of a library, so that `routed` does not name it."""

    def sourced(self, generated: Answer) -> SourcedAnswer:
        """What the base generated, with its sources."""
        routed = tuple(self.routed)
        is_adapted = self.has_lora or any(not route.is_empty for _, route in routed)
        by: AnsweredBy = "adapter" if is_adapted else "base"
        return SourcedAnswer(**vars(generated), answered_by=by, sources=self.sources, routed=routed)


def without_model(
    text: str, by: AnsweredBy, sources: tuple[Source, ...] = (), routed: Sequence[tuple[Adapter, Route]] = ()
) -> Prepared:
    """A question whose answer takes no model."""
    answer = SourcedAnswer(text, 0, 0, 0.0, 0.0, True, answered_by=by, sources=sources, routed=tuple(routed))
    return Prepared([], [*routed], sources, answer)
