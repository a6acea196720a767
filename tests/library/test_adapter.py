"""Adapters on disk: what comes back, what is refused, and what a crash leaves."""

from __future__ import annotations

import copy
import dataclasses
import gc
import hashlib
import json
import pickle
import shutil
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import TARGET, deltas, random_factors, some_chunks, some_manifest, write
from loracast.base.fingerprint import Fingerprint, check, config_fingerprint, fingerprint
from loracast.cast.document import cast_chunks, split_document
from loracast.documents import Document
from loracast.documents.units import sentence_spans
from loracast.errors import AdapterError, BaseModelError, ConfigError
from loracast.library.adapter import Adapter, factors_in_memory
from loracast.library.index import read_chunks
from loracast.library.library import Library
from loracast.library.manifest import check_name, name_from
from loracast.library.save import save_rows, tensors_of
from loracast.lora.algebra import LoRA, concat
from loracast.lora.target import target_from_config
from tiny import PROSE, make_hypernet, make_model


def assert_close(lora: LoRA, expected: dict[str, torch.Tensor]) -> None:
    assert set(lora.names) == set(expected)
    lora = lora.to(dtype=torch.float32)
    for name, delta in expected.items():
        torch.testing.assert_close(lora.delta(name), delta, atol=0.02 * delta.abs().max().item(), rtol=0.01)


# ---- what comes back


def test_a_chunk_length_that_is_too_small_is_named_as_the_caller_gave_it(model, tmp_path):
    (tmp_path / "a.txt").write_text(PROSE)
    with pytest.raises(ConfigError, match="max_chunk_tokens=12: a chunk needs at least 16 tokens"):
        model.learn(tmp_path / "a.txt", max_chunk_tokens=12)


def test_learned_factors_are_the_hypernetworks_own(model, tmp_path):
    path = tmp_path / "Amber Lantern.txt"
    path.write_text(PROSE * 6)
    steps = []
    adapter = model.learn(
        path, max_chunk_tokens=64, storage="bf16", progress=lambda done, total: steps.append((done, total))
    )
    n = adapter.manifest.n_chunks
    assert n >= 3 and steps[0] == (0, n) and steps[-1] == (n, n)
    prompts = [f"{c.heading}\n{c.text}" if c.heading else c.text for c in read_chunks(adapter.index)]
    expected = list(cast_chunks(model.documents, model.base, prompts, [sentence_spans(prompt) for prompt in prompts]))
    stored = load_file(adapter.folder / "factors.safetensors")
    for side in "ab":
        rows = torch.cat([batch[f"down_proj.{side}"] for batch in expected])
        assert torch.equal(stored[f"down_proj.{side}"], rows.bfloat16())
    lora = adapter.lora([1])
    for layer, module in enumerate(model.documents.hypernetwork.config.target.modules):
        assert torch.equal(lora.factors[module.name].a, stored["down_proj.a"][1, layer])
        assert torch.equal(lora.factors[module.name].b, stored["down_proj.b"][1, layer].T)
    assert all(lora.norms().values())


@pytest.mark.parametrize("storage", ["bf16", "int8"])
@pytest.mark.parametrize("static_kinds", [(), ("q_proj", "gate_proj")])
def test_learned_factors_are_those_of_a_plain_forward(static_kinds, storage, base, tmp_path):
    """Batches, padding and files out of the way: chunk by chunk, in fp32."""
    from loracast.cast.document import learn_document
    from loracast.documents import read_document
    from loracast.hypernets.encoders import Features
    from loracast.lab.training.doc import cast_documents

    modules = target_from_config(base.model.config, static_kinds, (1, 2)).rows if static_kinds else ()
    hypernet = make_hypernet(
        base, kinds=("v_proj", "down_proj"), static_rank=2, static_modules=modules, static_modules_rank=3
    )
    for kind in hypernet.config.target.kinds:
        torch.nn.init.normal_(hypernet.static[kind].b)
    path = tmp_path / "text.txt"
    path.write_text(PROSE * 4)
    document = read_document(path)
    adapter = learn_document(
        hypernet.bind(base), base, document, Library(tmp_path / "library"), "text", max_chunk_tokens=50, storage=storage
    )
    adapter = Adapter(adapter.folder)
    assert not adapter.faults()
    chunks = split_document(base, document, 50)
    assert adapter.manifest.n_chunks == len(chunks) > 2
    for i in (0, len(chunks) - 1):
        ids = torch.tensor([base.tokenizer(chunks[i].prompt, add_special_tokens=False)["input_ids"]])
        features = base.model(input_ids=ids, output_hidden_states=True).hidden_states[2]
        with torch.no_grad():
            batch = cast_documents(hypernet, Features(features)).loras  # the static LoRA comes with it, once
        expected = {name: f.b[0] @ f.a[0] for name, f in batch.factors.items()}
        assert_close(adapter.lora([i]), expected)
    name, shared = "model.layers.0.mlp.down_proj", hypernet.static["down_proj"]
    alone = [adapter.lora([i], static=False) for i in range(len(chunks))]
    parts = [lora.factors[name] for lora in alone]
    assert all(lora.norms()[m[0]] == 0 for lora in alone for m in modules)
    expected = sum(b.float() @ a.float() for a, b in parts) + (shared.b[0].T @ shared.a[0]).detach()
    found = adapter.lora().to(dtype=torch.float32).delta(name)
    torch.testing.assert_close(found, expected, atol=0.02 * expected.abs().max().item(), rtol=0.01)


