"""The hypernetwork: its start, its symmetries, its file, and the published checkpoints that it must reproduce."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loracast.base.fingerprint import Fingerprint
from loracast.errors import ConfigError, HypernetworkError
from loracast.hypernets.doc_to_lora import DocToLoRA
from loracast.hypernets.encoders import Features
from loracast.hypernets.protocol import Hypernetwork
from loracast.hypernets.published import PublishedDocToLoRA
from loracast.lab.training.checkpoint import average, with_config
from loracast.lab.training.doc import cast_documents
from loracast.lab.training.memory_start import set_question_map, take_low_rank
from loracast.lora.algebra import LoRA, LoRABatch, concat, inject
from loracast.lora.merge import decorrelate_keys
from loracast.lora.target import target_from_config
from tiny import for_base, make_model

MODEL = make_model()
MADE_FOR = Fingerprint("tiny", "c" * 16, "n" * 16, "m" * 16)
FREE = torch.Generator().manual_seed(11)

VARIANTS = {
    "default": {},
    "published": {"published": True, "n_decoder_blocks": 2, "n_latent_mlps": 2},
    "encoder": {"published": True, "n_encoder_blocks": 2, "n_latents": 5, "n_kv_heads": 1},
    "each layer": {"published": True, "reader_layers": (0, 1, 2, 3), "n_latent_mlps": 1},
    "each layer, encoder": {
        "published": True, "reader_layers": (0, 1, 2, 3), "n_encoder_blocks": 1, "n_latents": 3,
        "kinds": ("k_proj", "o_proj", "up_proj"), "head_shared_rank": 3, "static_rank": 1,
    },
    "shared head": {"head_shared_rank": 2},
    "kinds": {"kinds": ("q_proj", "v_proj", "down_proj"), "layers": (1, 3), "static_rank": 3},
    "values": {"d_values": 48},
}  # fmt: skip
MEMORY = tuple(
    (m.name, m.layer, m.kind, m.d_in, m.d_out) for m in target_from_config(MODEL.config, ("o_proj",), (1, 3)).modules
)
VARIANTS["memory"] = {
    "d_values": 48, "memory_modules": MEMORY, "memory_rank": 4, "memory_blocks": 1, "static_rank": 1,
}  # fmt: skip
VARIANTS["near tokens"] = {**VARIANTS["memory"], "memory_near_tokens": 2}
VARIANTS["verdicts"] = {**VARIANTS["near tokens"], "memory_verdicts": True, "memory_gate_power": 0.5}
SHARED = target_from_config(MODEL.config, ("q_proj", "gate_proj"), (1, 3)).rows
VARIANTS["shared modules"] = {**VARIANTS["memory"], "static_modules": SHARED, "static_modules_rank": 3}
variants = pytest.mark.parametrize("variant", VARIANTS)


def make(variant: str = "default", *, fresh: bool = False, **options) -> DocToLoRA:
    """A small hypernetwork; unless `fresh`, all that starts at zero is moved away from it."""
    settings = {
        "reader_layers": (2,), "rank": 2, "width": 16, "n_heads": 2, "n_kv_heads": 2, "head_dim": 8,
        "n_decoder_blocks": 1, **VARIANTS[variant], **options,
    }  # fmt: skip
    target = target_from_config(MODEL.config, settings.pop("kinds", ("down_proj",)), settings.pop("layers", None))
    torch.manual_seed(0)
    architecture = PublishedDocToLoRA if settings.pop("published", False) else DocToLoRA
    d_features = MODEL.config.hidden_size + settings.get("d_values", 0)
    hypernet = architecture(architecture.config_class.for_target(target, d_features, **settings))
    if not fresh:
        for name, value in hypernet.named_parameters():
            if "scaler" in name or name.endswith(
                (".b", ".b1", ".b2", ".o.weight", "mlp.down.weight", ".scale", "strength.weight")
            ):
                value.data = torch.randn(value.shape)
    return hypernet.eval().requires_grad_(False)


def make_features(hypernet: DocToLoRA, n: int = 3, t: int = 6) -> Features:
    c = hypernet.config
    each = (len(c.layers),) if len(c.reader_layers) > 1 else ()
    states = torch.randn(n, *each, t, c.d_features, generator=FREE)
    if not c.memory_modules:
        return Features(states)
    keys = torch.randn(n, len(c.memory_modules), t, c.memory_modules[0][3], generator=FREE)
    return Features(states, torch.randn(n, t, c.d_values, generator=FREE), keys)


def each(change, *features: Features) -> Features:
    """The same change to all tensors of features."""
    sides = [[getattr(f, name) for f in features] for name in ("states", "starts", "keys")]
    return Features(*(None if side[0] is None else change(*side) for side in sides))


def loras(hypernet: DocToLoRA, features: Features, mask: torch.Tensor | None = None, k: int = 1) -> LoRABatch:
    return cast_documents(hypernet, dataclasses.replace(features, mask=mask), k).loras


def row(batch, i: int) -> LoRA:
    """One row of a LoRABatch as a LoRA."""
    from loracast.lora.factors import Factors

    return LoRA({name: Factors(f.a[0], f.b[0]) for name, f in batch.take([i]).factors.items()})


def deltas(lora: LoRA) -> torch.Tensor:
    return torch.cat([lora.delta(name).flatten() for name in sorted(lora.names)])


@variants
def test_the_start_is_an_exact_no_op(variant):
    hypernet = make(variant, fresh=True, static_rank=2)
    batch = loras(hypernet, make_features(hypernet))
    assert set(batch.factors) == set(hypernet.config.target.names)
    for factors in batch.factors.values():
        assert torch.count_nonzero(factors.b @ factors.a) == 0
        assert torch.count_nonzero(factors.a) > 0
    ids = torch.randint(3, 600, (3, 5))
    with inject(MODEL, batch), torch.no_grad():
        found = MODEL(input_ids=ids).logits
    assert torch.equal(found, MODEL(input_ids=ids).logits)


@variants
def test_shapes_fit_the_target(variant):
    hypernet = make(variant)
    c = hypernet.config
    batch = loras(hypernet, make_features(hypernet, 4), None, 2)
    assert batch.n == 2 and tuple(batch.factors) == c.target.names
    for module in c.target.modules:
        if not c.ranks[module.kind]:
            continue  # the same for all documents, tested by itself
        rank = 2 * c.ranks[module.kind] + (c.static_rank if module.kind in c.kinds else 0)
        assert batch.factors[module.name].a.shape == (2, rank, module.d_in)
        assert batch.factors[module.name].b.shape == (2, module.d_out, rank)
    assert len({deltas(row(batch, i)).norm().item() for i in range(2)}) == 2  # another document, another LoRA


@variants
def test_padding_changes_nothing(variant):
    hypernet = make(variant)
    features = make_features(hypernet, 2, 4)
    noise = each(lambda side: side * 100, make_features(hypernet, 2, 5))
    mask = torch.tensor([[1] * 4 + [0] * 5] * 2)
    padded = loras(hypernet, each(lambda *sides: torch.cat(sides, dim=-2), features, noise), mask)
    for name, factors in loras(hypernet, features).factors.items():
        torch.testing.assert_close(padded.factors[name].a, factors.a, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(padded.factors[name].b, factors.b, atol=1e-4, rtol=1e-5)


@variants
def test_the_order_and_company_of_a_batch_change_nothing(variant):
    hypernet = make(variant)
    features = make_features(hypernet, 3)
    together = loras(hypernet, features)
    reverse = loras(hypernet, each(lambda side: side.flip(0), features))
    for i in range(3):
        alone = deltas(row(loras(hypernet, each(lambda side, i=i: side[i : i + 1], features)), 0))
        torch.testing.assert_close(deltas(row(together, i)), alone, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(deltas(row(reverse, 2 - i)), alone, atol=1e-4, rtol=1e-4)


@variants
def test_merging_chunks_is_the_sum_of_their_loras(variant):
    """And the document-independent LoRA comes once, not once a chunk."""
    hypernet = make(variant)
    features = make_features(hypernet, 6)
    merged = loras(hypernet, features, None, 3)
    expanded, _ = hypernet.cast_and_write(features)
    target = hypernet.config.target
    for document in range(2):
        lora = row(merged, document)
        for module in hypernet.config.target.modules:
            at = target.of_kind(module.kind).index(module)
            a, b = (side[:, at] for side in expanded[module.kind])
            expected = sum(b[i].T @ a[i] for i in range(3 * document, 3 * document + 3))
            if module.kind in hypernet.static:
                shared = hypernet.static[module.kind]
                expected = expected + shared.b[at].T @ shared.a[at]
            torch.testing.assert_close(lora.delta(module.name), expected, atol=1e-4, rtol=1e-4)
    if not hypernet.config.static_rank:
        parts = [row(loras(hypernet, each(lambda side, i=i: side[i : i + 1], features)), 0) for i in range(3)]
        torch.testing.assert_close(deltas(row(merged, 0)), deltas(concat(parts)), atol=1e-4, rtol=1e-4)


def test_beyond_the_limit_the_perceivers_factors_are_averaged_and_the_memorys_add_up():
    features = make_features(make("memory"), 6)
    free, limited = (row(loras(make("memory", max_unscaled_chunks=most), features, None, 6), 0) for most in (None, 2))
    shared = make("memory").static["down_proj"]
    for name in free.names:
        if "o_proj" in name:
            torch.testing.assert_close(limited.delta(name), free.delta(name))
        else:
            layer = int(name.split(".")[2])
            once = shared.b[layer].T @ shared.a[layer]  # never scaled
            expected = (free.delta(name) - once) / 3 + once
            torch.testing.assert_close(limited.delta(name), expected, atol=1e-4, rtol=1e-4)
    two = each(lambda side: side[:2], features)
    few = [row(loras(make("memory", max_unscaled_chunks=most), two, None, 2), 0) for most in (None, 2)]
    torch.testing.assert_close(deltas(few[0]), deltas(few[1]))
    with pytest.raises(ConfigError, match="max_unscaled_chunks must be at least 1"):
        make(max_unscaled_chunks=0)


def test_with_a_ridge_only_the_memorys_keys_of_several_chunks_change():
    features = make_features(make("memory"), 6)
    free, apart = (make("memory", key_decorrelation=ridge) for ridge in (None, 3.0))
    torch.testing.assert_close(*(deltas(row(loras(net, features), 4)) for net in (free, apart)))
    one, other = (row(loras(net, features, None, 3), 1) for net in (free, apart))
    a, b = free.cast_and_write(features)[0]["o_proj"]
    sides = (side[3:].transpose(0, 1).flatten(1, 2) for side in (a, b))
    owners = torch.arange(3).repeat_interleave(a.shape[2])
    keys = decorrelate_keys(*sides, owners, 3.0).unflatten(1, (3, -1))  # [modules, chunks, r, in]
    for name in one.names:
        if "o_proj" in name:
            module = [m[0] for m in MEMORY].index(name)
            expected = sum(b[3 + i, module].T @ keys[module, i] for i in range(3))
            torch.testing.assert_close(other.delta(name), expected, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(other.delta(name), one.delta(name), atol=1e-2)
        else:
            torch.testing.assert_close(other.delta(name), one.delta(name))
    for settings in ({"variant": "memory", "key_decorrelation": 0.0}, {"key_decorrelation": 3.0}):
        with pytest.raises(ConfigError, match="key_decorrelation"):
            make(**settings)


def test_rank_latents_have_length_one_and_the_scale_multiplies_b_alone():
    hypernet = make()
    features = make_features(hypernet)
    mask = torch.ones(features.states.shape[:2], dtype=torch.bool)
    latents = hypernet.latents(features.states, mask).latents
    torch.testing.assert_close(latents.norm(dim=-1), torch.ones(3, 4, 2))
    doubled = DocToLoRA(dataclasses.replace(hypernet.config, scale=2 * hypernet.config.scale))
    doubled.load_state_dict(hypernet.state_dict())
    one, two = loras(hypernet, features), loras(doubled, features)
    for name in one.factors:
        assert torch.equal(one.factors[name].a, two.factors[name].a)
        torch.testing.assert_close(2 * one.factors[name].b, two.factors[name].b)


def test_shared_modules_get_the_same_whatever_the_document():
    hypernet = make("shared modules")
    batch = loras(hypernet, make_features(hypernet, 4), None, 2)
    assert hypernet.config.ranks == {"q_proj": 0, "o_proj": 4, "gate_proj": 0, "down_proj": 2}
    for kind in ("q_proj", "gate_proj"):
        shared = hypernet.static[kind]
        for i, module in enumerate(hypernet.config.target.of_kind(kind)):
            a, b = batch.factors[module.name]
            assert a.shape == (1, 3, module.d_in) and b.shape == (1, module.d_out, 3)
            assert torch.equal(a[0], shared.a[i]) and torch.equal(b[0], shared.b[i].T)


def test_a_head_is_taken_over_at_low_rank():
    full, low = make(), make("default", head_shared_rank=16)
    take_low_rank(low.head("down_proj"), full.head("down_proj"))  # of rank 16 at most: nothing is lost
    latents = torch.randn(3, 4, 2, 16, generator=FREE)
    for one, other in zip(full.head("down_proj")(latents), low.head("down_proj")(latents), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    lower = make("default", head_shared_rank=4)
    take_low_rank(lower.head("down_proj"), full.head("down_proj"))
    weight = full.head("down_proj").weight
    head = lower.head("down_proj")
    lost = (weight - head.shared - head.down @ head.up).square().sum((1, 2))
    singular = torch.linalg.svdvals(weight - weight.mean(0))
    torch.testing.assert_close(lost, singular[:, 4:].square().sum(1), rtol=1e-4, atol=1e-6)  # Eckart and Young


def test_gradients_reach_every_parameter_once_the_scalers_have_moved(monkeypatch):
    monkeypatch.setattr("loracast.hypernets.associative_memory._FEWEST_POINTING", 0.5)  # sentences are short here
    for variant in VARIANTS:
        hypernet = make(variant).requires_grad_(True)
        batch = loras(hypernet, make_features(hypernet))
        sum((f.b @ f.a).square().sum() for f in batch.factors.values()).backward()
        without = [n for n, p in hypernet.named_parameters() if p.grad is None or not p.grad.abs().sum()]
        assert not without, f"{variant}: {without}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules": ()}, "no target"),
        ({"reader_layers": (1, 2)}, "name one layer"),
        ({"rank": 0, "n_kv_heads": 0}, "at least 1"),
        ({"n_heads": 3, "n_kv_heads": 2}, "multiple"),
        ({"modules": (("x.0.c_fc", 0, "c_fc", 4, 4),)}, "c_fc"),
        ({"modules": (("b", 1, "down_proj", 4, 4), ("a", 0, "down_proj", 4, 4))}, "order"),
        ({"modules": (("a", 0, "down_proj", 4, 4), ("b", 1, "down_proj", 8, 4))}, "same shape"),
        ({"modules": (("a", 0, "q_proj", 4, 4), ("b", 1, "down_proj", 8, 4))}, "same kinds"),
        ({"memory_modules": MEMORY}, "values as wide"),
        ({"d_values": 48, "memory_modules": MEMORY[::-1]}, "order of their layers"),
        ({"d_values": 48, "memory_modules": make("memory").config.modules}, "leaves alone"),
        ({"d_values": 48, "memory_modules": (MEMORY[0], ("b", 3, "v_proj", 64, 32))}, "one kind"),
        ({"d_values": 48, "memory_modules": MEMORY, "memory_rank": 0}, "memory_rank"),
        ({"d_values": 48, "memory_modules": MEMORY, "memory_heads": 1}, "memory_heads at least 2"),
        ({"static_modules": make().config.modules}, "leave alone"),
        ({"static_modules": SHARED, "static_modules_rank": 0}, "static_modules_rank"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(make().config, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reader_layers": (1, 2)}, "one for each of the 4"),
        ({"n_encoder_blocks": 1}, "both be zero"),
        ({"d_values": 48}, "copy no"),
    ],
)
def test_bad_configs_of_published_checkpoints_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(make("published").config, **changes)


# ---- the file


def largest_error(original: DocToLoRA, read: DocToLoRA) -> float:
    """The largest relative error (Frobenius) of any tensor."""
    assert original.state_dict().keys() == read.state_dict().keys()
    return max(
        ((value - read.state_dict()[name]).norm() / value.norm().clamp_min(1e-12)).item()
        for name, value in original.state_dict().items()
    )


@variants
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_round_trip_is_exact_to_the_type(variant, storage, tmp_path):
    hypernet = make(variant)
    for_base(hypernet, MADE_FOR).save_pretrained(tmp_path, storage=storage, provenance={"seed": 3})
    read = DocToLoRA.from_pretrained(tmp_path)
    made_for = read.made_for
    assert made_for == MADE_FOR and read.config == hypernet.config and not read.training
    for name, value in hypernet.state_dict().items():
        assert torch.equal(read.state_dict()[name], value.to(getattr(torch, storage)).float()), name
    features = make_features(hypernet)
    if storage == "float32":
        assert torch.equal(deltas(row(loras(read, features), 0)), deltas(row(loras(hypernet, features), 0)))
    assert json.loads((tmp_path / "config.json").read_text())["provenance"] == {"seed": 3}


def test_int8_is_close_and_small(tmp_path):
    hypernet = make(width=256)  # its head has 4 x 256 x 144 numbers: large enough to be packed
    for_base(hypernet, MADE_FOR).save_pretrained(tmp_path / "f", storage="float32")
    for_base(hypernet, MADE_FOR).save_pretrained(tmp_path / "i", storage="int8")
    stored = load_file(tmp_path / "i" / "model.safetensors")
    assert stored["heads.down_proj.weight"].dtype == torch.int8
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in "fi"]
    assert sizes[1] < 0.35 * sizes[0]
    read = DocToLoRA.from_pretrained(tmp_path / "i")
    error = largest_error(hypernet, read)
    features = make_features(hypernet)
    expected, found = deltas(row(loras(hypernet, features), 0)), deltas(row(loras(read, features), 0))
    print(f"int8: {error:.2%} on the weights, {(found - expected).norm() / expected.norm():.2%} on the deltas")
    assert 1e-4 < error < 0.01
    assert (found - expected).norm() < 0.02 * expected.norm()


def saved(folder: Path, **options) -> Path:
    for_base(make(**options), MADE_FOR).save_pretrained(folder, storage="float32")
    return folder


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_every_tensor_of_bad_numbers_is_in_one_error(tmp_path):
    folder = saved(tmp_path)

    def damage(tensors):
        tensors["heads.down_proj.scaler_a"][0, 0] = float("nan")
        tensors["heads.down_proj.scaler_b"] = tensors["heads.down_proj.scaler_b"].long()
        tensors["heads.down_proj.weight"] = tensors["heads.down_proj.weight"].to(torch.int8)

    change_tensors(folder, damage)
    with pytest.raises(HypernetworkError) as caught:
        DocToLoRA.from_pretrained(folder)
    for part in (
        "scaler_a holds numbers that are not finite", "scaler_b is of type torch.int64",
        "heads.down_proj.weight is of type torch.int8 without a scale",
    ):  # fmt: skip
        assert part in str(caught.value)


def test_every_tensor_that_does_not_fit_is_in_one_error(tmp_path):
    folder = saved(tmp_path)

    def damage(tensors):
        del tensors["decoder.norm.weight"]
        tensors["heads.up_proj.weight"] = torch.zeros(2)
        tensors["project.weight"] = torch.zeros(3, 3)
        tensors["feature_std.int8_scale"] = torch.ones(1)

    change_tensors(folder, damage)
    with pytest.raises(HypernetworkError, match="fits its config") as caught:
        DocToLoRA.from_pretrained(folder)
    for part in (
        'Missing key(s) in state_dict: "decoder.norm.weight"', '"heads.up_proj.weight"', '"feature_std.int8_scale"',
        "size mismatch for project.weight",
    ):  # fmt: skip
        assert part in str(caught.value)


def test_an_unknown_config_key_is_refused(tmp_path):
    folder = saved(tmp_path)
    change_config(folder, lambda config: config["config"].update(flash=True, speed=9))
    with pytest.raises(ConfigError, match=r"flash is True.*speed is 9"):
        DocToLoRA.from_pretrained(folder)


@pytest.mark.parametrize("change", [{"format": 3}, {"format": None}, {"architecture": "ImageToLoRA"}])
def test_another_format_is_refused_before_its_tensors_are_looked_at(change, tmp_path):
    folder = saved(tmp_path)
    change_config(folder, lambda config: config.update(change))
    (folder / "model.safetensors").unlink()
    with pytest.raises(HypernetworkError, match="update loracast"):
        DocToLoRA.from_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("made_for"),
        lambda c: c.pop("config"),
        lambda c: c.update(made_for={"base": "x"}),
        lambda c: c["config"].pop("d_features"),
        lambda c: c["config"].update(rank="8"),
        lambda c: c["config"].update(modules=7),
        lambda c: c["config"].update(modules=[["m", 0]]),
        lambda c: c["config"].update(width=-1),
    ],
)
def test_a_damaged_config_is_one_readable_error(change, tmp_path):
    folder = saved(tmp_path)
    change_config(folder, change)
    with pytest.raises((HypernetworkError, ConfigError), match=r"damaged|bad DocToLoRAConfig"):
        DocToLoRA.from_pretrained(folder)


def test_a_config_that_asks_for_a_terabyte_allocates_nothing(tmp_path):
    folder = saved(tmp_path)
    change_config(folder, lambda config: config["config"].update(width=10_000_000))
    with pytest.raises(HypernetworkError, match="size mismatch"):
        DocToLoRA.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null"])
def test_what_is_no_config_is_refused(content, tmp_path):
    folder = saved(tmp_path)
    (folder / "config.json").write_bytes(content)
    with pytest.raises(HypernetworkError):
        DocToLoRA.from_pretrained(folder)


@pytest.mark.parametrize("damage", ["truncated", "empty", "pickle", "missing"])
def test_a_damaged_tensor_file_is_refused(damage, tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"truncated": whole[:-9], "empty": b"", "pickle": pickle.dumps({"a": 1})}[damage])
    with pytest.raises(HypernetworkError, match=r"whole model\.safetensors"):
        DocToLoRA.from_pretrained(path.parent)


def test_an_unknown_storage_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="float32, bfloat16, int8"):
        for_base(make(), MADE_FOR).save_pretrained(tmp_path, storage="int4")


def test_b_rows_copy_the_values_that_the_latents_point_to():
    hypernet = make("values")
    head, pointer = hypernet.head("down_proj"), hypernet.pointer("down_proj")
    features = make_features(hypernet, n=2, t=5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    head.scaler_b.data.zero_()  # nothing but the copy
    b = (
        hypernet.expand(hypernet.latents(features.states, mask))["down_proj"][1] / hypernet.config.scale
    )  # [2, layers, r, 48]
    weights = b / pointer.scaler @ torch.linalg.pinv(features.states[..., -48:])[:, None]  # [2, layers, r, 5]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 2), atol=1e-3, rtol=1e-3)
    assert (weights > -1e-3).all() and weights[0, ..., 3:].abs().max() < 1e-3


def test_values_need_a_module_that_writes_them():
    with pytest.raises(ConfigError, match="no module writes 48 numbers"):
        make(d_values=48, kinds=("up_proj",))


def test_a_memory_answers_a_token_with_what_stood_behind_it():
    """At an input like that after token t, the memory adds the value of token t + 1, times gate and strength."""
    hypernet = make("memory", fresh=True, memory_rank=6)
    memory = hypernet.memory
    memory.scale.data.fill_(1 / 400)
    memory.log_ridge.data.fill_(1.6)  # so high that every key stays as it is
    memory.strength_bias.data.copy_(
        torch.tensor([0.05, -0.05, -0.05, -0.05, -0.05]).expand(2, 5)
    )  # 0.5 + 10 * it: only the token before
    memory.gate.weight.data.zero_()
    memory.gate.bias.data.copy_(torch.tensor([20.0, -20.0, -20.0]))  # say every token
    features = make_features(hypernet, n=1)
    factors, writes = hypernet.cast_and_write(features)
    a, b = factors["o_proj"]  # [1, modules, 6, in], [1, modules, 6, out]
    assert writes.gate_logits.shape == (1, 6, 3) and writes.pointer_scores.shape == (1, 3, 6, 6)
    torch.testing.assert_close(b, features.states[:, None, :, -48:].expand_as(b), atol=1e-5, rtol=1e-5)
    keys = features.keys / features.keys.norm(dim=-1, keepdim=True) / 64**0.5
    torch.testing.assert_close(a[:, :, 1:], keys[:, :, :-1], atol=1e-5, rtol=1e-5)
    assert not a[:, :, 0].any()  # nothing stands before the first
    response = (
        b.transpose(2, 3) @ a @ features.keys[:, :, 2, :, None]
    )  # what the module adds where token 2's key comes in
    best = (response.squeeze(-1) @ features.states[0, :, -48:].T).argmax(-1)
    assert (best == 3).all()


def test_a_memory_maps_the_end_of_a_sentence_to_its_question():
    """Where every token looks alike at all of its chunk, its key is the mapped mean of the chunk, of length 1."""
    hypernet = make("memory", fresh=True, memory_rank=6)
    memory = hypernet.memory
    memory.strength_bias.data.copy_(torch.tensor([-0.05, -0.05, -0.05, 0.05, -0.05]).expand(2, 5))
    memory.query.weight.data.zero_()
    memory.log_ridge.data.fill_(1.6)
    things = torch.randn(2, 500, 8, generator=FREE)  # what sentences and their questions say, in 8 of 64 directions
    sides = torch.randn(2, 2, 8, 64, generator=FREE)
    ends, answers = (things @ side for side in sides)
    places = torch.randn(2, 8, 64, generator=FREE)
    set_question_map(memory, ends[:, :400], answers[:, :400], places)
    features = dataclasses.replace(make_features(hypernet, n=1), keys=ends[None, :, 400:406])
    a = hypernet.cast_and_write(features)[0]["o_proj"][0]  # [1, modules, 6, in]
    centred = features.keys.mean(2) - ends[:, :400].mean(1)
    expected = (centred[:, :, None] @ memory.from_end @ memory.to_question).squeeze(2)
    expected = torch.nn.functional.normalize(expected, dim=-1) / 64**0.5
    torch.testing.assert_close(a, expected[:, :, None].expand_as(a), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(a @ places.mT, torch.zeros(1, 2, 6, 8), atol=1e-5, rtol=0)  # blind to the places
    mapped = (ends[:, 400:] - ends[:, :400].mean(1, keepdim=True)) @ memory.from_end @ memory.to_question
    scores = torch.nn.functional.normalize(mapped, dim=-1) @ answers[:, 400:].mT  # [modules, 100, 100]
    assert (scores.argmax(1) == torch.arange(100)).float().mean() > 0.9  # of unseen things, each question finds its own


def test_a_memory_maps_the_tokens_from_a_written_one_on_to_its_question():
    """A token's key is the mapped mean of three tokens, fewer at the chunk's end, of length 1."""
    hypernet = make("memory", fresh=True, memory_rank=6, memory_near_tokens=3)
    memory = hypernet.memory
    strengths = torch.full((2, 6), -0.05)
    strengths[:, 4] = 0.05  # 0.5 + 10 * it: only near tokens
    memory.strength_bias.data.copy_(strengths)
    memory.log_ridge.data.fill_(1.6)
    memory.near_mean.data.normal_(generator=FREE)
    features = make_features(hypernet, n=1)
    a = hypernet.cast_and_write(features)[0]["o_proj"][0]  # [1, modules, 6, in]
    means = torch.stack([features.keys[:, :, t : t + 3].mean(2) for t in range(6)], dim=2) - memory.near_mean[:, None]
    expected = torch.nn.functional.normalize(means @ memory.from_near @ memory.near_to_question, dim=-1) / 64**0.5
    torch.testing.assert_close(a, expected, atol=1e-5, rtol=1e-5)


def test_a_memory_writes_what_a_sentence_says_of_a_rule(monkeypatch):
    """At the end of five tokens, with the key of an answer's first token at the end of a sentence; nothing elsewhere."""
    hypernet = make("verdicts", fresh=True, memory_rank=6)
    memory, features = hypernet.memory, make_features(hypernet, n=1)
    memory.scale.data.fill_(1 / 400)
    memory.gate.bias.data.fill_(-30)
    memory.log_ridge.data.fill_(1.6)
    memory.verdict.weight.data.zero_()
    memory.verdict_value.data.copy_(torch.randn(48, generator=FREE))
    read = memory.read

    def point(*given):
        x, writes = read(*given)
        writes.pointer_scores[:, 1, :5, 4] = 50  # to the end, as the first five tokens do
        return x, writes

    monkeypatch.setattr(memory, "read", point)
    rows = {}
    for key, at in {"end": 3, "place": -1}.items():  # of the parts of a key one alone counts
        strengths = torch.full((2, 6), -0.05)
        strengths[:, at] = 0.05
        memory.strength_bias.data.copy_(strengths)
        for yes in (30.0, -30.0):
            memory.verdict.bias.data.copy_(torch.tensor([yes, -yes]))
            a, b = hypernet.cast_and_write(features)[0]["o_proj"]  # [1, modules, 6, in], [1, modules, 6, out]
            torch.testing.assert_close(b[0, :, 4], memory.verdict_value.expand(2, -1) * (1 if yes > 0 else -1))
            assert b[0, :, [0, 1, 2, 3, 5]].abs().max() < 1e-5
        rows[key] = a[0, :, 4]  # [modules, in]
    mapped = (features.keys[0, :, 4] - memory.end_mean)[:, None] @ memory.from_end @ memory.to_question
    for key, expected in (("end", mapped.squeeze(1)), ("place", memory.place_keys[:, 0])):
        torch.testing.assert_close(rows[key], torch.nn.functional.normalize(expected, dim=-1) / 64**0.5)


