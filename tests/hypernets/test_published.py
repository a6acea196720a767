"""Published checkpoints: read without running their code, converted exactly, opened from the hub and answered with."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, Gemma2Config, LlamaConfig, LlamaForCausalLM, MistralConfig
from typer.testing import CliRunner

import loracast
from loracast.base.fingerprint import fingerprint, fingerprint_of_files
from loracast.base.load import load_base
from loracast.cast.load import locate, open_hypernetwork
from loracast.cli import app
from loracast.errors import BaseModelError, HypernetworkError
from loracast.hypernets.encoders import Features, HiddenStatesEncoder
from loracast.hypernets.published import (
    HEAD_DIM,
    PublishedDocToLoRA,
    PublishedDocToLoRAConfig,
    PublishedTextToLoRA,
    doc_to_lora,
    read_pickled,
    text_to_lora,
)
from loracast.hypernets.text_to_lora import TextToLoRA, TextToLoRAConfig
from loracast.lab.training.doc import cast_documents
from loracast.lora.algebra import inject
from loracast.lora.target import target_from_config
from tiny import make_model, make_tokenizer

PUBLISHED = Path(__file__).parents[1] / "files" / "published"
DOC_TO_LORA, TEXT_TO_LORA = PUBLISHED / "doc-to-lora", PUBLISHED / "text-to-lora"
documents = pytest.mark.parametrize("name", ["one-layer-reader", "per-layer-reader"])
tasks = pytest.mark.parametrize("name", ["variant-l", "variant-m"])


def convert_document(name: str) -> PublishedDocToLoRA:
    folder = DOC_TO_LORA / name
    return doc_to_lora(read_pickled(folder / "pytorch_model.bin"), AutoConfig.from_pretrained(folder), (), ())


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


# ---- the factors that the published code makes


@documents
def test_the_factors_of_documents(name):
    hypernet = convert_document(name)
    folder, scale = DOC_TO_LORA / name, hypernet.config.scale
    about = json.loads((folder / "about.json").read_text())
    assert scale == about["scaling"] == 16.0
    assert sum(parameter.numel() for parameter in hypernet.parameters()) == about["n_params"]
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    features, mask = inputs["features"], inputs["attention_mask"]
    a, b = hypernet.expand(hypernet.latents(features, mask.bool()))["down_proj"]
    close(a, expected["chunks.down_proj.A"])
    close(b / scale, expected["chunks.down_proj.B"])
    batch = cast_documents(hypernet, Features(features, mask=mask), 3).loras
    assert batch.n == 1
    for layer, factors in enumerate(batch.factors.values()):
        close(factors.a[0], expected["combined.down_proj.A"][0, layer])
        close(factors.b[0].T / scale, expected["combined.down_proj.B"][0, layer])


@tasks
def test_the_factors_of_tasks(name):
    folder = TEXT_TO_LORA / name
    hypernet = text_to_lora(
        read_pickled(folder / "hypermod.pt"), yaml.safe_load((folder / "args.yaml").read_text()),
        json.loads((folder / "adapter_config.json").read_text()), AutoConfig.from_pretrained(folder),
    )  # fmt: skip
    expected = load_file(folder / "expected.safetensors")
    batch = hypernet(load_file(folder / "inputs.safetensors")["task_embedding"])
    assert batch.n == 3 and len(expected) == 3 * 2 * len(batch.factors)
    assert hypernet.config.scale == 16 / 4**0.5  # rank-stabilised, rank 4
    for module, (a, b) in batch.factors.items():
        for i in range(3):
            close(a[i], expected[f"{i}.base_model.model.{module}.lora_A.weight"])
            close(b[i] / hypernet.config.scale, expected[f"{i}.base_model.model.{module}.lora_B.weight"])


def test_a_converted_hypernetwork_survives_our_own_file(base, tmp_path):
    hypernet = convert_document("one-layer-reader")
    hypernet.made_for = base.fingerprint
    hypernet.save_pretrained(tmp_path, storage="float32")
    read = PublishedDocToLoRA.from_pretrained(tmp_path)
    assert read.config == hypernet.config and read.id == hypernet.id


def test_variant_s_asks_for_rows_by_their_position():
    """The formula of the published code, written out: block2(x + norm(side)) + block2(norm(position)), then the rest."""
    config = LlamaConfig(hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, head_dim=6)
    target = target_from_config(config, ("q_proj", "v_proj"))
    hypernet = PublishedTextToLoRA(TextToLoRAConfig(8, target.rows, variant="S", rank=3, width=8, head_width=5)).eval()
    texts = torch.randn(2, 8)
    x = hypernet.module_conditions(texts)[1, 1, 1]  # second text, second layer, v_proj
    second, last = hypernet.blocks[1], hypernet.last

    def residual(value):
        return value + second(value)

    for side in range(2):
        for row in range(3):
            asked = residual(x + hypernet.asked_norm(hypernet.asked[1, side, 0]))
            expected = last(asked + residual(hypernet.position(torch.tensor(row))))
            close(hypernet.latents(texts)[1, 1, 1, side, row], expected)
    a, b = hypernet(texts).factors["model.layers.1.self_attn.v_proj"]
    assert a.shape == (2, 3, 12) and b.shape == (2, 12, 3)


# ---- other shapes than the fixtures'


def checkpoint_of(kinds: tuple[str, ...], config: LlamaConfig, *, shares_mlp: bool = False, **settings) -> dict:
    """A random checkpoint in the published layout, of two encoder blocks, for modules of these kinds."""
    free, n_layers, rank, width = torch.Generator().manual_seed(5), config.num_hidden_layers, 3, 16
    target = target_from_config(config, kinds)
    shapes = {module.kind: (module.d_in, module.d_out) for module in target.modules}

    def weight(*shape):
        return torch.randn(*shape, generator=free)

    found = {}
    for side, shape in (("gate", (96, 24)), ("up", (96, 24)), ("down", (width, 96))):
        found[f"aggregator.perceiver.modality_projection.{side}_proj.weight"] = weight(*shape)
    n_queries = n_layers * len(kinds) * rank
    for part, n_blocks, queries in (("encoder", 2, 4), ("decoder", 1, n_queries)):
        found[f"aggregator.perceiver.{part}.latents_q"] = weight(queries, width)
        found[f"aggregator.perceiver.{part}.layernorm.weight"] = weight(width)
        for i in range(n_blocks):
            block = f"aggregator.perceiver.{part}.layers.{i}"
            norms = ("input_latents", "input_context", "post_attention", "pre_ff", "post_ff")
            found |= {f"{block}.{norm}_layernorm.weight": weight(width) for norm in norms}
            attention = {"q": (2 * HEAD_DIM, width), "k": (HEAD_DIM, width), "v": (HEAD_DIM, width)}
            attention["o"] = (width, 2 * HEAD_DIM)
            found |= {f"{block}.self_attn.{name}_proj.weight": weight(*shape) for name, shape in attention.items()}
            mlp = {"gate": (64, width), "up": (64, width), "down": (width, 64)}
            found |= {f"{block}.mlp.{name}_proj.weight": weight(*shape) for name, shape in mlp.items()}
    if shares_mlp:
        names = {"mlp.0": (width,), "mlp.2": (64, width), "mlp.5": (width, 64), "mlp.6": (width,)}
        biases = {"mlp.0": (width,), "mlp.2": (64,), "mlp.5": (width,), "mlp.6": (width,)}
    else:
        names = {"layers.0": (width,), "layers.1": (n_layers, width, 64), "layers.3": (n_layers, 64, width)}
        names["layers.4"] = (width,)
        biases = {"layers.0": (width,), "layers.1": (1, n_layers, 1, 1, 64), "layers.3": (1, n_layers, 1, 1, width)}
        biases["layers.4"] = (width,)
    for name, shape in names.items():
        found[f"layers.0.{name}.weight"], found[f"layers.0.{name}.bias"] = weight(*shape), weight(*biases[name])
    widest = max(sum(shape) for shape in shapes.values())
    found["head.weight"] = weight(n_layers, *([len(kinds)] if len(kinds) > 1 else []), width, widest)
    for kind, (d_in, d_out) in shapes.items():
        found[f"bias_A.{kind}"], found[f"bias_B.{kind}"] = weight(n_layers, rank, d_in), weight(n_layers, rank, d_out)
        found |= {f"scaler_{side}.{kind}": weight(1, n_layers, rank, 1) for side in "AB"}
    hypernet = {"use_light_weight_lora": False, "per_rank_gen": True, "use_token_mixing": False, "extra_modules": None}
    hypernet |= {"per_layer_processing": not shares_mlp, "layer_indices": torch.arange(n_layers)}
    hypernet["lora_config"] = SimpleNamespace(r=rank, target_modules=set(kinds), lora_alpha=2.5)
    hypernet["feature_sizes"] = tuple({kind: shape[i] for kind, shape in shapes.items()} for i in range(2))
    aggregator = {"aggregator_type": "perceiver", "num_self_attn_per_block": 0, "shared_weights": False}
    hypernet["aggregator_config"] = SimpleNamespace(**aggregator, feature_size=24, n_latent_queries=4)
    encoder = {"ctx_encoder_model_name_or_path": None, "ctx_encoder_type": "early_exit", "layer_idx": 1}
    hypernet |= {key: value for key, value in settings.items() if key not in encoder}
    encoder |= {"ctx_encoder_last_layer": None} | {key: settings[key] for key in encoder if key in settings}
    configs = {"hypernet_config": SimpleNamespace(**hypernet), "ctx_encoder_args": SimpleNamespace(**encoder)}
    return {**found, **configs, "base_model_name_or_path": "tiny"}


BASE = LlamaConfig(
    hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=6
)


@pytest.mark.parametrize("shares_mlp", [False, True])
def test_several_kinds_of_modules_lie_in_one_head(shares_mlp):
    """Latents attend to the context and not to each other: each kind must be as in a checkpoint of that kind alone."""
    kinds = ("down_proj", "k_proj", "q_proj")
    whole = checkpoint_of(kinds, BASE, shares_mlp=shares_mlp)
    context, mask = torch.randn(2, 7, 24), torch.ones(2, 7, dtype=torch.bool)
    hypernet = doc_to_lora(whole, BASE, (), ())
    found = hypernet.expand(hypernet.latents(context, mask))
    assert list(found) == ["q_proj", "k_proj", "down_proj"]
    for i, kind in enumerate(kinds):
        alone = checkpoint_of((kind,), BASE, shares_mlp=shares_mlp)
        alone |= {name: value for name, value in whole.items() if name in alone and torch.is_tensor(value)}
        queries = whole["aggregator.perceiver.decoder.latents_q"].view(3, len(kinds), 3, 16)[:, i]
        alone["aggregator.perceiver.decoder.latents_q"] = queries.reshape(9, 16)
        d_in, d_out = (side[kind] for side in whole["hypernet_config"].feature_sizes)
        alone["head.weight"] = whole["head.weight"][:, i, :, : d_in + d_out]
        one = doc_to_lora(alone, BASE, (), ())
        for side, expected in zip(found[kind], one.expand(one.latents(context, mask))[kind], strict=True):
            torch.testing.assert_close(side, expected, atol=1e-4, rtol=1e-3)


def test_an_mlp_that_layers_share_is_a_linear_map_of_torch():
    whole = checkpoint_of(("down_proj",), BASE, shares_mlp=True)
    hypernet = doc_to_lora(whole, BASE, (), ())
    x = torch.randn(1, 3, 3, 16)

    def norm(name, value):
        weight, bias = whole[f"layers.0.mlp.{name}.weight"], whole[f"layers.0.mlp.{name}.bias"]
        return torch.nn.functional.layer_norm(value, (16,), weight, bias)

    def linear(name, value):
        return torch.nn.functional.linear(
            value, whole[f"layers.0.mlp.{name}.weight"], whole[f"layers.0.mlp.{name}.bias"]
        )

    expected = x + norm(6, linear(5, torch.nn.functional.silu(linear(2, norm(0, x)))))
    torch.testing.assert_close(hypernet.latent_mlps[0](x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_token_mixing": True}, "use_token_mixing is True"),
        ({"per_rank_gen": False, "extra_modules": ["input_layernorm"]}, "per_rank_gen is False.*extra_modules"),
        ({"ctx_encoder_model_name_or_path": "another/model"}, "reads documents with 'another/model'"),
        ({"ctx_encoder_type": "telepathy"}, "unknown way, 'telepathy'"),
        ({"feature_sizes": ({"down_proj": 1}, {"down_proj": 2})}, "give the base that it was made for"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(settings, message):
    with pytest.raises(HypernetworkError, match=message):
        doc_to_lora(checkpoint_of(("down_proj",), BASE, **settings), BASE, (), ())


def test_a_checkpoint_that_lacks_tensors_is_refused_with_their_names():
    whole = checkpoint_of(("down_proj",), BASE)
    del whole["head.weight"]
    with pytest.raises(HypernetworkError, match=r"lacks 'head\.weight'"):
        doc_to_lora(whole, BASE, (), ())
    whole = checkpoint_of(("down_proj",), BASE)
    whole["head.weight"] = torch.zeros(3, 16, 5)
    with pytest.raises(HypernetworkError, match=r"size mismatch for heads\.down_proj\.weight"):
        doc_to_lora(whole, BASE, (), ())


# ---- parameters of the published sizes, on meta tensors


GEMMA_2_2B = Gemma2Config(
    hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4,
    head_dim=256,
)  # fmt: skip
MISTRAL_7B = MistralConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
)


def millions(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize(("n_blocks", "expected"), [(8, 309.5), (9, 315.0)])
def test_parameters_of_doc_to_lora_for_gemma(n_blocks, expected):
    """The paper's configuration has 8 + 1 blocks; the released demo has 9 + 1."""
    with torch.device("meta"):
        hypernet = PublishedDocToLoRA(
            PublishedDocToLoRAConfig.for_target(
                target_from_config(GEMMA_2_2B), 2304, reader_layers=tuple(range(26)), rank=8, width=512, n_heads=16,
                n_kv_heads=4, head_dim=128, n_encoder_blocks=n_blocks, n_latents=8, n_decoder_blocks=1,
                n_latent_mlps=1, static_rank=8,
            )
        )  # fmt: skip
    assert millions(hypernet) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize(("variant", "expected"), [("L", 55.4), ("M", 34.4), ("S", 5.0)])
