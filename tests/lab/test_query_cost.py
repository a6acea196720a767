"""The cost of queries: the formula against torch's own counter, the cache against the tensors, and the table's arithmetic."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from typer.testing import CliRunner

from loracast.base.generate import Sampling
from loracast.cli import app
from loracast.lab.evaluation.cost import QueryFlops, counted, lora_flops
from loracast.lora.algebra import LoRA
from loracast.lora.factors import Factors
from suites import write_rows
from tiny import PROSE, answer, make_model


@pytest.fixture
def eager(base, monkeypatch):
    """The tiny base with its attention spelled out: torch's counter does not know the fused one of CPUs."""
    monkeypatch.setattr(base.model.config, "_attn_implementation", "eager")
    return base


def some_lora() -> LoRA:
    module = "model.layers.1.self_attn.q_proj"
    other = "model.layers.2.self_attn.v_proj"
    return LoRA({module: Factors(torch.randn(3, 48), torch.randn(64, 3))}, {other: torch.randn(32, 48)})


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize(("n_prompt", "n_new"), [(9, 1), (30, 1), (9, 6)])
def test_the_formula_is_what_torch_counts(n_prompt, n_new, with_lora, eager):
    lora = some_lora() if with_lora else None
    prompt = list(range(10, 10 + n_prompt))
    sampling = Sampling(max_new_tokens=n_new, min_new_tokens=n_new)
    found = counted(lambda: answer(eager, prompt, lora, sampling))
    expected = QueryFlops.of(eager.model.config).query(n_prompt, n_new, lora)
    rotary = 2 * 8 * (n_prompt + n_new - 1)  # positions times frequencies, once: not in the formula
    assert 0 <= found - expected <= 4 * rotary


@pytest.mark.parametrize("n_kept", [1, 30, 49])
def test_a_kept_beginning_costs_nothing_again(n_kept, eager):
    """Against torch's count of a pass over the rest of the prompt, and of three steps behind it."""
    lora, ids = some_lora(), torch.arange(10, 63)[None]
    ends = [0, n_kept, 50, 51, 52, 53]
    with torch.no_grad(), lora.applied(eager.model):
        cache, costs = None, []

        def read(begin: int, end: int) -> None:
            nonlocal cache
            given = {"input_ids": ids[:, begin:end], "past_key_values": cache, "use_cache": True}
            cache = eager.model(**given, logits_to_keep=1).past_key_values

        for begin, end in itertools.pairwise(ends):
            costs.append(counted(lambda begin=begin, end=end: read(begin, end)))
    expected = QueryFlops.of(eager.model.config).query(50, 4, lora, n_kept)
    assert 0 <= sum(costs[1:]) - expected <= 4 * 2 * 8 * (53 - n_kept)  # rotary, as above


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "phi3"])
def test_one_forward_of_other_bases_too(model_type):
    model = make_model(model_type)
    model.config._attn_implementation = "eager"
    ids = torch.randint(3, 600, (1, 20))
    with torch.no_grad():
        found = counted(lambda: model(input_ids=ids, logits_to_keep=1))
    expected = QueryFlops.of(model.config).forward(20)
    assert found == pytest.approx(expected, rel=2e-3)


def test_a_lora_costs_what_its_matmuls_cost():
    lora, x = some_lora(), torch.randn(7, 48)
    (factors,) = lora.factors.values()
    (delta,) = lora.dense.values()
    assert counted(lambda: (x @ factors.a.T @ factors.b.T, x @ delta.T)) == 7 * lora_flops(lora)


def test_the_cache_is_as_large_as_its_tensors(base):
    with torch.no_grad():
        cache = base.model(input_ids=torch.arange(10, 33)[None], use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert QueryFlops.of(base.model.config).cache_bytes(23, 4) == held


def test_an_answer_can_be_made_as_long_as_another(base):
    prompt = base.chat.prompt("The lamp", "")
    for n in (1, 7):
        assert answer(base, prompt, None, Sampling(max_new_tokens=n, min_new_tokens=n)).n_tokens == n


def test_the_command(suite, hypernetwork, tiny_folder, tmp_path, home):
    write_rows(tmp_path / "prose.jsonl", [{"text": PROSE}])
    arguments = [
        "eval", "cost", "--tasks", suite, "--hypernetwork", hypernetwork, "--base", tiny_folder, "--out", tmp_path / "out",
        "--device", "cpu", "--queries", "2", "--texts", tmp_path / "prose.jsonl", "--document-tokens", "60", "--json",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    systems = ["none", "described", "shots3", "described_shots3", "adapter", "document"]
    assert [row["baseline"] for row in report["rows"]] == systems * 4  # three tasks and their mean
    first = dict(zip(systems, report["rows"], strict=False))
    assert first["adapter"]["prompt_tokens"] == first["none"]["prompt_tokens"] < first["described"]["prompt_tokens"]
    assert first["document"]["prompt_tokens"] - first["none"]["prompt_tokens"] == pytest.approx(60, abs=3)
    assert first["adapter"]["flops_ratio"] == 1 and len({row["new_tokens"] for row in first.values()}) == 1
    assert first["adapter"]["gflops"] > first["none"]["gflops"]
    assert first["none"]["break_even"] is None is first["document"]["break_even"]
    assert first["described"]["kept_ratio"] < first["described"]["flops_ratio"]
    assert first["document"]["gflops_kept"] < 0.7 * first["document"]["gflops"]
    described = first["described"]
    saved = described["gflops"] - first["adapter"]["gflops"]
    assert described["break_even"] - 1 < described["make_gflops"] / saved <= described["break_even"]
    assert described["joules"] == pytest.approx(15 * described["total_s"])
    mean = report["rows"][18:]
    for system, row in zip(systems, mean, strict=True):
        of_tasks = [r["gflops"] for r in report["rows"][:18] if r["baseline"] == system]
        assert row["task"] == "(mean)" and row["gflops"] == pytest.approx(sum(of_tasks) / 3)
    assert dict(zip(systems, mean, strict=True))["described"]["break_even"] > 0
    too_long = [str(a) for a in arguments[:-1]] + ["--document-tokens", "100000"]
    assert "the document shall have 100000" in CliRunner().invoke(app, too_long).output
