"""Context distillation: soft targets against torch's own divergence, teachers, questions that are to be left alone, and passages to continue."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch
from torch.nn import functional

from loracast.base.chat import encode_text
from loracast.errors import ConfigError, TrainingError
from loracast.hypernets.doc_to_lora import DocToLoRA
from loracast.lab.data.facts import AFTER, INSIDE
from loracast.lab.training.doc import DocRecipe, train_doc
from loracast.lab.training.document_source import (
    CONTINUED_TOKENS,
    START_TOKENS,
    DataConfig,
    EpisodeSource,
    reading_prompt,
)
from loracast.lab.training.loop import TrainConfig
from loracast.lab.training.losses import Distillation, Teacher
from loracast.lab.training.scoring import TOP_K, Episode, Question, divergence, pack, score_answers, soften
from loracast.lora.algebra import LoRABatch
from questions import ROWS, write_documents, write_unrelated
from tiny import DOC_TO_LORA


def test_divergence_is_kullback_leibler_where_all_tokens_are_kept():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 5, 40, dtype=torch.float64)
    soft = soften(teacher, k=40)
    expected = functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(divergence(student, *soft).double(), expected, atol=5e-3, rtol=5e-3)
    assert divergence(teacher, *soft).abs().max() < 1e-2
    few = soften(10 * teacher, k=8)
    assert few.ids.shape == (5, 8) and few.ids.dtype == torch.int32 and few.log_probs.dtype == torch.float16
    assert divergence(10 * teacher, *few).abs().max() < 2e-2 < divergence(student, *few).min()


def questions_of(base, n: int = 3) -> list[Question]:
    return [
        Question(tuple(base.chat.prompt(f"What is number {i}?", "")), tuple(base.chat.answer(f"number {i} of many")))
        for i in range(n)
    ]


def test_a_teacher_says_what_the_base_finds_likely(base):
    asked = questions_of(base)
    soft = Teacher(base.model, base.pad_id).soft_targets(asked)
    for question, targets in zip(asked, soft, strict=True):
        ids = torch.tensor([[*question.prompt, *question.answer]])
        logits = base.model(input_ids=ids).logits[0, len(question.prompt) - 1 : -1]
        expected = logits.log_softmax(-1).topk(TOP_K)
        assert torch.equal(targets.ids.long(), expected.indices)
        torch.testing.assert_close(targets.log_probs.float(), expected.values, atol=5e-3, rtol=5e-3)


def test_the_loss_parts_what_is_about_the_document_from_what_is_not(base):
    about, other, taught = questions_of(base)
    distillation = Distillation(Teacher(base.model, base.pad_id), None)
    other = dataclasses.replace(other, is_unrelated=True)
    (episode,) = distillation.with_soft_targets([Episode((), (about, taught, other))])
    assert [q.soft is not None for q in episode.questions] == [False, False, True]
    seen = score_answers(base.model, LoRABatch(1, {}, {}), pack([episode], base.pad_id))
    alone = score_answers(base.model, LoRABatch(1, {}, {}), pack([Episode((), (about, taught))], base.pad_id))
    torch.testing.assert_close(seen.loss, alone.loss)
    assert (
        seen.kl_to_base is not None and abs(seen.kl_to_base) < 1e-2 and alone.kl_to_base is None
    )  # no LoRA: as the base alone
    assert (seen.exact, seen.token_accuracy) == (alone.exact, alone.token_accuracy)
    soft = distillation._known[other.prompt, other.answer]
    changed = [dataclasses.replace(q, soft=soft if q.is_unrelated else None) for q in episode.questions]
    biased = dataclasses.replace(changed[2], soft=soft._replace(ids=soft.ids.flip(1)))
    worse = score_answers(base.model, LoRABatch(1, {}, {}), pack([Episode((), (*changed[:2], biased))], base.pad_id))
    assert worse.kl_to_base is not None and worse.kl_to_base > 0.1


# ---- episodes of real documents ----


def source_of(base, tmp_path, is_taught=False, **options) -> EpisodeSource:
    settings = {"max_chunk_tokens": 128, "max_chunks": 4, "max_questions": 8, "reading_chunk_tokens": 128, **options}
    config = DataConfig(documents=(write_documents(tmp_path / "qa.jsonl"),), **settings)
    return EpisodeSource(config, base.tokenizer, base.chat, is_taught=is_taught)


def test_peoples_questions_are_asked_of_their_documents_and_marked(base, tmp_path):
    source = source_of(base, tmp_path, max_questions=2, questions_per_step=9, context_tokens_per_step=4000)
    answers = {row["doc_id"]: [q["answers"][0] for q in row["questions"] if q["span"]] for row in ROWS}
    n_unasked = 0
    for number in range(5):
        episodes = source.of_kind("questions", number)
        assert sum(len(e.questions) for e in episodes) >= 9 and len({len(e.chunks) for e in episodes}) == 1
        for episode in episodes:
            text = "".join(base.tokenizer.decode(chunk) for chunk in episode.chunks)
            own = next(row for row in ROWS if row["document"][:24] in text)
            for number, question in enumerate(episode.questions):
                said = base.tokenizer.decode(question.answer[:-1]).strip()
                assert said in answers[own["doc_id"]] and question.answer[-1] == base.chat.end_of_turn
                labels = [
                    m for m in episode.token_labels if m.statement == number and m.place < len(question.answer) - 1
                ]
                spelled = "".join(base.tokenizer.decode(episode.chunks[m.chunk][m.token]) for m in labels)
                assert not labels or said in spelled.strip()
            # Answers that are not asked for are labelled too, each token once.
            places = [(m.chunk, m.token) for m in episode.token_labels if m.gate != AFTER]
            assert len(set(places)) == len(places)
            n_unasked += sum(m.statement == -1 for m in episode.token_labels)
    assert n_unasked > 20
    with pytest.raises(TrainingError, match="max_chunks"):
        source_of(base, tmp_path, max_chunk_tokens=16, max_chunks=1)


def test_a_teacher_is_shown_the_document(base, tmp_path):
    source = source_of(base, tmp_path, is_taught=True, questions_per_step=2, context_tokens_per_step=1000)
    (episode, *_) = source.of_kind("cloze", 1)
    text = "".join(base.tokenizer.decode(chunk) for chunk in episode.chunks)
    own = next(row for row in ROWS if row["document"][:24] in text)
    shown = base.tokenizer.decode(episode.questions[0].window_prompt)
    assert own["document"].split(".")[0] in shown
    assert list(episode.questions[0].window_prompt[:3]) == reading_prompt(base.chat, own["document"], "?")[:3]
    distillation = Distillation(Teacher(base.model, base.pad_id), Teacher(base.model, base.pad_id))
    (taught, *_) = distillation.with_soft_targets([episode])
    question = taught.questions[0]
    assert question.soft is not None
    (expected,) = Teacher(base.model, base.pad_id).soft_targets(
        [dataclasses.replace(question, prompt=question.window_prompt)]
    )
    assert torch.equal(question.soft.ids, expected.ids)


def test_passages_are_continued_word_for_word(base):
    source = EpisodeSource(DataConfig(), base.tokenizer, base.chat)
    prose = " ".join(row["document"] for row in ROWS)
    texts = [prose[:600], prose[600:1200].strip()]
    episode = source.passages(random.Random(0), texts, 4)
    assert len(episode.questions) == 4 and [list(c) for c in episode.chunks] == [
        encode_text(base.tokenizer, text) for text in texts
    ]
    used: set[tuple[int, int]] = set()
    for number, question in enumerate(episode.questions):
        labels = [m for m in episode.token_labels if m.statement == number]
        assert {m.gate for m in labels} == {INSIDE} and len(labels) == len(question.answer) <= CONTINUED_TOKENS
        assert tuple(episode.chunks[m.chunk][m.token] for m in labels) == question.answer
        places = {(m.chunk, m.token) for m in labels}
        assert not places & used
        used |= places
        first = labels[0].token
        start = base.tokenizer.decode(episode.chunks[labels[0].chunk][first - START_TOKENS : first]).strip()
        assert start in base.tokenizer.decode(question.prompt)
    assert pack([episode], base.pad_id).n_questions == 4


def test_steps_are_drawn_by_their_shares(base, tmp_path):
    files = {
        "documents": (write_documents(tmp_path / "qa.jsonl"),),
        "unrelated": (write_unrelated(tmp_path / "u.jsonl"),),
    }
    config = DataConfig(
        question_share=0.3,
        cloze_share=0.2,
        reading_share=0.2,
        questions_per_step=4,
        max_chunk_tokens=128,
        max_chunks=4,
        **files,
    )
    source = EpisodeSource(config, base.tokenizer, base.chat)
    steps = [source.step(i) for i in range(150)]
    tasks = [episodes[0].task for episodes in steps]
    assert {"questions", "cloze", "reading", "facts"} == set(tasks)
    assert 30 <= tasks.count("questions") <= 62 and 15 <= tasks.count("reading") <= 45
    asked = [q for episodes in steps for e in episodes for q in e.questions]
    unrelated = [q for q in asked if q.is_unrelated]
    assert unrelated and {len(base.tokenizer.decode(q.prompt).split("- ")) for q in unrelated} == {1, 3}
    assert source.step(7) == EpisodeSource(config, base.tokenizer, base.chat).step(7)
    with pytest.raises(ConfigError, match="more than 1 together"):
        DataConfig(question_share=0.7, cloze_share=0.7, **files)
    with pytest.raises(ConfigError, match="--documents"):
        DataConfig(reading_share=0.1)
    (tmp_path / "u.jsonl").write_text('{"choices": []}')
    with pytest.raises(ConfigError, match="line 1"):
        EpisodeSource(config, base.tokenizer, base.chat)


def test_all_of_it_trains(base, tmp_path):
    """Every loss is there, and the run goes on exactly where it stopped."""
    data = DataConfig(
        question_share=0.4, cloze_share=0.3, reading_share=0.3, questions_per_step=4, max_chunk_tokens=128, max_chunks=2,
        documents=(write_documents(tmp_path / "qa.jsonl"),), unrelated=(write_unrelated(tmp_path / "u.jsonl"),),
    )  # fmt: skip
    recipe = DocRecipe(
        static_kinds=("q_proj",), hypernetwork={**DOC_TO_LORA, "static_modules_rank": 3},
        distillation_weight=0.5, l1_weight=0.1,
        data=data, training=TrainConfig(steps=6, warmup_steps=1, lr=1e-2, bf16=False, log_every=1),
    )  # fmt: skip
    train_doc(base, recipe, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"answer_loss", "distillation_loss", "kl_to_base", "l1"} <= set().union(*rows)
    hypernet = DocToLoRA.from_pretrained(tmp_path / "run")
    shared = hypernet.static["q_proj"]
    assert shared is not None and shared.a.shape[1] == 3 and shared.b.abs().max() > 0
    assert hypernet.config.ranks["q_proj"] == 0


def test_a_teacher_without_a_weight_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match="distillation_weight"):
        train_doc(base, DocRecipe(hypernetwork=DOC_TO_LORA), tmp_path / "run", teacher=tmp_path)