def test_parameters_of_text_to_lora_for_mistral(variant, expected):
    """Factors that all tasks share and the scales of B are this project's own, and not counted."""
    rows = target_from_config(MISTRAL_7B, ("q_proj", "v_proj")).rows
    with torch.device("meta"):
        if variant == "S":
            hypernet = PublishedTextToLoRA(TextToLoRAConfig(1024, rows, variant=variant))
        else:
            hypernet = TextToLoRA(TextToLoRAConfig(1024, rows, variant=variant))
    own = sum(value.numel() for name, value in hypernet.named_parameters() if "shared_" in name or "scaler_b" in name)
    assert millions(hypernet) - own / 1e6 == pytest.approx(expected, rel=0.005)


# ---- hostile pickles


class Bomb:
    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.system, (f"touch {self.place}",)


def patched(source: Path, target: Path, change) -> Path:
    """A copy of a checkpoint with another pickle in it."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as copy:
        for name in archive.namelist():
            data = archive.read(name)
            copy.writestr(name, change(data) if name.endswith("data.pkl") else data)
    return target


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path):
    torch.save({"head.weight": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.bin")
    with pytest.raises(HypernetworkError, match=r"refused: it names (posix|nt)\.system"):
        read_pickled(tmp_path / "bomb.bin")
    assert not (tmp_path / "exploded").exists()


def test_a_class_that_is_not_listed_is_refused(tmp_path):
    torch.save({"when": datetime.date(2026, 1, 1)}, tmp_path / "date.bin")
    with pytest.raises(HypernetworkError, match=r"refused: it names datetime\.date"):
        read_pickled(tmp_path / "date.bin")


@pytest.mark.parametrize("index", range(0, 300, 7))
def test_a_pickle_without_one_of_its_bytes_is_refused_or_read(index, tmp_path):
    torch.save({"a": torch.zeros(3), "b": [1, 2]}, tmp_path / "good.bin")
    bad = patched(tmp_path / "good.bin", tmp_path / "bad.bin", lambda data: data[:index] + data[index + 1 :])
    with contextlib.suppress(HypernetworkError):
        assert read_pickled(bad)["a"].shape


@pytest.mark.parametrize("damage", [{"r": [4]}, {"r": 0}, {"lora_alpha": "x"}])
def test_settings_of_other_types_are_refused(damage):
    folder = TEXT_TO_LORA / "variant-m"
    args, adapter = (
        yaml.safe_load((folder / "args.yaml").read_text()),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    with pytest.raises(HypernetworkError, match="damaged"):
        text_to_lora(read_pickled(folder / "hypermod.pt"), args, adapter | damage, AutoConfig.from_pretrained(folder))


BILLION = b"J" + (10**9).to_bytes(4, "little")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b"K\x03tq", BILLION + b"tq").replace(b"K\x03\x85", BILLION + b"\x85"),  # storage too
        lambda data: data.replace(b"K\x03\x85", BILLION + b"\x85"),  # the shape alone
        lambda data: data.replace(b"K\x03\x85", BILLION + b"\x85").replace(b"K\x01\x85", b"K\x00\x85"),  # stride 0
    ],
)
def test_a_claim_of_a_billion_numbers_is_refused(change, tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "good.bin")
    assert read_pickled(tmp_path / "good.bin")["a"].shape == (3,)
    bad = patched(tmp_path / "good.bin", tmp_path / "bad.bin", change)
    with pytest.raises(HypernetworkError, match=r"damaged|claims more numbers"):
        read_pickled(bad)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    whole = DOC_TO_LORA / "one-layer-reader" / "pytorch_model.bin"
    (tmp_path / "half.bin").write_bytes(whole.read_bytes()[:100_000])
    (tmp_path / "text.bin").write_text("no pickle at all")
    torch.save([1, 2], tmp_path / "list.bin")
    for name, message in (("half", "not a checkpoint"), ("text", "not a checkpoint"), ("list", "holds a list")):
        with pytest.raises(HypernetworkError, match=message):
            read_pickled(tmp_path / f"{name}.bin")


# ---- the base that is read


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_the_states_are_those_of_a_base_without_its_last_block(family):
    """As the published code reads them: all hidden states of the shortened model, the last one past the final norm."""
    model, ids = make_model(family), torch.tensor([[5, 6, 7, 8]])
    found = HiddenStatesEncoder(model, range(4), with_final_norm=True)(ids).states
    shorter = make_model(family)
    shorter.model.layers = shorter.model.layers[:3]
    expected = shorter.model(ids, output_hidden_states=True).hidden_states
    assert len(expected) == 4
    close(found, torch.stack(expected, dim=1))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_fingerprint_of_files_is_that_of_the_loaded_base(family, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path)
    assert fingerprint_of_files(model.config, tmp_path, "tiny") == fingerprint(model, "tiny")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="no safetensors with all of its weights"):
        fingerprint_of_files(model.config, tmp_path, "tiny")


def test_the_chat_turns_around_a_chunk():
    tokenizer = make_tokenizer()
    before, after = loracast.base.chat.ChatFormat(tokenizer).frame()
    assert tokenizer.decode(before) == "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n"
    assert tokenizer.decode(after) == "<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.chat_template = (  # like Gemma's, which refuses a system turn
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
    )
    before, after = loracast.base.chat.ChatFormat(tokenizer).frame()
    assert tokenizer.decode(before) == "<|im_start|>user\n\n\n"
    assert tokenizer.decode(after) == "<|im_end|>\n<|im_start|>model\n"


# ---- from the hub to an answer


@pytest.fixture
def published_base(hub, tmp_path):
    """A base of the fixtures' shape with a tokenizer, in the hub's cache under the name that they know it by."""
    config = LlamaConfig.from_pretrained(DOC_TO_LORA / "one-layer-reader")
    config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id = 600, 1, 2, 0
    torch.manual_seed(3)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    hub(tmp_path / "base", "tiny/random-llama")
    return tmp_path / "base"


@documents
def test_a_checkpoint_on_the_hub_learns_and_answers(name, hub, published_base, tmp_path, home):
    nested = tmp_path / "repository" / "demo" / "checkpoint-80000"
    nested.mkdir(parents=True)
    shutil.copy(DOC_TO_LORA / name / "pytorch_model.bin", nested)
    hub(tmp_path / "repository", "me/d2l")
    (tmp_path / "note.txt").write_text("The museum opens at nine on Tuesday mornings. " * 3)
    options = ["--base", "tiny/random-llama", "--device", "cpu"]
    arguments = ["learn", str(tmp_path / "note.txt"), *options, "--hypernetwork", "me/d2l/demo", "--name", "note"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["ask", "When does it open?", "-a", "note", "--max-tokens", "4"])
    assert result.exit_code == 0, result.output
    # What was kept is what the fixture's own hypernetwork casts for the chunk inside the chat's turns, in PEFT too.
    model = loracast.load("tiny/random-llama", "me/d2l/demo", device="cpu", dtype="float32")
    adapter, base, hypernet = model.adapter("note"), model.base, model.documents.hypernetwork
    assert hypernet.config.chat_prefix and adapter.manifest.max_chunk_tokens == 512
    before, after = base.chat.frame()
    (chunk,) = loracast.library.index.read_chunks(adapter.index)
    ids = torch.tensor([[*before, *base.tokenizer(chunk.prompt)["input_ids"], *after]])
    states = HiddenStatesEncoder(base.model, hypernet.config.reader_layers, with_final_norm=True)(ids)
    cast = cast_documents(convert_document(name), states).loras.row(0)
    lora = model.cast(tmp_path / "note.txt")
    for module in cast.names:
        difference = lora.delta(module).float() - cast.delta(module)
        assert difference.norm() < 0.02 * cast.delta(module).norm()  # it is kept in bf16
    prompt = torch.tensor([base.chat.prompt("When does it open?")])
    with inject(base.model, lora):
        expected = base.model(prompt).logits
    torch.testing.assert_close(lora.to_peft(base.model)(prompt).logits, expected, atol=1e-3, rtol=1e-3)


def test_convert_writes_a_folder_that_is_opened(hub, published_base, tmp_path, home):
    arguments = ["convert", "doc-to-lora", str(DOC_TO_LORA / "one-layer-reader"), "--out", str(tmp_path / "own")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "0.8M parameters for tiny/random-llama" in result.output, result.output
    converted = open_hypernetwork(tmp_path / "own")
    base = load_base("tiny/random-llama", device="cpu", dtype="float32")
    assert converted.made_for == base.fingerprint
    assert converted.id == open_hypernetwork(DOC_TO_LORA / "one-layer-reader", base).id
    wrong = CliRunner().invoke(app, ["convert", "text-to-lora", *arguments[2:]])
    assert wrong.exit_code == 1 and "name the other system" in wrong.output
    none = CliRunner().invoke(app, ["convert", "doc-to-lora", str(published_base), "--out", str(tmp_path / "x")])
    assert none.exit_code == 1 and "no published checkpoint" in none.output


def test_a_task_with_a_converted_text_to_lora(hub, published_base, tmp_path, home):
    arguments = ["convert", "text-to-lora", str(TEXT_TO_LORA / "variant-m"), "--out", str(tmp_path / "own")]
    result = CliRunner().invoke(app, [*arguments, "--encoder", "my/encoder", "--storage", "bfloat16"])
    assert result.exit_code == 0, result.output
    read = TextToLoRA.from_pretrained(tmp_path / "own")
    assert read.config.encoder == "my/encoder" and read.made_for.base == "tiny/random-llama"
    exact = text_to_lora(
        read_pickled(TEXT_TO_LORA / "variant-m" / "hypermod.pt"),
        yaml.safe_load((TEXT_TO_LORA / "variant-m" / "args.yaml").read_text()),
        json.loads((TEXT_TO_LORA / "variant-m" / "adapter_config.json").read_text()),
        AutoConfig.from_pretrained(published_base),
    )
    text, module = torch.ones(1, 24), "model.layers.0.self_attn.q_proj"
    found, expected = read(text).factors[module].b, exact(text).factors[module].b
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_a_base_must_be_named_for_a_hypernetwork_of_another(home):
    with pytest.raises(BaseModelError, match=r"give that base \(--base tiny/random-llama\)"):
        loracast.load(hypernetwork=DOC_TO_LORA / "one-layer-reader")


def test_one_of_several_checkpoints_must_be_named(tmp_path):
    for name in ("one-layer-reader", "per-layer-reader"):
        shutil.copytree(DOC_TO_LORA / name, tmp_path / name)
    with pytest.raises(HypernetworkError, match="several checkpoints, in one-layer-reader, per-layer-reader"):
        locate(tmp_path)
