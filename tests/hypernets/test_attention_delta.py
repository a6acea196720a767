"""The attention-delta hypernetwork: its encoder, its LoRAs, its file, its training, and the Python API around it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from loracast.base.load import Base
from loracast.cast.load import load_caster
from loracast.cast.task import TaskCaster
from loracast.documents.task_spec import Example, TaskSpec, as_examples, with_description
from loracast.errors import AdapterError, ConfigError, EncoderError
from loracast.hypernets.attention_delta import KEPT_RANK, AttentionDeltaToLoRA
from loracast.hypernets.attention_delta_encoder import POSITIONS
from loracast.lab.data.tasks import read_tasks
from loracast.lab.training.loop import TrainConfig
from loracast.lab.training.loras import OracleRecipe, PeftConfig, train_multitask
from loracast.lab.training.recipe import read_recipe
from loracast.lab.training.task_source import TaskDataConfig, TaskSource
from loracast.lab.training.task_start import cast_described, nothing_described
from loracast.lab.training.text import TextRecipe, fit_position_probes, train_text
from loracast.library.library import Library
from loracast.lora.algebra import LoRA, LoRABatch, inject
from loracast.lora.peft_format import read_peft
from other_processes import digests_in_another_process, digests_of_loras
from suites import write_suite
from tiny import ATTENTION_DELTA, DESCRIPTIONS, FAMILIES, for_base, make_attention_delta, make_model, make_tokenizer


def written_less(base: Base, lora: LoRABatch, ids: list[int], place: slice) -> Tensor:
    """What attention writes less without some tokens [blocks, t, d_state], from the base's own attention weights."""
    values: dict[int, Tensor] = {}
    blocks = base.model.get_decoder().layers
    handles = [
        block.self_attn.v_proj.register_forward_hook(lambda m, i, o, n=n: values.update({n: o}))
        for n, block in enumerate(blocks)
    ]
    usual = base.model.config._attn_implementation
    base.model.set_attn_implementation("eager")
    try:
        with torch.no_grad(), inject(base.model, lora):
            attentions = base.model(input_ids=torch.tensor([ids]), output_attentions=True).attentions
            is_left_out = torch.zeros(len(ids), dtype=torch.bool)
            is_left_out[place] = True
            written = []
            for n, weights in enumerate(attentions):
                block, heads = blocks[n].self_attn, weights.shape[1]
                others = weights.masked_fill(is_left_out, 0.0)
                others = others / others.sum(-1, keepdim=True)
                value = values[n].view(1, len(ids), -1, block.head_dim).transpose(1, 2)
                value = value.repeat_interleave(heads // value.shape[1], dim=1)
                less = ((weights - others) @ value).transpose(1, 2).flatten(2)
                written.append(block.o_proj(less)[0])
    finally:
        base.model.set_attn_implementation(usual)
        for handle in handles:
            handle.remove()
    return torch.stack(written)


def text_in(prompt: list[int], plain: list[int]) -> slice:
    """The tokens that a prompt has more than a plain one, all in one place."""
    first = next(i for i, (a, b) in enumerate(zip(plain, prompt, strict=False)) if a != b)
    return slice(first, first + len(prompt) - len(plain))


def contributions(base: Base, hypernet: AttentionDeltaToLoRA, description: str) -> Tensor:
    """Attention deltas of a description [positions, blocks, d_state]."""
    c, chat = hypernet.config, base.chat
    plain, prompt = chat.prompt(c.dummy_input, ""), chat.prompt(with_description(description, c.dummy_input), "")
    place, ids = text_in(prompt, plain), [*prompt, *chat.reply(c.dummy_answer)[:-1]]
    written = written_less(base, hypernet.encoder_lora_batch(), ids, place)
    n_after = len(chat.prompt("", "")) - place.start  # nothing is said
    at = {
        "start": [len(prompt) - 1],
        "answer": [len(ids) - 1],
        "input": range(place.stop, len(prompt) - n_after),
        "turn": range(len(prompt) - n_after, len(prompt) - 1),
    }
    return torch.stack([written[:, list(at[place])].mean(1) for place in POSITIONS])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_attention_writes_less_without_the_description(family):
    base = Base(family, make_model(family), make_tokenizer())
    hypernet = make_attention_delta(base)
    n_blocks = len(base.model.get_decoder().layers)
    read = hypernet.text_encoder(base)(DESCRIPTIONS)
    for i, text in enumerate(DESCRIPTIONS):
        expected = contributions(base, hypernet, text)
        assert expected.shape == (len(POSITIONS), n_blocks, 48) and expected.abs().amin(dim=(0, 1)).max() > 0
        torch.testing.assert_close(read[i].view(len(POSITIONS), n_blocks, 48), expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_are_read_in_the_base_as_it_is(family):
    base = Base(family, make_model(family), make_tokenizer())
    encoder = make_attention_delta(base).text_encoder(base)
    examples, asked = as_examples([("big", "small"), ("hot", "cold")]), Example("old", ("new",))
    plain, answer = base.chat.prompt("old", ""), base.chat.reply("new")[:-1]
    for description in ("", DESCRIPTIONS[0]):
        first = f"{description}\n\nbig" if description else "big"
        turns = zip(
            ("system", "user", "assistant", "user", "assistant", "user"),
            ("", first, "small", "hot", "cold", "old"),
            strict=True,
        )
        prompt = base.chat.conversation([{"role": role, "content": content} for role, content in turns])
        read = encoder.after_turns(TaskSpec(description, examples), asked)
        place = text_in(prompt, plain)
        expected = written_less(base, LoRABatch(1, {}, {}), [*prompt, *answer], place)[:, place.stop :]
        torch.testing.assert_close(read.deltas, expected, atol=1e-5, rtol=1e-3)
        assert (read.ids, read.n_input) == ([*plain, *answer], len(prompt) - 1 - place.stop)


def test_blocks_that_are_no_target_hand_theirs_on(base):
    some = make_attention_delta(base, layers=(1, 3))
    assert len(base.model.get_decoder().layers) == 4
    (read,) = some.text_encoder(base)(DESCRIPTIONS[:1]).view(1, len(POSITIONS), 2, 48)
    expected = contributions(base, some, DESCRIPTIONS[0])
    torch.testing.assert_close(read[:, 0], expected[:, 0] + expected[:, 1], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(read[:, 1], expected[:, 2] + expected[:, 3], atol=1e-5, rtol=1e-3)


def test_no_deeper_than_asked_for(base):
    shallow = make_attention_delta(base, depth=2)
    (read,) = shallow.text_encoder(base)(DESCRIPTIONS[:1]).view(1, len(POSITIONS), 2, 48)
    torch.testing.assert_close(read, contributions(base, shallow, DESCRIPTIONS[0])[:, :2], atol=1e-5, rtol=1e-3)
    ranks = {
        name: factors.a.shape[1] for name, factors in cast_described(shallow, read.flatten()[None]).factors.items()
    }
    assert [ranks[m.name] for m in shallow.config.target.of_kind("o_proj")] == [8, 8, 3, 3]
    with pytest.raises(ConfigError, match="within a depth of 1"):
        make_attention_delta(base, layers=(1, 3), depth=1)


def test_an_adapter_is_the_best_of_rank_12_and_descent_starts_from_all_of_it(base, tmp_path):
    hypernet = make_attention_delta(base, rank=6, shared_rank=16)
    for_base(hypernet, base.fingerprint).save_pretrained(tmp_path / "hypernetwork", storage="float32")
    caster = TaskCaster(load_caster(tmp_path / "hypernetwork", "task", lambda: base), Library(tmp_path / "library"))
    sentence = DESCRIPTIONS[0]
    whole = caster.hypernetwork(caster.caster.encode([sentence]).states[:, 0]).row(0)
    kept = caster.loras([sentence])[0]
    start = caster.hypernetwork.loras(caster.start_of_descent(TaskSpec(sentence, as_examples([("a", "b")])))).row(0)
    assert {name: pair.rank for name, pair in kept.factors.items()} == dict.fromkeys(whole.names, KEPT_RANK)
    assert {pair.rank for pair in whole.factors.values()} == {16, 22}
    for name in whole.names:
        u, s, vt = np.linalg.svd(whole.delta(name).detach().numpy(), full_matrices=False)
        assert s[KEPT_RANK] > 0.01 * s[0]
        best = torch.from_numpy(u[:, :KEPT_RANK] * s[:KEPT_RANK] @ vt[:KEPT_RANK])
        torch.testing.assert_close(kept.delta(name), best, atol=1e-4 * s[0], rtol=0)
        torch.testing.assert_close(start.delta(name), whole.delta(name), atol=1e-5 * s[0], rtol=0)
    assert caster.task(sentence, "kept").manifest.ranks == dict.fromkeys(("q_proj", "o_proj", "down_proj"), KEPT_RANK)


def test_what_is_cast_without_being_finite_is_refused_and_nothing_is_kept(base, tmp_path):
    hypernet = make_attention_delta(base, rank=6, shared_rank=16)
    for_base(hypernet, base.fingerprint).save_pretrained(tmp_path / "hypernetwork", storage="float32")
    caster = TaskCaster(load_caster(tmp_path / "hypernetwork", "task", lambda: base), Library(tmp_path / "library"))
    caster.hypernetwork.up.data[0] = float("inf")  # as an overflow gives; a file with it is refused
    for examples in ((), [("hot", "cold"), ("big", "small")]):
        with pytest.raises(AdapterError, match="these descriptions"):
            caster.task(DESCRIPTIONS[0], "opposite", examples=examples)
    assert Library(tmp_path / "library").names() == []


def test_reading_leaves_the_base_as_it_was(base):
    usual = base.model.config._attn_implementation
    ids = torch.randint(3, 600, (2, 5), generator=torch.Generator().manual_seed(5))
    before = base.model(input_ids=ids).logits
    make_attention_delta(base).text_encoder(base)(DESCRIPTIONS)
    assert base.model.config._attn_implementation == usual
    assert torch.equal(base.model(input_ids=ids).logits, before)


def test_at_the_start_contributions_are_written_as_they_were_read(base):
    hypernet = make_attention_delta(base, fresh=True)
    read = hypernet.text_encoder(base)(DESCRIPTIONS)
    batch, gate = hypernet(read), hypernet.gate(hypernet.pooled(read)).squeeze(-1).sigmoid()
    assert batch.n == 3 and tuple(batch.factors) == hypernet.config.target.names
    by_place = read.view(3, len(POSITIONS), -1, 48)
    for n, name in enumerate(m.name for m in hypernet.config.target.of_kind("o_proj")):
        a, b = batch.factors[name]
        assert torch.equal(a[1, :5], hypernet.where[n]) and a.shape[1] == hypernet.config.ranks["o_proj"] == 8
        torch.testing.assert_close(b[:, :, : len(POSITIONS)], by_place[:, :, n].transpose(1, 2) * gate[:, None, None])
        assert not b[:, :, len(POSITIONS) :].any()


def test_a_description_is_read_the_same_in_any_company(base):
    hypernet = make_attention_delta(base)
    reader = hypernet.text_encoder(base)
    together = hypernet(reader(DESCRIPTIONS))
    for i, text in enumerate(DESCRIPTIONS):
        for name, factors in hypernet(reader([text])).factors.items():
            torch.testing.assert_close(factors.b[0], together.factors[name].b[i], atol=1e-4, rtol=1e-3)


def test_what_all_texts_begin_with_is_read_anew_in_training_and_once_after_it(base):
    hypernet = make_attention_delta(base)
    reader = hypernet.text_encoder(base)
    first = reader(DESCRIPTIONS)
    hypernet.train()
    for part in hypernet.encoder_lora.values():
        part.b.data.mul_(1.5)
    other = reader(DESCRIPTIONS)
    torch.testing.assert_close(other, hypernet.text_encoder(base)(DESCRIPTIONS))
    assert not torch.allclose(first, other, atol=1e-3)
    torch.testing.assert_close(hypernet.eval().text_encoder(base)(DESCRIPTIONS), other)
    n_read: list[int] = []
    handle = base.model.get_input_embeddings().register_forward_hook(lambda m, inputs, out: n_read.append(out.shape[1]))
    torch.testing.assert_close(reader(DESCRIPTIONS), other)
    torch.testing.assert_close(reader(DESCRIPTIONS), other)
    handle.remove()
    assert len(n_read) == 3  # the beginning, then the texts alone, twice
    assert n_read[1] == n_read[2] > n_read[0] > 0


def test_a_description_that_is_the_probe_itself_is_read(base):
    hypernet = make_attention_delta(base)
    probe = hypernet.config.dummy_input
    (read,) = hypernet.text_encoder(base)([probe])
    assert read.isfinite().all()
    assert read.abs().max() > 0
    with pytest.raises(EncoderError, match="512 are read"):
        hypernet.text_encoder(base)(["The lamp on the desk. " * 200])


def test_the_gate_shuts_all_of_it(base):
    hypernet = make_attention_delta(base)
    read = hypernet.text_encoder(base)(DESCRIPTIONS)
    hypernet.gate[-1].weight.data.zero_()
    hypernet.gate[-1].bias.data.fill_(-200.0)
    assert not hypernet(read).squared_norms().any()
    hypernet.gate[-1].bias.data.fill_(0.0)
    half = hypernet(read).squared_norms()
    hypernet.gate[-1].bias.data.fill_(200.0)
    torch.testing.assert_close(4 * half, hypernet(read).squared_norms(), atol=1e-4, rtol=1e-4)


def test_it_knows_what_is_far_and_what_describes_nothing(base):
    hypernet = make_attention_delta(base)
    reader = hypernet.text_encoder(base)
    same, other = hypernet.distances(reader([DESCRIPTIONS[0], "zq vv kk"]))
    assert same < 1e-5 < other and hypernet.ood_threshold() > 0
    conditions = nothing_described(hypernet, 3, torch.Generator().manual_seed(0))
    assert conditions.shape == (4, reader.d_text)
    assert hypernet(conditions).squared_norms().isfinite().all()


def test_kept_and_read_again(base, tmp_path):
    hypernet = make_attention_delta(base)
    for_base(hypernet, base.fingerprint).save_pretrained(tmp_path, storage="float32")
    again = AttentionDeltaToLoRA.from_pretrained(tmp_path)
    made_for = again.made_for
    assert made_for == base.fingerprint and again.config == hypernet.config
    one, other = (h(h.text_encoder(base)(DESCRIPTIONS)) for h in (hypernet, again))
    for name in one.factors:
        assert torch.equal(one.factors[name].b, other.factors[name].b)


def test_a_user_casts_a_description(base, tmp_path):
    hypernet = make_attention_delta(base)
    for_base(hypernet, base.fingerprint).save_pretrained(tmp_path / "hypernetwork", storage="float32")
    caster = TaskCaster(load_caster(tmp_path / "hypernetwork", "task", lambda: base), Library(tmp_path / "library"))
    adapter = caster.task(DESCRIPTIONS[0], "opposite", storage="bf16")
    assert adapter.manifest.ranks == {"q_proj": 3, "o_proj": 8, "down_proj": 3}
    (lora,) = caster.loras([DESCRIPTIONS[0]])
    for name in lora.names:
        expected = lora.delta(name)
        torch.testing.assert_close(
            adapter.lora().delta(name).float(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item()
        )
    with pytest.raises(EncoderError, match="give it, and no other text encoder"):
        load_caster(tmp_path / "hypernetwork", "task")


def test_configs_that_cannot_be(base):
    with pytest.raises(ConfigError, match="modules of the kind o_proj, with 48 outputs"):
        make_attention_delta(base, kinds=("q_proj", "down_proj"))
    with pytest.raises(ConfigError, match="rank must be at least 4"):
        make_attention_delta(base, rank=3)


# ------------------------------------------------------------------------------------------------------- training


def recipe(**options) -> TextRecipe:
    return TextRecipe(
        kinds=("o_proj", "down_proj"),
        hypernetwork=ATTENTION_DELTA,
        data=TaskDataConfig(tasks_per_step=2, examples_per_task=5, augmented_share=0.3),
        training=TrainConfig(steps=44, lr=1e-2, log_every=10, warmup_steps=5, bf16=False),
        **options,
    )


def test_its_rows_fire_where_they_shall(base, tmp_path):
    hypernet = make_attention_delta(base)
    source = TaskSource(TaskDataConfig(), read_tasks(write_suite(tmp_path)), base.chat)
    probes = fit_position_probes(base, hypernet.encoder_lora_batch(), hypernet.in_layers(hypernet.config.kind), source)
    hypernet.where.data[:, : probes.shape[1]] = probes
    example = source.tasks[0].train[0]
    prompt, answer = base.chat.prompt(example.input, ""), base.chat.reply(example.outputs[0])[:-1]
    seen: list[Tensor] = []
    module = base.model.get_submodule(hypernet.config.target.of_kind("o_proj")[-1].name)
    handle = module.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0][0]))
    with torch.no_grad(), inject(base.model, hypernet.encoder_lora_batch()):
        base.model(input_ids=torch.tensor([[*prompt, *answer]]))
    handle.remove()
    fires = hypernet.where[-1, : len(POSITIONS)] @ seen[0].T
    start, later = fires[POSITIONS.index("start")], fires[POSITIONS.index("answer")]
    assert start.argmax() == len(prompt) - 1 and start.max() > 0.5
    assert later[len(prompt) :].mean() > later[: len(prompt)].mean() + 0.3


def test_it_learns_tasks_and_shuts_for_gibberish(base, tmp_path):
    rows: list[dict[str, float]] = []
    tasks = read_tasks(write_suite(tmp_path))
    train_text(base, recipe(null_condition_weight=0.3), tasks, tmp_path / "run", on_metrics=rows.append)
    hypernet = AttentionDeltaToLoRA.from_pretrained(tmp_path / "run")
    assert rows[-1]["answer_loss"] < 0.7 * rows[0]["answer_loss"] and hypernet.config.n_seen == 4
    reader = hypernet.text_encoder(base)
    seen, nonsense = (
        hypernet(reader(texts)).squared_norms().mean() for texts in (["train words for shout"], ["qv xzz kp wvuq"])
    )
    assert nonsense < 0.5 * seen
    again = dataclasses.replace(recipe(), hypernetwork={}, training=TrainConfig(steps=1, warmup_steps=1, bf16=False))
    train_text(base, again, tasks, tmp_path / "next", init_from=tmp_path / "run")
    assert AttentionDeltaToLoRA.from_pretrained(tmp_path / "next").config == hypernet.config


@pytest.mark.parametrize("is_trained", [False, True])
def test_reading_and_what_all_share_start_from_a_multitask_lora(base, tmp_path, is_trained):
    tasks = read_tasks(write_suite(tmp_path))
    lora = PeftConfig(kinds=("o_proj", "down_proj"), rank=3)
    training = TrainConfig(steps=2, warmup_steps=1, bf16=False)
    multitask = OracleRecipe(lora=lora, data=TaskDataConfig(tasks_per_step=2), training=training)
    assert train_multitask(base, multitask, tasks, tmp_path / "multitask", described=True)
    settings = dataclasses.replace(
        recipe(encoder_lora_is_trained=is_trained), training=dataclasses.replace(training, lr=1e-3)
    )
    train_text(base, settings, tasks, tmp_path / "run", shared_from=tmp_path / "multitask")
    hypernet = AttentionDeltaToLoRA.from_pretrained(tmp_path / "run")
    trained, read_with = LoRA(read_peft(tmp_path / "multitask")), hypernet.encoder_lora_batch().row(0)
    unchanged = [
        torch.allclose(read_with.delta(name), trained.delta(name).float(), atol=1e-6, rtol=1e-4)
        for name in trained.names
    ]
    assert all(unchanged) is not is_trained
    known = hypernet.text_encoder(base)(
        [text for task in tasks if not task.is_heldout for text in task.seen_descriptions()]
    )
    assert hypernet.distances(known).max() < 1e-4  # as it is read in the end


def test_options_of_the_other_variants_are_refused(base, tmp_path):
    path = tmp_path / "r.toml"
    for line, message in (
        ('variant = "attention_delta"\nwidth = 3', "no hypernetwork.width"),
        ('variant = "attention_delta"\nencoder = "base"', "no hypernetwork.encoder"),
    ):
        path.write_text(f'[hypernetwork]\nkinds = ["o_proj"]\n{line}\n')
        with pytest.raises(ConfigError, match=message):
            train_text(base, read_recipe(TextRecipe(), path), read_tasks(write_suite(tmp_path)), tmp_path / "run")


def test_another_process_and_hash_seed_make_the_same_bits(base, tiny_folder, hypernetwork, tmp_path):
    """Of text-to-LoRA too: its published code took its modules from a set, so that factors could swap."""
    for_base(make_attention_delta(base), base.fingerprint).save_pretrained(tmp_path / "delta", storage="bfloat16")
    hypernetworks = [str(tmp_path / "delta"), str(hypernetwork)]
    here = digests_of_loras(str(tiny_folder), hypernetworks, DESCRIPTIONS)
    assert len({*here}) == 2
    assert digests_in_another_process(tmp_path, tiny_folder, hypernetworks, DESCRIPTIONS) == here
