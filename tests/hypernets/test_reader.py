"""The reader's two steps against their formulas, and its file."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from loracast.errors import HypernetworkError
from loracast.hypernets.reader import Reader, ReaderConfig


def make_reader(**changes) -> Reader:
    torch.manual_seed(0)
    config = {
        "d_state": 6,
        "vocabulary": 30,
        "layer": 1,
        "prefix": (1,),
        "width": 8,
        "inner": 12,
        "n_blocks": 1,
        "n_heads": 2,
    }
    return Reader(ReaderConfig(**{**config, "n_best": 2, "most_tokens": 5, **changes})).eval().requires_grad_(False)


@pytest.fixture
def reader() -> Reader:
    return make_reader()


def test_late_interaction_is_the_weighted_sum_of_each_tokens_best_cosine(reader):
    asked, text, units = torch.randn(2, 3, 12), reader.vectors(torch.randn(7, 12)), torch.tensor([0, 0, 1, 1, 1, 2, 2])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    question = reader.question(asked, mask)
    found, cosines = reader.late(question, text, units, 3)
    for i, m in enumerate((3, 2)):
        vectors = [reader.asked(asked[i, j]) for j in range(m)]
        weights = torch.stack([reader.weigh(asked[i, j])[0] for j in range(m)]).softmax(0)
        for unit in range(3):
            own = [text[t] for t in range(7) if units[t] == unit]
            best = [max(functional.cosine_similarity(v, one, dim=0) for one in own) for v in vectors]
            expected = sum(weight * value for weight, value in zip(weights, best, strict=True))
            assert cosines[i, :m, unit].tolist() == pytest.approx([float(one) for one in best], abs=1e-4)
            assert float(found[i, unit]) == pytest.approx(float(expected), abs=1e-4)


def test_a_token_is_matched_by_the_document_and_by_each_unit_that_is_read(reader):
    reader.rarity.copy_(torch.linspace(-1, 2, 30))
    ids, cosines = torch.tensor([3, 29, 12, 25, 14, 20, 0]), torch.rand(7, 3)
    held = torch.tensor([[0, 1, 0.5, 1], [0, 0, 1, 1], [1, 0.5, 0, 1], [0, 1, 0.5, 1]])[[0, 1, 2, 3, 2, 2, 2]]
    found = reader.matched(ids, cosines, held, torch.tensor([2]))
    assert found.shape == (5, 10)  # the last `most_tokens` tokens
    # Of the rare tokens, the third unit holds 29, the second 25, the first 12, 14 and 20; its chunk all that it holds.
    weights = {i: max(0.0, float(reader.rarity[i])) for i in ids.tolist()}
    units = [weights[12] + weights[14] + weights[20], weights[25], weights[29]]
    chunks = [units[0], units[0] + weights[25], weights[29] + weights[25]]
    unit, chunk = units.index(max(units)), chunks.index(max(chunks))
    for token, row in zip(range(2, 7), found.tolist(), strict=True):
        of_one, of_words = cosines[token].tolist(), held[token].tolist()  # of two units that could be read one is there
        of_word = [
            float(reader.rarity[ids[token]]),
            of_words[3],
            float(of_words[chunk] > 0),
            float(of_words[unit] == 1),
        ]
        assert row == pytest.approx([max(of_one), of_one[2], 0.0, of_words[3], of_words[2], 0.0, *of_word])


def test_rarity_is_the_logarithm_of_how_seldom_a_token_is(reader):
    reader.measure(torch.randn(100, 12), torch.tensor([4] * 90 + [5] * 10))
    expected = [torch.tensor(100 / (1 + n)).log() / 4 - 1 for n in (90, 10, 0)]
    assert reader.rarity[[4, 5, 6]].tolist() == pytest.approx([float(one) for one in expected])


def test_each_word_adds_its_own_evidence_that_the_answer_is_absent(reader):
    asked, text, units = torch.randn(1, 4, 12), torch.randn(1, 6, 8), torch.tensor([[0, 0, 1, 1, 1, 1]])
    mask, matched, scores = torch.ones(1, 4) > 0, torch.rand(1, 4, 10), torch.rand(1, 2, 2)
    found = reader.places(asked, mask, matched, text, units, scores)
    assert float(found.absent) == pytest.approx(float(sum(reader.evidence(one[-4:]) for one in matched[0])), abs=1e-5)
    torch.nn.init.constant_(reader.evidence[-1].bias, float(reader.evidence[-1].bias) + 0.5)
    more = reader.places(asked, mask, matched, text, units, scores)
    for before, after in ((found.nowhere, more.nowhere), (found.foreign, more.foreign)):
        assert float(after - before) == pytest.approx(4 * 0.5, abs=1e-4)
    assert torch.equal(more.units, found.units)


def test_what_is_kept_of_a_token_is_a_byte_a_number(reader):
    vectors = reader.vectors(torch.randn(50, 12))
    kept = reader.kept(vectors)
    assert kept.dtype == torch.int8 and kept.shape == (50, 8)
    assert (reader.unpacked(kept) - vectors.clamp(-4, 4)).abs().max() <= 2 / 127 + 1e-6
    assert vectors.square().mean(-1) == pytest.approx(1.0, abs=1e-3)


def test_padding_changes_nothing(reader):
    asked, text = torch.randn(2, 4, 12), torch.randn(2, 6, 8)
    scores, units = torch.rand(2, 2, 2), torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 2, 2, 2]])
    mask, matched = torch.tensor([[True] * 4, [True, True, False, False]]), torch.rand(2, 4, 10)
    both = reader.places(asked, mask, matched, text, units, scores)
    alone = reader.places(asked[1:, :2], mask[1:, :2], matched[1:, :2], text[1:, :3], units[1:, :3], scores[1:])
    assert torch.allclose(both.all()[1], alone.all()[0], atol=1e-5)
    assert torch.allclose(both.begins[1, :3], alone.begins[0], atol=1e-5)


def test_a_units_probability_is_that_of_its_tokens_together(reader):
    question, text = torch.randn(4, 12), torch.randn(9, 8)
    units, bm25 = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3]), torch.tensor([0.0, 1.0, 0.2, 0.0])
    found = reader.find(question, torch.arange(4), text, units, bm25, torch.zeros(4, 5))
    assert len(found.units) == 2 and list(found.units) == sorted(found.units)
    assert sum(found.of_units) + found.nowhere + found.foreign == pytest.approx(1.0, abs=1e-5)
    for unit, probability in zip(found.units, found.of_units, strict=True):
        tokens = [p for token, p in found.begins if units[token] == unit]
        assert sum(tokens) == pytest.approx(probability, abs=1e-5)
    first = reader.first(reader.late(reader.question(question[None]), text, units, 4)[0][0], bm25)
    assert set(found.units) == set(first.topk(2).indices.tolist())
    assert found.margin == pytest.approx(torch.log(torch.tensor(found.nowhere / sum(found.of_units))).item(), abs=1e-4)


def test_a_long_question_and_a_long_unit_are_cut(reader):
    units = torch.tensor([0] * 9 + [1] * 2)
    found = reader.find(
        torch.randn(20, 12), torch.arange(20), torch.randn(11, 8), units, torch.zeros(2), torch.zeros(20, 3)
    )
    assert {token for token, _ in found.begins} == {0, 1, 2, 3, 4, 9, 10}


def test_the_order_of_units_is_seen(reader):
    """Which of two equal units comes later can tell which one is newer."""
    text = torch.randn(3, 8).repeat(2, 1)
    found = reader.find(
        torch.randn(3, 12), torch.arange(3), text, torch.tensor([0, 0, 0, 1, 1, 1]), torch.zeros(2), torch.zeros(3, 3)
    )
    assert abs(found.of_units[0] - found.of_units[1]) > 1e-6


def test_a_file_gives_the_same_reader_and_its_id(reader, tmp_path):
    reader.refusing.fill_(1.5)
    reader.measure(torch.randn(30, 12), torch.arange(30))
    reader.save(tmp_path / "reader.safetensors", {"command": "loracast train reader"})
    read = Reader.read(tmp_path / "reader.safetensors")
    assert read.config == reader.config and len(read.id) == 16 and not read.training
    for name, value in reader.state_dict().items():
        assert torch.equal(read.state_dict()[name], value.half().float())
    assert Reader.read(tmp_path / "reader.safetensors").id == read.id


@pytest.mark.parametrize("damage", ["cut", "config", "tensor", "no metadata"])
def test_a_damaged_file_is_refused(reader, tmp_path, damage):
    path = tmp_path / "reader.safetensors"
    reader.save(path, {})
    tensors, config = load_file(path), json.dumps({"d_state": 6})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "config":
        save_file(tensors, path, metadata={"config": json.dumps({"d_state": "six", "colour": 1})})
    elif damage == "tensor":
        save_file({name: value for name, value in tensors.items() if name != "at"}, path, metadata={"config": config})
    else:
        save_file(tensors, path)
    with pytest.raises(HypernetworkError, match=r"reader\.safetensors holds no reader"):
        Reader.read(path)
