"""The training loop: resumed exactly, killed at any moment, stopped by a signal."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from loracast.cli import app
from loracast.errors import ConfigError, TrainingError
from loracast.hypernets.doc_to_lora import DocToLoRA
from loracast.hypernets.encoders import HiddenStatesEncoder
from loracast.lab.training import doc as verdicts
from loracast.lab.training import loop as checkpoint
from loracast.lab.training.doc import DocRecipe, doc_config, sample_chunks, train_doc
from loracast.lab.training.document_source import DataConfig, EpisodeSource
from loracast.lab.training.loop import TrainConfig, make_optimizer, train
from loracast.lab.training.recipe import read_recipe
from tiny import DOC_TO_LORA


@pytest.fixture(autouse=True)
def few_texts_to_calibrate(monkeypatch):
    """The units of a memory, and what remains of a Perceiver, are measured on a few texts."""
    monkeypatch.setattr(verdicts, "CALIBRATION_ROWS", 4)
    monkeypatch.setattr(verdicts, "CALIBRATION_CHUNKS", 24)


class Killed(BaseException):
    """Stands in for the end of the process."""


class Toy(nn.Module):
    """A matrix, a stack of matrices and a vector, and noise from torch's random state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 6)
        self.heads = nn.Parameter(torch.randn(2, 6, 4) * 0.3)
        self.latents = nn.Parameter(torch.randn(3, 6))
        self.register_buffer("units", torch.ones(6))

    def forward(self, step: int) -> torch.Tensor:
        """How far it is from a fixed answer; the noise makes the random state matter."""
        g = torch.Generator().manual_seed(step % 2)
        x = torch.randn(5, 6, generator=g)
        x = self.inner(x * self.units + self.latents.mean(0)) @ self.heads.sum(0)
        noise = 0.01 * torch.randn(5, 4)
        return (x + noise - torch.linspace(-1, 1, 4)).square().mean()


def run(model: Toy, out: Path, config: TrainConfig, stop_after: int | None = None, **options) -> dict[str, float]:
    """Train; with `stop_after`, SIGTERM comes after that many steps."""

    def on_metrics(metrics: dict[str, float]) -> None:
        if metrics["step"] == stop_after:
            signal.raise_signal(signal.SIGTERM)

    return train(
        model,
        lambda number: (model(number), {"seen": 1.0}),
        config,
        out,
        save_model=lambda folder: (folder / "saved").write_text("model"),
        on_metrics=on_metrics,
        **options,
    )


def config(**options: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 8, "warmup_steps": 3, "log_every": 1, "lr": 0.02, **options})


def state_of(out: Path) -> dict[str, torch.Tensor]:
    state = json.loads((out / "state.json").read_text())
    return load_file(out / state["folder"] / "state.safetensors")


def metrics_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("options", [{}, {"accumulate": 3, "weight_decay": 0.1}])
def test_resumed_training_equals_uninterrupted_training(options, tmp_path):
    torch.manual_seed(5)
    whole = Toy()
    run(whole, tmp_path / "whole", config(**options))
    torch.manual_seed(5)
    last = run(Toy(), tmp_path / "parts", config(**options), stop_after=4)
    assert last["step"] == 4 and json.loads((tmp_path / "parts" / "state.json").read_text())["step"] == 4
    torch.manual_seed(99)  # another process, another random state
    resumed = Toy()
    nn.init.zeros_(resumed.inner.weight)
    last = run(resumed, tmp_path / "parts", config(**options))
    assert last["step"] == 8
    assert same(whole.state_dict(), resumed.state_dict())
    assert same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))  # optimizers and random state too
    rows = [metrics_of(tmp_path / out) for out in ("whole", "parts")]
    assert [r["step"] for r in rows[1]] == list(range(1, 9))
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]


