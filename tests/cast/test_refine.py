"""Refining a LoRA on examples: where it starts, what is held back, when it ends, and the adapters that come of it."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from typer.testing import CliRunner

from loracast.answering.model import ASK_SYSTEM_TURN, Model
from loracast.base.generate import Sampling
from loracast.cast import refine as refine_module
from loracast.cast.load import load_caster
from loracast.cast.refine import RefineConfig, refine, refiner
from loracast.cast.task import TaskCaster
from loracast.cli import app
from loracast.documents.task_spec import TaskSpec, as_examples
from loracast.errors import ConfigError, EncoderError
from loracast.lab.data.tasks import read_tasks
from loracast.lab.evaluation.refining import STARTS, Mark, RefiningConfig, descend, evaluate_refining, loras_of, rows_of
from loracast.lab.evaluation.tasks import TaskSetup, draw
from loracast.library.library import Library
from loracast.lora.algebra import LoRA, inject
from loracast.lora.factors import Factors
from tiny import answer, for_base, make_attention_delta

WORDS = ("lamp", "river", "stone", "kettle", "bridge", "museum", "north", "desk", "water", "code", "line", "morning")
EXAMPLES = as_examples([(word, "kettle") for word in WORDS])
SENTENCE = "Say kettle."
QUICK = RefineConfig(seconds=60, steps=24, lr=1e-2)


@pytest.fixture
def caster(base, tmp_path) -> TaskCaster:
    hypernet = make_attention_delta(base)
    for part in (*hypernet.shared.values(), *hypernet.encoder_lora.values()):
        part.b.data.mul_(0.05)
    hypernet.up.data.mul_(0.05)
    for_base(hypernet, base.fingerprint).save_pretrained(tmp_path / "hypernetwork", storage="float32")
    return TaskCaster(load_caster(tmp_path / "hypernetwork", "task", lambda: base), Library(tmp_path / "library"))


def answer_loss(base, lora: LoRA, word: str) -> float:
    """Mean loss of the answer's tokens, computed by a plain forward pass."""
    prompt, answer = base.chat.prompt(word, ""), base.chat.reply("kettle")
    with torch.no_grad(), inject(base.model, lora):
        logits = base.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.float(), torch.tensor(answer)).item()


def test_descent_learns_the_examples_and_leaves_the_start_and_the_base_alone(base, caster):
    (lora,) = caster.loras([SENTENCE])
    before = {name: (a.clone(), b.clone()) for name, (a, b) in lora.factors.items()}
    weights = [p.clone() for p in base.model.parameters()]
    refined = loras_of(refine(base, rows_of(lora), loras_of, EXAMPLES, QUICK).rows).row(0)
    assert refined.names == lora.names
    for name, (a, b) in lora.factors.items():
        assert torch.equal(a, before[name][0]) and torch.equal(b, before[name][1])
        assert torch.equal(refined.factors[name].a[: len(a)], a) and torch.equal(
            refined.factors[name].b[:, : len(a)], b
        )
        assert refined.factors[name].rank == len(a) + QUICK.rank
    assert all(map(torch.equal, weights, base.model.parameters()))
    unseen = ("tea", "lantern")
    assert all(answer_loss(base, refined, word) < 0.5 * answer_loss(base, lora, word) for word in unseen)


def test_what_did_best_on_the_held_back_examples_is_kept(base, caster):
    rows = caster.caster.cast(caster.caster.encode([SENTENCE])).rows
    loras_of = caster.hypernetwork.loras
    good = refine(base, rows, loras_of, EXAMPLES, QUICK)
    assert good.loss_after < good.loss_before and 0 < good.steps <= 24 and good.steps % QUICK.look_every == 0
    wild = refine(base, rows, loras_of, EXAMPLES, RefineConfig(seconds=60, steps=200, lr=30.0, look_every=1))
    assert wild.loss_after <= wild.loss_before
    if not wild.steps:
        assert all(torch.equal(wild.rows[kind][0], rows[kind][0]) for kind in rows)
    none = refine(base, rows, loras_of, EXAMPLES, RefineConfig(seconds=1e-9))
    assert none.steps == 0 and none.loss_after == none.loss_before


def test_it_starts_from_what_the_lora_does(base):
    """A LoRA of zeros has the loss of the plain base."""
    name = "model.layers.1.self_attn.q_proj"
    nothing = LoRA({name: Factors(torch.randn(2, 48), torch.zeros(64, 2))})
    done = refine(base, rows_of(nothing), loras_of, EXAMPLES[:4], RefineConfig(seconds=60, steps=1))
    held = [answer_loss(base, LoRA(), e.input) for e in EXAMPLES[:4]]
    assert any(done.loss_before == pytest.approx(loss, abs=0.05) for loss in held)


