"""The lm-evaluation-harness with an adapter on the base, on a local task file, against likelihoods of plain forward passes."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from loracast.answering.model import Model
from loracast.cast.load import load_caster
from loracast.cast.task import TaskCaster
from loracast.cli import app
from loracast.lab.evaluation.harness import HarnessConfig, evaluate_harness
from loracast.lora.algebra import inject
from suites import write_rows

WORDS = ("lamp", "bridge", "museum", "machine", "kettle", "code", "river", "line", "north", "desk", "litres", "water")
ROWS = [
    {"question": f"The {word} of the", "choices": [WORDS[i - 1], WORDS[i - 4], WORDS[i - 7]], "label": i % 3}
    for i, word in enumerate(WORDS)
]
TASK = """
task: desk
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: " "
metric_list: [{metric: acc}]
"""


@pytest.fixture
def task_folder(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    write_rows(folder / "rows.jsonl", ROWS)
    (folder / "desk.yaml").write_text(TASK.replace("ROWS", json.dumps(str(folder / "rows.jsonl"))))
    return folder


def accuracy(base, lora) -> float:
    """Each choice in a forward pass of its own."""
    hits = 0
    for row in ROWS:
        prompt = base.tokenizer(row["question"], add_special_tokens=False)["input_ids"]
        scores = []
        for choice in row["choices"]:
            ids = base.tokenizer(f"{row['question']} {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad(), inject(base.model, lora):
                logits = base.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logits[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))))
        hits += max(range(3), key=scores.__getitem__) == row["label"]
    return hits / len(ROWS)


def test_the_harness_sees_the_adapter(base, hypernetwork, tiny_folder, task_folder, home, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    only_own = partial(TaskManager, include_defaults=False)  # an index of its 14,000 files takes seconds
    monkeypatch.setattr("lm_eval.tasks.TaskManager", only_own)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # it runs `pip list` each time
    caster = TaskCaster(load_caster(hypernetwork, "task", base))
    caster.task("the lamp please", "lamp", strength=3.0, storage="bf16")
    config = HarnessConfig(("desk",), ("lamp",), str(task_folder), chat=False, batch_size=5)
    (row,) = evaluate_harness(Model(base, caster.library), config, tmp_path / "out").rows
    lora = Model(base, caster.library).lora_for("", ["lamp"], None)[0]
    assert (row["task"], row["metric"], row["n"]) == ("desk", "acc", 12)
    assert row["base"] == pytest.approx(accuracy(base, None))
    assert row["adapter"] == pytest.approx(accuracy(base, lora)) and row["base"] != row["adapter"]
    arguments = [
        "eval", "harness", "--tasks", "desk", "--include", task_folder, "--base", tiny_folder, "--device", "cpu", "--limit", "2",
        "--out", tmp_path / "out", "--json",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["rows"]
    assert row["n"] == 2 and "adapter" not in row
    unknown = CliRunner().invoke(app, ["no_such_task" if a == "desk" else str(a) for a in arguments])
    assert "knows no task no_such_task" in unknown.output
