"""Reconstruction: the losses against dense products, and a hypernetwork that gives back the LoRAs of a library."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from loracast.errors import ConfigError, TrainingError
from loracast.hypernets.text_to_lora import TextToLoRA
from loracast.lab.data.tasks import read_tasks
from loracast.lab.training.loop import TrainConfig, plot_metrics
from loracast.lab.training.loras import (
    OracleRecipe,
    PeftConfig,
    read_oracle,
    train_oracles,
)
from loracast.lab.training.task_source import TaskDataConfig
from loracast.lab.training.text import TextRecipe, relative_square_error, train_text
from loracast.lora.algebra import stack
from suites import WordCounts, answer_loss, write_suite
from tiny import dense, random_lora


def test_inner_products_and_errors_are_those_of_the_dense_deltas():
    ones, others = ([random_lora(rank, 10 * rank + i) for i in range(3)] for rank in (2, 3))
    batches = [stack(loras) for loras in (ones, others)]
    expected = torch.stack([dense(one) @ dense(other) for one, other in zip(ones, others, strict=True)])
    torch.testing.assert_close(batches[0].inner(batches[1]), expected, rtol=1e-4, atol=1e-4)
    expected = torch.stack(
        [(dense(a) - dense(b)).norm() ** 2 / dense(b).norm() ** 2 for a, b in zip(ones, others, strict=True)]
    )
    torch.testing.assert_close(relative_square_error(*batches), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def trained_oracles(base, tmp_path_factory):
    """The folder of a suite, and in it the folder `library` of oracles of its two tasks for training."""
    folder = tmp_path_factory.mktemp("oracles")
    recipe = OracleRecipe(
        PeftConfig(("q_proj", "v_proj", "down_proj"), rank=2),
        TaskDataConfig(tasks_per_step=1, examples_per_task=5),
        TrainConfig(steps=40, lr=5e-3, warmup_steps=4, bf16=False),
    )
    train_oracles(base, recipe, read_tasks(write_suite(folder)), folder / "library")
    return folder


def test_descriptions_give_back_the_oracles(base, word_encoder, trained_oracles, tmp_path):
    library, tasks = trained_oracles / "library", read_tasks(trained_oracles)
    text = TextRecipe(
        kinds=("q_proj", "v_proj", "down_proj"),
        hypernetwork={"rank": 2, "width": 16, "head_width": 16, "dropout": 0.0},
        data=TaskDataConfig(tasks_per_step=2),
        training=TrainConfig(steps=80, lr=2e-2, warmup_steps=10, log_every=10, bf16=False),
    )
    rows: list[dict[str, float]] = []
    train_text(base, text, tasks, tmp_path / "run", oracles=library, on_metrics=rows.append)
    assert rows[0]["relative_error"] > 0.6 and rows[-1]["relative_error"] < 0.2 and rows[-1]["tasks"] == 2
    hypernet = TextToLoRA.from_pretrained(tmp_path / "run")
    descriptions = [f"train words for {name}" for name in ("opposite", "shout")]
    made = answer_loss(base, hypernet, descriptions, ["opposite", "shout"], trained_oracles)
    swapped = answer_loss(base, hypernet, descriptions[::-1], ["opposite", "shout"], trained_oracles)
    assert made < 0.7 * swapped
    plot_metrics(tmp_path / "run" / "metrics.jsonl", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    with torch.no_grad():
        lora = hypernet(WordCounts()(descriptions)).row(0)
    own = read_oracle(library / "opposite", base.fingerprint)
    assert (dense(lora) - dense(own)).norm() < 0.2 * dense(own).norm()
    for change, message in (
        ({"kinds": ("q_proj",)}, "other modules"),
        ({"hypernetwork": {**text.hypernetwork, "rank": 1}}, "rank 2, the hypernetwork 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_text(base, dataclasses.replace(text, **change), tasks, tmp_path / "other", oracles=library)


def test_another_library_is_no_resume(base, word_encoder, tmp_path):
    tasks = read_tasks(write_suite(tmp_path))
    recipe = OracleRecipe(PeftConfig(rank=2), training=TrainConfig(steps=1, warmup_steps=1, bf16=False))
    text = TextRecipe(
        hypernetwork={"rank": 2, "width": 16, "head_width": 16},
        training=TrainConfig(steps=2, warmup_steps=1, bf16=False),
    )
    train_oracles(base, recipe, tasks[1:2], tmp_path / "library")
    train_text(base, text, tasks, tmp_path / "run", oracles=tmp_path / "library")
    other = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, seed=5))
    train_oracles(base, other, tasks[1:2], tmp_path / "again" / "library")
    with pytest.raises(TrainingError, match="oracles_sha256"):
        train_text(base, text, tasks, tmp_path / "run", oracles=tmp_path / "again" / "library")


def test_a_library_without_training_tasks_is_refused(base, word_encoder, tmp_path):
    tasks = read_tasks(write_suite(tmp_path))
    with pytest.raises(ConfigError, match="has no oracle of a training task"):
        train_text(base, TextRecipe(), tasks, tmp_path / "run", oracles=tmp_path / "nothing")
