"""Exported adapters, loaded as their runtimes load them, give the same answers up to rounding."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from adapters import deltas, random_factors, write
from loracast.answering.model import load
from loracast.cast.document import learn_document
from loracast.cli import app
from loracast.documents import Document
from loracast.errors import AdapterError, BaseModelError
from loracast.export import FORMATS, MERGED
from loracast.export.adapter import export_adapter
from loracast.export.base import write_merged
from loracast.export.formats import VLLM_RANKS, Request
from loracast.export.gguf import write_ollama
from loracast.library.library import Library
from loracast.lora.algebra import LoRA, inject, uniform
from loracast.lora.factors import Factors
from loracast.lora.peft_format import read_peft
from loracast.lora.target import _SUPPORTED
from tiny import PROSE, make_hypernet, make_model

IDS = torch.randint(3, 600, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def library(tiny_folder, tiny_hypernet_folder, tmp_path_factory):
    """A library with a document of one chunk and one of several, learned on the tiny base."""
    folder = tmp_path_factory.mktemp("library")
    model = load(tiny_folder, tiny_hypernet_folder, library=folder, device="cpu")
    (folder / "short.txt").write_text("The lamp on the desk was made in the north.")
    (folder / "long.txt").write_text(PROSE * 3)
    model.learn(folder / "short.txt", "short")
    assert model.learn(folder / "long.txt", "long", max_chunk_tokens=40).manifest.n_chunks > 3
    return folder


@pytest.fixture
def adapter(library):
    from loracast.library.library import Library

    return lambda name: Library(library).open(name)


def logits(model, lora=None) -> torch.Tensor:
    with torch.no_grad(), inject(model, lora):
        return model(input_ids=IDS).logits


def request(lora: LoRA, base, out: Path) -> Request:
    return Request(uniform(lora), out, "tiny", "tiny@0123", "tiny", {}, lambda: base.model.config)


def random_lora(model, kinds=("q_proj", "k_proj", "down_proj"), layers=(1, 2), rank=3) -> LoRA:
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for name, module in model.named_modules():
        if name.endswith(kinds) and any(f".{layer}." in name for layer in layers):
            d_out, d_in = module.weight.shape
            a, b = (torch.randn(*shape, generator=generator) / 4 for shape in ((rank, d_in), (d_out, rank)))
            factors[name] = Factors(a, b)
    return LoRA(factors)


def test_one_rank_in_all_modules():
    model = make_model()
    lora = random_lora(model)
    uneven = LoRA(
        {name: Factors(a[: 1 + i % 3], b[:, : 1 + i % 3]) for i, (name, (a, b)) in enumerate(lora.factors.items())}
    )
    made = uniform(uneven, allowed=VLLM_RANKS)
    assert (made.rank, made.error) == (8, 0.0) and all(pair.rank == 8 for pair in made.lora.factors.values())
    torch.testing.assert_close(logits(model, made.lora), logits(model, uneven), atol=1e-5, rtol=1e-5)
    small = uniform(lora, max_rank=2)
    assert small.rank == 2
    whole, kept = ({name: x.delta(name) for name in lora.names} for x in (lora, small.lora))
    lost = sum((whole[n] - kept[n]).square().sum() for n in whole) / sum(whole[n].square().sum() for n in whole)
    assert small.error == pytest.approx(lost.sqrt().item(), rel=1e-3) and small.error > 0.1
    dense = LoRA(dense={name: lora.delta(name) for name in lora.names})
    assert uniform(dense, max_rank=3).error < 1e-3
    bounded = uniform(lora, max_rank=3, allowed=(1, 2, 4))  # a bound is kept, not rounded up
    assert bounded.rank == 2 and bounded.error == pytest.approx(small.error)
    with pytest.raises(AdapterError, match="nothing to export"):
        uniform(LoRA())


@pytest.mark.parametrize("name", ["short", "long"])
def test_peft_loads_it_and_answers_the_same(name, adapter, base, tmp_path):
    from peft import PeftModel

    (made,) = export_adapter(adapter(name), "peft", tmp_path / "out")
    expected = logits(base.model, adapter(name).lora().to(dtype=torch.float32))
    plain = logits(base.model)
    wrapped = PeftModel.from_pretrained(make_model(), str(tmp_path / "out"))
    with torch.no_grad():
        found = wrapped(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-2)
    assert (expected - plain).abs().max() > 20 * (found - expected).abs().max()
    wrapped.add_weighted_adapter(["default"], [0.5], "weaker", combination_type="linear")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == made.rank and made.error == 0
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["factors_sha256"] == adapter(name).manifest.factors_sha256
    again = LoRA(read_peft(tmp_path / "out"))
    for module in adapter(name).lora().names:
        torch.testing.assert_close(
            again.delta(module).float(), adapter(name).lora().delta(module).float(), atol=1e-2, rtol=2e-2
        )


def test_what_is_written_twice_is_the_same_bytes(adapter, tmp_path):
    first, second = (export_adapter(adapter("short"), "peft", tmp_path / name)[0].path for name in ("first", "second"))
    for file in first.glob("adapter_*"):
        assert file.read_bytes() == (second / file.name).read_bytes()
    with safe_open(first / "adapter_model.safetensors", "pt") as weights:
        assert len(weights.metadata()) > 4  # safetensors would write so many in another order each time


@pytest.mark.parametrize(("to", "rank"), [("peft", None), ("vllm", None), ("peft", 20)])
def test_what_is_written_of_many_chunks_is_as_near_to_their_sum_as_the_report_says(to, rank, tmp_path):
    """Forty chunks of rank 2 outgrow modules of 48 rows: they are compressed, and no rounding goes unreported."""
    many = write(tmp_path / "library", 40)
    assert many.lora().dense
    (made,) = export_adapter(many, to, tmp_path / "out", max_rank=rank)
    assert made.rank == (rank or {"peft": 48, "vllm": 64}[to])
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    lost = total = 0.0
    for name, delta in deltas(random_factors(40), list(range(40))).items():
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        lost += (b @ a - delta).square().sum().item()
        total += delta.square().sum().item()
    assert (lost / total) ** 0.5 == pytest.approx(made.error, rel=1e-3, abs=2e-6)
    assert (made.error == 0) == (rank is None)


def test_vllm_gets_a_rank_that_it_allows_and_a_name_that_never_means_other_weights(adapter, tmp_path):
    (made,) = export_adapter(adapter("short"), "vllm", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert made.rank in VLLM_RANKS and config["r"] == config["lora_alpha"] == made.rank and not config["use_rslora"]
    note = (tmp_path / "out" / "README.md").read_text()
    assert adapter("short").version in note and f"--max-lora-rank {made.rank}" in note


def test_every_base_that_can_be_targeted_has_a_name_in_gguf(base, tmp_path):
    import gguf

    from loracast.export.gguf import _ARCHITECTURES, write_gguf

    assert set(_ARCHITECTURES) == set(_SUPPORTED) and set(_ARCHITECTURES.values()) <= set(
        gguf.MODEL_ARCH_NAMES.values()
    )
    wanted = request(random_lora(base.model, ("down_proj",)), base, tmp_path)
    for model_type, fits in (("olmo2", True), ("phi3", True), ("mamba", False)):
        config = copy.deepcopy(base.model.config)
        config.model_type = model_type
        asked = dataclasses.replace(wanted, read_config=lambda config=config: config)
        if fits:
            assert write_gguf(asked).is_file()
        else:
            with pytest.raises(AdapterError, match="a base of type 'mamba'"):
                write_gguf(asked)


def test_gguf_has_the_rows_of_q_and_k_as_llama_cpp_keeps_them(base, tmp_path):
    """llama.cpp's own weights are W with rows reordered; B must be reordered with them, so that W + B A is."""
    import gguf

    from loracast.export.gguf import write_gguf

    wanted = request(random_lora(base.model, ("q_proj", "k_proj", "v_proj", "down_proj")), base, tmp_path)
    made = wanted.made
    reader = gguf.GGUFReader(write_gguf(wanted))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora" and fields["adapter.lora.alpha"] == made.rank
    tensors = {t.name: np.array(t.data).reshape(tuple(reversed(t.shape))) for t in reader.tensors}
    heads = {"q_proj": 4, "k_proj": 2}
    places = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "down_proj": "ffn_down"}
    assert len(tensors) == 2 * len(made.lora.factors)
    for name in made.lora.names:
        layer, kind = name.split(".")[2], name.rpartition(".")[2]
        stem = f"blk.{layer}.{places[kind]}.weight"
        found = tensors[f"{stem}.lora_b"] @ tensors[f"{stem}.lora_a"]
        expected = made.lora.delta(name).numpy()
        if kind in heads:  # row i of the first half of a head stands at 2 i, row i of the second at 2 i + 1
            d = expected.shape[0] // heads[kind]
            order = [h * d + j * (d // 2) + i for h in range(heads[kind]) for i in range(d // 2) for j in range(2)]
            expected = expected[order]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_mlx_finds_its_own_layout(base, tmp_path):
    """mlx-lm adds scale * (x a) b to the same modules of the last so many layers, and refuses any other tensor."""
    from loracast.export.formats import write_mlx

    wanted = request(random_lora(base.model, layers=(1, 3)), base, tmp_path)
    made = wanted.made
    write_mlx(wanted)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapters.safetensors")
    parameters, n_layers = config["lora_parameters"], base.model.config.num_hidden_layers
    there = {
        f"model.layers.{layer}.{key}"
        for layer in range(n_layers - config["num_layers"], n_layers)
        for key in parameters["keys"]
    }
    assert {name.rpartition(".")[0] for name in tensors} == there and config["fine_tune_type"] == "lora"
    rebuilt = {}
    for name in there:
        a, b = (tensors[f"{name}.lora_{side}"] for side in "ab")
        assert a.shape[1] == b.shape[0] == parameters["rank"]
        rebuilt[name] = parameters["scale"] * (a @ b).T
    torch.testing.assert_close(
        logits(base.model, LoRA(dense=rebuilt)), logits(base.model, made.lora), atol=1e-5, rtol=1e-5
    )
    assert not rebuilt["model.layers.2.mlp.down_proj"].any()


def test_the_merged_checkpoint_answers_the_same(base, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lora = random_lora(base.model)
    plain, expected = logits(base.model), logits(base.model, lora)
    write_merged(lora, tmp_path / "out", base, max_shard_size="50KB")
    assert torch.equal(logits(base.model), plain)  # the base in memory is its old self
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == base.tokenizer.chat_template
    with pytest.raises(AdapterError, match="the base has no nothing"):
        write_merged(LoRA(dense={"nothing": torch.zeros(2, 2)}), tmp_path / "other", base)


def test_a_document_chunk_by_chunk(adapter, tmp_path):
    long = adapter("long")
    made = export_adapter(long, "peft", tmp_path / "out", each_chunk=True)
    listing = json.loads((tmp_path / "out" / "chunks.json").read_text())
    assert len(made) == long.manifest.n_chunks == len(listing["chunks"])
    from loracast.reading.routing import route_document

    index, question = tmp_path / "out" / "chunks.sqlite", "Who built the old bridge?"
    picked = route_document(index, question, 1).chunk_weights
    assert len(picked) == 1
    for i in picked:
        chunk = listing["chunks"][i]
        assert "bridge" in chunk["text"] and chunk["end"] > chunk["start"]
        found = LoRA(read_peft(tmp_path / "out" / chunk["path"]))
        for name in found.names:
            torch.testing.assert_close(
                found.delta(name).float(), long.lora([i]).delta(name).float(), atol=1e-2, rtol=2e-2
            )
    with pytest.raises(AdapterError, match="'short' has one chunk: leave out --each-chunk"):
        export_adapter(adapter("short"), "peft", tmp_path / "one", each_chunk=True)
    for form in (MERGED, "ollama"):
        with pytest.raises(AdapterError, match=f"{form} cannot be written chunk by chunk: leave out --each-chunk"):
            export_adapter(long, form, tmp_path / "one", each_chunk=True)
    with pytest.raises(AdapterError, match="leave out --rank"):
        export_adapter(long, MERGED, tmp_path / "one", max_rank=4)
    with pytest.raises(AdapterError, match="no word of 1 of the questions stands in 'long', such as 'zzz'"):
        export_adapter(long, "peft", tmp_path / "one", questions=["Who built the old bridge?", "zzz"])


def test_of_chunks_loaded_together_the_static_lora_comes_in_once(base, tmp_path):
    hypernet = make_hypernet(base, kinds=("v_proj", "down_proj"), static_rank=2)
    for kind in hypernet.config.target.kinds:
        torch.nn.init.normal_(hypernet.static[kind].b)
    text = Document.from_text(PROSE * 3)
    long = learn_document(hypernet.bind(base), base, text, Library(tmp_path / "library"), "long", max_chunk_tokens=40)
    export_adapter(long, "peft", tmp_path / "out", each_chunk=True, base="tiny")
    question = "Who built the old bridge over the river?"
    arguments = ["route", question, "--exported", str(tmp_path / "out"), "--route", "3", "--json"]
    (found,) = json.loads(CliRunner().invoke(app, arguments).stdout)["adapters"]
    assert len(found["chunks"]) > 1
    name = "model.layers.0.mlp.down_proj"
    loaded = [*found["chunks"], found["static"]]
    total = sum(one["weight"] * LoRA(read_peft(Path(one["path"]))).delta(name).float() for one in loaded)
    alone = sum(one["weight"] * long.lora([one["chunk"]], static=False).delta(name).float() for one in found["chunks"])
    expected = long.static_lora.delta(name).float()
    torch.testing.assert_close(total - alone, expected, atol=0.02 * expected.abs().max().item(), rtol=0.02)


def test_what_peft_wrote_of_many_chunks_is_read_again(tmp_path):
    """All modules have one rank, which is more than the smaller ones have rows."""
    factors = {
        "model.layers.0.self_attn.o_proj": Factors(torch.randn(600, 700), torch.randn(700, 600)),
        "model.layers.0.self_attn.k_proj": Factors(torch.randn(4, 700), torch.randn(64, 4)),
    }
    LoRA(factors).save_pretrained(tmp_path / "out", base="x")
    again = LoRA(read_peft(tmp_path / "out"))
    for name in factors:
        torch.testing.assert_close(again.delta(name), LoRA(factors).delta(name), rtol=1e-4, atol=1e-3)


@pytest.fixture
def run(library, tiny_folder):
    def invoke(*arguments):
        command = ("export", *arguments, "--library", library, "--base", tiny_folder)
        return CliRunner().invoke(app, [str(argument) for argument in command])

    return invoke


@pytest.mark.parametrize("to", FORMATS)
def test_the_command_writes_every_format(to, run, tiny_folder, tmp_path):
    done = run("short", "--to", to, "--out", tmp_path / to)
    assert done.exit_code == 0, done.output
    assert "exported short" in done.stdout
    marks = {"gguf": "short.gguf", "ollama": "Modelfile", "vllm": "README.md", "mlx": "adapters.safetensors"}
    assert (tmp_path / to / marks.get(to, "")).exists() and any((tmp_path / to).iterdir())
    if to == "ollama":
        assert f"FROM {tiny_folder}" in (tmp_path / to / "Modelfile").read_text()


def test_ollama_gets_a_base_only_from_a_folder_of_its_own(base, tiny_folder, tmp_path):
    (cache := tmp_path / "snapshot").mkdir()
    for path in Path(tiny_folder).iterdir():
        (cache / path.name).symlink_to(path)
    (tmp_path / "link").symlink_to(tiny_folder)
    asked = request(random_lora(base.model), base, tmp_path / "out")
    for name, source in (("org/name", "org/name"), (str(cache), "OWNER/NAME")):
        with pytest.raises(AdapterError, match=f"hf download {source} --local-dir FOLDER"):
            write_ollama(dataclasses.replace(asked, base=name))
    assert not (tmp_path / "out").exists()
    write_ollama(dataclasses.replace(asked, base=str(tmp_path / "link")))
    assert f"FROM {Path(tiny_folder).resolve()}\n" in (tmp_path / "out" / "Modelfile").read_text()


def test_the_command_compresses_and_refuses(run, tiny_folder, tmp_path):
    done = run("long", "--to", "peft", "--rank", 2, "--out", tmp_path / "small", "--json")
    assert json.loads(done.stdout)["exported"][0]["rank"] == 2 and json.loads(done.stdout)["exported"][0]["error"] > 0
    done = run("short", "--to", "peft", "--out", tmp_path / "small")
    assert done.exit_code == 1 and "give another --out" in done.stderr
    done = run("short", "--to", "safetensors", "--out", tmp_path / "x")
    assert done.exit_code == 1 and f"one of {', '.join(FORMATS)}" in done.stderr
    done = CliRunner().invoke(app, ["export-base", "--out", str(tmp_path / "b"), "--base", str(tiny_folder)])
    assert done.exit_code == 1 and "no embedded base" in done.stderr


def test_every_format_is_in_the_help_and_the_docs():
    shown = CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "300"}).stdout
    table = Path(__file__).parents[2] / "docs" / "export.md"
    assert re.findall(r"^\| `(\w+)` \|", table.read_text(encoding="utf-8"), re.MULTILINE) == list(FORMATS)
    for name, label in FORMATS.items():
        assert f"{name} ({label})" in shown


def test_another_base_is_refused(adapter, tmp_path):
    make_model("qwen3").save_pretrained(tmp_path / "other")
    with pytest.raises(BaseModelError, match="made for a base of other shapes"):
        export_adapter(adapter("short"), "gguf", tmp_path / "out", base=str(tmp_path / "other"))
