"""Refining a LoRA on examples: where it starts, what is held back, when it ends, and the adapters that come of it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from loracast.cast.load import load_caster
from loracast.cast.task import TaskCaster
from loracast.cli import app
from loracast.data.task_examples import ToldTask, as_examples
from loracast.data.tasks import read_tasks
from loracast.errors import ConfigError
from loracast.evaluation.task_baselines import BASELINES, TaskCase, TaskSetup
from loracast.evaluation.tasks import TasksConfig, draw, evaluate_tasks
from loracast.hypernets.store import save_pretrained
from loracast.lora.algebra import Factors, LoRA
from loracast.lora.inject import inject
from loracast.model import Model
from loracast.training.refine import RefineConfig, refine, refine_lora, refiner
from tiny import for_base, make_attention_delta

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
    save_pretrained(for_base(hypernet, base.fingerprint), tmp_path / "hypernetwork", storage="float32")
    return TaskCaster(load_caster(tmp_path / "hypernetwork", "task", lambda: base), tmp_path / "library")


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
    refined = refine_lora(base, lora, EXAMPLES, QUICK)
    assert refined.names == lora.names
    for name, (a, b) in lora.factors.items():
        assert torch.equal(a, before[name][0]) and torch.equal(b, before[name][1])
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


def test_it_starts_from_the_loras_own_factors(base):
    """From B = 0 the first loss is that of the plain base."""
    name = "model.layers.1.self_attn.q_proj"
    nothing = LoRA({name: Factors(torch.randn(2, 48), torch.zeros(64, 2))})
    from loracast.lora.algebra import LoRABatch

    def lora_of(rows):
        (a, b) = rows[name]
        return LoRABatch(1, {name: Factors(a[:, 0], b[:, 0].transpose(1, 2))}, {})

    a, b = nothing.factors[name]
    rows = {name: (a[None, None], b.T[None, None])}
    done = refine(base, rows, lora_of, EXAMPLES[:4], RefineConfig(seconds=60, steps=1))
    held = [answer_loss(base, LoRA(), e.input) for e in EXAMPLES[:4]]
    assert any(done.loss_before == pytest.approx(loss, abs=0.05) for loss in held)


def test_too_few_examples_and_bad_settings_are_refused(base, caster):
    with pytest.raises(ConfigError, match="at least 4 examples, and there are 3"):
        caster.task(SENTENCE, "kettle", examples=EXAMPLES[:3], refine=refiner(base, QUICK))
    for bad in ({"seconds": 0}, {"steps": 0}):
        with pytest.raises(ConfigError, match="seconds must be above 0"):
            RefineConfig(**bad)


def test_the_evaluation_refines_for_the_steps_that_are_given(base, caster, suite):
    tasks = [task for task in read_tasks(suite) if task.is_heldout]
    drawn = dataclasses.replace(draw(tasks, 1, 0), shots=EXAMPLES)
    cast = caster.loras([ToldTask(drawn.description, EXAMPLES)])[0]
    for config in (dataclasses.replace(QUICK, steps=2), QUICK):
        setup = TaskSetup(base, caster, refine=config)
        found = BASELINES["refined"].request(setup, TaskCase(drawn, EXAMPLES[0])).lora.make()
        expected = refine_lora(base, cast, EXAMPLES, config)
        for name, (a, b) in expected.factors.items():
            torch.testing.assert_close(found.factors[name].a, a)
            torch.testing.assert_close(found.factors[name].b, b)
            assert not torch.equal(a, cast.factors[name].a)
    with pytest.raises(ConfigError, match="at least 1"):
        evaluate_tasks(TaskSetup(base, caster), TasksConfig(tasks=str(suite), refine_steps=0), caster.library)


def test_an_adapter_is_refined_in_python_and_by_the_command(base, caster, tiny_folder, tmp_path, home):
    model = Model(base, tmp_path / "library", task_hypernetwork=tmp_path / "hypernetwork")
    adapter = model.task(SENTENCE, "kettle", examples=EXAMPLES, refine_s=2)
    assert adapter.manifest.is_refined and adapter.manifest.n_examples == len(EXAMPLES)
    cast = model.task(SENTENCE, "cast", examples=EXAMPLES)
    assert not cast.manifest.is_refined and cast.manifest.ranks == adapter.manifest.ranks
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
    told = CliRunner().invoke(app, [str(a) for a in (*arguments[:1], *arguments[2:4], *arguments[6:-1], "--replace")])
    assert told.exit_code == 0 and "cast again (lamp => kettle, 12 examples)" in told.stdout
    assert CliRunner().invoke(app, ["task", "--library", str(tmp_path / "library")]).exit_code == 2