def test_any_chunks_are_the_sum_of_theirs(tmp_path):
    written = write(tmp_path, 5)
    factors = random_factors(5)
    for adapter in (written, Adapter(written.folder)):
        for chunks in ([0], [4], [1, 3], [3, 1, 3], [0, 1, 2, 3, 4], None):
            lora = adapter.lora(chunks)
            assert_close(lora, deltas(factors, sorted(set(chunks if chunks is not None else range(5)))))
        single = concat([adapter.lora([i]) for i in range(5)]).to(dtype=torch.float32)
        assert_close(single, deltas(factors, list(range(5))))
        assert adapter.lora([1, 3]) is adapter.lora([3, 1])
        weighted = adapter.lora({3: 0.5, 1: 2.0}).to(dtype=torch.float32)
        parts = [adapter.lora([i]).to(dtype=torch.float32).scale(weight) for i, weight in ((1, 2.0), (3, 0.5))]
        assert_close(weighted, {name: sum(part.delta(name) for part in parts) for name in weighted.names})


def test_what_was_read_is_kept_whatever_the_weights(tmp_path, monkeypatch):
    adapter = write(tmp_path, 5)
    adapter.lora({1: 1.0, 3: 0.5})
    again = adapter.lora([2])
    monkeypatch.setattr(Adapter, "rows", lambda *a, **k: pytest.fail("these chunks were read before"))
    name = TARGET.names[0]
    expected = [deltas(random_factors(5), [i])[name] for i in (1, 3)]
    for weights in ((1.0, 0.4999), (0.3, 1.0)):  # another question, nearly or quite other weights
        found = adapter.lora(dict(zip((1, 3), weights, strict=True))).to(dtype=torch.float32).delta(name)
        wanted = weights[0] * expected[0] + weights[1] * expected[1]
        torch.testing.assert_close(found, wanted, atol=0.02 * wanted.abs().max().item(), rtol=0.01)
    assert adapter.lora([2]) is again


def test_many_chunks_become_dense_and_stay_right(tmp_path):
    n = 40  # rank 80, past the break-even rank of both kinds
    adapter = write(tmp_path, n)
    lora = adapter.lora()
    assert set(lora.dense) == set(TARGET.names) and not lora.factors
    assert lora.n_bytes == sum(2 * m.d_in * m.d_out for m in TARGET.modules)
    assert_close(lora, deltas(random_factors(n), list(range(n))))


@pytest.mark.parametrize("chunks", [[], [3], [-1], [0, 99]])
def test_chunks_that_are_not_there_are_refused(chunks, tmp_path):
    with pytest.raises(AdapterError, match=r"0\.\.2"):
        write(tmp_path).lora(chunks)


def test_the_manifest_comes_back(tmp_path):
    adapter = write(tmp_path)
    again = Adapter(adapter.folder).manifest
    assert again == adapter.manifest
    assert dataclasses.replace(again, factors_sha256="", chunks_sha256="") == some_manifest(3)
    assert again.target == TARGET and adapter.name == "doc"
    assert adapter.n_bytes == sum(path.stat().st_size for path in adapter.folder.iterdir())
    adapter.verify()
    assert {path.name for path in adapter.folder.iterdir()} == {
        "factors.safetensors",
        "chunks.sqlite",
        "adapter.json",
    }