def test_a_run_that_is_stopped_between_two_lines_of_metrics_notes_its_last_steps(tmp_path):
    last = run(Toy(), tmp_path, config(log_every=5, budget_s=1e-9, steps=1)) or {}
    assert last == {} and metrics_of(tmp_path) == []
    model = Toy()
    steps = iter(range(9))

    def stop_at_three(number: int) -> tuple[torch.Tensor, dict[str, float]]:
        if next(steps) == 2:
            signal.raise_signal(signal.SIGTERM)
        return model(number), {}

    train(model, stop_at_three, config(log_every=5), tmp_path / "run", save_model=lambda folder: None)
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [3]


@pytest.mark.parametrize("memory_layers", [(), (1, 3)])
def test_resumed_doc_to_lora_equals_uninterrupted(memory_layers, base, tmp_path):
    """The whole chain on the tiny base: data, encoder, hypernetwork, injection, optimizer."""
    recipe = DocRecipe(
        hypernetwork={**DOC_TO_LORA, "d_values": 48} if memory_layers else DOC_TO_LORA,
        memory_layers=memory_layers,
        calibration_questions=40,
        data=DataConfig(needle_share=0.0, questions_per_step=4, max_facts=2, max_chunk_tokens=128),
        training=TrainConfig(steps=4, log_every=1, warmup_steps=2, bf16=False),
    )  # fmt: skip

    def stop(metrics: dict[str, float]) -> None:
        if metrics["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    train_doc(base, recipe, tmp_path / "whole")
    train_doc(base, recipe, tmp_path / "parts", on_metrics=stop)
    torch.manual_seed(7)
    train_doc(base, recipe, tmp_path / "parts")
    assert same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    one, other = (DocToLoRA.from_pretrained(tmp_path / out).state_dict() for out in ("whole", "parts"))
    assert same(one, other)
    assert [r["loss"] for r in metrics_of(tmp_path / "whole")] == [r["loss"] for r in metrics_of(tmp_path / "parts")]
    assert one["heads.down_proj.scaler_b"].abs().max() > 0  # it has learned something
    if memory_layers:
        assert one["memory.scale"].abs().max() > 0
        assert metrics_of(tmp_path / "whole")[0]["owner_accuracy"] >= 0  # there were token labels
    with pytest.raises(TrainingError, match=r"other settings \(objective.kl_to_base_weight\)"):
        train_doc(base, dataclasses.replace(recipe, kl_to_base_weight=0.5), tmp_path / "parts")


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("training.schedule=linear", "schedule is 'linear'"),
        ("training.steps=ten", "steps is 'ten'"),
        ("training.bf16=False", "bf16 is 'False'"),
        ("data.max_facts=2.5", "max_facts is 2.5"),
        ("objective.l1_weight=true", "l1_weight is True"),
        ("hypernetwork.kinds=down_proj", "kinds is 'down_proj'"),
    ],
)
def test_a_recipe_refuses_values_of_another_type(override, fault):
    with pytest.raises(ConfigError, match=f"bad recipe: .*{fault}"):
        read_recipe(DocRecipe(), None, [override])


def test_options_of_a_hypernetwork_refuse_values_of_another_type(base):
    for given in ({"rank": "x"}, {"reader_layers": (1,), "n_heads": 2.0}):
        with pytest.raises(ConfigError, match=r"bad recipe: (rank is 'x'|n_heads is 2\.0)"):
            doc_config(base.model.config, base.tokenizer, DocRecipe(hypernetwork=given))


def test_a_trained_encoder_lora_comes_back_with_the_hypernetwork(base, tmp_path):
    recipe = DocRecipe(
        hypernetwork=DOC_TO_LORA,
        encoder_kinds=("q_proj",),
        data=DataConfig(questions_per_step=4, max_facts=2, max_chunk_tokens=128),
        training=TrainConfig(steps=4, log_every=1, warmup_steps=1, lr=1e-2, bf16=False),
    )
    train_doc(base, recipe, tmp_path / "run")
    hypernet = DocToLoRA.from_pretrained(tmp_path / "run")
    depth = max(hypernet.config.reader_layers)
    assert [layer for _, layer, *_ in hypernet.config.encoder_modules] == list(range(depth))
    assert hypernet.encoder_lora["q_proj"].b.abs().max() > 0
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    read = hypernet.hidden_states_encoder(base)(ids).states
    assert not torch.equal(read, HiddenStatesEncoder(base.model, hypernet.config.reader_layers)(ids).states)


