"""Labels with probabilities as LoRAs: the rows of their sentences, each weighed, from whatever gives the labels."""

from __future__ import annotations

import pytest
import torch

import loracast
from loracast.base.chat import encode_text
from loracast.cast.document import CachedRecast
from loracast.cast.labels import cast_labels, learn_labels
from loracast.documents.labels import N_NAMES, Labels
from loracast.errors import AdapterError, ConfigError
from loracast.hypernets.encoders import HiddenStatesEncoder
from loracast.lora.target import target_from_config
from tiny import make_hypernet

HEARD = {"dog": 0.64, "siren": 0.16, "rain": 0.04}


@pytest.fixture(params=["a memory", "no memory"])
def caster(request, base):
    memory = {
        "d_values": 48, "memory_rank": 16, "memory_blocks": 1, "memory_question_rank": 8, "static_rank": 1,
        "memory_modules": target_from_config(base.model.config, ("o_proj",)).rows,
    }  # fmt: skip
    hypernet = make_hypernet(base, **(memory if request.param == "a memory" else {}))
    if hypernet.memory is not None:
        hypernet.memory.scale.data.fill_(0.05)
        hypernet.static["down_proj"].b.data.fill_(0.1)
    return hypernet.bind(base)


def deltas(lora) -> dict[str, torch.Tensor]:
    return {name: lora.delta(name).float() for name in lora.names}


def test_the_lora_of_labels_is_the_weighed_sum_of_those_of_its_sentences(caster, base):
    cast = deltas(cast_labels(CachedRecast(caster, base), Labels(HEARD, "One hears {}.", title="The yard")))
    static = deltas(
        caster.hypernetwork.loras(
            {k: (a[:, :, :0], b[:, :, :0]) for k, (a, b) in rows_of(caster, base, "x").items()}
        ).row(0)
    )
    weights = {"The yard.": 1, "One hears dog.": 1, "One hears siren.": 0.5, "One hears rain.": 0.25}
    for name, delta in cast.items():
        expected = static.get(name, 0)
        for sentence, weight in weights.items():
            whole = caster.hypernetwork.loras(rows_of(caster, base, sentence)).row(0)
            expected = expected + weight * (deltas(whole)[name] - static.get(name, 0))
        torch.testing.assert_close(
            delta, expected.detach(), rtol=0.05, atol=0.02 * float(expected.detach().abs().max())
        )


def rows_of(caster, base, sentence: str):
    return caster.cast(caster.encode([encode_text(base.tokenizer, sentence)])).rows


def test_what_is_kept_is_what_was_cast(caster, base, tmp_path):
    labels, library = Labels(HEARD, "One hears {}.", title="The yard"), loracast.Library(tmp_path)
    recast = CachedRecast(caster, base)
    kept, cast = learn_labels(recast, labels, library, "yard", storage="bf16"), cast_labels(recast, labels)
    assert (kept.manifest.kind, kept.manifest.title, kept.faults()) == ("labels", "The yard", [])
    for name, delta in deltas(cast).items():
        torch.testing.assert_close(deltas(kept.lora())[name], delta, rtol=0.02, atol=1e-3)
    with pytest.raises(AdapterError, match="yard"):
        learn_labels(recast, labels, library, "yard")
    with pytest.raises(ConfigError, match="only documents can be kept as text"):
        learn_labels(recast, labels, library, "other", storage="text")


def test_a_sentence_is_cast_once(caster, base, monkeypatch):
    recast, seen = CachedRecast(caster, base), []
    read = HiddenStatesEncoder.__call__
    monkeypatch.setattr(
        HiddenStatesEncoder, "__call__", lambda self, ids, *more: seen.append(len(ids)) or read(self, ids, *more)
    )
    first = cast_labels(recast, Labels(HEARD))
    again = cast_labels(recast, Labels({"rain": 0.04, "dog": 0.64, "siren": 0.16}))
    cast_labels(recast, Labels({**HEARD, "bell": 0.1}))
    assert seen == [3, 1]
    for name, delta in deltas(first).items():
        torch.testing.assert_close(deltas(again)[name], delta)


def test_the_likeliest_names_are_told():
    many = Labels({f"n{i}": 1 / 2**i for i in range(40)} | {"never": 0})
    assert list(many.likeliest) == [f"n{i}" for i in range(N_NAMES)]
    assert list(Labels({"b": 0.2, "a": 0.8, "c": 0.0}).likeliest) == ["a", "b"]
    assert Labels({"a": 0.8}, "It is {}.").text == "It is a. (80%)"
    assert Labels({"a": 0.8}).sha256 == Labels({"a": 0.8}).sha256 != Labels({"a": 0.7}).sha256


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [({"a": 1}, "no place"), ({"a": 1}, "{} and {}"), ({}, "{}"), ({"a": 0}, "{}"), ({"a": -1, "b": 1}, "{}")],
)
def test_what_are_no_labels_is_refused(labels, sentence):
    with pytest.raises(ConfigError):
        Labels(labels, sentence)


def test_a_model_learns_labels_and_answers_with_them(model):
    adapter = model.learn(Labels(HEARD, "One hears {}."), "yard")
    assert adapter.name == "yard" and model.ask("What does one hear?", "yard") != model.ask("What does one hear?")
