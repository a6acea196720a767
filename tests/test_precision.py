"""The precision in which a base is loaded: bf16 where the processor computes in it, else float32."""

import platform

import pytest
import torch

from loracast.base.load import load_base
from loracast.base.precision import has_fast_bf16
from loracast.training.loop import TrainConfig


@pytest.fixture
def processor(monkeypatch):
    """Pretend to be an x86 processor with or without instructions for bf16."""

    def pretend(has_bf16, machine="x86_64"):
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

    return pretend


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_base_is_loaded_in_the_precision_that_the_processor_computes_in(tiny_folder, processor, has_bf16, dtype):
    processor(has_bf16)
    assert load_base(tiny_folder, device="cpu").model.dtype == dtype
    assert load_base(tiny_folder, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_training_computes_in_bf16_only_where_that_is_fast(processor):
    for has_bf16 in (True, False):
        processor(has_bf16)
        with TrainConfig().autocast(torch.device("cpu")):
            assert torch.is_autocast_enabled("cpu") is has_bf16
        with TrainConfig(bf16=False).autocast(torch.device("cpu")):
            assert not torch.is_autocast_enabled("cpu")


def test_other_devices_and_processors_compute_in_bf16(processor):
    processor(False)
    assert has_fast_bf16("cuda")
    processor(False, machine="arm64")
    assert has_fast_bf16("cpu")


def test_a_fingerprint_does_not_depend_on_the_precision(tiny_folder):
    one, other = (load_base(tiny_folder, device="cpu", dtype=dtype).fingerprint for dtype in ("bfloat16", "float32"))
    assert one == other
