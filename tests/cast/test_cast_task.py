"""Descriptions become adapters: in Python, in batches, from the command line, beside documents."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from loracast.answering.model import Model, load
from loracast.base.generate import Sampling
from loracast.base.load import load_base
from loracast.cast.load import load_caster
from loracast.cast.task import TaskCaster
from loracast.cli import app
from loracast.errors import AdapterError, HypernetworkError
from loracast.hypernets.encoders import BaseTextEncoder
from loracast.hypernets.text_to_lora import TextToLoRA, TextToLoRAConfig
from loracast.lab.training.task_start import remember_seen
from loracast.library.library import Library
from loracast.library.manifest import FACTORS
from loracast.lora.algebra import LoRA
from loracast.lora.target import target_from_config
from tiny import for_base, make_sentence_encoder, make_task_hypernet

KNOWN = ["Answer with the opposite word.", "Give the antonym of the word.", "Translate the word to French."]
SENTENCE = "Turn each word around."


@pytest.fixture(scope="module")
def task_hypernetwork(base, tmp_path_factory):
    """A folder with a random hypernetwork for the tiny base, which reads with a tiny random sentence encoder."""
    folder = tmp_path_factory.mktemp("tasks")
    encoder = make_sentence_encoder(folder / "encoder")
    hypernet = make_task_hypernet(base, encoder, 4, 30.0)
    from loracast.hypernets.encoders import load_text_encoder

    remember_seen(hypernet, load_text_encoder(str(encoder))(KNOWN))
    for_base(hypernet, base.fingerprint).save_pretrained(folder / "hypernetwork", storage="float32")
    return folder / "hypernetwork"


@pytest.fixture
def caster(task_hypernetwork, tmp_path) -> TaskCaster:
    return TaskCaster(load_caster(task_hypernetwork, "task"), Library(tmp_path / "library"))


def close(one: LoRA, other: LoRA) -> bool:
    return set(one.names) == set(other.names) and all(
        torch.allclose(
            one.delta(name), other.delta(name).float(), rtol=2e-2, atol=2e-2 * one.delta(name).abs().max().item()
        )
        for name in one.names
    )


def test_a_description_becomes_an_adapter_that_answers(caster, base):
    adapter = caster.task(SENTENCE, "opposite")
    manifest = adapter.manifest
    assert (manifest.kind, manifest.title, manifest.n_chunks, manifest.made_for) == (
        "task",
        SENTENCE,
        1,
        base.fingerprint,
    )
    (lora,) = caster.loras([SENTENCE])
    stored = adapter.lora()
    assert manifest.storage == "int4" and set(stored.factors) == set(lora.factors)
    for name, (
        a,
        b,
    ) in lora.factors.items():  # each number within half a step of its group's scale, and bf16's rounding
        for rows, kept in ((a, stored.factors[name].a), (b.T, stored.factors[name].b.T)):
            largest = rows.unflatten(1, (-1, 16)).abs().amax(2).repeat_interleave(16, 1)
            assert ((rows - kept).abs() <= largest * (0.5 / 7 + 2**-7)).all()
    n_numbers = sum(a.numel() + b.numel() for a, b in lora.factors.values())
    assert (adapter.folder / FACTORS).stat().st_size < 0.75 * n_numbers + 4096  # bf16 would take two bytes a number
    adapter.verify()
    answerer = Model(base, caster.library)
    few = Sampling(max_new_tokens=6)
    assert answerer.ask("hot", "opposite", sampling=few) != answerer.ask("hot", sampling=few)


def test_a_batch_is_one_pass_and_the_same_as_one_by_one(caster, monkeypatch):
    texts = [*KNOWN, SENTENCE]
    passes = []
    rows = TextToLoRA.rows
    monkeypatch.setattr(TextToLoRA, "rows", lambda self, x: (passes.append(len(x)), rows(self, x))[1])
    adapters = caster.tasks(texts, storage="bf16")
    assert passes == [4] and [a.name for a in adapters][:2] == [
        "answer-with-the-opposite-word",
        "give-the-antonym-of-the-word",
    ]
    for text, adapter in zip(texts, adapters, strict=True):
        assert close(caster.loras([text])[0], adapter.lora())


@pytest.mark.parametrize(("storage", "bytes_each"), [("int4", 0.625), ("int8", 1.0), ("bf16", 2.0)])
def test_a_task_is_kept_as_it_is_asked_for(caster, storage, bytes_each):
    adapter = caster.task(SENTENCE, storage, storage=storage)
    numbers = sum(a.numel() + b.numel() for a, b in adapter.lora().factors.values())
    assert adapter.manifest.storage == storage
    assert (adapter.folder / FACTORS).stat().st_size == pytest.approx(bytes_each * numbers, rel=0.2, abs=3000)


@pytest.mark.parametrize("storage", ["text", "int3"])
def test_a_storage_that_no_task_has_is_refused(caster, storage):
    with pytest.raises(AdapterError, match="int8"):
        caster.task(SENTENCE, storage=storage)


def test_strength_scales_the_delta(caster):
    whole, half, none = (caster.loras([SENTENCE], strength)[0] for strength in (1.0, 0.5, 0.0))
    for name in whole.names:
        torch.testing.assert_close(half.delta(name), whole.delta(name) / 2)
        assert not none.delta(name).any()
    assert caster.task(SENTENCE, "half", strength=0.5).manifest.strength == 0.5


def test_a_description_far_from_training_is_cast_with_a_warning(caster):
    same, other = caster.distances([KNOWN[0], "zxq vv kk"])
    assert same == pytest.approx(0, abs=1e-5) and other > caster.ood_threshold > 0
    assert not caster.task(KNOWN[0]).manifest.warnings
    (warning,) = caster.task("zxq vv kk").manifest.warnings
    assert warning.startswith("'zxq vv kk' is far from every description seen in training")


def test_what_is_refused_leaves_nothing(caster):
    caster.task(KNOWN[0], "taken")
    for descriptions, names, message in (
        (["  "], ["empty"], "description of a task is empty"),
        ([KNOWN[1], KNOWN[2]], ["new", "taken"], "already"),
        ([KNOWN[1], KNOWN[2]], ["same", "same"], "a name of its own"),
        ([KNOWN[1]], ["Not Allowed"], "cannot name an adapter"),
    ):
        with pytest.raises(AdapterError, match=message):
            caster.tasks(descriptions, names)
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        caster.tasks([KNOWN[1], KNOWN[2]], ["good", "Bad Name"], replace=True)
    assert caster.library.names() == ["taken"]
    assert caster.task(KNOWN[1], "taken", replace=True).manifest.title == KNOWN[1]
    assert caster.task(KNOWN[1], "taken").version == caster.task(KNOWN[1], "taken").version  # the same again
    with pytest.raises(AdapterError, match="already"):
        caster.task(KNOWN[1], "taken", strength=0.5)


def test_a_task_and_a_document_answer_together(task_hypernetwork, tiny_folder, tiny_hypernet_folder, tmp_path):
    model = load(tiny_folder, tiny_hypernet_folder, task_hypernetwork=task_hypernetwork, library=tmp_path, device="cpu")
    (tmp_path / "note.txt").write_text("The access number of the amber lantern is 5283.")
    note, task = model.learn(tmp_path / "note.txt", "note"), model.task(KNOWN[0], "opposite")
    lora, _ = model.lora_for("What is the number?", ["opposite", "note"])
    for name in lora.names:
        parts = [adapter.lora() for adapter in (note, task)]
        expected = sum(part.delta(name).float() for part in parts if name in part.names)
        torch.testing.assert_close(lora.delta(name).float(), expected, rtol=2e-2, atol=2e-2)
    assert [a.name for a in model.tasks([KNOWN[1]], ["second"])] == ["second"]


def test_without_a_hypernetwork_for_tasks_the_error_says_what_to_do(tiny_folder, tiny_hypernet_folder, tmp_path):
    model = load(tiny_folder, tiny_hypernet_folder, library=tmp_path, device="cpu")
    with pytest.raises(HypernetworkError, match="loracast train text"):
        model.task("Do something.")


def test_the_command(task_hypernetwork, tmp_path, home):
    library = tmp_path / "library"
    arguments = [
        "task",
        SENTENCE,
        "--name",
        "opposite",
        "--hypernetwork",
        str(task_hypernetwork),
        "--library",
        str(library),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and done.stdout.startswith(
        f"cast opposite ({SENTENCE})\nrank 2 in q_proj, 2 in v_proj, "
    )
    assert CliRunner().invoke(app, arguments).exit_code == 0  # the same again
    other = ["task", "Turn no word around.", *arguments[2:]]
    assert CliRunner().invoke(app, other).exit_code == 1  # the name is taken
    report = json.loads(CliRunner().invoke(app, [*arguments, "--replace", "--json", "--strength", "0.5"]).stdout)
    assert report["name"] == "opposite" and report["strength"] == 0.5 and report["description"] == SENTENCE
    assert report["distance"] > 0 and report["cast_s"] < 5
    shown = CliRunner().invoke(app, ["show", "opposite", "--library", str(library)]).stdout
    assert "strength 0.5" in shown and "sha256" not in shown
    listed = CliRunner().invoke(app, ["list", "--library", str(library), "--json"]).stdout
    assert json.loads(listed)["adapters"][0]["kind"] == "task"
    far = [*arguments, "--replace"]
    far[1] = "zxq vv kk"
    assert "far from every description" in CliRunner().invoke(app, far).stderr


def test_the_command_reads_with_the_base_where_the_hypernetwork_does(base, tiny_folder, tmp_path, home):
    target = target_from_config(base.model.config, ("q_proj",))
    torch.manual_seed(3)
    hypernet = TextToLoRA(TextToLoRAConfig(48, target.rows, encoder="base", rank=2, width=16, head_width=16))
    hypernet.heads["q_proj"].scaler_b.data.fill_(1.0)
    for_base(hypernet, base.fingerprint).save_pretrained(tmp_path / "h", storage="float32")
    arguments = [
        "task",
        SENTENCE,
        "--name",
        "t",
        "--hypernetwork",
        str(tmp_path / "h"),
        "--library",
        str(tmp_path / "l"),
        "--storage",
        "bf16",
    ]
    done = CliRunner().invoke(app, [*arguments, "--base", str(tiny_folder), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["distance"] is None
    with torch.no_grad():
        expected = hypernet.eval()(BaseTextEncoder(load_base(tiny_folder, device="cpu"))([SENTENCE])).row(0)
    assert close(expected, Model(base, tmp_path / "l").adapter("t").lora())
    for_base(hypernet, dataclasses.replace(base.fingerprint, norms="0" * 16)).save_pretrained(tmp_path / "h")
    done = CliRunner().invoke(app, [*arguments, "--replace", "--base", str(tiny_folder)])
    assert done.exit_code == 1 and "the weights differ" in done.stderr.replace("\n", " ")
