"""Context distillation: what a teacher that sees the document, or one that never saw any, finds likely at a question's answer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from loracast.lora import LoRA, LoRABatch, stack
from loracast.training.episodes import Episode, Question, pack
from loracast.training.objective import answer_with
from loracast.training.soft_targets import TOP_K, SoftTargets, soften


@dataclass(frozen=True)
class Teacher:
    """A frozen base, perhaps with a LoRA of its own, that says what it would answer."""

    model: Any
    pad_id: int
    lora: LoRA | None = None
    k: int = TOP_K

    @torch.no_grad()
    def soft_targets(self, questions: Sequence[Question]) -> list[SoftTargets]:
        """What it finds likely at each token of each answer: of k tokens each. The questions share a row, and read its beginning once."""
        device = self.model.device
        batch = pack([Episode((), tuple(questions))], self.pad_id).to(device)
        loras = LoRABatch(1, {}, {}) if self.lora is None else stack([self.lora])
        autocast = torch.autocast(device.type, torch.bfloat16) if self.model.dtype == torch.bfloat16 else nullcontext()
        with autocast:
            seen, _ = answer_with(self.model, loras, batch)
        soft = soften(seen.logits, self.k)
        lengths = [len(question.answer) for question in questions]
        return [
            SoftTargets(*parts) for parts in zip(soft.ids.split(lengths), soft.log_probs.split(lengths), strict=True)
        ]


class Teaching:
    """Gives the questions of episodes their soft targets.

    Questions that have nothing to do with a document are answered by the plain base, which is asked once for each; the others by the teacher
    that sees the document, where there is one.
    """

    def __init__(self, plain: Teacher, seeing: Teacher | None):
        self.plain, self.seeing = plain, seeing
        self._known: dict[Question, SoftTargets] = {}

    def taught(self, episodes: Sequence[Episode]) -> list[Episode]:
        """The episodes with soft targets."""
        new = {q for episode in episodes for q in episode.questions if q.is_unrelated} - self._known.keys()
        for question in new:
            (self._known[question],) = self.plain.soft_targets([question])
        return [replace(episode, questions=tuple(self._taught(episode))) for episode in episodes]

    def _taught(self, episode: Episode) -> list[Question]:
        seen: dict[Question, SoftTargets] = {}
        if self.seeing is not None and (asked := [q for q in episode.questions if q.window_prompt]):
            shown = [replace(q, prompt=q.window_prompt) for q in asked]
            seen = dict(zip(asked, self.seeing.soft_targets(shown), strict=True))
        return [replace(q, soft=self._known.get(q, seen.get(q))) for q in episode.questions]
