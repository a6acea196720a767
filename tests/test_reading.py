"""Text-to-LoRA that reads: its start, its gate, what it copies, its file, its training, and a user's way to it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional

from conftest import make_model, make_tokenizer
from loracast.base import Base
from loracast.chat import encode_text
from loracast.describe import TaskCaster, load_caster
from loracast.encoders.context import ContextEncoder
from loracast.encoders.description import DescriptionReader
from loracast.errors import ConfigError, EncoderError
from loracast.hypernets.doc_to_lora import DocToLoRA, DocToLoRAConfig
from loracast.hypernets.reading import ReadingToLoRA, ReadingToLoRAConfig, with_memory
from loracast.hypernets.store import from_pretrained, save_pretrained
from loracast.inject import inject
from loracast.lora import LoRA
from loracast.target import target_from_config
from loracast.tasks import read_tasks
from loracast.training.loop import TrainConfig
from loracast.training.oracle import OracleRecipe, train_multitask
from loracast.training.peft_training import PeftConfig
from loracast.training.task_source import TaskDataConfig
from loracast.training.text import TextRecipe, read_text_recipe, train_text
from other_processes import digests_in_other_processes
from test_tasks import write_suite

TEXTS = ["Answer with the opposite word.", "Say it louder", "Turn each word around, and end with a full stop."]
TINY = {
    "variant": "reading",
    "reader_layer": 2,
    "rank": 2,
    "shared_rank": 3,
    "width": 16,
    "n_heads": 2,
    "head_shared_rank": 4,
}


def make(base: Base, kinds=("q_proj", "o_proj", "down_proj"), *, fresh: bool = False, **options) -> ReadingToLoRA:
    settings = {name: value for name, value in {**TINY, **options}.items() if name != "variant"}
    torch.manual_seed(1)
    target = target_from_config(base.model.config, kinds)
    hypernet = ReadingToLoRA(ReadingToLoRAConfig(48, target.rows, lead_in=(5,), **settings))
    if not fresh:
        for part in (*hypernet.reader.heads.values(), *hypernet.reader.pointers.values()):
            getattr(part, "scaler_b" if hasattr(part, "scaler_b") else "scaler").data.normal_()
        for shared in hypernet.reader.document_independent.values():
            shared.b.data.normal_()
        hypernet.gate[-1].weight.data.normal_()
    return hypernet.eval().requires_grad_(False)


def test_the_start_is_an_exact_no_op(base):
    hypernet = make(base, fresh=True)
    reader = DescriptionReader(base, hypernet.config)
    hypernet.know(reader(TEXTS))
    batch = hypernet(reader(TEXTS))
    assert batch.n == 3 and set(batch.factors) == set(hypernet.config.target.names)
    ids = torch.randint(3, 600, (3, 5), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        with inject(base.model, batch):
            found = base.model(input_ids=ids).logits
        assert torch.equal(found, base.model(input_ids=ids).logits)
    assert all(factors.a.any() for factors in batch.factors.values())


def test_a_description_is_read_the_same_in_any_company(base):
    hypernet = make(base)
    reader = DescriptionReader(base, hypernet.config)
    hypernet.know(reader(TEXTS))
    together = hypernet(reader(TEXTS))
    for i, text in enumerate(TEXTS):
        alone = hypernet(reader([text]))
        for name, factors in alone.factors.items():
            torch.testing.assert_close(factors.b[0], together.factors[name].b[i], atol=1e-4, rtol=1e-4)
            assert factors.a.shape[1] == hypernet.config.lora_rank == 5


def test_what_is_read_are_the_states_and_what_an_answer_begins_with(base):
    config = make(base).config
    conditions = DescriptionReader(base, config)(TEXTS)
    ids = encode_text(base.tokenizer, TEXTS[1])
    states = base.model(input_ids=torch.tensor([[5, *ids]]), output_hidden_states=True).hidden_states[2][0, 1:]
    assert conditions.shape == (3, max(len(encode_text(base.tokenizer, t)) for t in TEXTS), 2 * 48 + 1)
    torch.testing.assert_close(conditions[1, : len(ids), :48], states, atol=1e-4, rtol=1e-4)
    assert conditions[1, :, -1].tolist() == [1.0] * len(ids) + [0.0] * (conditions.shape[1] - len(ids))
    # The value of a token makes the base say what an answer begins with: the word without its space.
    weight = base.model.get_output_embeddings().weight
    centred = functional.normalize((weight - weight.mean(0)) * base.model.model.norm.weight, dim=-1)
    for place, token in enumerate(ids):
        first = encode_text(base.tokenizer, base.tokenizer.decode([token]).strip())[0]
        torch.testing.assert_close(conditions[1, place, 48:96], centred[first], atol=1e-5, rtol=1e-4)


def test_the_gate_shuts_all_of_it(base):
    hypernet = make(base)
    reader = DescriptionReader(base, hypernet.config)
    hypernet.know(reader(TEXTS))
    hypernet.gate[-1].weight.data.zero_()
    hypernet.gate[-1].bias.data.fill_(-200.0)
    assert not hypernet(reader(TEXTS)).squared_norms().any()
    hypernet.gate[-1].bias.data.fill_(0.0)
    half = hypernet(reader(TEXTS)).squared_norms()
    hypernet.gate[-1].bias.data.fill_(200.0)
    torch.testing.assert_close(4 * half, hypernet(reader(TEXTS)).squared_norms(), atol=1e-4, rtol=1e-4)


def test_conditions_that_describe_nothing_have_the_shape_of_what_is_read(base):
    hypernet = make(base)
    reader = DescriptionReader(base, hypernet.config)
    hypernet.know(reader(TEXTS))
    for conditions in (hypernet.constant(), hypernet.meaningless(3, torch.Generator().manual_seed(0))):
        assert conditions.shape[2] == reader.d_text and conditions[..., -1].all()
        assert hypernet(conditions).squared_norms().isfinite().all()


def test_it_knows_what_is_far(base):
    hypernet = make(base)
    reader = DescriptionReader(base, hypernet.config)
    hypernet.know(reader(TEXTS))
    same, other = hypernet.distances(reader([TEXTS[0], "zq vv kk"]))
    assert same < 1e-5 < other and hypernet.usual_distance() > 0


def with_tiny_memory(base: Base) -> tuple[ReadingToLoRA, DocToLoRA]:
    """A hypernetwork that took the memory of one for documents, and the latter."""
    torch.manual_seed(2)
    rows = target_from_config(base.model.config, ("o_proj",), (1, 3)).rows
    config = DocToLoRAConfig.for_target(
        target_from_config(base.model.config, ("down_proj",)), 96, reader_layers=(2,), rank=2, width=16, n_heads=2, n_kv_heads=2,
        head_dim=8, lead_in=(5,), d_values=48, memory_modules=rows, memory_rank=6, memory_question_rank=4,
    )  # fmt: skip
    doc = DocToLoRA(config)
    doc.feature_mean.normal_(std=0.1)
    for name, value in doc.memory.named_parameters():
        value.data.normal_(std=0.02 if name == "scale" else 0.3)
    hypernet = make(base)
    hypernet.know(DescriptionReader(base, hypernet.config)(TEXTS))
    return with_memory(hypernet, doc).eval().requires_grad_(False), doc.requires_grad_(False)


def test_a_memory_is_that_of_the_documents_and_starts_without_a_word(base):
    hypernet, doc = with_tiny_memory(base)
    plain = make(base)
    plain.know(DescriptionReader(base, plain.config)(TEXTS))
    conditions = DescriptionReader(base, hypernet.config)(TEXTS)
    before = plain(DescriptionReader(base, plain.config)(TEXTS))
    for name, pair in hypernet(conditions).factors.items():
        torch.testing.assert_close(
            pair.b @ pair.a, before.factors[name].b @ before.factors[name].a, atol=1e-5, rtol=1e-5
        )

    hypernet.memory_gain.fill_(0.01)
    hypernet.gate[-1].weight.zero_()
    hypernet.gate[-1].bias.fill_(200.0)  # wide open
    made = hypernet(conditions)
    for i, text in enumerate(TEXTS):
        ids = torch.tensor([encode_text(base.tokenizer, text)])
        read = ContextEncoder.for_hypernet(base, doc)(ids)
        starts = conditions[i, None, : ids.shape[1], 48:96]  # replies begin otherwise than answers about documents
        standard = (read.states - doc.feature_mean) / doc.feature_std
        a, b, _ = doc.memory(standard, dataclasses.replace(read, starts=starts), torch.ones_like(ids, dtype=torch.bool))
        for module, (name, *_) in enumerate(hypernet.config.memory_modules):
            pair = made.factors[name]
            assert pair.a.shape[1] == hypernet.config.lora_rank == 5 + 6
            found = pair.b[i, :, 5:] @ pair.a[i, 5:]
            torch.testing.assert_close(found, 0.01 * 30 * b[0, module].T @ a[0, module], atol=1e-4, rtol=1e-3)
            assert found.abs().max() > 1e-3


def test_a_memory_that_does_not_fit_is_refused(base):
    hypernet, doc = with_tiny_memory(base)
    with pytest.raises(ConfigError, match="has a memory already"):
        with_memory(hypernet, doc)
    with pytest.raises(ConfigError, match="same width"):
        with_memory(make(base, reader_layer=1), doc)
    without = DocToLoRA(dataclasses.replace(doc.config, memory_modules=()))
    with pytest.raises(ConfigError, match="no memory to start from"):
        with_memory(make(base), without)


def test_a_memory_is_trained_with_the_rest_and_kept(base, tmp_path):
    _, doc = with_tiny_memory(base)
    save_pretrained(doc, tmp_path / "doc", base.fingerprint, storage="float32")
    settings = dataclasses.replace(
        recipe(),
        kinds=("o_proj", "down_proj"),
        hypernetwork={**TINY, "lead_in": (5,)},
        training=TrainConfig(steps=6, lr=5e-3, warmup_steps=1, bf16=False),
    )
    tasks = read_tasks(write_suite(tmp_path))
    train_text(base, settings, tasks, tmp_path / "run", memory_from=tmp_path / "doc")
    hypernet, _ = from_pretrained(tmp_path / "run", ReadingToLoRA)
    assert hypernet.memory_gain != 0 and hypernet.config.memory_modules == doc.config.memory_modules
    assert not torch.equal(hypernet.memory.query.weight, doc.memory.query.weight)
    for conditions in (hypernet.constant(), hypernet.meaningless(3, torch.Generator().manual_seed(0))):
        assert hypernet(conditions).squared_norms().isfinite().all()


def test_kept_and_read_again(base, tmp_path):
    hypernet = make(base)
    hypernet.know(DescriptionReader(base, hypernet.config)(TEXTS))
    save_pretrained(hypernet, tmp_path, base.fingerprint, storage="float32")
    again, made_for = from_pretrained(tmp_path, ReadingToLoRA)
    assert made_for == base.fingerprint and again.config == hypernet.config
    conditions = DescriptionReader(base, again.config)(TEXTS)
    for one, other in zip(hypernet(conditions).factors.values(), again(conditions).factors.values(), strict=True):
        torch.testing.assert_close(one.b @ one.a, other.b @ other.a, atol=1e-6, rtol=1e-5)


def test_a_user_casts_a_description(base, tmp_path):
    hypernet = make(base)
    hypernet.know(DescriptionReader(base, hypernet.config)(TEXTS))
    save_pretrained(hypernet, tmp_path / "hypernetwork", base.fingerprint, storage="float32")
    caster = load_caster(tmp_path / "hypernetwork", base=lambda: base, library=tmp_path / "library")
    assert isinstance(caster, TaskCaster)
    adapter = caster.task(TEXTS[0], "opposite")
    assert set(adapter.manifest.ranks.values()) == {5}
    (lora,) = caster.loras([TEXTS[0]])
    for name in lora.names:
        expected = lora.delta(name)
        torch.testing.assert_close(
            adapter.lora().delta(name).float(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item()
        )
    with pytest.raises(EncoderError, match="give the base, and no other text encoder"):
        load_caster(tmp_path / "hypernetwork")
    with pytest.raises(EncoderError, match="512 are read"):
        caster.loras(["The lamp on the desk. " * 200])


def test_matrices_held_in_bf16_give_the_same_bits(base):
    hypernet, held = make(base), make(base)
    conditions = DescriptionReader(base, hypernet.config)(TEXTS)
    before = {name: p.dtype for name, p in held.named_parameters()}
    held.hold_in_bf16()
    turned = {name for name, p in held.named_parameters() if p.dtype != before[name]}
    assert {"reader.project.weight", "reader.heads.o_proj.up", "reader.pointers.down_proj.key.weight"} <= turned
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for one, other in zip(hypernet(conditions).factors.values(), held(conditions).factors.values(), strict=True):
            assert torch.equal(one.a, other.a) and torch.equal(one.b, other.b)


def test_configs_that_cannot_be():
    rows = target_from_config(make_model().config, ("q_proj", "v_proj")).rows
    with pytest.raises(ConfigError, match="writes into the residual stream"):
        ReadingToLoRAConfig(40, rows)
    with pytest.raises(ConfigError, match="multiple of n_heads"):
        ReadingToLoRAConfig(48, rows, width=20, n_heads=8)


# ------------------------------------------------------------------------------------------------------- training


def recipe(**options) -> TextRecipe:
    return TextRecipe(
        kinds=("v_proj", "down_proj"),
        hypernetwork=TINY,
        data=TaskDataConfig(tasks_per_step=2, examples_per_task=5, varied_share=0.3),
        training=TrainConfig(steps=60, lr=5e-3, log_every=10, warmup_steps=5, bf16=False),
        **options,
    )


def test_it_learns_tasks_and_shuts_for_gibberish(base, tmp_path):
    rows: list[dict[str, float]] = []
    train_text(
        base, recipe(calm_weight=0.3), read_tasks(write_suite(tmp_path)), tmp_path / "run", on_metrics=rows.append
    )
    hypernet, _ = from_pretrained(tmp_path / "run", ReadingToLoRA)
    assert rows[-1]["answer_loss"] < 0.6 * rows[0]["answer_loss"] and hypernet.config.n_known == 4
    reader = DescriptionReader(base, hypernet.config)
    seen, nonsense = (
        hypernet(reader(texts)).squared_norms().mean() for texts in (["train words for shout"], ["qv xzz kp wvuq"])
    )
    assert nonsense < 0.5 * seen
    # It goes on from its folder, and another run from its weights.
    again = dataclasses.replace(recipe(), hypernetwork={}, training=TrainConfig(steps=1, warmup_steps=1, bf16=False))
    train_text(base, again, read_tasks(tmp_path), tmp_path / "next", init_from=tmp_path / "run")
    assert from_pretrained(tmp_path / "next", ReadingToLoRA)[0].config == hypernet.config


def test_what_all_share_starts_from_a_multitask_lora(base, tmp_path):
    tasks = read_tasks(write_suite(tmp_path))
    lora = PeftConfig(kinds=("v_proj", "down_proj"), rank=3)
    training = TrainConfig(steps=2, warmup_steps=1, bf16=False)
    multitask = OracleRecipe(lora=lora, data=TaskDataConfig(tasks_per_step=2), training=training)
    assert train_multitask(base, multitask, tasks, tmp_path / "multitask")
    settings = dataclasses.replace(recipe(), training=dataclasses.replace(training, steps=1, lr=1e-9))
    train_text(base, settings, tasks, tmp_path / "run", shared_from=tmp_path / "multitask")
    hypernet, _ = from_pretrained(tmp_path / "run", ReadingToLoRA)
    from loracast.peft_format import read_peft

    trained = read_peft(tmp_path / "multitask")
    hypernet.gate[-1].bias.data.fill_(200.0)
    made: LoRA = hypernet(DescriptionReader(base, hypernet.config)(TEXTS[:1])).row(0)
    for name in trained.names:
        torch.testing.assert_close(made.delta(name), trained.delta(name).float(), atol=1e-4, rtol=1e-3)
    other = dataclasses.replace(settings, hypernetwork={**TINY, "shared_rank": 4})
    with pytest.raises(ConfigError, match="no factors of rank 4"):
        train_text(base, other, tasks, tmp_path / "other", shared_from=tmp_path / "multitask")


def test_options_of_the_other_variants_are_refused(base, tmp_path):
    path = tmp_path / "r.toml"
    for line, message in (
        ('variant = "reading"\nhead_width = 3', "no hypernetwork.head_width"),
        ('variant = "L"\nshared_rank = 3', "no hypernetwork.shared_rank"),
        ('variant = "reading"\nencoder = "base"', "leave hypernetwork.encoder out"),
    ):
        path.write_text(f"[hypernetwork]\n{line}\n")
        with pytest.raises(ConfigError, match=message):
            train_text(base, read_text_recipe(path), read_tasks(write_suite(tmp_path)), tmp_path / "run")


def test_the_tokenizer_of_the_fixtures_has_words_that_begin_with_a_space():
    tokenizer = make_tokenizer()
    assert any(tokenizer.decode([i]).startswith(" ") for i in encode_text(tokenizer, TEXTS[2]))


def test_another_process_and_hash_seed_make_the_same_bits(base, tiny_folder, tmp_path):
    hypernet = make(base)
    hypernet.know(DescriptionReader(base, hypernet.config)(TEXTS))
    save_pretrained(hypernet, tmp_path / "hypernetwork", base.fingerprint, storage="bfloat16")
    digests = digests_in_other_processes(tiny_folder, tmp_path / "hypernetwork", TEXTS)
    assert len(digests) == 1 and len(digests.pop()) == 64