def test_too_few_examples_and_bad_settings_are_refused(base, caster, tmp_path):
    with pytest.raises(ConfigError, match="at least 4 examples, and there are 3"):
        caster.task(SENTENCE, "kettle", examples=EXAMPLES[:3], refine=refiner(base, QUICK))
    model = Model(base, tmp_path / "library", task_hypernetwork=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="at least 4 examples"):  # before a hypernetwork is looked for
        model.task(SENTENCE, examples=EXAMPLES[:3], refine_s=1)
    for bad in ({"seconds": 0}, {"steps": 0}, {"rank": 0}):
        with pytest.raises(ConfigError, match="seconds must be above 0"):
            RefineConfig(**bad)


@pytest.mark.parametrize("description", [SENTENCE, ""])
def test_descent_starts_from_the_description_or_from_examples_without_one(caster, description):
    starts = []

    def refine(rows, loras_of, examples):
        assert tuple(examples) == EXAMPLES
        starts.append(loras_of(rows).row(0))
        return rows

    caster.task(description, "kettle", examples=EXAMPLES, refine=refine)
    expected = caster.loras([description or TaskSpec("", EXAMPLES)])[0]
    (start,) = starts
    assert start.names == expected.names
    for name, (a, b) in expected.factors.items():
        torch.testing.assert_close(start.factors[name].b @ start.factors[name].a, b @ a)


def test_too_long_an_example_is_refused_before_descent(base, caster):
    examples = [("lamp " * 9000, "kettle"), *((e.input, e.outputs[0]) for e in EXAMPLES)]
    with pytest.raises(EncoderError, match="example 1 is too long"):
        caster.task(SENTENCE, "kettle", examples=examples, refine=lambda *given: pytest.fail("it descended"))


