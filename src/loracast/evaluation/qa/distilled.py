"""Context distillation of each document by gradient descent: the slow way to an adapter, and what a fast one is measured by.

A LoRA is trained on rule-made questions about the document, towards what the base with the document in its window says (the reader, where
there is one). Published as the rival of Doc-to-LoRA with 25 questions (arXiv 2602.15902, section 4).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from loracast.base.chat import Message
from loracast.base.generate import Sampling, answer_batch
from loracast.data.qa import DocumentQuestion
from loracast.data.questions.cloze import make_clozes
from loracast.evaluation.cut import without_middle
from loracast.evaluation.qa.baseline import MAX_NEW_TOKENS, Baseline, Given, Request, Setup, plain
from loracast.evaluation.qa.window import BEST, PROMPTS
from loracast.lora.algebra import Factors, LoRA, LoRABatch
from loracast.lora.target import target_from_config
from loracast.model import ASK_SYSTEM_TURN
from loracast.scoring.episodes import Episode, Question, pack
from loracast.scoring.likelihood import score_answers
from loracast.training.episode_maker import reading_prompt
from loracast.training.teacher import Distillation, Teacher

N_QUESTIONS = 25
_KINDS = ("q_proj", "v_proj", "o_proj", "down_proj")
_RANK = 8
_STEPS = 60
_LR = 1e-3
_ROWS = 5  # the questions in this many rows: attention grows with the square of a row
_NAME = "distilled"


def distil(setup: Setup, given: Given) -> LoRA:
    """A LoRA that says about the document what the base says that sees it."""
    base = setup.model.base
    questions = _questions(setup, given)
    teacher = Teacher(base.model, base.pad_id, setup.reader)
    rows = [Episode((), tuple(questions[i::_ROWS])) for i in range(_ROWS) if questions[i::_ROWS]]
    distillation = Distillation(dataclasses.replace(teacher, lora=None), teacher)
    batch = pack(distillation.with_soft_targets(rows), base.pad_id).to(base.device)
    generator = torch.Generator().manual_seed(0)
    target = target_from_config(base.model.config, _KINDS)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for module in target.modules:
        a = torch.randn(1, _RANK, module.d_in, generator=generator) / module.d_in**0.5
        b = torch.zeros(1, module.d_out, _RANK)
        factors[module.name] = (a.to(base.device).requires_grad_(), b.to(base.device).requires_grad_())
    optimizer = torch.optim.AdamW([side for pair in factors.values() for side in pair], lr=_LR, weight_decay=0.0)
    loras = LoRABatch(1, {name: Factors(*pair) for name, pair in factors.items()}, {})
    with torch.enable_grad():
        for _ in range(_STEPS):
            scores = score_answers(base.model, loras, batch)
            optimizer.zero_grad()
            scores.distillation_loss.backward()
            optimizer.step()
    dtype = base.model.dtype
    return LoRA({name: Factors(a[0].detach().to(dtype), b[0].detach().to(dtype)) for name, (a, b) in factors.items()})


def _questions(setup: Setup, given: Given) -> list[Question]:
    """Rule-made questions, each with the answer that the base gives when it sees the document."""
    base, text = setup.model.base, given.adapter.full_text
    clozes = make_clozes(random.Random(given.document.doc_id), given.document.text, N_QUESTIONS)
    asked = [cloze.question for cloze in clozes]
    shown = [tuple(_window(setup, text, question)) for question in asked]
    said = (
        answer_batch(base, shown, [setup.reader] * len(shown), Sampling(max_new_tokens=MAX_NEW_TOKENS)) if shown else []
    )
    return [
        Question(plain(setup, question), tuple(base.chat.answer(answer)), window_prompt=prompt)
        for question, prompt, answer in zip(asked, shown, said, strict=True)
        if answer
    ]


def _window(setup: Setup, text: str, question: str) -> list[int]:
    base = setup.model.base
    text = without_middle(base.tokenizer, text, base.window // 2)
    if setup.reader is not None:
        return reading_prompt(base.chat, text, question)
    system: Message = {"role": "system", "content": ASK_SYSTEM_TURN}
    return base.chat.conversation([system, *PROMPTS[BEST](text, question)])


def _learn(setup: Setup, given: Sequence[Given]) -> None:
    for one in given:
        one.loras[_NAME] = distil(setup, one)


def _ask(setup: Setup, given: Given, question: DocumentQuestion) -> Request:
    return Request(plain(setup, question.question), given.loras[_NAME])


BASELINES = {
    _NAME: Baseline(f"context distillation, {N_QUESTIONS} questions", _ask, _learn, is_optional=True),
}