def test_a_half_open_gate_writes_as_its_power_says():
    linear, root = (make("memory", fresh=True, memory_gate_power=power) for power in (1.0, 0.5))
    root.load_state_dict(linear.state_dict())
    features = make_features(linear, n=1)
    for logit in (-2.0, 3.0):
        for hypernet in (linear, root):
            hypernet.memory.scale.data.fill_(0.01)
            hypernet.memory.gate.weight.data.zero_()
            hypernet.memory.gate.bias.data.fill_(logit)
        of_linear, of_root = (hypernet.cast_and_write(features)[0]["o_proj"][1] for hypernet in (linear, root))
        torch.testing.assert_close(of_root, of_linear / torch.tensor(logit).sigmoid().sqrt())
    with pytest.raises(ConfigError, match="memory_gate_power"):
        make("memory", memory_gate_power=0.0)


def test_a_memory_keeps_the_tokens_whose_gates_are_most_open():
    hypernet = make("memory")
    features = make_features(hypernet)
    factors, writes = hypernet.cast_and_write(features)
    open_most = writes.gate_logits.sigmoid().sum(-1).topk(4).indices.sort().values  # [3, 4]
    whole = DocToLoRA(dataclasses.replace(hypernet.config, memory_rank=6))
    whole.load_state_dict(hypernet.state_dict())
    for h in (hypernet, whole):  # keys know of one another: of all of them, or of the four
        h.memory.log_ridge.data.fill_(1.6)
    factors, _ = hypernet.cast_and_write(features)
    for side, all_tokens in zip(factors["o_proj"], whole.cast_and_write(features)[0]["o_proj"], strict=True):
        for chunk in range(3):
            torch.testing.assert_close(side[chunk], all_tokens[chunk][:, open_most[chunk]])


