"""Context distillation: soft targets from a teacher that sees the document, or from the plain base."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from loracast.lora.algebra import LoRA, LoRABatch, stack
from loracast.scoring.episodes import Episode, Question, pack
from loracast.scoring.likelihood import score_answers
from loracast.scoring.soft_targets import TOP_K, SoftTargets, soften


@dataclass(frozen=True)
class Teacher:
    """A frozen base, perhaps with a LoRA, whose answer distributions a student learns."""

    model: Any
    pad_id: int
    lora: LoRA | None = None
    k: int = TOP_K

    @torch.no_grad()
    def soft_targets(self, *rows: Sequence[Question]) -> list[SoftTargets]:
        """The k likeliest tokens at each token of each answer. The questions of one row share their common prefix."""
        device = self.model.device
        questions = [question for row in rows for question in row]
        batch = pack([Episode((), tuple(row)) for row in rows], self.pad_id).to(device)
        loras = LoRABatch(1, {}, {}) if self.lora is None else stack([self.lora])
        autocast = torch.autocast(device.type, torch.bfloat16) if self.model.dtype == torch.bfloat16 else nullcontext()
        with autocast:
            scores = score_answers(self.model, loras, batch)
        soft = soften(scores.logits, self.k)
        lengths = [len(question.answer) for question in questions]
        return [
            SoftTargets(*parts) for parts in zip(soft.ids.split(lengths), soft.log_probs.split(lengths), strict=True)
        ]


class Distillation:
    """Adds soft targets to the questions of episodes.

    The plain base is the teacher of unrelated questions, and is asked once for each; a teacher that sees the document,
    if there is one, is the teacher of the others.
    """

    def __init__(self, plain: Teacher, seeing: Teacher | None):
        self.plain, self.seeing = plain, seeing
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], SoftTargets] = {}  # by prompt and answer

    def with_soft_targets(self, episodes: Sequence[Episode]) -> list[Episode]:
        """The same episodes with soft targets."""
        unrelated = {(q.prompt, q.answer): q for episode in episodes for q in episode.questions if q.is_unrelated}
        if new := [key for key in unrelated if key not in self._known]:
            self._known |= zip(new, self.plain.soft_targets(*([unrelated[key]] for key in new)), strict=True)
        return [replace(episode, questions=tuple(self._questions(episode))) for episode in episodes]

    def _questions(self, episode: Episode) -> list[Question]:
        seen: dict[Question, SoftTargets] = {}
        if self.seeing is not None and (shown := [q for q in episode.questions if q.window_prompt]):
            in_window = [replace(q, prompt=q.window_prompt) for q in shown]
            seen = dict(zip(shown, self.seeing.soft_targets(in_window), strict=True))
        return [
            replace(q, soft=self._known[q.prompt, q.answer] if q.is_unrelated else seen.get(q))
            for q in episode.questions
        ]
