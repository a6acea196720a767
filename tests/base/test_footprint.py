"""What a base is said to take, against models that are really built."""

import pytest
import torch

import tiny
from loracast.base import footprint as module
from loracast.base.footprint import count_parameters, footprint, free_memory
from loracast.errors import BaseModelError
from loracast.lab.training.plan import read_base_config


@pytest.mark.parametrize("model_type", tiny.FAMILIES)
def test_weights_and_cache_of_a_built_model(model_type):
    model = tiny.make_model(model_type)
    result = footprint(model.config, "float32")
    assert result.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    cache = model(torch.ones(1, 7, dtype=torch.long), use_cache=True).past_key_values
    kept = sum(side.numel() * side.element_size() for layer in cache.layers for side in (layer.keys, layer.values))
    assert 7 * result.kv_per_token == kept


def test_quantization_is_of_the_linear_modules_in_the_blocks(tmp_path):
    model = tiny.make_model("qwen3")
    linear = sum(m.weight.numel() for name, m in model.named_modules() if name.split(".")[-1].endswith("_proj"))
    n, n_in_blocks = count_parameters(model.config)
    assert n_in_blocks == linear
    plain, eight, four = (footprint(model.config, "bfloat16", q).weights for q in (None, "8bit", "4bit"))
    assert plain == 2 * n
    assert linear <= eight - 2 * (n - linear) < 1.05 * linear
    assert 0.5 * linear <= four - 2 * (n - linear) < 0.57 * linear


def test_published_sizes():
    from transformers import AutoConfig

    gemma = footprint(AutoConfig.for_model("gemma2"), "bfloat16")  # transformers' defaults are Gemma 2 2B
    assert gemma.n_parameters == 2_614_341_888  # as the hub says
    assert gemma.kv_per_token == 2 * 26 * 4 * 256 * 2


def test_the_config_is_read_without_weights(tmp_path):
    tiny.make_model("gemma2").config.save_pretrained(tmp_path)
    assert read_base_config(tmp_path).model_type == "gemma2"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="no config of transformers"):
        read_base_config(tmp_path)


def test_free_memory_heeds_the_limit_of_a_container(tmp_path, monkeypatch):
    for name, text in {
        "memory.max": "5000",
        "memory.current": "3000",
        "memory.stat": "anon 2000\ninactive_file 900\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "_CGROUP", tmp_path)
    assert free_memory("cpu") == 2900
    (tmp_path / "memory.max").write_text("max")
    assert free_memory("cpu") > 10**6
