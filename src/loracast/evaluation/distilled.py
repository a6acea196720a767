"""Context distillation of each document by gradient descent: the slow way to an adapter, to measure a fast one by.

A LoRA is trained on rule-made questions about the document, towards the distributions of the base that sees the
document (or of the window LoRA, where there is one). Doc-to-LoRA is compared with it (arXiv 2602.15902, section 4).
"""

from __future__ import annotations

import dataclasses
import random

import torch
from torch import Tensor

from loracast.base.cut import without_middle
from loracast.base.generate import Sampling, answer_batch
from loracast.data.questions.cloze import make_clozes
from loracast.evaluation.baseline import Request, fixed
from loracast.evaluation.documents import DocumentCase, DocumentSetup, plain
from loracast.evaluation.qa_prompts import BEST, PROMPTS
from loracast.lora.algebra import Factors, LoRA, LoRABatch
from loracast.lora.target import target_from_config
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


def distil(setup: DocumentSetup, case: DocumentCase) -> LoRA:
    """Train a LoRA that answers about the document as the base does that sees it."""
    base = setup.model.base
    questions = _questions(setup, case)
    if not questions:  # so short that it has no sentence to ask about
        return LoRA()
    teacher = Teacher(base.model, base.pad_id, setup.window_lora)
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


def _questions(setup: DocumentSetup, case: DocumentCase) -> list[Question]:
    """Rule-made questions, each with the answer that the base gives when it sees the document."""
    base = setup.base
    text = without_middle(base.tokenizer, case.document.full_text, base.window // 2)
    prompt = PROMPTS[BEST] if setup.window_lora is None else reading_prompt
    clozes = make_clozes(random.Random(case.doc_id), case.document.document.text, N_QUESTIONS)
    asked = [cloze.question for cloze in clozes]
    shown = [tuple(prompt(base.chat, text, question)) for question in asked]
    sampling = Sampling(max_new_tokens=setup.max_new_tokens)
    said = answer_batch(base, shown, [setup.window_lora] * len(shown), sampling) if shown else []
    return [
        Question(plain(setup, question), tuple(base.chat.answer(answer)), window_prompt=shown_prompt)
        for question, shown_prompt, answer in zip(asked, shown, said, strict=True)
        if answer
    ]


def learn_distilled(setup: DocumentSetup, case: DocumentCase) -> None:
    """Train the document's LoRA and keep it with the document's questions."""
    case.learned[_NAME] = distil(setup, case)


def request_distilled(setup: DocumentSetup, case: DocumentCase) -> Request:
    """The question alone, with the LoRA that was trained for the document."""
    return Request(plain(setup, case.question), fixed(case.learned[_NAME]))