def test_a_memory_is_added_to_a_checkpoint_that_has_none(base, tmp_path):
    """And changes nothing before it is trained."""
    data = DataConfig(questions_per_step=4, max_facts=4, max_chunk_tokens=128)
    settings = TrainConfig(steps=1, warmup_steps=1, lr=1e-12, bf16=False)
    first = DocRecipe(
        hypernetwork={**DOC_TO_LORA, "d_values": 48}, data=data, training=dataclasses.replace(settings, lr=1e-2)
    )
    train_doc(base, first, tmp_path / "first")
    second = DocRecipe(memory_layers=(3,), calibration_questions=40, data=data, training=settings)
    train_doc(base, second, tmp_path / "grown", init_from=tmp_path / "first")
    old, grown = (DocToLoRA.from_pretrained(tmp_path / name) for name in ("first", "grown"))
    assert old.config.memory_modules == () and [m[0] for m in grown.config.memory_modules] == [
        "model.layers.3.self_attn.o_proj"
    ]
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        before = old.cast_and_write(old.hidden_states_encoder(base)(ids))[0]
        after = grown.cast_and_write(grown.hidden_states_encoder(base)(ids))[0]
    for side, other in zip(before["down_proj"], after["down_proj"], strict=True):
        torch.testing.assert_close(side, other)
    assert after["o_proj"][0].any() and after["o_proj"][1].abs().max() < 1e-6
    assert grown.memory.key_std.std() > 0 and grown.memory.end_mean.any()  # its units were measured
    with pytest.raises(ConfigError, match="give these and more"):
        train_doc(base, second, tmp_path / "again", init_from=tmp_path / "grown")


def train_and_grow(base, folder, layers, options, static_kinds=(), **second):
    """Train a memory in these layers and go on with another recipe: both hypernetworks, and that recipe."""
    data = DataConfig(questions_per_step=4, max_facts=4, max_chunk_tokens=128)
    settings = TrainConfig(steps=3, warmup_steps=1, lr=1e-2, bf16=False)
    first = DocRecipe(
        hypernetwork={**DOC_TO_LORA, "d_values": 48, **options},
        memory_layers=layers,
        static_kinds=static_kinds,
        calibration_questions=40,
        data=data,
        training=settings,
    )
    train_doc(base, first, folder / "first")
    settings = dataclasses.replace(settings, steps=1, lr=1e-12)
    recipe = DocRecipe(calibration_questions=40, data=data, training=settings, **second)
    train_doc(base, recipe, folder / "grown", init_from=folder / "first")
    old, grown = (DocToLoRA.from_pretrained(folder / name) for name in ("first", "grown"))
    return old, grown, recipe


def test_a_memory_can_grow_by_further_layers(base, tmp_path):
    """What it wrote before it writes still; the new layers know their units and say nothing yet."""
    old, grown, _ = train_and_grow(base, tmp_path, (3,), {"memory_near_tokens": 2}, memory_layers=(1, 3))
    assert [layer for _, layer, *_ in grown.config.memory_modules] == [1, 3]
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        before, after = (h.cast_and_write(h.hidden_states_encoder(base)(ids))[0] for h in (old, grown))
    for side, other in zip(before["o_proj"], after["o_proj"], strict=True):
        torch.testing.assert_close(side[:, 0], other[:, 1])
    assert before["o_proj"][1].any() and after["o_proj"][1][:, 0].abs().max() < 1e-6
    assert after["o_proj"][0][:, 0].any() and (grown.memory.key_std[0] != 1).all()
    # The tokens near a value are read as a sentence's end is, half as strongly.
    torch.testing.assert_close(grown.memory.near_to_question[0], grown.memory.to_question[0])
    assert grown.memory.strength_bias[0].tolist() == pytest.approx([0, 0, 0, 0, -0.025, 0], abs=1e-6)


