"""Copying: the bias for answers that stand in a document, by its formula, and that all ways to answer obey it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from loracast.base import copying
from loracast.base.copying import CopyBias, signs
from loracast.base.generate import Sampling, answers
from loracast.documents import Document
from loracast.reading.matching import Candidate, candidates_together, shortened
from loracast.serving.engine import LocalEngine
from loracast.serving.generation import GenerationRequest
from tiny import answer

END = 0


class Letters:
    """Encodes each letter as a token of its own: a is 1, b is 2; a blank is 27."""

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[27 if c == " " else ord(c.lower()) - 96 for c in text] for text in texts]}

    def decode(self, ids):
        return "".join(" " if i == 27 else chr(96 + i) for i in ids)


def of(text: str) -> list[int]:
    return Letters()([text], add_special_tokens=False)["input_ids"][0]


@pytest.fixture
def always(monkeypatch):
    """Copying applies to every answer."""
    monkeypatch.setattr(copying, "APPLIES", {"bias": 1.0})


def biases(candidates, said: str = "") -> dict[int, float] | None:
    """The bias of each token that is not that of most tokens, which has the key None."""
    given = CopyBias(Letters(), candidates, [END]).bias(of(said), torch.zeros(40))
    if given is None:
        return None
    common = given[35].item()
    return {None: common} | {i: x for i, x in enumerate(given.tolist()) if x != common}


def test_the_first_token_gains_by_the_probability_that_an_answer_begins_with_it(always):
    gains = biases([("ab", 0.5), ("ac", 0.25), ("the dog", 0.1)])
    assert gains.pop(None) == 0
    shares = {"a": 0.75, " ": 0.85, "t": 0.1, "d": 0.1}  # each text as it is, behind a blank, and without its article
    shares[" "] += 0.1
    assert gains == pytest.approx({of(c)[0]: math.log((p + 0.001) / 0.001) for c, p in shares.items()})
    assert biases([]) is None and biases([("", 0.9)]) is None and biases([("to ", 0.9)], "b") is None


def test_a_word_may_lose_the_capital_with_which_a_sentence_begins():
    seen = []
    CopyBias(lambda texts, **_: seen.extend(texts) or {"input_ids": []}, [], [])
    CopyBias(
        lambda texts, **_: seen.extend(texts) or {"input_ids": [[]] * len(texts)}, [("The hose", 1), ("NO", 1)], []
    )
    assert seen == ["The hose", " The hose", "hose", " hose", "the hose", " the hose", "NO", " NO"]


def test_an_answer_that_began_like_a_text_goes_on_like_it_or_ends_where_a_word_does():
    candidates = [("ab c", 0.5), ("ad", 0.25), ("b", 0.2)]
    lost = -math.log(0.751 / 0.001)
    gains = biases(candidates, "a")  # within a word: the end is no better than another letter
    assert gains == pytest.approx(
        {None: lost, of("b")[0]: math.log(0.501 / 0.751), of("d")[0]: math.log(0.251 / 0.751)}
    )
    gains = biases(candidates, "ab")
    assert gains == pytest.approx({None: -math.log(501), END: 0.0, of(" ")[0]: 0.0}, abs=1e-6)
    assert biases(candidates, "x") is None and biases(candidates, "ab c") is None  # began otherwise; copied to its end


def test_documents_together_have_candidates_by_their_weights():
    one, other = (Candidate("a", 0.8), Candidate("b", 0.2)), (Candidate("c", 1.0),)
    equal = candidates_together([(1.0, one), (1.0, ()), (1.0, other)])
    assert equal == (Candidate("a", 0.4), Candidate("b", 0.1), Candidate("c", 0.5))
    assert candidates_together([(1.0, one), (0.25, other)])[2] == Candidate("c", 0.2)
    assert candidates_together([(1.0, ()), (0.5, one)]) == one and candidates_together([]) == ()


def test_a_long_text_is_cut_between_words():
    assert shortened("£20 " + "and nothing else whatsoever " * 9) == "£20 and nothing else whatsoever and nothing"


@pytest.mark.parametrize("penalty", [None, 1.5])
def test_all_ways_to_answer_copy_alike(always, base, penalty):
    """A text that is certain beats the logits of a tiny base, alone, in a batch, and in the engine."""
    ids = [base.chat.prompt("What is it?"), base.chat.prompt("And what is that, if I may ask?")]
    copy_bias = CopyBias(base.tokenizer, [("the little house", 1.0)], base.end_ids)
    sampling = Sampling(max_new_tokens=6, repetition_penalty=penalty)
    alone = answer(base, ids[0], None, sampling, copy_bias=copy_bias)
    assert (alone.text and "little house".startswith(alone.text)) or "the little house".startswith(alone.text)
    both = answers(base, ids, [None, None], sampling, [copy_bias, None])
    assert [one.text for one in both] == [alone.text, answer(base, ids[1], None, sampling).text]
    engine = LocalEngine(base)
    tickets = [
        engine.submit(GenerationRequest(ids[0], sampling=sampling, copy_bias=copy_bias, n_logprobs=0)),
        engine.submit(GenerationRequest(ids[1], sampling=sampling)),
    ]
    assert [ticket.text() for ticket in tickets] == [one.text for one in both]
    engine.close()


def test_whether_an_answer_is_a_copy_is_told_by_what_model_and_hint_think_of_each_others_words():
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1))
    logprobs = logits.log_softmax(0)
    found = signs({3: 0.5, 7: 0.25}, logits)
    others = [i for i in range(40) if i not in (3, 7)]
    theirs, best = (logprobs[some].max().item() for some in ([3, 7], others))
    expected = {"theirs": theirs, "others": best, "somewhere": math.log(0.75)}
    assert found == pytest.approx({**expected, "likeliest": math.log(0.5), "bias": 1.0})
    copy_bias = CopyBias(Letters(), [("ab", 0.9)], [END])
    sure, unsure = torch.zeros(40), torch.zeros(40)
    sure[of("a")[0]], unsure[30] = 9.0, 9.0  # the model begins with the text's letter, or with a word of its own
    assert copy_bias.bias([], sure) is not None and copy_bias.bias(of("a"), sure) is not None
    assert copy_bias.bias([], unsure) is None
    assert copy_bias.bias(of("a"), unsure) is None  # an answer that is no copy is left alone to its end


def test_the_learned_decision_is_the_same_alone_in_a_batch_and_in_the_engine(base, monkeypatch):
    ids, sampling = base.chat.prompt("What is it?"), Sampling(max_new_tokens=6)
    plain = answer(base, ids, None, sampling)
    copy_bias = [("the little house", 1.0)]
    with torch.no_grad():
        logits = base.model(torch.tensor([ids])).logits[0, -1]
    found = signs(CopyBias(base.tokenizer, copy_bias, base.end_ids).shares(()), logits)
    told = {}
    for is_copy in (True, False):  # the same weights, on either side of the boundary
        at = found["theirs"] - found["others"]
        monkeypatch.setattr(
            copying, "APPLIES", {"theirs": 1.0, "others": -1.0, "bias": -at + (0.1 if is_copy else -0.1)}
        )
        of = [CopyBias(base.tokenizer, copy_bias, base.end_ids) for _ in range(3)]
        alone = answer(base, ids, None, sampling, copy_bias=of[0]).text
        (batch, _) = answers(base, [ids, base.chat.prompt("And that?")], [None, None], sampling, [of[1], None])
        engine = LocalEngine(base)
        ticket = engine.submit(GenerationRequest(ids, sampling=sampling, copy_bias=of[2]))
        assert alone == batch.text == ticket.text()
        engine.close()
        told[is_copy] = alone
    assert told[False] == plain.text != told[True]


def test_a_document_hints_and_a_task_beside_it_does_not(always, reading, monkeypatch):
    model = reading
    model.learn(Document.from_text("Adults pay £20. We open at 9:30 am."), "door")
    prepared = model.prepare("How much do adults pay?", "door")
    assert prepared.candidates
    copy_bias = model.copy_bias(prepared)
    assert copy_bias.bias([], torch.zeros(len(model.base.tokenizer))) is not None
    assert model.copy_bias(model.prepare("How much do adults pay?")) is None
    assert model.prepare("How much do adults pay?", "door", outlines=False).candidates == ()
    seen = []
    monkeypatch.setattr(
        "loracast.answering.model.answers",
        lambda base, prompts, loras, sampling, copy_biases, on_text: (
            seen.extend(copy_biases) or [SimpleNamespace(text="")]
        ),
    )
    monkeypatch.setattr(type(prepared), "sourced", lambda self, given: given)
    model.answer("How much do adults pay?", "door")
    assert seen[0] is not None


@pytest.mark.parametrize(("scale", "share"), [(0.5, 0.5), (2.0, 1.0), (-1.0, None)])
def test_an_adapter_with_a_factor_copies_less_and_one_that_is_subtracted_nothing(reading, scale, share):
    model = reading
    adapter = model.learn(Document.from_text("Adults pay £20. We open at 9:30 am."), "door")
    question = "How much do adults pay?"
    whole = model.prepare(question, "door").candidates
    candidates = model.prepare(question, "door", scales={adapter.manifest.version: scale}).candidates
    expected = () if share is None else tuple(Candidate(text, p * share) for text, p, _ in whole)
    assert whole and candidates == expected
