"""`loracast plan` and `models`: sizes and steps from configs, against models that are built and steps that are run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from loracast.base.chat import ChatFormat
from loracast.base.footprint import footprint
from loracast.base.load import Base
from loracast.cast.catalogue import base_config, known_bases, known_hypernetworks, published_in_cache
from loracast.cli import app
from loracast.errors import ConfigError
from loracast.hypernets.doc_to_lora import DocToLoRA
from loracast.hypernets.published import PublishedDocToLoRA, PublishedDocToLoRAConfig, PublishedTextToLoRA
from loracast.hypernets.text_to_lora import TextToLoRA, TextToLoRAConfig
from loracast.lab.training.doc import DocRecipe, answer_questions, doc_config
from loracast.lab.training.document_source import EpisodeSource
from loracast.lab.training.plan import Counter, Machine, StepShape, gpus, shape_of, step_cost
from loracast.lab.training.recipe import read_recipe
from loracast.lab.training.scoring import Passes, pack
from loracast.lora.target import target_from_config
from tiny import make_model, make_tokenizer

RECIPES = Path(__file__).parents[2] / "recipes" / "gpu"
OF_TYPE = {"qwen3-0.6b.toml": "qwen3", "gemma-2-2b.toml": "gemma2"}
GEMMA, QWEN = "google/gemma-2-2b-it", {
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "tie_word_embeddings": True,
}  # fmt: skip
CPU = Machine("cpu", torch.float32, autocast=False)


@pytest.fixture
def only_config(tmp_path):
    """A folder with config.json and a tokenizer, and no weights."""

    def make(config) -> Path:
        folder = tmp_path / config.model_type
        config.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return folder

    return make


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(part) for part in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("passes", [Passes(), Passes(True, 2)])
def test_a_steps_peak_and_computation_are_those_of_a_real_one(passes):
    """Of a real batch with a memory: live tensors and operations of training's own step, forward and backward."""
    model, tokenizer = make_model(), make_tokenizer()
    recipe = read_recipe(
        DocRecipe(), None, ["data.questions_per_step=12", "hypernetwork.memory_layers=[0.5]", "hypernetwork.width=32"]
    )
    config = doc_config(model.config, tokenizer, recipe)
    source = EpisodeSource(recipe.data, tokenizer, ChatFormat(tokenizer))
    batch = pack(source.step(0), 0)
    result = step_cost(model.config, config, shape_of(batch), CPU, passes)
    hypernet = DocToLoRA(config)
    encoder = hypernet.hidden_states_encoder(Base("tiny", model, tokenizer))
    with Counter(model, hypernet) as real:
        scores, memory, _ = answer_questions(model, encoder, hypernet, batch, passes)
        (scores.loss + memory.loss).backward()
    assert result.peak == pytest.approx(real.peak, rel=0.15)
    assert result.flops == pytest.approx(real.flops, rel=0.1)


def test_weights_are_not_counted_with_the_step():
    layer = torch.nn.Linear(300, 200, bias=False)
    with Counter(layer) as counter:
        layer(torch.ones(1, 300)).sum().backward()
    assert layer.weight.numel() * 4 < counter.peak < 1.1 * layer.weight.numel() * 4  # the gradient alone


def test_checkpointing_trades_computation_for_memory():
    model, tokenizer = make_model(), make_tokenizer()
    config = doc_config(model.config, tokenizer, read_recipe(DocRecipe(), None))
    shape = StepShape((40, 30, 20), 1, ((400, 9), (350, 5), (120, 4)))
    plain, checkpointed = (step_cost(model.config, config, shape, CPU, Passes(c)) for c in (False, True))
    assert checkpointed.peak < plain.peak and checkpointed.flops > plain.flops