def test_least_squares_keeps_keys_apart():
    """Nearly without a ridge, a key responds to itself as before and to no other that is written, at any lengths."""
    memory = make("memory").memory
    memory.log_ridge.data.fill_(-2.0)
    common = torch.randn(64, generator=FREE)
    units = torch.nn.functional.normalize(common + torch.randn(1, 2, 5, 64, generator=FREE), dim=-1)
    assert (units @ units.mT).sub(torch.eye(5)).abs().max() > 0.3
    lengths = torch.rand(1, 2, 5, 1, generator=FREE) + 0.5
    keys = lengths * units
    apart = memory._decorrelate(keys, torch.ones(1, 5))
    torch.testing.assert_close(apart @ units.mT, torch.diag_embed(lengths.squeeze(-1)), atol=1e-5, rtol=0)
    torch.testing.assert_close(memory._decorrelate(keys[:, :, :1], torch.ones(1, 1)), keys[:, :, :1])
    torch.testing.assert_close(memory._decorrelate(keys, torch.zeros(1, 5)), keys)
    memory.log_ridge.data.fill_(0.1)  # e^1, against numpy
    gram = (units @ units.mT)[0, 1].double().numpy()
    expected = np.linalg.inv(gram + math.e * np.eye(5)) @ units[0, 1].double().numpy() * (1 + math.e)
    expected = torch.from_numpy(expected).float() * lengths[0, 1]
    torch.testing.assert_close(memory._decorrelate(keys, torch.ones(1, 5))[0, 1], expected)