# ---- what is refused


def change_factors(folder: Path, change) -> None:
    tensors = load_file(folder / "factors.safetensors")
    change(tensors)
    save_file(tensors, folder / "factors.safetensors")


def test_every_fault_of_the_factors_is_in_one_error(tmp_path):
    shared = {f"q_proj.shared.{side}": torch.randn(2, 3, d) for side, d in (("a", 48), ("b", 64))}
    adapter = write(tmp_path, shared=shared)

    def damage(tensors):
        tensors["q_proj.a"], tensors["q_proj.b"] = tensors["q_proj.b"], tensors["q_proj.a"]
        tensors["down_proj.a"] = tensors["down_proj.a"].float()
        del tensors["down_proj.b"]
        tensors["up_proj.a"] = torch.zeros(1)

    change_factors(adapter.folder, damage)
    with pytest.raises(AdapterError) as caught:
        Adapter(adapter.folder).lora([0], static=False)
    for part in (
        "q_proj.a is BF16 [3, 2, 2, 64], not BF16 [3, 2, 2, 48]", "q_proj.b is", "down_proj.a is F32",
        "down_proj.b is missing", "up_proj.a is unknown",
    ):  # fmt: skip
        assert part in str(caught.value)
    static = load_file(adapter.folder / "static.safetensors")
    del static["q_proj.shared.b"]
    save_file(static | {"q_proj.a": torch.zeros(1)}, adapter.folder / "static.safetensors")
    with pytest.raises(AdapterError, match=r"q_proj\.shared\.b is missing; q_proj\.a is unknown"):
        assert Adapter(adapter.folder).static_lora


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_on_both_sides(bad, tmp_path):
    adapter = write(tmp_path)
    change_factors(adapter.folder, lambda tensors: tensors["down_proj.b"][1, 0, 0].fill_(bad))
    opened = Adapter(adapter.folder)
    assert opened.lora([0]).rank == 2
    with pytest.raises(AdapterError, match=r"down_proj\.b holds numbers that are not finite"):
        opened.lora([0, 1])
    factors = random_factors(3)
    factors["q_proj"][0][2, 1, 0, 0] = bad
    with pytest.raises(AdapterError, match="not finite"):
        save_rows(Library(tmp_path), some_manifest(3, name="other"), some_chunks(3), [tensors_of(factors)], {})
    assert Library(tmp_path).names() == ["doc"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "pickle", "header", "missing", "directory"])
def test_damaged_factors_are_refused(damage, tmp_path):
    adapter = write(tmp_path)
    path = adapter.folder / "factors.safetensors"
    whole = path.read_bytes()
    path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage != "missing":
        header = (2**40).to_bytes(8, "little") + whole[8:]
        content = {"truncated": whole[:-7], "empty": b"", "pickle": pickle.dumps([1]), "header": header}
        path.write_bytes(content[damage])
    with pytest.raises(AdapterError, match=r"cannot be used: factors\.safetensors"):
        Adapter(adapter.folder).lora()


def test_a_flipped_bit_is_found_by_its_hash(tmp_path):
    adapter = write(tmp_path)
    path = adapter.folder / "factors.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(AdapterError, match="hash differs"):
        Adapter(adapter.folder).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=6), "update loracast"),
        (lambda m: m.update(memory_kinds=["o_proj"]), "damaged.*memory"),
        (lambda m: m.pop("format"), "update loracast"),
        (lambda m: m.pop("ranks"), "damaged"),
        (lambda m: m.update(secret=1), "damaged"),
        (lambda m: m.update(modules=7), "damaged"),
        (lambda m: m.update(modules=[]), "damaged"),
        (lambda m: m["modules"].append(["x", 0]), "damaged"),
        (lambda m: m["modules"].append(["x", 0, "c_fc", 2, 2]), "damaged.*c_fc"),
        (lambda m: m.update(ranks={"down_proj": 0}), "damaged"),
        (lambda m: m.update(n_chunks=-1), "damaged"),
        (lambda m: m.update(ranks={"down_proj": "two"}), "damaged"),
        (lambda m: m.update(ranks={}), "damaged"),
        (lambda m: m.update(ranks=2), "damaged"),
        (lambda m: m.update(name="../x"), "damaged"),
        (lambda m: m.update(made_for={"base": "x"}), "damaged"),
    ],
)
def test_damaged_manifests_are_refused(change, message, tmp_path):
    path = write(tmp_path).folder / "adapter.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(AdapterError, match=message):
        Library(tmp_path).open("doc")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe\x00", b"3"])
