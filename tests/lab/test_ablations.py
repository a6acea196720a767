"""Variants of a recipe, trained for the same time and compared."""

from __future__ import annotations

import dataclasses
import json

import pytest

from loracast.errors import ConfigError
from loracast.lab.evaluation.ablations import AblationConfig, read_variants, run_ablations
from questions import write_documents

RECIPE = """
[hypernetwork]
reader_layers = [2]
width = 16
n_heads = 2
n_kv_heads = 2
head_dim = 8
rank = 2

[data]
question_share = 0.5
questions_per_step = 6
max_chunk_tokens = 128
max_facts = 2
max_chunks = 4
document_sources = ["tales"]

[training]
steps = 2
log_every = 1
warmup_steps = 1
bf16 = false
"""


@pytest.fixture
def config(tmp_path) -> AblationConfig:
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    documents = write_documents(tmp_path / "qa.jsonl")
    return AblationConfig(
        recipe=str(tmp_path / "recipe.toml"),
        variants={"as it is": (), "Rank 4, deeper": ("hypernetwork.rank=4", "hypernetwork.n_decoder_blocks=4")},
        overrides=(f'data.documents=["{documents}"]',),
        held_out_sources=("letters",),
        kinds=("facts", "questions"),
        steps=1,
        seeds=(0,),
    )


def test_a_budget_without_a_step_is_too_short(base, config, tmp_path):
    short = dataclasses.replace(config, overrides=(*config.overrides, "training.budget_s=1e-9"))
    with pytest.raises(ConfigError, match="the budget ended before the first step"):
        run_ablations(base, short, tmp_path / "out")


def test_each_variant_is_trained_and_measured_and_never_twice(base, config, tmp_path):
    out = tmp_path / "out"
    report = run_ablations(base, config, out)
    plain, deeper = report.rows
    assert [row["label"] for row in report.rows] == ["as it is", "Rank 4, deeper"]
    assert plain["steps"] == deeper["steps"] == 2
    assert deeper["chunk_kb"] == 2 * plain["chunk_kb"] and deeper["parameters_m"] > plain["parameters_m"]
    # rank 2 in two bytes for each number that enters or leaves a down_proj
    c = base.model.config
    n_layers = c.num_hidden_layers - 1  # from a fifth of the depth on
    assert plain["chunk_kb"] == 2 * 2 * n_layers * (c.intermediate_size + c.hidden_size) / 1000
    assert 0 <= plain["questions_exact"] <= plain["questions_accuracy"] <= 1
    assert not list(out.glob("*/seed-0/run")) and (out / "rank-4-deeper/seed-0/metrics.jsonl").is_file()

    kept = out / "as-it-is/seed-0/results.json"
    changed = json.loads(kept.read_bytes()) | {"facts_accuracy": 1.0}
    kept.write_text(json.dumps(changed), encoding="utf-8")
    (out / "rank-4-deeper/seed-0/results.json").unlink()  # as if it had been stopped half-way
    later = AblationConfig(**{**vars(config), "seeds": (0, 1)})
    again = run_ablations(base, later, out).rows
    assert again[0]["facts_accuracy_by_seed"][0] == 1.0 and again[0]["seeds"] == 2
    with pytest.raises(ConfigError, match=r"rank-4-deeper.*another recipe"):
        run_ablations(base, AblationConfig(**{**vars(config), "variants": {"Rank 4, deeper": ()}}), out)
    assert again[1]["questions_accuracy_by_seed"][0] == deeper["questions_accuracy"]  # the same seed, the same run


def test_what_is_wrong_is_told_before_anything_is_trained(base, config, tmp_path):
    wrong = AblationConfig(**{**vars(config), "variants": {"as it is": (), "typo": ("hypernetwork.rnk=4",)}})
    with pytest.raises(ConfigError, match=r"hypernetwork\.rnk"):
        run_ablations(base, wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="--held-out"):
        AblationConfig(recipe="r.toml", variants={"as it is": ()})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variants = 3", "one table"),
        ('[variants]\na = "hypernetwork.rank=16"', "valid list"),
        ('[variants]\n"rank 16" = []\n"Rank-16" = []', "share a folder"),
        ("[variants", "cannot read"),
    ],
)
def test_a_bad_file_of_variants_is_reported(tmp_path, text, message):
    (tmp_path / "v.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_variants(tmp_path / "v.toml")


def test_the_variants_of_the_repository_can_be_read():
    from pathlib import Path

    recipes = Path(__file__).parents[2] / "recipes"
    variants = read_variants(recipes / "doc-ablation-variants.toml")
    config = AblationConfig(str(recipes / "doc-ablation.toml"), variants, ('data.documents=["x"]',), ("y",))
    ranks = [config.recipe_of(name, 0).hypernetwork.get("rank") for name in variants]
    assert ranks[:3] == [None, 16, 32]
    assert list(read_variants(recipes / "doc-ablation-variants.toml", ["rank 32", "as it ships"])) == [
        "rank 32",
        "as it ships",
    ]
    with pytest.raises(ConfigError, match="no variants called rank 33"):
        read_variants(recipes / "doc-ablation-variants.toml", ["rank 33"])
