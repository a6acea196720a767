"""The precision in which a base is loaded: bf16 where the processor computes in it, else float32."""

import platform

import pytest
import torch

from loracast import Hypernetwork, load
from loracast.base.footprint import fastest_dtype, has_fast_bf16
from loracast.base.load import load_base
from loracast.cast.load import load_caster
from loracast.lab.training.loop import TrainConfig


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
    assert has_fast_bf16("mps")
    processor(False, machine="arm64")
    assert has_fast_bf16("cpu")


@pytest.mark.parametrize("is_native", [True, False])
def test_a_gpu_that_emulates_bf16_computes_in_float32(is_native, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: is_native or including_emulation
    )
    assert has_fast_bf16("cuda") is is_native
    assert fastest_dtype("cuda:0") is (torch.bfloat16 if is_native else torch.float32)


def test_a_fingerprint_does_not_depend_on_the_precision(tiny_folder):
    one, other = (load_base(tiny_folder, device="cpu", dtype=dtype).fingerprint for dtype in ("bfloat16", "float32"))
    assert one == other


def test_a_hypernetwork_computes_in_its_own_type_and_on_its_own_device(tiny_folder, tiny_hypernet_folder, monkeypatch):
    """What the base reads is moved where it goes into the hypernetwork, and only there."""
    casts = {}
    for dtype in ("bfloat16", "float16", "float32"):
        model = load(tiny_folder, tiny_hypernet_folder, device="cpu", dtype=dtype)
        caster = model.documents
        assert next(caster.hypernetwork.parameters()).dtype == torch.float32
        features = caster.encode([[5, 6, 7, 8], [9, 10]])
        assert features.states.dtype == getattr(torch, dtype)
        casts[dtype] = caster.cast(features).rows["down_proj"][1]
    for dtype in ("float16", "bfloat16"):
        torch.testing.assert_close(casts[dtype].float(), casts["float32"], rtol=0.1, atol=0.05)
    cast, seen = caster.hypernetwork.cast(features), []
    caster.hypernetwork.to("meta")  # a second device that every machine has; nothing can be computed on it
    monkeypatch.setattr(caster.hypernetwork, "cast", lambda moved: seen.append(moved) or cast)
    caster.cast(features)
    assert {value.device.type for value in vars(seen[0]).values() if value is not None} == {"meta"}


def test_a_hypernetwork_stays_on_the_gpu_that_it_is_on(base, tiny_hypernet_folder, monkeypatch):
    on_cpu = Hypernetwork.from_pretrained(tiny_hypernet_folder)
    elsewhere = Hypernetwork.from_pretrained(tiny_hypernet_folder).to("meta")
    monkeypatch.setattr(Hypernetwork, "id", "x")  # otherwise hashed from numbers, which are not there
    for given, device in ((on_cpu, "cpu"), (elsewhere, "meta")):
        caster = load_caster(given, "document", base)
        assert next(caster.hypernetwork.parameters()).device.type == device