def test_what_is_no_manifest_is_refused_but_can_be_removed(content, tmp_path):
    (write(tmp_path).folder / "adapter.json").write_bytes(content)
    with pytest.raises(AdapterError):
        Library(tmp_path).open("doc")
    assert Library(tmp_path).names() == ["doc"]
    Library(tmp_path).remove("doc")
    assert Library(tmp_path).names() == []
    assert [path.name for path in tmp_path.iterdir()] == ["register.sqlite"]


BAD_NAMES = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "/etc",
    "%2e%2e",
    "A",
    "-x",
    ".x",
    "x\n",
    "x\0",
    "é",
    "🙂",
    "x" * 65,
    "x" * 10_240,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused_everywhere(name, tmp_path):
    library = tmp_path / "library"
    for use in (
        check_name,
        lambda n: Library(library).open(n),
        lambda n: Library(library).remove(n),
        lambda n: save_rows(Library(library), some_manifest(0, name=n), [], [], {}),
    ):
        with pytest.raises(AdapterError) as caught:
            use(name)
        assert len(str(caught.value)) < 400
    assert not library.exists()


def test_names_made_from_titles_are_allowed():
    for title in (
        "The Manual (2nd ed.).pdf",
        "../../etc/passwd",
        "🙂",
        "",
        "x" * 500,
        "ÄÖ Überblick",
        "-.-",
        "a" * 63 + "--b",
    ):
        assert check_name(name_from(title)) == name_from(title)
    assert name_from("The Manual (2nd ed.)") == "the-manual-2nd-ed"


# ---- the base it belongs to


def changed(model, change) -> Fingerprint:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            change(name, weight)
    return fingerprint(other, "other")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_fingerprints_tell_models_from_quantisations(family):
    model = make_model(family)
    own = fingerprint(model, "own")
    assert own == fingerprint(make_model(family), "own")
    assert own == fingerprint(make_model(family).bfloat16(), "own")  # the type it is loaded in does not matter

    def quantise(name, weight):
        if weight.ndim == 2:
            step = weight.abs().amax() / 7
            weight.copy_((weight / step).round() * step)

    def train(name, weight):
        weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(own, dataclasses.replace(own, base="the same under another name"), "the adapter 'x'")
    with pytest.warns(UserWarning, match="'x' was made for another quantisation"):
        check(own, changed(model, quantise), "the adapter 'x'")
    with pytest.raises(BaseModelError, match=r"'x' was made for the base 'own'.*weights differ"):
        check(own, changed(model, train), "the adapter 'x'")
    config = copy.deepcopy(model.config)
    config.intermediate_size *= 2
    assert config_fingerprint(config) != own.config == config_fingerprint(model.config)
    with pytest.raises(BaseModelError, match="shapes differ"):
        check(own, dataclasses.replace(own, config=config_fingerprint(config)), "the adapter 'x'")


def test_an_adapter_of_another_base_is_refused_when_it_is_used(model, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(PROSE)
    model.learn(path, "text")
    assert isinstance(model.ask("What is the code?", "text"), str)
    stored = model.adapter("text").folder / "adapter.json"
    manifest = json.loads(stored.read_text())
    manifest["made_for"]["matrices"] = "0" * 16
    stored.write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match="another quantisation"):
        model.adapter("text")
    manifest["made_for"] |= {"norms": "0" * 16, "base": "a-bigger-one"}
    stored.write_text(json.dumps(manifest))
    with pytest.raises(BaseModelError, match="a-bigger-one"):
        model.ask("What is the code?", "text")


# ---- adapters of released versions are opened for ever

GOLDEN = Path(__file__).parents[1] / "files" / "adapter-format-1"
VERSIONS = {
    "bf16": "1fc0a27e2eb74f40fe2dc99e47c49c6e4dce44fbd9a6745ef16dae4073549950",
    "int8": "9f9b5b93feb8210506432674ada7e98f9a7712008fa1c2f11307594380550903",
    "text": "b7e0e4d6c057b5c8d2b132f4dbd20f2a1352d4f10eef653e341167ec2f04cb10",
}


