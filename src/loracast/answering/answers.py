"""What becomes of a question: its prompt and adapters, the answer with its sources, or the refusal of an unsure one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from loracast.base.generate import Answer
from loracast.library.adapter import Adapter
from loracast.reading.matching import Candidate
from loracast.reading.routing import Route, Source

NOT_SAID = "The document does not say."
"""The answer of a refusal, and in training to a question that the document does not answer."""
LEAST_CONFIDENCE = 0.5
"""Of a strict answer (`Answer.confidence`), however likely the documents hold it. Chosen on dev, as are the next ones
(docs/notebook/2026-12-01.md)."""
_LOGIT, _SLOPE, _SLOPE_NOWHERE = 4.8, 0.75, 0.75
"""logit(least confidence) = _LOGIT - _SLOPE * logit(Route.about) + _SLOPE_NOWHERE * logit(Route.nowhere)."""
_LEAST_NOWHERE, _UNKNOWN_NOWHERE = 0.001, 0.03
"""The smallest `Route.nowhere` that counts, and the one of a route that does not say it."""

AnsweredBy = Literal["adapter", "base", "outline", "refusal"]
"""What gave an answer: the model with an adapter, the plain base (no adapter was used), the outline that a document
keeps, or the refusal `NOT_SAID`. The last two ask no model, or leave aside what it said."""


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
    least_confidence: float = 0.0
    """An answer of a lower confidence becomes `NOT_SAID`; where it is above 0, no text must be shown before the end."""
    has_lora: bool = False
    """Whether a LoRA answers that is no adapter of a library, so that `routed` does not name it."""

    @property
    def comes_whole(self) -> bool:
        """Whether no piece of the answer may be shown before its end, since it may yet be refused or needs no model."""
        return self.answer is not None or self.least_confidence > 0

    def sourced(self, generated: Answer) -> SourcedAnswer:
        """What the base generated, with its sources; or, where it is too unsure, `NOT_SAID`."""
        routed = tuple(self.routed)
        if generated.confidence < self.least_confidence:
            refused = {**vars(generated), "text": NOT_SAID, "finished": True}
            return SourcedAnswer(**refused, answered_by="refusal", routed=routed)
        is_adapted = self.has_lora or any(not route.is_empty for _, route in routed)
        by: AnsweredBy = "adapter" if is_adapted else "base"
        return SourcedAnswer(**vars(generated), answered_by=by, sources=self.sources, routed=routed)


def without_model(
    text: str, by: AnsweredBy, sources: tuple[Source, ...] = (), routed: Sequence[tuple[Adapter, Route]] = ()
) -> Prepared:
    """A question whose answer takes no model."""
    answer = SourcedAnswer(text, 0, 0, 0.0, 0.0, True, answered_by=by, sources=sources, routed=tuple(routed))
    return Prepared([], [*routed], sources, answer)


def least_confidence(routes: Sequence[Route]) -> float:
    """How sure the model must be of a strict answer, 0 to 1: the surer, the less likely the documents give it.

    Args:
        routes: what the question gets of each document.
    """
    about = max((route.about for route in routes if route.about is not None), default=None)
    nowhere = min((route.nowhere for route in routes if route.nowhere is not None), default=_UNKNOWN_NOWHERE)
    if about is None:
        return LEAST_CONFIDENCE
    logit = _LOGIT - _SLOPE * _logit(about) + _SLOPE_NOWHERE * _logit(max(nowhere, _LEAST_NOWHERE))
    return max(LEAST_CONFIDENCE, 1 / (1 + math.exp(-logit)))


def _logit(probability: float) -> float:
    return math.log(max(probability, 1e-6) / max(1 - probability, 1e-6))