def expected_alone(name, static, loras):
    """The static delta and, of down_proj, 1.8 times the mean that the LoRAs of chunks add to it, cut to their rank."""
    delta = static.delta(name)
    if "down_proj" not in name:
        return delta
    mean = sum(lora.delta(name) for lora in loras) / len(loras) - delta
    u, s, vh = np.linalg.svd(1.8 * mean.numpy())
    r = DOC_TO_LORA["rank"]
    return delta + torch.from_numpy(u[:, :r] * s[:r] @ vh[:r])


def test_a_memory_can_remain_alone(base, tmp_path):
    """Without the Perceiver, the memory stays as it is, and the static LoRA gets the mean of what the Perceiver cast."""
    options = {"static_rank": 2, "static_modules_rank": 3}
    only = {"kinds": (), "given": frozenset({"kinds"})}
    old, alone, recipe = train_and_grow(base, tmp_path, (1, 3), options, ("q_proj",), **only)
    assert not hasattr(alone, "decoder") and alone.config.ranks == {**old.config.ranks, "down_proj": 0}
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        before, after = (h.cast_and_write(h.hidden_states_encoder(base)(ids))[0] for h in (old, alone))
        for side, other in zip(before["o_proj"], after["o_proj"], strict=True):
            torch.testing.assert_close(side, other)
        assert before["down_proj"][0].shape[2] and not after["down_proj"][0].shape[2]
        static, kept = (h.static.lora(h.config.target.rows).row(0) for h in (old, alone))
        assert {*static.names} == {*kept.names}
        chunks = sample_chunks(base, recipe, EpisodeSource(recipe.data, base.tokenizer, base.chat))
        features = [old.hidden_states_encoder(base)(torch.tensor([chunk])) for chunk in chunks]
        loras = [old.loras(old.cast(one).rows).row(0) for one in features]
        of_down = [name for name in static.names if "down_proj" in name]
        assert all((expected_alone(name, static, loras) - static.delta(name)).abs().max() > 1e-3 for name in of_down)
        for name in static.names:
            torch.testing.assert_close(kept.delta(name), expected_alone(name, static, loras), atol=1e-6, rtol=1e-3)
    with pytest.raises(ConfigError, match="`kinds` can only be"):
        train_doc(base, dataclasses.replace(recipe, kinds=("q_proj",)), tmp_path / "q", init_from=tmp_path / "first")


def test_a_fresh_memory_can_be_alone(base, tmp_path):
    settings = TrainConfig(steps=2, warmup_steps=1, lr=1e-2, bf16=False)
    recipe = DocRecipe(
        kinds=(), static_kinds=("q_proj",), memory_layers=(1, 3), hypernetwork={**DOC_TO_LORA, "d_values": 48},
        calibration_questions=40, data=DataConfig(questions_per_step=4, max_chunk_tokens=128), training=settings,
    )  # fmt: skip
    train_doc(base, recipe, tmp_path)
    assert DocToLoRA.from_pretrained(tmp_path).config.target.kinds == ("q_proj", "o_proj")
    with pytest.raises(ConfigError, match="no target modules"):
        train_doc(base, dataclasses.replace(recipe, memory_layers=(), static_kinds=()), tmp_path / "nothing")