def test_a_memory_needs_keys():
    hypernet = make("memory")
    with pytest.raises(ValueError, match="keys and starts"):
        hypernet.cast_and_write(Features(make_features(hypernet).states))


def test_the_mean_of_several():
    nets = [make() for _ in range(3)]
    with torch.no_grad():
        for other in nets[1:]:
            for value in other.parameters():
                value.add_(torch.randn_like(value))
            other.feature_mean.add_(1)
    before = [{name: value.clone() for name, value in net.state_dict().items()} for net in nets]
    average(nets[0], nets[1:])
    for name, value in nets[0].named_parameters():
        torch.testing.assert_close(value, sum(weights[name] for weights in before) / 3)
    assert torch.equal(nets[0].feature_mean, before[0]["feature_mean"])  # its own units
    with pytest.raises(ConfigError, match="same architecture and config"):
        average(nets[0], [make(width=32)])


def test_what_fixes_no_weight_can_be_changed_in_a_config():
    net = make("memory")
    changed = with_config(net, {"key_decorrelation": 2.0})
    assert changed.config.key_decorrelation == 2.0 and net.config.key_decorrelation is None
    assert all(torch.equal(value, changed.state_dict()[name]) for name, value in net.state_dict().items())
    for changes in ({"width": 32}, {"key_decorrelation": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            with_config(net, changes)


def test_a_newer_key_of_the_config_is_in_no_id_at_its_default():
    """Hypernetworks of before the key, and adapters that name them, keep the id that they had."""
    hypernet = make("memory")
    newer = {"memory_near_tokens", "memory_verdicts", "memory_gate_power"}
    config = {key: value for key, value in dataclasses.asdict(hypernet.config).items() if key not in newer}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(hypernet.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    assert hypernet.id == digest.hexdigest()[:16]
    near = [make("near tokens", memory_near_tokens=n) for n in (2, 3)]
    near[1].load_state_dict(near[0].state_dict())
    assert near[0].id != near[1].id


def test_former_ids_name_the_weights_and_config_that_they_were_given_to_alone(tmp_path):
    for_base(make("memory"), MADE_FOR).save_pretrained(tmp_path / "first", storage="float32")
    stored = json.loads((tmp_path / "first" / "config.json").read_text())
    (tmp_path / "first" / "config.json").write_text(json.dumps({**stored, "former_ids": ["0123456789abcdef"]}))
    read = Hypernetwork.from_pretrained(tmp_path / "first")
    assert read.former_ids == ("0123456789abcdef",)
    changed = with_config(read, {"key_decorrelation": 2.0})
    changed.save_pretrained(tmp_path / "second", storage="float32")
    assert changed.former_ids == Hypernetwork.from_pretrained(tmp_path / "second").former_ids == ()
    average(read, [Hypernetwork.from_pretrained(tmp_path / "first")])
    assert read.former_ids == ()
