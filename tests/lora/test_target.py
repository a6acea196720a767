"""The target from the config alone, against the modules of instantiated models."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from loracast.errors import BaseModelError, ConfigError
from loracast.lab.training.recipe import layers_at
from loracast.lora.target import KINDS, target_from_config
from tiny import FAMILIES, make_model


def linears(model) -> dict[str, tuple[int, int]]:
    """All linear modules inside a model's decoder layers, `name -> (in, out)`, read from the weights."""
    return {
        name: (module.weight.shape[1], module.weight.shape[0])
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name and "vision" not in name
    }


@pytest.mark.parametrize("family", [*FAMILIES, "olmo2"])
def test_config_alone_gives_names_and_shapes_of_the_real_model(family):
    model = make_model(family)
    target = target_from_config(model.config, KINDS)
    assert {m.name: (m.d_in, m.d_out) for m in target.modules} == linears(model)


def test_matrices_that_a_type_fuses_cannot_be_targeted():
    model = make_model("phi3")
    target = target_from_config(model.config, ("o_proj", "down_proj"))
    assert {m.name: (m.d_in, m.d_out) for m in target.modules}.items() <= linears(model).items()
    with pytest.raises(ConfigError, match=r"'phi3' has no module q_proj of its own \(kinds: o_proj, down_proj\)"):
        target_from_config(model.config, ("q_proj", "o_proj"))


@pytest.mark.parametrize(
    ("where", "n_layers", "expected"),
    [
        (None, 3, [0, 1, 2]),
        (0.2, 30, list(range(6, 30))),
        (0.2, 4, [1, 2, 3]),
        (1.0, 4, [3]),
        ((0.37, 0.53, 0.97), 30, [11, 16, 29]),
        ((0.37, 0.4, 0.97), 4, [1, 2, 3]),
        ((0.9, 1.0), 4, [3]),
        ((2, 0), 4, [0, 2]),
    ],
)
def test_layers_by_number_or_by_share_of_the_depth(where, n_layers, expected):
    assert layers_at(where, n_layers) == expected
    with pytest.raises(ConfigError, match="shares of the depth must be"):
        layers_at((1.5,), n_layers)


@pytest.mark.parametrize("heads", [(4, 4, None), (6, 1, None), (4, 2, 24)])
def test_attention_shapes_follow_the_heads(heads):
    from transformers import LlamaConfig, LlamaForCausalLM

    n_heads, n_kv_heads, head_dim = heads
    config = LlamaConfig(
        vocab_size=32, hidden_size=48, intermediate_size=80, num_hidden_layers=1,
        num_attention_heads=n_heads, num_key_value_heads=n_kv_heads, head_dim=head_dim,
    )  # fmt: skip
    target = target_from_config(config, KINDS)
    assert {m.name: (m.d_in, m.d_out) for m in target.modules} == linears(LlamaForCausalLM(config))


def test_a_multimodal_base_nests_its_language_model():
    from transformers import AutoModelForCausalLM, Gemma3Config

    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=make_model("gemma3_text").config.to_dict(), vision_config=vision)
    model = AutoModelForCausalLM.from_config(config)
    target = target_from_config(model.config, KINDS)
    assert {m.name: (m.d_in, m.d_out) for m in target.modules} == linears(model)


def test_order_is_by_layer_then_kind_however_it_is_asked():
    config = make_model().config
    target = target_from_config(config, ["down_proj", "q_proj", "down_proj"], layers=[3, 1, 3])
    assert [(m.layer, m.kind) for m in target.modules] == [
        (1, "q_proj"), (1, "down_proj"), (3, "q_proj"), (3, "down_proj"),
    ]  # fmt: skip
    assert target.layers == (1, 3) and target.kinds == ("q_proj", "down_proj")
    assert target == target_from_config(config, {"q_proj", "down_proj"}, layers=(1, 3))
    assert [m.layer for m in target.of_kind("q_proj")] == [1, 3]


def test_order_does_not_depend_on_the_hash_seed():
    code = (
        "from types import SimpleNamespace as N; from loracast.lora.target import *;"
        "c = N(model_type='llama', hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2);"
        "print(target_from_config(c, set(KINDS)).names)"
    )
    path = os.pathsep.join(sys.path)
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={"PYTHONPATH": path, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "1", "2")
    }  # fmt: skip
    assert len(outputs) == 1
    assert outputs.pop().index("q_proj") < 100


def test_all_problems_come_in_one_error():
    config = make_model().config
    with pytest.raises(ConfigError) as caught:
        target_from_config(config, ["down_proj", "c_attn", "w1"], layers=[0, 4, -1])
    message = str(caught.value)
    for part in ("c_attn", "w1", "layer 4 ", "layer -1 ", "0..3", "q_proj"):
        assert part in message
    for kinds, layers in (([], None), (["q_proj"], [])):
        with pytest.raises(ConfigError, match="no module"):
            target_from_config(config, kinds, layers)


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "t5", "llama4"])
def test_other_architectures_are_refused_by_name(model_type):
    with pytest.raises(BaseModelError, match=model_type):
        target_from_config(SimpleNamespace(model_type=model_type, num_hidden_layers=2), KINDS)