@pytest.mark.recipe
@pytest.mark.parametrize("recipe", OF_TYPE)
def test_the_recipes_for_one_gpu_fit_into_24_gb(recipe, only_config, monkeypatch):
    from transformers import AutoConfig

    monkeypatch.setattr("loracast.lab.training.plan._DRAWN", 1)
    config = base_config(GEMMA) if "gemma" in recipe else AutoConfig.for_model(**QWEN)
    result = json.loads(
        run("plan", "--base", only_config(config), "--recipe", RECIPES / recipe, "--gpu", "24GB", "--json")
    )
    assert result["fits"] is True and result["remedies"] == []
    assert result["memory"]["base"] == footprint(config, "bfloat16").weights
    assert result["total_bytes"] < 24e9 == result["available_bytes"]
    assert result["hours"].keys() == {"RTX 3090", "A10", "L4", "RTX 4090"}
    assert result["hours"]["L4"] == pytest.approx(result["steps"] * result["flops"] / (0.3 * 121e12) / 3600)
    assert "--texts FILE --documents FILE" in result["command"]


def test_what_does_not_fit_is_said_with_what_would(only_config):
    config = base_config(GEMMA)
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    config.vocab_size = 8_000_000  # embeddings of 37 GB
    said = run("plan", "--base", only_config(config), "--gpu", "24GB", "--set", "data.questions_per_step=20")
    assert "does NOT fit into 24.0 GB" in said and "data.questions_per_step=10 " in said


def test_this_machine_is_measured(only_config, monkeypatch):
    monkeypatch.setattr("loracast.lab.training.plan.MEASURE_S", 0.5)
    monkeypatch.setattr("loracast.lab.training.plan._DRAWN", 1)
    result = json.loads(run("plan", "--base", only_config(make_model("gemma2").config), "--device", "cpu", "--json"))
    (hours,) = result["hours"].values()
    assert result["fits"] is True and 0 < hours < 100
    assert result["memory"]["overhead"] == 250_000_000


def test_groups_have_the_tokens_of_their_padded_rows():
    shape = StepShape((10, 10, 2), 3, ((8, 3), (4, 1), (4, 1)))
    assert shape.evened(1) == StepShape((10, 10, 10), 3, ((8, 3), (8, 1), (8, 1)))
    assert shape.evened(2) == StepShape((8, 8, 8), 3, ((6, 3), (6, 1), (6, 1)))  # 22 and 16 tokens, rounded up


def test_gpus_are_found_by_name_and_memory():
    assert [gpu.memory_gb for gpu in gpus("rtx 4090")] == [24]
    assert all(gpu.memory_gb == 80 for gpu in gpus("80GB"))
    with pytest.raises(ConfigError, match="RTX 4090"):
        gpus("abacus")


