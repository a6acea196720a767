"""The contract of every hypernetwork: bind, encode, cast; ids and earlier formats; and the one loader of casters."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from loracast.answering.model import Model, load
from loracast.base.fingerprint import Fingerprint
from loracast.base.forward import pad_right
from loracast.base.load import Base
from loracast.cast.load import SHIPPED, load_caster, shipped_hypernetwork
from loracast.errors import BaseModelError, ConfigError, EncoderError, HypernetworkError
from loracast.hypernets.config import ModuleRow
from loracast.hypernets.encoders import HiddenStatesEncoder
from loracast.hypernets.protocol import Cast, Hypernetwork
from loracast.hypernets.store import read_made_for
from loracast.lab.training.checkpoint import with_config
from loracast.lab.training.doc import cast_documents, merged
from loracast.lora.target import Target, TargetModule, target_from_config
from tiny import DESCRIPTIONS, make_attention_delta, make_hypernet, make_model, make_tokenizer

architectures = pytest.mark.parametrize("architecture", ["document", "memory", "published", "task", "attention_delta"])
CHUNKS = [[3, 40, 77, 120, 9, 250, 31], [5, 6, 7], [300, 41, 77, 9, 88]]
RANK = 4  # tokens that the memory stores of a chunk
DOC_KEYS = {
    "prefix": "lead_in", "static_rank": "document_independent_rank", "static_modules": "shared_modules",
    "static_modules_rank": "shared_rank", "max_unscaled_chunks": "most_summed_chunks",
    "key_decorrelation": "memory_merge_ridge",
}  # fmt: skip
DELTA_KEYS = {
    "dummy_input": "probe", "dummy_answer": "probe_answer", "task_bank_rank": "recall_rank",
    "task_bank_width": "recall_width", "bank_sizes": "recalled", "n_seen": "n_known",
}  # fmt: skip
IDLE = {"whitened": False, "among_latents": False, "n_latents": 0, "factorised_queries": True}
"""Options of format 1 that are gone, at values that had no effect."""


@pytest.fixture
def make(base, hypernetwork):
    """Makes a tiny hypernetwork of an architecture for the tiny base; its LoRAs are not zero."""

    def make(architecture: str, **options):
        if architecture == "task":
            return Hypernetwork.from_pretrained(hypernetwork)
        if architecture == "attention_delta":
            return make_attention_delta(base, **options)
        if architecture == "published":
            options |= {"published": True, "n_encoder_blocks": 1, "n_latents": 3, "n_latent_mlps": 1}
        if architecture == "memory":
            modules = target_from_config(base.model.config, ("o_proj",), (1, 3)).rows
            options |= {"d_values": 48, "memory_modules": modules, "memory_rank": RANK, "memory_blocks": 1}
        hypernet = make_hypernet(base, static_rank=1, **options)
        hypernet.static["down_proj"].b.data.normal_()
        if architecture == "memory":
            hypernet.memory.scale.data.fill_(0.01)
            # Of the write gates (INSIDE, BEGIN, AFTER) only the first opens: a row of B is its token's value alone.
            hypernet.memory.gate.weight.data[1:] = 0
            hypernet.memory.gate.bias.data[1:] = -60
        return hypernet

    return make


@architectures
def test_another_base_is_refused(make, architecture):
    hypernet = make(architecture)
    model = make_model()
    model.model.norm.weight.data.mul_(2)
    with pytest.raises(BaseModelError, match=f"the hypernetwork for {hypernet.modality}s was made .*weights differ"):
        hypernet.bind(Base("other", model, make_tokenizer()))
    hypernet.made_for = dataclasses.replace(hypernet.made_for, config="0" * 16)
    with pytest.raises(BaseModelError, match="shapes differ"):
        hypernet.bind(Base("other", make_model(), make_tokenizer()))


@architectures
def test_rows_give_the_deltas_of_the_plain_forward(make, base, architecture):
    hypernet = make(architecture)
    caster, is_task = hypernet.bind(base), hypernet.modality == "task"
    features = caster.encode(DESCRIPTIONS if is_task else CHUNKS)
    rows = caster.cast(features).rows
    with torch.no_grad():
        plain = hypernet(features.states[:, 0]) if is_task else cast_documents(hypernet, features).loras
    static = hypernet.static_rows()
    assert set(rows) == set(hypernet.config.target.kinds) and bool(static) is not is_task
    for kind, (a, b) in rows.items():
        for i, module in enumerate(hypernet.config.target.of_kind(kind)):
            expected = plain.factors[module.name].b @ plain.factors[module.name].a
            assert expected.abs().max() > 0
            for n in range(3):
                delta = b[n].expand(len(a[n]), -1, -1)[i].T @ a[n, i]
                if kind in static:
                    delta = delta + static[kind][1][i].T @ static[kind][0][i]
                torch.testing.assert_close(delta, expected[n], atol=1e-5, rtol=1e-4)


def test_rows_of_a_memory_name_the_tokens_whose_values_they_hold(make, base):
    caster = make("memory").bind(base)
    found = caster.cast(caster.encode(CHUNKS))
    assert found.tokens is not None and set(found.tokens) == {"o_proj"}
    b = found.rows["o_proj"][1]  # [n, 1, r, out]: the same in all modules
    weight = base.model.lm_head.weight.float()
    values = (weight - weight.mean(0)) * base.model.model.norm.weight
    for n, chunk in enumerate(CHUNKS):
        is_written = b[n].abs().amax((0, 2)) > 0
        tokens = found.tokens["o_proj"][n][is_written[: found.tokens["o_proj"].shape[1]]].tolist()
        assert len(tokens) == len(set(tokens)) == min(RANK, len(chunk)) and max(tokens) < len(chunk)
        expected = values[[chunk[token] for token in tokens]]
        for module in b[n]:
            assert torch.cosine_similarity(module[is_written], expected).min() > 0.999


@pytest.mark.parametrize("fault", ["rank", "kind", "factor", "number"])
@architectures
def test_rows_that_do_not_fit_the_config_are_refused(make, base, architecture, fault, monkeypatch):
    caster = make(architecture).bind(base)
    features = caster.encode(DESCRIPTIONS if caster.hypernetwork.modality == "task" else CHUNKS)
    rows = caster.cast(features).rows
    kind, (a, b) = next(iter(rows.items()))
    wrong = {
        "rank": {kind: (a[:, :, 1:], b[:, :, 1:])},
        "kind": {"k_proj": (a, b)},
        "factor": {kind: (a, b.transpose(2, 3))},  # [out, r] where rows [r, out] are wanted
        "number": {name: (one[1:], other[1:]) for name, (one, other) in rows.items()},
    }
    monkeypatch.setattr(caster.hypernetwork, "cast", lambda features: Cast(rows | wrong[fault]))
    with pytest.raises(HypernetworkError, match=r"cast rows of the shapes .* B rows are \[n, modules, r, out\]"):
        caster.cast(features)


@dataclasses.dataclass(frozen=True)
class PlainConfig:
    """The least that a config needs: modules, target and ranks."""

    modules: tuple[ModuleRow, ...]

    @property
    def target(self) -> Target:
        return Target(tuple(TargetModule(*module) for module in self.modules))

    @property
    def ranks(self) -> dict[str, int]:
        return dict.fromkeys(self.target.kinds, RANK)


class Plain(Hypernetwork):
    """A hypernetwork for documents as CONTRIBUTING describes it: a linear map of the first hidden state of a chunk."""

    config_class = PlainConfig
    modality = "document"
    needs_base = True

    def __init__(self, config: PlainConfig):
        super().__init__()
        self.config = config
        self.a = torch.nn.Linear(48, 2 * RANK * 96)
        self.b = torch.nn.Linear(48, 2 * RANK * 48)
        self.static = torch.nn.Parameter(torch.randn(2, 3, 96 + 48))

    def encoder_for(self, base, encoder, say):
        read = HiddenStatesEncoder(base.model, (2,), prefix=(1,))
        return lambda rows: read(*pad_right(rows, base.pad_id))

    def cast(self, features):
        first = features.states[:, 0]
        return Cast({"down_proj": (self.a(first).view(-1, 2, RANK, 96), self.b(first).view(-1, 2, RANK, 48))})

    def static_rows(self):
        return {"down_proj": self.static.split([96, 48], dim=-1)}


def test_loras_and_merge_add_the_static_lora_of_any_subclass(base):
    torch.manual_seed(3)
    hypernet = Plain(PlainConfig(target_from_config(base.model.config, ("down_proj",), (1, 3)).rows))
    caster = hypernet.bind(base)
    features = caster.encode(CHUNKS[:2])
    a, b = caster.cast(features).rows["down_proj"]
    static_a, static_b = hypernet.static_rows()["down_proj"]
    each, together = caster.loras_of(features), merged(hypernet, {"down_proj": (a, b)}, 2)
    for i, name in enumerate(hypernet.config.target.names):
        deltas = b[:, i].mT @ a[:, i]
        static = static_b[i].T @ static_a[i]
        for loras, expected in ((each, deltas + static), (together, (deltas.sum(0) + static)[None])):
            found = loras.factors[name]
            torch.testing.assert_close(found.b @ found.a, expected)


@pytest.mark.parametrize("architecture", ["document", "memory", "published", "attention_delta"])
def test_a_base_of_another_depth_or_width_is_refused(make, architecture):
    hypernet = make(architecture)
    hypernet.made_for = None  # no fingerprint to compare
    shallow = make_model()
    del shallow.model.layers[1:]
    with pytest.raises(EncoderError, match=r"the base has no block \d, which is read"):
        hypernet.bind(Base("shallow", shallow, make_tokenizer()))
    config = make_model().config
    config.hidden_size = 64
    wide = type(shallow)(config)
    with pytest.raises(HypernetworkError, match=r"the hypernetwork reads .* gives \d+: give the"):
        hypernet.bind(Base("wide", wide, make_tokenizer()))


def test_without_a_base_a_hypernetwork_of_another_one_is_refused_before_the_default_is_fetched(
    make, tmp_path, monkeypatch
):
    hypernet = make("document")
    hypernet.save_pretrained(tmp_path / "other")
    monkeypatch.setattr("loracast.answering.model.load_base", lambda *_, **__: pytest.fail("a base was loaded"))
    for loader in (load, partial(load, eager=False)):
        with pytest.raises(BaseModelError, match=f"was made for the base {hypernet.made_for.base!r}, .*--base"):
            loader(hypernetwork=tmp_path / "other")
    with pytest.raises(BaseModelError, match="was made for the base"):
        load(task_hypernetwork=tmp_path / "other")
    loaded = []
    monkeypatch.setattr("loracast.answering.model.load_base", lambda base, **_: loaded.append(base))
    load(hypernetwork=shipped_hypernetwork("smollm2-135m-instruct"), eager=False)  # made for the default
    load("another", hypernetwork=tmp_path / "other", eager=False)  # the base itself is checked later
    assert loaded == [None, "another"]


@architectures
def test_the_id_is_that_of_config_and_weights(make, base, architecture, tmp_path):
    hypernet = make(architecture)
    changes = {"attention_delta": {"dummy_answer": "rice"}, "memory": {"key_decorrelation": 2.0}}
    changed = with_config(hypernet, changes.get(architecture, {"scale": 2.0}))
    assert changed.id != hypernet.id
    assert all(torch.equal(value, changed.state_dict()[name]) for name, value in hypernet.state_dict().items())
    hypernet.save_pretrained(tmp_path, storage="float32")
    read = Hypernetwork.from_pretrained(tmp_path)
    assert read.id == hypernet.id == hypernet.bind(base).id and read.former_ids == ()
    before = hypernet.id
    next(iter(hypernet.parameters())).data.flatten()[0] += 1e-3
    assert hypernet.id != before


def as_format_1(folder, names: dict[str, str], keys: dict[str, str], **changes) -> str:
    """Rewrite a float32 folder as loracast 0.1 wrote it; the id that it had there: a hash of the weights alone."""
    stored = json.loads((folder / "config.json").read_text())
    stored["format"] = 1
    stored["architecture"] = "AttendingToLoRA" if "dummy_input" in stored["config"] else "DocToLoRA"
    stored["config"] = {keys.get(key, key): value for key, value in stored["config"].items()} | changes
    (folder / "config.json").write_text(json.dumps(stored))
    tensors = load_file(folder / "model.safetensors")
    for new, old in names.items():
        tensors = {old + name.removeprefix(new) if name.startswith(new) else name: v for name, v in tensors.items()}
    if stored["architecture"] == "DocToLoRA":
        tensors["heads.down_proj.in_scale"] = torch.ones(4, 1, 96)
        tensors["heads.down_proj.out_scale"] = torch.ones(4, 1, 48)
    save_file(tensors, folder / "model.safetensors")
    content = b"".join(name.encode() + value.numpy().tobytes() for name, value in sorted(tensors.items()))
    return hashlib.sha256(content).hexdigest()[:16]


def test_format_1_opens_and_remembers_its_former_id(make, tmp_path):
    document = make("memory", max_unscaled_chunks=8)
    task = make("attention_delta", task_bank_rank=2, task_bank_width=3, bank_sizes=(2, 1))
    for folder, hypernet in (("document", document), ("gone", document), ("task", task)):
        hypernet.save_pretrained(tmp_path / folder, storage="float32")
    former = as_format_1(tmp_path / "document", {"static.": "document_independent."}, DOC_KEYS, **IDLE)
    names = {"encoder_lora.": "reading.", "task_bank.keys": "recall.entries", "task_bank.": "recall.", "seen": "known"}
    other = as_format_1(tmp_path / "task", names, DELTA_KEYS)
    for folder, hypernet, former_id in (("document", document, former), ("task", task, other)):
        read = Hypernetwork.from_pretrained(tmp_path / folder)
        assert read.config == hypernet.config and read.former_ids == (former_id,)
        assert read.id == hypernet.id != former_id
    as_format_1(tmp_path / "gone", {"static.": "document_independent."}, DOC_KEYS, **IDLE | {"whitened": True})
    with pytest.raises(ConfigError, match=r"trained with whitened, which .* no longer has: use loracast 0\.1"):
        Hypernetwork.from_pretrained(tmp_path / "gone")


def test_each_modality_takes_its_own_hypernetworks_only(make, base, tmp_path):
    for modality, wanted in (("document", "task"), ("task", "document")):
        make(modality).save_pretrained(tmp_path / modality)
        with pytest.raises(HypernetworkError, match=f"casts {modality}s, and {wanted}s are wanted"):
            load_caster(tmp_path / modality, wanted, base)
    make_hypernet(base, encoder="lenses", encoder_fingerprint="e" * 16).save_pretrained(tmp_path / "image")
    with pytest.raises(HypernetworkError, match="this hypernetwork reads images, which become words"):
        load_caster(tmp_path / "image", "document", base)
    assert load_caster(tmp_path / "document", "document", base).hypernetwork.modality == "document"


@pytest.mark.parametrize("modality", SHIPPED)
def test_a_shipped_hypernetwork_is_found_by_fingerprint(modality):
    def base_like(fingerprint: Fingerprint) -> Base:
        named = Base("/models/copy", make_model(), make_tokenizer())
        vars(named)["fingerprint"] = fingerprint
        return named

    made_for = read_made_for(shipped_hypernetwork("smollm2-135m-instruct", modality))
    renamed = dataclasses.replace(made_for, base="/models/copy", matrices="0" * 16)
    assert shipped_hypernetwork(base_like(renamed), modality).name == SHIPPED[modality]
    for part in ("config", "norms"):
        with pytest.raises(HypernetworkError, match="no hypernetwork is shipped for the base '/models/copy'"):
            shipped_hypernetwork(base_like(dataclasses.replace(renamed, **{part: "0" * 16})), modality)


def test_adapters_of_a_former_id_are_asked_and_found_again(model, base, tmp_path, monkeypatch):
    page = tmp_path / "page.txt"
    page.write_text("The lamp on the desk was made in the north. The museum opens at nine.")
    model.learn(page, "text", storage="text")
    model.learn(page, "kept", storage="int8")
    renewed = with_config(model.documents.hypernetwork, {"scale": 3.0})
    with pytest.raises(HypernetworkError, match="keeps only its text, and this is not the hypernetwork"):
        Model(base, model.library, renewed).adapter("text")
    renewed.former_ids = (model.documents.id,)
    later = Model(base, model.library, renewed)
    assert later.documents.id != model.documents.id
    assert isinstance(later.ask("What?", "text"), str)
    monkeypatch.setattr(type(later.documents), "cast", lambda *_: pytest.fail("cast anew"))
    later.learn(page, "again", storage="int8")
    again, kept = (model.library.versions(name) for name in ("again", "kept"))
    assert [entry.version for entry in again] == [entry.version for entry in kept]
