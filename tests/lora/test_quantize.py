"""Adapters in less space: what comes back, and what they then need."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from adapters import TARGET, deltas, random_factors, write
from loracast.answering.model import load
from loracast.cast.compact import compact
from loracast.cli import app
from loracast.errors import AdapterError, HypernetworkError
from loracast.export.adapter import export_adapter
from loracast.library.adapter import Adapter, first_with_static
from loracast.library.library import Library
from loracast.lora.algebra import concat
from loracast.lora.quantize import DEFAULT_STORAGE, check_storage, dequantise, pack, packed, quantise, unpack
from loracast.reading.matching import Route
from loracast.reading.routing import loras_together
from tiny import PROSE, for_base, make_hypernet

QUESTION = "What is the code of the amber lantern?"


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "lantern.txt"
    path.write_text(PROSE * 6)
    return path


def test_bytes_come_back_but_for_half_a_step():
    rows = torch.randn(3, 2, 4, 48, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 4)[:, None]
    rows[0, 0, 0] = 0
    kept, scale = quantise(rows)
    assert kept.dtype == torch.int8 and scale.dtype == torch.bfloat16 and scale.shape == (3, 2, 4, 1)
    back = dequantise(kept, scale)
    assert back.dtype == torch.bfloat16 and not back[0, 0, 0].any()
    step = rows.abs().amax(-1, keepdim=True) / 127
    assert ((back.float() - rows).abs() <= 0.5 * step + rows.abs() / 128).all()  # the second: bf16 itself
    columns, column_scale = quantise(rows.mT, axis=-2)
    assert torch.equal(columns, kept.mT) and torch.equal(column_scale, scale.mT)
    with pytest.raises(AdapterError, match="bf16, int8, int4, text"):
        check_storage("int2")


@pytest.mark.parametrize("d", [48, 64, 96, 50])
def test_half_bytes_come_back_but_for_half_a_step_of_their_group(d):
    rows = torch.randn(3, 4, d, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 4)[:, None]
    rows[0, 0] = 0
    parts = pack(rows, "int4")
    group = math.gcd(d, 16)
    assert {suffix: (value.dtype, value.shape[-1]) for suffix, value in parts.items()} == {
        "": (torch.uint8, d // 2), ".scale": (torch.bfloat16, d // group),
    }  # fmt: skip
    assert packed(d, "int4") == {"": ("U8", d // 2), ".scale": ("BF16", d // group)}
    back = unpack(parts, "int4")
    assert back.shape == rows.shape and not back[0, 0].any()
    step = rows.unflatten(-1, (-1, group)).abs().amax(-1, keepdim=True).expand(-1, -1, -1, group).flatten(-2) / 7
    assert ((back.float() - rows).abs() <= 0.51 * step + rows.abs() / 64).all()
    with pytest.raises(AdapterError, match="even number; use int8"):
        pack(rows[..., :-1], "int4")


def test_an_adapter_of_bytes_is_half_the_size_and_nearly_the_same(tmp_path):
    shared = {f"q_proj.shared.{side}": torch.randn(2, 3, d) for side, d in (("a", 48), ("b", 64))}
    whole = write(tmp_path, 40, shared=shared)
    small = compact(Library(tmp_path), "doc", "int8")
    factors = [(a.folder / "factors.safetensors").stat().st_size for a in (whole, small)]
    assert factors[1] < 0.56 * factors[0] and small.manifest.storage == "int8" and Library(tmp_path).verify() == []
    for chunks in ([0], [3, 39], {1: 1.0, 7: 0.5}):
        one, other = (a.lora(chunks).to(dtype=torch.float32) for a in (whole, small))
        for name in one.names:
            delta = one.delta(name)
            assert (other.delta(name) - delta).norm() < 0.02 * delta.norm()
    stored = load_file(small.folder / "factors.safetensors")
    static = load_file(small.folder / "static.safetensors")
    for name, expected in (
        ("q_proj.shared.a", shared["q_proj.shared.a"]),
        ("q_proj.a", random_factors(40)["q_proj"][0]),
    ):
        values, scale = (stored | static)[name], (stored | static)[f"{name}.scale"]
        assert torch.equal(values.float(), (expected.bfloat16().float() / scale.float()).round())

    stored["q_proj.a"] = stored["q_proj.a"].bfloat16()
    stored["q_proj.b.scale"] = stored["q_proj.b.scale"].float()
    del stored["down_proj.a.scale"]
    save_file(stored, small.folder / "factors.safetensors")
    with pytest.raises(AdapterError) as caught:
        Adapter(small.folder).lora()
    for fault in ("q_proj.a is BF16 [", "], not I8 [", "q_proj.b.scale is F32", "down_proj.a.scale is missing"):
        assert fault in str(caught.value)


def test_a_static_lora_of_16_bits_and_the_same_in_bytes_come_in_once(tmp_path):
    """An adapter of format 3 holds its static LoRA in bf16; beside a younger one of the same hypernetwork it is one."""
    shared = {f"q_proj.shared.{side}": torch.randn(2, 3, d) for side, d in (("a", 48), ("b", 64))}
    old = write(tmp_path, 2, name="old", seed=1, shared=shared, storage="int8", format=3)
    young = write(tmp_path, 2, name="young", seed=2, shared=shared, storage="int8")
    stored = [load_file(old.folder / "factors.safetensors"), load_file(young.folder / "static.safetensors")]
    assert [one["q_proj.shared.a"].dtype for one in stored] == [torch.bfloat16, torch.int8]
    assert old.faults() == young.faults() == []
    added = concat(loras_together([(old, Route()), (young, Route())])).to(dtype=torch.float32)
    for i, module in enumerate(TARGET.of_kind("q_proj")):
        static = shared["q_proj.shared.b"][i].T @ shared["q_proj.shared.a"][i]
        own = [deltas(random_factors(2, seed), [0, 1])[module.name] for seed in (1, 2)]
        expected = static + own[0] + own[1]
        assert (added.delta(module.name) - expected).norm() < 0.02 * expected.norm()
    other = write(tmp_path, 2, name="other", seed=2, shared={k: 1.1 * v for k, v in shared.items()}, storage="int8")
    assert first_with_static([old, young, other]) == [True, False, True]


@pytest.mark.parametrize("rank", [1, 3])
def test_adapters_of_one_hypernetwork_have_the_very_same_static_lora(rank, tmp_path):
    """So none of its numbers is compared when questions about several documents follow each other."""
    shared = {f"q_proj.shared.{side}": torch.randn(2, rank, d) for side, d in (("a", 48), ("b", 64))}
    one, two = (write(tmp_path, 2, name=name, seed=seed, shared=shared) for seed, name in enumerate(("one", "two")))
    other = write(tmp_path, 2, name="other", seed=2, shared={k: 1.1 * v for k, v in shared.items()})
    assert one.static_lora is two.static_lora and one.static_lora is not other.static_lora
    for i, module in enumerate(TARGET.of_kind("q_proj")):
        expected = shared["q_proj.shared.b"][i].T @ shared["q_proj.shared.a"][i]
        torch.testing.assert_close(one.static_lora.delta(module.name).float(), expected, rtol=0.02, atol=0.05)


def test_an_older_adapter_made_smaller_merges_the_rows_that_it_merged_before(tmp_path):
    shared = {f"q_proj.shared.{side}": torch.randn(2, 3, d) for side, d in (("a", 48), ("b", 64))}
    for older in (2, 3):
        whole = write(tmp_path, 40, name=f"doc{older}", shared=shared, format=older, seed=older)
        small = compact(Library(tmp_path), f"doc{older}", "int8")
        assert small.manifest.format == 5 and small.manifest.merging == whole.manifest.merging
        one, other = (a.lora().to(dtype=torch.float32) for a in (whole, small))
        assert all((other.delta(n) - one.delta(n)).norm() < 0.02 * one.delta(n).norm() for n in one.names)


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_a_document_learned_small_is_that_of_16_bits_made_smaller(model, document, storage):
    model.learn(document, "whole", max_chunk_tokens=64, storage="bf16")
    made_smaller = compact(model.library, "whole", storage)
    learned = model.learn(document, "small", max_chunk_tokens=64, storage=storage)
    assert learned.manifest.storage == storage and DEFAULT_STORAGE == "int4"
    assert learned.manifest.version == made_smaller.manifest.version
    assert model.library.find("whole").n_versions == 2
    before = model.library.collect_garbage(keep=1).n_bytes
    assert before > learned.n_bytes and isinstance(model.ask(QUESTION, "whole"), str)


def test_a_document_kept_as_text_answers_as_the_whole_one(model, document, tiny_folder, tiny_hypernet_folder, tmp_path):
    whole = model.learn(document, "whole", max_chunk_tokens=64, storage="bf16")
    text = model.learn(document, "text", max_chunk_tokens=64, storage="text")
    assert not (text.folder / "factors.safetensors").exists() and model.library.verify() == []
    assert compact(model.library, "whole", "text").manifest.version == text.manifest.version
    opened = model.adapter("text")
    for chunks in (None, [1], {0: 1.0, 2: 0.5}):
        one, other = (a.lora(chunks).to(dtype=torch.float32) for a in (whole, opened))
        for name in one.names:
            torch.testing.assert_close(other.delta(name), one.delta(name), rtol=0.05, atol=1e-2)
    assert model.ask(QUESTION, "text") == model.ask(QUESTION, whole)
    answerer = load(tiny_folder, tiny_hypernet_folder, library=model.library, device="cpu", eager=False)
    assert answerer.ask(QUESTION, "text") == model.ask(QUESTION, whole)

    with pytest.raises(AdapterError, match=r"keeps only its text.*--storage bf16"):
        export_adapter(model.library.open("text"), "peft", tmp_path / "out")
    other = make_hypernet(model.base, seed=5)
    for_base(other, model.base.fingerprint).save_pretrained(tmp_path / "other")
    with pytest.raises(HypernetworkError, match="not the hypernetwork that it was learned with"):
        load(tiny_folder, tmp_path / "other", library=model.library, device="cpu").ask(QUESTION, "text")
    with pytest.raises(HypernetworkError, match="no hypernetwork is shipped"):
        load(tiny_folder, library=model.library, device="cpu", eager=False).ask(QUESTION, "text")


def test_nothing_becomes_larger_or_what_it_cannot_be(tmp_path):
    write(tmp_path, name="task", kind="task")
    with pytest.raises(AdapterError, match="only a document's factors"):
        compact(Library(tmp_path), "task", "text")
    compact(Library(tmp_path), "task", "int8")
    for storage, fault in (("bf16", "kept as int8 and cannot become bf16"), ("int8", "kept as int8 already$")):
        with pytest.raises(AdapterError, match=fault):
            compact(Library(tmp_path), "task", storage)


def test_an_older_version_is_not_made_the_newest_by_being_made_smaller(tmp_path):
    write(tmp_path, name="task", kind="task")
    newest = compact(Library(tmp_path), "task", "int8")
    older = Library(tmp_path).versions("task")[1].version
    with pytest.raises(AdapterError, match="not the newest version of 'task'"):
        compact(Library(tmp_path), f"task@{older[:12]}", "int4")
    assert Library(tmp_path).find("task").version == newest.manifest.version


def test_storage_on_the_command_line(model, document, tiny_folder, tiny_hypernet_folder):
    def run(*arguments: str):
        done = CliRunner().invoke(app, [*arguments, "--library", str(model.library)])
        assert done.exit_code == 0, done.output
        return done.stdout

    models = ("--base", str(tiny_folder), "--hypernetwork", str(tiny_hypernet_folder), "--device", "cpu")
    run("learn", str(document), "--name", "note", "--storage", "text", *models)
    run("learn", str(document), "--name", "whole", "--storage", "bf16", *models)
    assert json.loads(run("show", "note", "--json"))["norms"] == {} and "kept as text" in run("show", "note")
    ask = ("ask", QUESTION, "--max-tokens", "8", "--json", *models)
    assert json.loads(run(*ask, "-a", "note"))["answer"] == json.loads(run(*ask, "-a", "whole"))["answer"]
    assert "as int8" in run("compact", "whole", "-s", "int8") and "as int4" in run("compact", "whole")
    again = CliRunner().invoke(app, ["compact", "whole", "--library", str(model.library)])
    assert again.exit_code == 1 and "kept as int4 already; --storage text" in again.output
    assert [e.n_bytes for e in model.library.versions("whole")] == sorted(
        e.n_bytes for e in model.library.versions("whole")
    )
