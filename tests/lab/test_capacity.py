"""The curve of facts that a merged LoRA tells apart: what is drawn, and its figures against one question at a time."""

from __future__ import annotations

import json
import random

import pytest
import torch

from loracast.answering.model import Model
from loracast.errors import ConfigError
from loracast.lab.evaluation.capacity import BASELINES, CapacityConfig, evaluate_capacity, make_facts, right_tokens
from loracast.lab.evaluation.documents import DocumentCase, DocumentSetup
from loracast.lora.algebra import LoRA, inject
from tiny import make_hypernet


@pytest.fixture
def model(base, tmp_path) -> Model:
    return Model(base, tmp_path / "library", make_hypernet(base))


def test_facts_are_told_apart_by_name_and_label_and_have_values_of_one_length(base):
    facts = make_facts(random.Random(0), 21, 12, base.chat, "dev")
    assert len(facts) == 21 and len({fact.key for fact in facts}) == 6
    assert {len(base.chat.answer(fact.answer)) - 1 for fact in facts} == {12}
    assert any(fact.answer.isdigit() for fact in facts) and not all(fact.answer.isdigit() for fact in facts)
    assert all(fact.answer in fact.statement and fact.answer not in fact.question for fact in facts)
    others = make_facts(random.Random(0), 21, 12, base.chat, "test")
    assert not {fact.key for fact in facts} & {fact.key for fact in others}


def test_tokens_that_are_right_are_those_of_each_question_alone(model, monkeypatch):
    """Both with one LoRA for all questions and with one for each; a value is what the base says, but for one token."""
    setup, base = DocumentSetup(model, CapacityConfig()), model.base
    facts = make_facts(random.Random(1), 6, 12, base.chat, "dev")
    document = setup.keep("\n\n".join(fact.statement for fact in facts))

    def said(ids: list[int], lora: LoRA | None) -> list[int]:
        with torch.no_grad(), inject(base.model, lora):
            return base.model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()

    for name in ("merged", "routed"):
        requests = [BASELINES[name].request(setup, DocumentCase(document, fact.question)) for fact in facts]
        tokens: dict[str, list[int]] = {}
        expected = []
        for request, fact in zip(requests, facts, strict=True):
            ids, lora = [*request.prepared.prompt], request.lora and request.lora.make()
            for place in range(5):
                ids.append((said(ids, lora)[-1] + (place == 2)) % base.model.config.vocab_size)
            value = tokens[fact.answer] = ids[-5:]
            expected.append([a == b for a, b in zip(said(ids, lora)[-6:-2], value, strict=False)])
        with monkeypatch.context() as patch:
            patch.setattr(type(base.chat), "answer", lambda chat, text, tokens=tokens: tokens[text])
            assert right_tokens(setup, requests, [fact.answer for fact in facts]) == expected
        assert expected == [[True, True, False, True]] * len(facts)


def test_the_curve_has_a_row_for_each_size_length_and_baseline(model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "loracast.lab.evaluation.capacity.right_tokens",
        lambda setup, requests, values: [[i % 2 == 0 for i in range(12)] for _ in values],
    )
    monkeypatch.setattr("loracast.lab.evaluation.capacity.is_exact", lambda answer, value: value.isdigit())
    config = CapacityConfig(facts=(2, 6), value_tokens=(12,), questions=4, baselines=("merged", "none"))
    evaluate_capacity(model, config, tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = results["rows"]
    assert results["is_complete"]
    assert [(row["facts"], row["baseline"]) for row in rows] == [(n, b) for n in (2, 6) for b in ("merged", "none")]
    assert [(row["documents"], row["n"]) for row in rows] == [(2, 4), (2, 4), (1, 4), (1, 4)]
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    for row in rows:
        mine = [a for a in answers if (a["facts"], a["baseline"]) == (row["facts"], row["baseline"])]
        assert row["exact"] == sum(a["value"].isdigit() for a in mine) / 4 and row["tokens"] == 0.5
        assert row["exact_low"] <= row["exact"] <= row["exact_high"]


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        CapacityConfig(facts=(0,))
    with pytest.raises(ConfigError, match="32 tokens at most"):
        CapacityConfig(value_tokens=(40,))
    with pytest.raises(ConfigError, match="unknown baselines"):
        CapacityConfig(baselines=("window",))