def test_how_chunks_are_merged_keeps_its_keys_of_format_1(tmp_path):
    merging = {"max_unscaled_chunks": {"q_proj": 2}, "key_decorrelation": {"down_proj": 3.0}}
    adapter = write(tmp_path, **merging)
    stored = json.loads((adapter.folder / "adapter.json").read_text())
    assert stored["most_summed"] == {"q_proj": 2} and stored["merge_ridges"] == {"down_proj": 3.0}
    # The version is the hash of these keys, as docs/adapter-format.md defines it: it must not move.
    for key in ("name", "created", "learn_s", "chunks_sha256", "storage", "memory_kinds"):
        del stored[key]
    content = json.dumps(stored, sort_keys=True, ensure_ascii=False).encode()
    assert adapter.manifest.version == hashlib.sha256(content).hexdigest()
    opened = Adapter(adapter.folder).manifest
    assert {key: getattr(opened, key) for key in merging} == merging


@pytest.mark.parametrize("storage", VERSIONS)
@pytest.mark.parametrize("is_early", [False, True])
def test_an_adapter_of_format_1_is_opened_as_it_always_was(storage, is_early, tmp_path):
    """Files that are never written again; a change that needs other files needs another format beside this one."""
    shutil.copytree(GOLDEN / storage, tmp_path / "doc")
    if is_early:  # from before these were kept
        path = tmp_path / "doc" / "adapter.json"
        stored = json.loads(path.read_text())
        for key in ("chunks_sha256", "storage", "kind", "strength") if storage == "bf16" else ("chunks_sha256",):
            del stored[key]
        path.write_text(json.dumps(stored))
    assert Adapter(tmp_path / "doc").faults() == []
    adapter = Library(tmp_path).open("doc")  # the library takes it in
    assert adapter.manifest.version == VERSIONS[storage] and adapter.manifest.title == "A manual"
    assert [chunk.text for chunk in read_chunks(adapter.index)] == [f"word{i} in chunk {i}" for i in range(3)]
    if storage == "text":
        return
    stored = {k: v.float() for k, v in load_file(adapter.folder / "factors.safetensors").items()}
    a, b = (stored[f"q_proj.{s}"] * stored.get(f"q_proj.{s}.scale", torch.ones(1)) for s in "ab")
    shared = stored["q_proj.shared.b"][1].T @ stored["q_proj.shared.a"][1]
    expected = b[2, 1].T @ a[2, 1] + b[0, 1].T @ a[0, 1] + shared
    delta = adapter.lora([0, 2]).to(dtype=torch.float32).delta("model.layers.3.self_attn.q_proj")
    torch.testing.assert_close(delta, expected, atol=0.05, rtol=0.02)


def test_an_adapter_leaves_memory_with_its_last_reference(model, tmp_path):
    (tmp_path / "a.txt").write_text(PROSE)
    model.learn(tmp_path / "a.txt", "prose")
    adapter = model.adapter("prose")
    adapter.lora()
    left = weakref.ref(adapter)
    gc.disable()
    try:
        del adapter
        assert left() is None
    finally:
        gc.enable()


def test_adapters_that_stay_open_keep_few_factors_and_no_file(model, tmp_path):
    for i in range(5):
        model.learn(Document.from_text(f"{PROSE} Its number is {i}."), f"doc-{i}")
    opened = [model.adapter(f"doc-{i}") for i in range(5)]
    opened[0].lora()
    one = opened[0].kept.cache.currsize
    assert all(adapter.kept is opened[0].kept for adapter in opened)
    kept = factors_in_memory(2 * one)
    for adapter in opened:
        adapter.kept = kept
    left = [weakref.ref(next(iter(adapter.lora().factors.values())).a) for adapter in opened]
    gc.collect()
    assert [tensor() is not None for tensor in left] == [False, False, False, True, True]
    assert 0 < kept.cache.currsize <= 2 * one
    if (maps := Path("/proc/self/maps")).exists():
        assert str(model.library) not in maps.read_text()


def test_an_adapter_that_is_deleted_while_it_is_opened_is_said_to_be_gone(tmp_path, monkeypatch):
    adapter = write(tmp_path)
    monkeypatch.setattr(Adapter, "header_faults", lambda self, name: (self.folder / "factors.safetensors").unlink())
    with pytest.raises(AdapterError, match="'doc' was deleted a moment ago"):
        adapter.lora()