def test_a_memory_can_grow_by_near_tokens(base, tmp_path):
    """Their map starts as that of the ends of sentences, at half of its strength; nothing else changes."""
    near = {"memory_near_tokens": 3}
    *both, recipe = train_and_grow(base, tmp_path, (1, 3), {}, hypernetwork=near)
    old, grown = (hypernet.memory for hypernet in both)
    assert old.n_near == 0 and grown.n_near == 3 and grown.n_keys == old.n_keys + 1
    torch.testing.assert_close(grown.near_to_question, old.to_question)
    torch.testing.assert_close(grown.near_mean, old.end_mean)
    x = torch.randn(5, old.strength.in_features, generator=torch.Generator().manual_seed(3))
    before, after = (
        0.5 + 10 * memory.strength_bias + memory.strength(x).view(5, 2, -1) for memory in (old, grown)
    )  # [tokens, modules, keys]
    torch.testing.assert_close(after[..., [*range(old.n_keys - 1), -1]], before)
    torch.testing.assert_close(after[..., -2], before[..., -2] / 2)
    with pytest.raises(ConfigError, match="memory_near_tokens, 1 or more, is for a checkpoint"):
        train_doc(base, recipe, tmp_path / "again", init_from=tmp_path / "grown")


def test_a_memory_can_grow_by_verdicts(base, tmp_path, monkeypatch):
    """They tell the sentences of the rules that they were fitted to from others; nothing else changes."""
    monkeypatch.setattr(verdicts, "N_DOCUMENTS", 12)
    monkeypatch.setattr("loracast.hypernets.associative_memory._FEWEST_POINTING", 0.5)  # nothing points anywhere yet
    old, grown, recipe = train_and_grow(base, tmp_path, (1, 3), {}, hypernetwork={"memory_verdicts": True})
    assert grown.memory.has_verdicts and not old.memory.has_verdicts
    for name, value in old.state_dict().items():
        torch.testing.assert_close(grown.state_dict()[name], value)
    first = torch.tensor([base.chat.answer(text)[0] for text in ("Yes", "No")])
    encoder = grown.hidden_states_encoder(base)
    yes, no = encoder.values(first)
    assert grown.memory.verdict_value @ yes > 0 > grown.memory.verdict_value @ no
    seen = list(verdicts._sentences(grown, base, encoder, recipe.data.max_chunk_tokens, recipe.data.seed))
    states, labels = (torch.cat(side) for side in zip(*seen, strict=True))
    assert 10 < labels.sum() < len(labels) / 2 and labels.any(0).all()
    said = grown.memory.verdict(states).sigmoid()
    assert ((said > 0.5) == labels.bool()).all(1).float().mean() > 0.9
    with pytest.raises(ConfigError, match="memory_verdicts is for a checkpoint whose memory has none"):
        train_doc(base, recipe, tmp_path / "again", init_from=tmp_path / "grown")
    with pytest.raises(ConfigError, match="memory_verdicts needs a trained memory"):
        train_doc(base, recipe, tmp_path / "fresh")


