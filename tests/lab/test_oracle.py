"""LoRAs trained with PEFT on tasks: the files, resuming, what they saw, and that the base is left as it was."""

from __future__ import annotations

import dataclasses
import json
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from loracast.cli import app
from loracast.errors import AdapterError, BaseModelError, ConfigError, TrainingError
from loracast.lab.data.tasks import read_tasks
from loracast.lab.training.loop import TrainConfig
from loracast.lab.training.loras import (
    MULTITASK,
    OracleRecipe,
    PeftConfig,
    oracles_in,
    read_multitask,
    read_oracle,
    train_multitask,
    train_oracles,
)
from loracast.lab.training.recipe import read_recipe
from loracast.lab.training.scoring import pack, score_answers
from loracast.lab.training.task_source import TaskDataConfig, TaskSource
from loracast.lab.training.text import TextRecipe
from loracast.lora.algebra import LoRA, LoRABatch, inject
from loracast.lora.peft_format import read_peft
from suites import write_suite
from tiny import make_model

RECIPE = OracleRecipe(
    PeftConfig(("q_proj", "v_proj", "down_proj"), rank=4),
    TaskDataConfig(tasks_per_step=1, examples_per_task=5),
    TrainConfig(steps=24, lr=1e-2, warmup_steps=3, log_every=6, bf16=False),
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return read_tasks(write_suite(tmp_path_factory.mktemp("suite")))


def loss_of(base, task, lora) -> float:
    source = TaskSource(TaskDataConfig(examples_per_task=5), [task], base.chat, heldout_too=True)
    batch = pack(source.episodes(source.draw(0)), base.pad_id)
    with torch.no_grad(), inject(base.model, lora):
        return score_answers(base.model, LoRABatch(1, {}, {}), batch).loss.item()


def test_an_oracle_learns_its_task_and_is_peft_s_own(base, tasks, tmp_path):
    """Held-out tasks too; what PEFT computes with the folder is what loracast computes with what it read of it."""
    from peft import PeftModel

    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    assert train_oracles(base, RECIPE, tasks, tmp_path) == [task.name for task in tasks]
    assert oracles_in(tmp_path) == tuple(task.name for task in tasks) and any(task.is_heldout for task in tasks)
    after = base.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert all(type(m) is nn.Linear for n, m in base.model.named_modules() if n.endswith("_proj"))
    for task in tasks:
        own = read_oracle(tmp_path / task.name, base.fingerprint)
        assert own.rank == 4 and loss_of(base, task, own) < 0.5 * loss_of(base, task, None)
        other = next(t for t in tasks if t is not task)
        assert loss_of(base, task, own) < 0.7 * loss_of(
            base, task, read_oracle(tmp_path / other.name, base.fingerprint)
        )
    ids = torch.randint(3, 600, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with inject(base.model, LoRA(read_peft(tmp_path / "opposite"))):
            ours = base.model(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(make_model(), str(tmp_path / "opposite"))(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
    assert not list((tmp_path / "opposite").glob("state*"))


def test_interrupted_oracles_go_on_to_the_same_weights(base, tasks, tmp_path):
    def stop(task: str, metrics: dict[str, float]) -> None:
        if task == tasks[0].name and metrics["step"] == 3:
            signal.raise_signal(signal.SIGTERM)

    recipe = dataclasses.replace(RECIPE, training=dataclasses.replace(RECIPE.training, steps=6, log_every=1))
    train_oracles(base, recipe, tasks[:2], tmp_path / "whole")
    assert train_oracles(base, recipe, tasks[:2], tmp_path / "parts", on_metrics=stop) == []
    assert not (tmp_path / "parts" / tasks[1].name).exists()  # asked to stop, it does not begin the next
    with pytest.raises(AdapterError, match="is finished"):
        read_oracle(tmp_path / "parts" / tasks[0].name, base.fingerprint)
    over, enough = (
        dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, budget_s=s)) for s in (0.0, 600.0)
    )
    assert train_oracles(base, over, tasks[:2], tmp_path / "parts") == []
    assert train_oracles(base, enough, tasks[:2], tmp_path / "parts") == [t.name for t in tasks[:2]]
    for task in tasks[:2]:
        one, other = (
            load_file(tmp_path / which / task.name / "adapter_model.safetensors") for which in ("whole", "parts")
        )
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    stamp = (tmp_path / "whole" / tasks[0].name / "adapter_model.safetensors").stat().st_mtime_ns
    train_oracles(base, recipe, tasks[:2], tmp_path / "whole")  # nothing to do
    assert (tmp_path / "whole" / tasks[0].name / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert train_oracles(base, over, tasks[:2], tmp_path / "whole") == [t.name for t in tasks[:2]]
    with pytest.raises(TrainingError, match=r"other settings \(lora\)"):
        train_oracles(base, dataclasses.replace(recipe, lora=PeftConfig(rank=3)), tasks[:1], tmp_path / "whole")


def test_the_multi_task_lora_sees_the_rows_of_text_to_lora_and_no_held_out_task(base, tasks, tmp_path, monkeypatch):
    seen: list[tuple] = []
    episodes_of = TaskSource.episodes

    def episodes(self, drawn):
        seen.append(([one.text for one in drawn], found := episodes_of(self, drawn)))
        return found

    monkeypatch.setattr(TaskSource, "episodes", episodes)
    recipe = dataclasses.replace(MULTITASK, lora=RECIPE.lora, training=dataclasses.replace(RECIPE.training, steps=3))
    assert recipe.data == TextRecipe().data and MULTITASK.training == TextRecipe().training
    assert train_multitask(base, recipe, tasks, tmp_path / "plain")
    assert train_multitask(base, recipe, tasks, tmp_path / "described", described=True)
    plain, described = seen[:3], seen[3:]
    text_to_lora = TaskSource(recipe.data, tasks, base.chat)
    for number, (descriptions, rows) in enumerate(plain):
        drawn = text_to_lora.draw(number)
        assert [one.text for one in drawn] == descriptions and episodes_of(text_to_lora, drawn) == rows
    about = json.loads((tmp_path / "described" / "loracast.json").read_text())
    assert about["settings"]["described"] and about["settings"]["tasks"] == [t.name for t in tasks if not t.is_heldout]
    for (descriptions, rows), (again, others) in zip(plain, described, strict=True):
        assert descriptions == again
        for text, bare, described in zip(descriptions, rows, others, strict=True):
            for question, with_text in zip(bare.questions, described.questions, strict=True):
                assert question.answer == with_text.answer
                expected = base.tokenizer.decode(question.prompt).replace("user\n", f"user\n{text}\n\n")
                assert base.tokenizer.decode(with_text.prompt) == expected
    assert read_multitask(tmp_path / "plain", base.fingerprint, False).names
    with pytest.raises(AdapterError, match=r"a multi-task LoRA without descriptions; give what .*--described"):
        read_multitask(tmp_path / "plain", base.fingerprint, True)
    one = dataclasses.replace(RECIPE, training=recipe.training)
    train_oracles(base, one, tasks[:1], tmp_path / "library")
    with pytest.raises(AdapterError, match="the LoRA of a single task"):
        read_multitask(tmp_path / "library" / tasks[0].name, base.fingerprint, False)
    with pytest.raises(BaseModelError, match="made for the base"):
        read_oracle(tmp_path / "plain", dataclasses.replace(base.fingerprint, norms="another"))


@pytest.mark.parametrize(
    "changes", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 7, r"layers\.1\.mlp\..*": 3}}, {}]
)
def test_scales_are_read_as_peft_applies_them(changes, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    targets = ["q_proj", "down_proj"]
    wrapped = get_peft_model(make_model(), LoraConfig(r=4, lora_alpha=10, target_modules=targets, **changes))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(str(tmp_path))
    lora = LoRA(read_peft(tmp_path))
    for name, module in wrapped.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            torch.testing.assert_close(lora.delta(name), module.get_delta_weight("default"), atol=1e-6, rtol=1e-5)
    assert len(lora.names) == 8


def test_what_is_not_a_plain_lora_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(
        AdapterError, match=r"adapter_config\.json cannot be read.*adapter_model\.safetensors cannot be read"
    ):
        read_peft(tmp_path)
    get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)).save_pretrained(
        str(tmp_path / "dora")
    )
    with pytest.raises(AdapterError, match="use_dora"):
        read_peft(tmp_path / "dora")
    get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path / "half"))
    path = tmp_path / "half" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "layers.2" not in k or "lora_A" in k}, path)
    with pytest.raises(AdapterError, match=r"layers\.2.*lora_B is missing"):
        read_peft(tmp_path / "half")