def test_an_adapter_that_descent_made_no_better_is_as_it_was_cast(base, caster, tiny_folder, tmp_path, home):
    cast = caster.task(SENTENCE, "cast", examples=EXAMPLES)
    still = dataclasses.replace(QUICK, seconds=1e-9)
    adapter = caster.task(SENTENCE, "still", examples=EXAMPLES, refine=refiner(base, still))
    assert not adapter.manifest.is_refined and adapter.manifest.ranks == cast.manifest.ranks
    for name, (a, b) in cast.lora().factors.items():
        assert torch.equal(adapter.lora().factors[name].a, a) and torch.equal(adapter.lora().factors[name].b, b)
    file = tmp_path / "examples.txt"
    file.write_text("".join(f"{e.input} => {e.outputs[0]}\n" for e in EXAMPLES))
    arguments = [
        "task", SENTENCE, "--examples", file, "--refine", "0.001s", "--name", "by-command", "--base", tiny_folder,
        "--hypernetwork", tmp_path / "hypernetwork", "--library", tmp_path / "library",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0 and "refining made the LoRA no better" in done.stderr, done.output
    assert "refined" not in done.stdout
    shown = CliRunner().invoke(app, ["show", "by-command", "--library", str(tmp_path / "library")])
    assert f"examples {len(EXAMPLES)}" in " ".join(shown.stdout.replace("│", " ").split())


def test_the_learning_rate_falls_within_passes_over_the_examples_and_stays_without():
    def rates(n_learned, **options):
        rate = refine_module._schedule(RefineConfig(lr=1.0, **options), n_learned)
        return [rate(step) for step in range(100)]

    for n_learned, options, n_steps in ((24, {}, 21), (3, {}, 20), (96, {"decay_passes": 2}, 24)):
        found = rates(n_learned, **options)
        assert max(found) == found[3] == 1 and found[n_steps - 1] > found[n_steps] == pytest.approx(0.1)
        assert found[n_steps:] == [found[n_steps]] * (100 - n_steps)
    assert rates(24, decay_passes=0)[3:] == [1] * 97
    with pytest.raises(ConfigError, match="decay_passes must be at least 0"):
        RefineConfig(decay_passes=-1)


def test_of_many_examples_few_are_held_back(base, caster, monkeypatch):
    sizes = []
    made = refine_module._batch
    monkeypatch.setattr(refine_module, "_batch", lambda base, some: sizes.append(len(some)) or made(base, some))
    many = as_examples([(f"lamp {i}", "kettle") for i in range(200)])
    refine(base, rows_of(caster.loras([SENTENCE])[0]), loras_of, many, dataclasses.replace(QUICK, steps=1))
    assert sizes == [32, QUICK.examples_per_step]


def test_a_stage_of_the_evaluation_is_what_refining_for_its_steps_gives(base, caster, suite):
    tasks = [task for task in read_tasks(suite) if task.is_heldout]
    drawn = dataclasses.replace(draw(tasks, 1, 0), shots=EXAMPLES)
    marks = [Mark("0 s", seconds=0), *(Mark(f"{n}", steps=n) for n in (2, 7, 24))]
    stages = descend(TaskSetup(base, caster), drawn, STARTS["adapter"], marks, QUICK)
    cast = caster.loras([drawn.description])[0]
    for mark in marks:
        ended = {"seconds": 1e-9} if math.isinf(mark.steps) else {"steps": int(mark.steps)}
        config = dataclasses.replace(QUICK, **ended)
        expected = refine(base, rows_of(cast), loras_of, EXAMPLES, config)
        assert stages[mark.name].n_steps == expected.steps
        for name, (a, b) in loras_of(expected.rows).row(0).factors.items():
            torch.testing.assert_close(stages[mark.name].lora.factors[name].a, a)
            torch.testing.assert_close(stages[mark.name].lora.factors[name].b, b)
    assert stages["24"].n_steps > stages["2"].n_steps == 2 and stages["0 s"].n_steps == 0


def test_the_evaluation_compares_starts_at_the_same_time(base, caster, suite, tmp_path, monkeypatch):
    monkeypatch.setattr("loracast.cast.refine._PATIENCE", 1)  # descents end sooner
    (plain,) = caster.loras([SENTENCE])
    config = RefiningConfig(tasks=str(suite), rows=2, seeds=(0,), seconds=(60,), steps=(2,))
    report = evaluate_refining(TaskSetup(base, caster, multitask=plain), config, tmp_path)
    rows = {(row["start"], row["at"]): row for row in report.rows}
    assert list(rows) == [(start, at) for start in STARTS for at in ("0 s", "60 s", "2 steps")]
    saved = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(saved) == len(rows) * 3 * 2
    sampling = Sampling(max_new_tokens=32)
    for line in saved:
        if line["at"] == "0 s" and line["start"] != "adapter":
            lora = plain if line["start"] == "multitask" else None
            prompt = base.chat.prompt(line["input"], ASK_SYSTEM_TURN)
            assert line["answer"] == answer(base, prompt, lora, sampling).text
    for (start, at), row in rows.items():
        mine = [line["exact"] for line in saved if (line["start"], line["at"]) == (start, at)]
        assert row["n_tasks"] == 3 and row["n"] == 6 and row["exact"] == pytest.approx(sum(mine) / 6)
        assert (row["n_steps"] == 0) == (at == "0 s") or start == "adapter"
        if start != "adapter":
            assert row["difference"] == pytest.approx(rows["adapter", at]["exact"] - row["exact"])
    with pytest.raises(ConfigError, match="at least 1"):
        RefiningConfig(tasks=str(suite), steps=(0,))
    three = tmp_path / "three"
    three.mkdir()
    (three / "few.json").write_text(
        json.dumps({"heldout": True, "descriptions": {"heldout": ["Say it."]}, "examples": [
            {"input": str(i), "output": "a", "split": "test" if i else "train"} for i in range(2)]})
    )  # fmt: skip
    with pytest.raises(ConfigError, match="takes 4 training examples; fewer have few"):
        evaluate_refining(TaskSetup(base, caster), RefiningConfig(tasks=str(three)), tmp_path)


def test_an_adapter_is_refined_in_python_and_by_the_command(base, caster, tiny_folder, tmp_path, home):
    model = Model(base, tmp_path / "library", task_hypernetwork=tmp_path / "hypernetwork")
    adapter = model.task(SENTENCE, "kettle", examples=EXAMPLES, refine_s=2)
    assert adapter.manifest.is_refined and adapter.manifest.n_examples == len(EXAMPLES)
    cast = model.task(SENTENCE, "cast")
    assert not cast.manifest.is_refined
    more = {kind: rank + RefineConfig().rank for kind, rank in cast.manifest.ranks.items()}
    assert adapter.manifest.ranks == more
    assert answer_loss(base, adapter.lora(), "tea") < answer_loss(base, cast.lora(), "tea")
    file = tmp_path / "examples.jsonl"
    file.write_text("".join(json.dumps({"input": e.input, "output": e.outputs[0]}) + "\n" for e in EXAMPLES))
    arguments = [
        "task", SENTENCE, "--examples", file, "--refine", "1s", "--name", "again", "--base", tiny_folder,
        "--hypernetwork", tmp_path / "hypernetwork", "--library", tmp_path / "library", "--json",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["n_examples"] == len(EXAMPLES) and facts["description"] == SENTENCE and facts["distance"] is None
    assert model.adapter("again").manifest.is_refined
    result = CliRunner().invoke(app, [str(a) for a in (*arguments[:1], *arguments[2:4], *arguments[6:-1], "--replace")])
    assert result.exit_code == 0 and "cast again (lamp => kettle, 12 examples)" in result.stdout
    assert CliRunner().invoke(app, ["task", "--library", str(tmp_path / "library")]).exit_code == 2