def test_verdicts_are_fitted_by_logistic_regression():
    """As scikit-learn's, with as much weight on sentences without a rule as on the others."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(600, 7, generator=generator)
    kinds = (states[:, :3] + torch.randn(600, 3, generator=generator)).argmax(1)  # yes, no
    labels = torch.nn.functional.one_hot(kinds, 3)[:, :2].float()
    weight, bias = verdicts.logistic_regressions(states, labels)
    is_rule = labels.any(1)
    shares = torch.where(is_rule, 1.0, is_rule.sum() / (~is_rule).sum())
    for i in range(2):
        theirs = linear_model.LogisticRegression(C=1 / 1000, tol=1e-8, max_iter=1000)
        theirs.fit(states.numpy(), labels[:, i].numpy(), sample_weight=shares.numpy())
        torch.testing.assert_close(weight[i], torch.tensor(theirs.coef_[0]).float(), atol=1e-4, rtol=1e-3)
        assert bias[i].item() == pytest.approx(theirs.intercept_[0], abs=1e-3)


def test_a_memory_can_keep_some_of_its_layers_and_write_more_tokens(base, tmp_path):
    """A layer that stays writes what it wrote, and then further tokens."""
    options = {"hypernetwork": {"memory_rank": 6}, "memory_layers": (3,)}
    old, kept, recipe = train_and_grow(base, tmp_path, (1, 3), {"memory_rank": 4}, **options)
    assert [layer for _, layer, *_ in kept.config.memory_modules] == [3]
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    with torch.no_grad():
        (before, few), (after, more) = (h.cast_and_write(h.hidden_states_encoder(base)(ids)) for h in (old, kept))
    rows = [i for i, token in enumerate(more.tokens[0]) if token in few.tokens[0]]
    assert after["o_proj"][0].shape[2] == 6 and len(rows) == 4
    # B [1, modules, rank, width]; A is of all rows' keys, which are decorrelated.
    torch.testing.assert_close(before["o_proj"][1][:, 1], after["o_proj"][1][:, 0, rows])
    torch.testing.assert_close(old.memory.key_std[1], kept.memory.key_std[0])
    with pytest.raises(ConfigError, match="or give these and more, or some of these"):
        train_doc(base, dataclasses.replace(recipe, memory_layers=(2,)), tmp_path / "x", init_from=tmp_path / "first")


def test_a_memory_can_get_another_gate_power(base, tmp_path):
    old, grown, _ = train_and_grow(base, tmp_path, (1, 3), {}, hypernetwork={"memory_gate_power": 0.5})
    assert (old.config.memory_gate_power, grown.config.memory_gate_power) == (1.0, 0.5) and old.id != grown.id
    torch.testing.assert_close(old.state_dict(), grown.state_dict())


def test_the_loss_falls_on_something_that_can_be_memorised(tmp_path):
    run(Toy(), tmp_path, config(steps=80))
    losses = [row["loss"] for row in metrics_of(tmp_path)]
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])


def test_an_update_is_adamws_own(tmp_path):
    """One step against torch's AdamW used by hand: clipping, warm-up, accumulation."""
    settings = config(steps=1, accumulate=2, clip_norm=0.01, weight_decay=0.1, warmup_steps=4)
    torch.manual_seed(5)
    model = Toy()
    run(model, tmp_path, settings)
    torch.manual_seed(5)
    hand = Toy()
    optimizer = torch.optim.AdamW(hand.parameters(), lr=settings.lr / 4, betas=settings.betas, weight_decay=0.1)
    for number in (0, 1):  # a batch's noise follows from its number
        torch.manual_seed(number)
        (hand(number) / 2).backward()
    torch.nn.utils.clip_grad_norm_(hand.parameters(), 0.01)
    optimizer.step()
    for name, value in hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_the_schedule():
    cosine = config(steps=100, warmup_steps=10)
    factors = [cosine.lr_factor(step) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert factors[10] == 1 and factors[55] == pytest.approx(0.55) and factors[99] == pytest.approx(0.1, abs=1e-2)
    assert sorted(factors[10:], reverse=True) == factors[10:]
    flat = config(steps=100, warmup_steps=0, schedule="constant")
    assert {flat.lr_factor(step) for step in range(200)} == {1.0}
    for bad in ({"steps": 0}, {"accumulate": 0}, {"log_every": 0}):
        with pytest.raises(ConfigError):
            config(**bad)


def test_other_settings_are_refused_by_name(tmp_path):
    run(Toy(), tmp_path, config(steps=2), settings={"data": {"seed": 0, "max_facts": 5}})
    before = state_of(tmp_path)
    with pytest.raises(TrainingError) as caught:
        run(Toy(), tmp_path, config(steps=2, lr=0.5), settings={"data": {"seed": 1, "max_facts": 5}})
    assert "training.lr" in str(caught.value) and "data.seed" in str(caught.value)
    assert "max_facts" not in str(caught.value)
    free = config(steps=2, budget_s=100.0, save_every_s=1.0, log_every=5)
    assert run(Toy(), tmp_path, free, settings={"data": {"seed": 0, "max_facts": 5}})["step"] == 2
    assert same(before, state_of(tmp_path))


def test_a_budget_ends_a_run_and_the_next_goes_on(tmp_path, monkeypatch):
    clock = SimpleNamespace(now_s=50.0, monotonic=lambda: clock.now_s)
    monkeypatch.setattr("loracast.lab.training.loop.time", clock)
    model = Toy()

    def slow(step: int):
        clock.now_s += 2.0
        return model(step), {}

    for done in (6, 12):  # the step that crosses the budget is finished
        last = train(model, slow, config(steps=1000, budget_s=10.0), tmp_path, save_model=lambda folder: None)
        assert last["step"] == done
        clock.now_s += 99  # between two runs no time is counted
    assert [row["elapsed_s"] for row in metrics_of(tmp_path)] == [2.0 * n for n in range(1, 13)]


def test_sigterm_stops_after_the_step_and_is_handed_back(tmp_path):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    model = Toy()

    def objective(step: int):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return model(step), {}

    last = train(model, objective, config(steps=50), tmp_path, save_model=lambda folder: None)
    assert last["step"] == 3 and json.loads((tmp_path / "state.json").read_text())["step"] == 3
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_it_trains_in_a_thread_too(tmp_path):
    found: list[dict[str, float]] = []
    thread = threading.Thread(target=lambda: found.append(run(Toy(), tmp_path, config(steps=2))))
    thread.start()
    thread.join()
    assert found[0]["step"] == 2


@pytest.mark.parametrize("sick", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_run_and_leaves_the_last_good_state(sick, tmp_path):
    model = Toy()

    def objective(step: int):
        loss = model(step)
        if step == 5:
            zero = (model.latents * 0).sum()
            loss = loss * float("nan") if sick == "loss" else loss + zero.sqrt()  # a finite loss, an infinite slope
        return loss, {}

    with pytest.raises(TrainingError, match=f"the {sick} of step 5 .*--init-from"):
        train(model, objective, config(save_every_s=0.0), tmp_path, save_model=lambda folder: None)
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 5
    assert all(value.isfinite().all() for name, value in state_of(tmp_path).items() if name.startswith("model."))
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_metrics_are_json_lines_each_step_once_however_often_it_is_killed(tmp_path):
    def until(n: int):
        def on_metrics(metrics: dict[str, float]) -> None:
            if metrics["step"] == n:
                raise Killed

        return on_metrics

    model = Toy()
    objective = lambda number: (model(number), {"exact": 0.5})  # noqa: E731
    every_step = config(steps=6, save_every_s=0.0)
    for n in (1, 3, 5):  # before the first checkpoint, and twice after one
        with pytest.raises(Killed):
            train(model, objective, every_step, tmp_path, save_model=lambda folder: None, on_metrics=until(n))
        with open(tmp_path / "metrics.jsonl", "a") as log:
            log.write('{"step": 4, "lo')  # killed in the middle of a line
    train(model, objective, every_step, tmp_path, save_model=lambda folder: None)
    rows = metrics_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(set(row) == {"step", "elapsed_s", "loss", "exact", "grad_norm"} for row in rows)


def test_metrics_are_means_over_the_steps_between_two_lines(tmp_path):
    model = Toy()
    steps = config(steps=7, log_every=3)
    train(model, lambda number: (model(number), {"x": float(number)}), steps, tmp_path, save_model=lambda folder: None)
    assert [(row["step"], row["x"]) for row in metrics_of(tmp_path)] == [(3, 1.0), (6, 4.0), (7, 6.0)]


# ---- killed while saving

TOUCHES = [
    (safetensors.torch, "save_file"), (checkpoint.os, "replace"), (checkpoint.os, "fsync"),
    (checkpoint, "write_atomically"), (checkpoint.shutil, "rmtree"),
]  # fmt: skip


def trained(step: int) -> tuple[Toy, torch.optim.Optimizer]:
    """A model whose weights tell after how many steps they were saved."""
    model = Toy()
    optimizer = make_optimizer(model, config())
    for _ in range(2):
        model(step).backward()
        optimizer.step()
    nn.init.constant_(model.inner.bias, step)
    return model, optimizer


def test_a_kill_at_any_touch_of_the_disk_leaves_a_usable_state(tmp_path, monkeypatch):
    n_touches, outcomes = 0, []
    for kill_at in range(1, 30):
        out = tmp_path / str(kill_at)
        out.mkdir()
        checkpoint.save_state(out, *trained(4), 4, 1.0, {"s": 1})
        n_touches = 0
        with monkeypatch.context() as patch:
            for owner, name in TOUCHES:

                def touch(*args, real=getattr(owner, name), kill_at=kill_at, **kwargs):
                    nonlocal n_touches
                    n_touches += 1
                    if n_touches == kill_at:
                        if real is safetensors.torch.save_file:
                            args[1].write_bytes(b"half of a file")
                        raise Killed
                    return real(*args, **kwargs)

                patch.setattr(owner, name, touch)
            try:
                checkpoint.save_state(out, *trained(5), 5, 2.0, {"s": 1})
            except Killed:
                was_killed = True
            else:
                was_killed = False
        model = Toy()
        step, elapsed_s = checkpoint.load_state(out, model, make_optimizer(model, config()), {"s": 1})
        assert step in (4, 5) and elapsed_s == step - 3.0
        assert model.inner.bias.tolist() == [step] * 6
        outcomes.append(step)
        checkpoint.save_state(out, *trained(6), 6, 3.0, {"s": 1})  # and the next save goes through
        assert [path.name for path in out.glob("state-*")] == ["state-6"]
        if not was_killed:
            break
    assert kill_at > 5 and outcomes[0] == 4 and outcomes[-1] == 5


def save_for_ever(out: Path, began) -> None:
    torch.set_num_threads(1)
    for step in range(1, 10**6):
        model, optimizer = trained(0)
        nn.init.constant_(model.inner.bias, step)
        checkpoint.save_state(out, model, optimizer, step, 0.0, {})
        began.set()


def test_sigkill_in_a_loop_leaves_a_usable_state(tmp_path):
    context, steps = multiprocessing.get_context("fork"), []
    checkpoint.save_state(tmp_path, *trained(1), 1, 0.0, {})
    for i in range(6):
        began = context.Event()
        process = context.Process(target=save_for_ever, args=(tmp_path, began))
        process.start()
        assert began.wait(30)
        time.sleep(0.03 + 0.013 * i)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        model = Toy()
        step, _ = checkpoint.load_state(tmp_path, model, make_optimizer(model, config()), {})
        assert step >= 1 and model.inner.bias.tolist() == [step] * 6
        steps.append(step)
    assert max(steps) > 1  # they were killed while they saved


@pytest.mark.parametrize("damage", ["json", "tensors", "folder"])
def test_a_damaged_state_is_refused_and_not_taken_for_a_fresh_start(damage, tmp_path):
    run(Toy(), tmp_path, config(steps=2))
    if damage == "json":
        (tmp_path / "state.json").write_text("{")
    elif damage == "tensors":
        path = tmp_path / "state-2" / "state.safetensors"
        path.write_bytes(path.read_bytes()[:-5])
    else:
        shutil.rmtree(tmp_path / "state-2")
    with pytest.raises(TrainingError, match="cannot be read"):
        run(Toy(), tmp_path, config(steps=2))


def test_a_curve_that_cannot_be_drawn_is_said_before_the_training(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("loracast.lab.training.loop.find_spec", lambda name: None)
    refused = CliRunner().invoke(app, ["train", "doc", "--base", str(tiny_folder), "--out", str(tmp_path / "run")])
    assert refused.exit_code == 1 and not (tmp_path / "run").exists()
    assert "loracast[train]" in refused.output