def test_the_recipe():
    recipe = read_recipe(OracleRecipe(), None, ["lora.rank=3", "data.examples_per_task=7", "training.lr=0.5"])
    assert (recipe.lora.rank, recipe.data.examples_per_task, recipe.training.lr) == (3, 7, 0.5)
    assert recipe.training.steps == OracleRecipe().training.steps
    with pytest.raises(ConfigError, match=r"unknown key lora\.rnk"):
        read_recipe(OracleRecipe(), None, ["lora.rnk=3"])


def test_the_commands(tiny_folder, tmp_path, home):
    suite = write_suite(tmp_path)
    common = ["--tasks", suite, "--base", tiny_folder, "--device", "cpu", "--json", "--set", "training.steps=2"]

    def run(*arguments) -> dict:
        done = CliRunner().invoke(app, ["train", *(str(a) for a in (*arguments, *common))])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    names = sorted(task.name for task in read_tasks(suite))
    assert run("oracle", "--out", tmp_path / "library", "--only", names[0])["done"] == names[:1]
    assert run("oracle", "--out", tmp_path / "library")["done"] == names
    assert run("multitask", "--out", tmp_path / "all", "--described")["done"]
    refused = CliRunner().invoke(app, ["train", "oracle", "--out", "x", "--only", "nothing", *map(str, common)])
    assert refused.exit_code != 0 and "nothing" in refused.output
