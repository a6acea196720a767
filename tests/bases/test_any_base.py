"""Train for any base: `make bases` trains, learns, asks and exports for each type, and writes a table into docs/any-base.md.

A suite of its own: nine trainings take minutes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import loracast
from loracast.cli import app
from tiny import make_model, make_tokenizer

TYPES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "smollm3", "olmo2")
PAGE = Path(__file__).parents[2] / "docs" / "any-base.md"
MARK = "<!-- the rest is written by `make bases` -->\n"
ROWS: dict[str, str] = {}
STEPS = 30


@pytest.fixture(scope="module", autouse=True)
def table():
    """Write the rows of all types into the page, where all of them ran."""
    yield
    if ROWS.keys() == set(TYPES):
        head = "| type | layers that receive a LoRA | loss, first and last ten of 30 steps | difference of the logits from PEFT's, beside what the LoRA changes |\n"
        text = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
        rows = "".join(ROWS[name] for name in TYPES)
        PAGE.write_text(f"{text}{MARK}\n{head}|---|---|---|---|\n{rows}", encoding="utf-8")


@pytest.mark.parametrize("model_type", TYPES)
def test_a_base_of_each_type(model_type, tmp_path, monkeypatch):
    """No option says anything of the architecture: train, learn, ask, export, and PEFT's own forward."""
    monkeypatch.setenv("LORACAST_HOME", str(tmp_path / "home"))
    folder = tmp_path / "base"
    make_model(model_type).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    smaller = [f"training.steps={STEPS}", "training.warmup_steps=3", "training.lr=3e-3", "data.questions_per_step=8"]
    changes = [part for change in smaller for part in ("--set", change)]
    run("train", "doc", "--base", folder, "--out", tmp_path / "run", "--device", "cpu", *changes)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = metrics[0]["loss"], metrics[-1]["loss"]
    assert len(metrics) == 3 and last < first
    (tmp_path / "note.txt").write_text("The museum opens at nine on Tuesday mornings. It closes at five.")
    here = ("--base", folder, "--hypernetwork", tmp_path / "run", "--device", "cpu")
    run("learn", tmp_path / "note.txt", "--name", "note", *here)
    assert run("ask", "When does the museum open?", "-a", "note", "--always", "--max-tokens", "4")
    run("export", "note", "--to", "peft", "--out", tmp_path / "peft", "--base", folder)
    model = loracast.load(folder, tmp_path / "run", device="cpu", dtype="float32")
    ids = torch.tensor([model.base.chat.prompt("When does the museum open?")])
    adapter = model.adapter("note")
    with adapter.lora(dense=False).applied(model.base.model):
        ours = model.base.model(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = theirs(ids).logits
    merged = PeftModel.from_pretrained(theirs, next((tmp_path / "peft").rglob("adapter_config.json")).parent)
    error = ((merged(ids).logits - ours).norm() / (ours - plain).norm()).item()
    assert error < 1e-3, error
    layers = sorted({layer for _, layer, *_ in adapter.manifest.modules})
    ROWS[model_type] = f"| {model_type} | {layers[0]} to {layers[-1]} of 4 | {first:.2f}, {last:.2f} | {error:.0e} |\n"
