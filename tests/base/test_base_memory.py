"""What a base takes is said before its weights are read, and one that cannot fit is refused then."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loracast.base import footprint as memory
from loracast.base.load import load_base
from loracast.errors import BaseModelError
from tiny import make_tokenizer

GB = 10**9


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The config and tokenizer of a base of 3.2 billion parameters; its weights are not there."""
    folder = tmp_path_factory.mktemp("large")
    AutoConfig.for_model(
        "llama", vocab_size=1000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=15,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=512,
    ).save_pretrained(folder)  # fmt: skip
    make_tokenizer().save_pretrained(folder)
    return folder


def test_a_base_that_cannot_fit_is_refused_before_its_weights_are_looked_for(large, monkeypatch):
    with torch.device("meta"):
        n_parameters = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(large)).num_parameters()
    monkeypatch.setattr(memory, "free_memory", lambda device: 4 * GB)
    with pytest.raises(BaseModelError) as refused:
        load_base(large, device="cpu", dtype="float32")
    said = str(refused.value)
    assert f"takes {4 * n_parameters / GB:.1f} GB in float32" in said and "cpu has 4.0 GB free" in said
    assert "give a smaller dtype (bfloat16), or quantize (8bit, 4bit)" in said
    with pytest.raises(BaseModelError, match=r"in bfloat16.*: give quantize \(8bit, 4bit\)"):
        load_base(large, device="cpu", dtype="bfloat16")
    monkeypatch.setattr(memory, "free_memory", lambda device: GB)
    monkeypatch.setattr("loracast.base.footprint.find_spec", lambda name: SimpleNamespace())
    with pytest.raises(BaseModelError, match=r"in 4bit.*: take a smaller base or a larger machine"):
        load_base(large, device="cpu", dtype="bfloat16", quantize="4bit")


@pytest.mark.parametrize("free", [10 * GB, None])
def test_what_a_large_base_takes_is_said(large, free, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    said: list[str] = []
    with pytest.raises(BaseModelError, match="cannot load the base"):  # it has no weights
        load_base(large, device="cpu", dtype="bfloat16", say=said.append)
    (line,) = said
    assert "GB in bfloat16" in line and "in a window of 1,024 tokens" in line
    assert ("cpu has 10.0 GB free" in line) is (free is not None)


def test_nothing_is_said_of_a_small_base(tiny_folder, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    said: list[str] = []
    load_base(tiny_folder, device="cpu", say=said.append)
    assert not said


def test_the_devices_of_a_map_are_added_up(large, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert memory.devices_of("cuda", None) == ["cuda"]
    assert memory.devices_of("cuda", "auto") == ["cuda:0", "cuda:1"]
    assert memory.devices_of("cuda", {"model.embed_tokens": 1, "model.layers": "cpu", "lm_head": 1}) == [
        "cuda:1",
        "cpu",
    ]
    assert memory.devices_of("cuda", {"model": 0, "lm_head": "disk"}) == []
    assert memory.devices_of("cpu", "cpu") == ["cpu"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert memory.devices_of("cpu", "auto") == ["cpu"]
    monkeypatch.setattr(memory, "free_memory", {"cuda:0": 6 * GB, "cuda:1": 7 * GB}.get)
    said: list[str] = []
    config = AutoConfig.from_pretrained(large)
    memory.check_memory("x", config, torch.bfloat16, None, ["cuda:0", "cuda:1"], said.append)
    assert said[0].endswith("cuda:0, cuda:1 has 13.0 GB free")


def test_a_checkpoint_that_is_quantized_already_is_not_estimated(large, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    config = AutoConfig.from_pretrained(large)
    config.quantization_config = {"quant_method": "bitsandbytes"}
    memory.check_memory("x", config, torch.bfloat16, None, ["cpu"], pytest.fail)