@pytest.mark.parametrize("recipe", OF_TYPE)
def test_a_recipe_trains_a_small_base_of_its_type(recipe, tmp_path, only_config):
    """A handful of steps of the recipe itself, with its checkpointing and groups: the loss is finite and falls."""
    model = make_model(OF_TYPE[recipe])
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    facts = {
        "needle_share": 0,
        "question_share": 0,
        "reading_share": 0,
        "diluted_share": 0,
        "everyday_share": 0,
        "max_facts": 3,
    }
    smaller = [f"data.{key}={value}" for key, value in facts.items()]
    smaller += ["data.questions_per_step=6", "training.steps=8", "training.log_every=1", "training.warmup_steps=2"]
    smaller += ["training.accumulate=1"]
    smaller += ["training.lr=3e-3", "hypernetwork.calibration_questions=12", "hypernetwork.width=64"]
    changes = [part for change in smaller for part in ("--set", change)]
    run("train", "doc", RECIPES / recipe, "--base", folder, "--out", tmp_path / "run", "--device", "cpu", *changes)
    losses = [json.loads(line)["answer_loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 8 and all(torch.isfinite(torch.tensor(losses)))
    assert sum(losses[-3:]) < sum(losses[:3])


def test_known_models():
    """Sizes that the papers and the hub state (arXiv 2602.15902, 2506.06105)."""
    bases = {one.name: one for one in known_bases()}
    assert bases["google/gemma-2-2b-it"].n_parameters == 2_614_341_888
    assert bases["mistralai/Mistral-7B-Instruct-v0.2"].n_parameters == 7_241_732_096
    assert bases["meta-llama/Llama-3.1-8B-Instruct"].n_parameters == 8_030_261_248
    assert bases["Qwen/Qwen3-4B-Instruct-2507"].n_parameters == 4_022_468_096
    assert bases["smollm2-135m-instruct"].n_parameters == 134_515_008
    millions = {one.name.rpartition("/")[2]: [n / 1e6 for n in one.n_parameters] for one in known_hypernetworks()}
    for name, stated in {"gemma_demo": 315, "gemma_2b_d2l": 309.5, "qwen_4b_d2l": 415, "mistral_7b_d2l": 568}.items():
        assert millions[name] == pytest.approx([stated, stated], rel=0.005)
    assert millions["mistral_7b_t2l"] == pytest.approx(
        [8.4, 58.8], rel=0.01
    )  # 3.4 of them, factors that all tasks share, are this project's own


def test_published_hypernetworks_have_the_parameters_of_their_models():
    """The catalogue's numbers are those of the modules (arXiv 2602.15902, appendix on the architecture)."""

    for one in known_hypernetworks():
        if one.source != "published":
            continue
        config = base_config(one.base)
        with torch.device("meta"):
            if one.modality == "document":
                given = PublishedDocToLoRAConfig.for_target(
                    target_from_config(config), config.hidden_size,
                    reader_layers=tuple(range(config.num_hidden_layers)), rank=8, width=512, n_heads=16, n_kv_heads=4,
                    head_dim=128, n_latents=8, n_decoder_blocks=1, n_latent_mlps=1, static_rank=8,
                    n_encoder_blocks=9 if one.name.endswith("gemma_demo") else 8,
                )  # fmt: skip
                variants = [PublishedDocToLoRA(given)]
            else:
                rows = target_from_config(config, ("q_proj", "v_proj")).rows
                made = {"L": TextToLoRA, "M": TextToLoRA, "S": PublishedTextToLoRA}
                variants = [kind(TextToLoRAConfig(1024, rows, variant=name)) for name, kind in made.items()]
        counts = [sum(parameter.numel() for parameter in variant.parameters()) for variant in variants]
        assert one.n_parameters == (min(counts), max(counts)), one.name


def test_models_are_listed_with_what_is_in_the_caches(tmp_path, monkeypatch):
    """A hub cache as huggingface_hub lays it out: the checkpoint's blob is called by its sha256."""
    monkeypatch.setenv("LORACAST_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    place = "SakanaAI/doc-to-lora/gemma_demo"
    assert published_in_cache(place) == (0, False)
    repository = tmp_path / "hub" / "models--SakanaAI--doc-to-lora"
    snapshot = repository / "snapshots" / ("0" * 40) / "gemma_demo"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    digest = "ab" * 32
    (repository / "blobs" / digest).write_bytes(b"x" * 1000)
    (snapshot / "pytorch_model.bin").symlink_to(repository / "blobs" / digest)
    assert published_in_cache(place) == (1000, False)
    converted = tmp_path / "home" / "converted" / "0123"
    converted.mkdir(parents=True)
    (converted / "config.json").write_text(json.dumps({"provenance": {"converted_from": {"sha256": digest}}}))
    result = json.loads(run("models", "--json"))
    found = {one["name"]: one for one in result["hypernetworks"]}
    assert (found[place]["cached"], found[place]["converted"]) == (1000, True)
    assert found["doc-smollm2-135m"]["cached"] > 10**7 and not found["SakanaAI/doc-to-lora/qwen_4b_d2l"]["cached"]
    shown = run("models")
    (line,) = [line for line in shown.splitlines() if line.startswith(place)]
    assert line.endswith("  0.00 GB, converted") and shown.count("converted\n") == 1
