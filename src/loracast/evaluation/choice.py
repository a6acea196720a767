"""Multiple choice by log-likelihood: which of a few answers a base finds likeliest, whatever it would write itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loracast.base.load import Base
from loracast.lora.algebra import LoRA, stack
from loracast.scoring.episodes import Episode, Question, pack
from loracast.scoring.likelihood import score_answers

_MAX_TOKENS = 4000
"""Tokens of one batch."""


@dataclass(frozen=True)
class Choice:
    """The likeliest of some answers, by their place."""

    by_sum: int
    """By the log-probability of all of its tokens, the end of the turn included."""
    by_byte: int
    """By the same for each byte of it, which is fair to long answers."""


def likeliest(
    base: Base, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[str]], loras: Sequence[LoRA | None]
) -> list[Choice]:
    """For each prompt, the likeliest of its answers; arguments as in `negative_log_likelihood`."""
    chosen = []
    for texts, of_prompt in zip(answers, negative_log_likelihood(base, prompts, answers, loras), strict=True):
        lengths = torch.tensor([max(1, len(text.encode())) for text in texts], device=of_prompt.device)
        chosen.append(Choice(int(of_prompt.argmin()), int((of_prompt / lengths).argmin())))
    return chosen


@torch.no_grad()
def negative_log_likelihood(
    base: Base, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[str]], loras: Sequence[LoRA | None]
) -> list[Tensor]:
    """The negative log-likelihood of each answer of each prompt, summed over the answer's tokens [answers].

    The answers of a prompt are branches of one row, so that the prompt is read once. An answer may begin with a space,
    as LoRAs of documents are trained to write it, or without one, as LoRAs of tasks are: the likelier form counts.

    Args:
        prompts: token ids.
        answers: for each prompt the texts to choose from.
        loras: one or none for each prompt.
    """
    episodes = [
        Episode((), tuple(Question(tuple(prompt), form) for text in texts for form in _forms(base, text)))
        for prompt, texts in zip(prompts, answers, strict=True)
    ]
    sizes = [len(e.questions[0].prompt) + sum(len(q.answer) for q in e.questions) for e in episodes]
    batches: list[list[int]] = []  # of the rows' places, the longest first
    for i in sorted(range(len(episodes)), key=lambda i: -sizes[i]):
        if batches and (len(batches[-1]) + 1) * sizes[batches[-1][0]] <= _MAX_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    found: dict[int, Tensor] = {}
    for rows in batches:
        batch = pack([episodes[i] for i in rows], base.pad_id).to(base.device)
        of_rows = [loras[i] for i in rows]
        if all(lora is of_rows[0] for lora in of_rows):  # one LoRA serves all rows
            of_rows = of_rows[:1]
        losses = score_answers(base.model, stack(of_rows), batch).by_question  # mean over each answer's tokens
        sums = losses * torch.bincount(batch.answer_question)
        for i, of_forms in zip(rows, sums.split([2 * len(answers[i]) for i in rows]), strict=True):
            found[i] = of_forms.view(-1, 2).amin(1)
    return [found[i] for i in range(len(episodes))]


def _forms(base: Base, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """An answer as it stands inside a sentence, and as it begins a turn; the end of the turn is included."""
    return tuple(base.chat.answer(text)), tuple(base.chat.reply(text))
