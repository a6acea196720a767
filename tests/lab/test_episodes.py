"""Packed rows of many questions, against each question in a row of its own."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from loracast.base.chat import encode_inside, encode_text
from loracast.base.forward import common_prefix
from loracast.hypernets.doc_to_lora import DocToLoRA, DocToLoRAConfig
from loracast.hypernets.encoders import HiddenStatesEncoder
from loracast.lab.training.doc import answer_questions, cast_documents
from loracast.lab.training.scoring import Episode, Question, pack
from loracast.lora.algebra import LoRA, inject
from loracast.lora.factors import Factors
from loracast.lora.target import target_from_config
from tiny import make_model, make_tokenizer

MODEL = make_model()
PAD = 0

tokens = st.lists(st.integers(3, 599), min_size=1, max_size=5).map(tuple)


@st.composite
def episodes(draw) -> list[Episode]:
    """Episodes of one to three chunks; the prompts of one share a beginning, sometimes the whole shorter prompt."""
    made = []
    for _ in range(draw(st.integers(1, 3))):
        beginning = draw(tokens)
        prompts = [beginning + draw(st.just(()) | tokens) for _ in range(draw(st.integers(1, 4)))]
        questions = tuple(Question(prompt, draw(tokens)) for prompt in prompts)
        made.append(Episode(tuple(draw(st.lists(tokens, min_size=1, max_size=3))), questions))
    return made


def make_hypernet(model, **options) -> DocToLoRA:
    """A hypernetwork strong enough to change every answer."""
    torch.manual_seed(1)
    target = target_from_config(model.config, ("v_proj", "down_proj"))
    config = DocToLoRAConfig.for_target(
        target, model.config.hidden_size, reader_layers=(2,), rank=2, width=16, n_heads=2, n_kv_heads=2, head_dim=8,
        n_decoder_blocks=1, **options,
    )  # fmt: skip
    hypernet = DocToLoRA(config)
    for kind in config.kinds:
        hypernet.head(kind).scaler_b.data.fill_(0.3)
    return hypernet


def documents_lora(encoder, hypernet, episode: Episode) -> LoRA:
    """A document's LoRA, its chunks expanded one by one."""
    parts = [cast_documents(hypernet, encoder(torch.tensor([chunk]))).loras.factors for chunk in episode.chunks]
    return LoRA(
        {
            name: Factors(torch.cat([p[name].a[0] for p in parts]), torch.cat([p[name].b[0] for p in parts], dim=1))
            for name in parts[0]
        }
    )


def merged(model, lora: LoRA):
    """A copy of the model with the delta in its weights."""
    model = copy.deepcopy(model)
    for name, (a, b) in lora.factors.items():
        model.get_submodule(name).weight.data += b @ a
    return model


def alone(model, question: Question) -> torch.Tensor:
    """Logits [answer, vocabulary] from which the answer's tokens are predicted, by transformers' own forward of one row."""
    ids = torch.tensor([[*question.prompt, *question.answer[:-1]]])
    return model(input_ids=ids).logits[0, len(question.prompt) - 1 :]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(episodes())
@torch.no_grad()
def test_every_branch_computes_what_its_own_row_would(made):
    batch = pack(made, PAD)
    encoder, hypernet = HiddenStatesEncoder(MODEL, (2,)), make_hypernet(MODEL)
    features = encoder(batch.chunk_ids, batch.chunk_mask)
    loras = cast_documents(hypernet, features, batch.chunks_per_document).loras
    own = [documents_lora(encoder, hypernet, episode) for episode in made]
    with inject(MODEL, loras):
        logits = MODEL(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits
    found = logits[batch.answer_rows, batch.answer_positions]
    expected = [
        alone(merged(MODEL, lora), question)
        for lora, episode in zip(own, made, strict=True)
        for question in episode.questions
    ]
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-3, rtol=1e-3)
    assert batch.answer_ids.tolist() == [i for e in made for q in e.questions for i in q.answer]
    assert batch.n_questions == sum(len(e.questions) for e in made)


def test_the_common_beginning_is_packed_once():
    prompt = tuple(range(10, 30))
    questions = tuple(Question((*prompt, 40 + i, 5), (7, 8, 2)) for i in range(4))
    batch = pack([Episode(((3, 4),), questions)], PAD)
    assert batch.n_tokens == 20 + 4 * (2 + 2)  # the last answer token is only predicted
    assert batch.position_ids.max() == 20 + 2 + 2 - 1


def test_common_prefix():
    assert common_prefix([(1, 2, 3)]) == 2  # a branch keeps the token from which its answer is predicted
    assert common_prefix([(1, 2, 3), (1, 2, 3)]) == 2
    assert common_prefix([(1, 2), (1, 2, 3)]) == 1
    assert common_prefix([(1, 2, 3, 4), (1, 2, 9, 4)]) == 2
    assert common_prefix([(5,), (5, 6)]) == 0


EPISODES = [
    Episode(((9, 8, 7, 6), (5, 4)), (Question((11, 12, 13, 14), (21, 22, 2)), Question((11, 12, 15), (23, 2)))),
    Episode(((31, 32, 33),), (Question((11, 12, 16, 17, 18), (24, 2)),)),
]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"])
def test_the_loss_is_that_of_separate_rows(family):
    """Gemma 2 adds its mask to eager attention's scores and caps its logits: neither may get lost."""
    model = make_model(family)
    encoder, hypernet = HiddenStatesEncoder(model, (2,)), make_hypernet(model)
    batch = pack(EPISODES, PAD)
    outcome, *_ = answer_questions(model, encoder, hypernet, batch)
    outcome.loss.backward()
    grads = {name: p.grad.clone() for name, p in hypernet.named_parameters()}
    with torch.no_grad():
        own = [documents_lora(encoder, hypernet, episode) for episode in EPISODES]
        logits = [alone(merged(model, lora), q) for lora, e in zip(own, EPISODES, strict=True) for q in e.questions]
    answers = [torch.tensor(q.answer) for e in EPISODES for q in e.questions]
    losses = [functional.cross_entropy(rows, ids) for rows, ids in zip(logits, answers, strict=True)]
    assert outcome.loss.item() == pytest.approx(sum(losses).item() / 3, rel=1e-3)
    right = [(rows.argmax(-1) == ids).float() for rows, ids in zip(logits, answers, strict=True)]
    assert outcome.exact == pytest.approx(sum(r.min().item() for r in right) / 3)
    assert outcome.token_accuracy == pytest.approx(torch.cat(right).mean().item())

    hypernet.zero_grad()
    total = 0.0
    for episode in EPISODES:
        lora = documents_lora(encoder, hypernet, episode)
        for question in episode.questions:
            with inject(model, lora):
                total = total + functional.cross_entropy(alone(model, question), torch.tensor(question.answer)) / 3
    total.backward()
    for name, p in hypernet.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, atol=2e-3 * max(1.0, p.grad.abs().max().item()), rtol=1e-2)


def test_a_batch_moves_whole():
    there = pack(EPISODES, PAD)
    moved = there.to("meta")
    assert moved.chunks_per_document == 2
    for field in dataclasses.fields(there):
        before, after = getattr(there, field.name), getattr(moved, field.name)
        if isinstance(before, torch.Tensor):
            assert after.is_meta and after.shape == before.shape and after.dtype == before.dtype, field.name
        else:
            assert after == before, field.name


def test_an_encoder_lora_is_the_bases_own_while_it_reads_and_learns():
    """What is read with it is what a base with merged weights would read; the answers' loss reaches it; without a gradient wanted there is none."""
    model = make_model().requires_grad_(False)
    modules = target_from_config(model.config, ("q_proj", "up_proj"), (0, 1)).rows
    hypernet = make_hypernet(model, encoder_modules=modules, encoder_rank=2)
    encoder = HiddenStatesEncoder(model, (2,), lora=hypernet.encoder_lora_batch)
    ids = torch.tensor([[9, 8, 7, 6, 5]])
    plain = HiddenStatesEncoder(model, (2,))(ids).states
    torch.testing.assert_close(encoder(ids).states, plain)  # B starts at zero
    for kind in ("q_proj", "up_proj"):
        torch.nn.init.normal_(hypernet.encoder_lora[kind].b, std=0.5)
    lora = hypernet.encoder_lora_batch()
    assert set(lora.factors) == {name for name, *_ in modules}
    row = LoRA({name: Factors(a[0].detach(), b[0].detach()) for name, (a, b) in lora.factors.items()})
    with torch.no_grad():
        read = encoder(ids).states
        of_merged = merged(model, row)(input_ids=ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(read, of_merged, atol=1e-4, rtol=1e-4)
    assert not read.requires_grad and (read - plain).abs().max() > 1e-2
    outcome, *_ = answer_questions(model, encoder, hypernet, pack(EPISODES, PAD))
    outcome.loss.backward()
    assert all(p.grad.abs().max() > 0 for p in hypernet.encoder_lora.parameters())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"])
def test_the_encoder_reads_the_bases_own_hidden_states(family):
    model = make_model(family)
    ids = torch.randint(3, 600, (2, 9), generator=torch.Generator().manual_seed(0))
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    for layers in ((0, 1, 2, 3), (3, 1), (2,), (0,)):
        features = HiddenStatesEncoder(model, layers)(ids).states
        expected = states[layers[0]] if len(layers) == 1 else torch.stack([states[n] for n in layers], dim=1)
        torch.testing.assert_close(features, expected)
        assert not features.requires_grad
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.long)], dim=1)
    torch.testing.assert_close(HiddenStatesEncoder(model, (2,))(padded).states[:, :9], states[2], atol=1e-4, rtol=1e-4)
    again = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(again) == len(states) and torch.equal(again[-1], states[-1])  # the base is as it was


@pytest.fixture
def ran(monkeypatch) -> list[int]:
    """The numbers of the blocks that ran."""
    numbers, block = [], type(MODEL.get_decoder().layers[0])
    forward = block.forward

    def counted(layer, *given, **options):
        numbers.append(layer.self_attn.layer_idx)
        return forward(layer, *given, **options)

    monkeypatch.setattr(block, "forward", counted)
    return numbers


def test_the_encoder_stops_at_the_deepest_layer_it_reads(ran):
    HiddenStatesEncoder(MODEL, (1, 2))(torch.tensor([[5, 6]]))
    assert ran == [0, 1]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_value_written_into_the_last_hidden_state_makes_the_base_say_its_token(family):
    model = make_model(family)
    ids = torch.arange(3, 103)[None]
    features = HiddenStatesEncoder(model, (2,), with_values=True)(ids).states
    values = features[0, :, -model.config.hidden_size :]
    torch.testing.assert_close(values.norm(dim=-1), torch.ones(100))
    said = model.get_output_embeddings()(model.get_decoder().norm(values)).argmax(-1)
    assert (said == ids[0]).float().mean() > 0.95  # tokens with nearly the same embedding aside


def test_a_lead_in_is_read_before_the_text_and_dropped():
    ids = torch.randint(3, 600, (2, 9), generator=torch.Generator().manual_seed(0))
    together = torch.cat([torch.tensor([[7, 8]]).expand(2, -1), ids], dim=1)
    states = MODEL(input_ids=together, output_hidden_states=True).hidden_states
    features = HiddenStatesEncoder(MODEL, (0, 2), with_values=True, prefix=(7, 8))(ids).states
    hidden = MODEL.config.hidden_size
    torch.testing.assert_close(features[..., :hidden], torch.stack([states[0], states[2]], dim=1)[:, :, 2:])
    without = HiddenStatesEncoder(MODEL, (0, 2), with_values=True)(ids).states
    assert torch.equal(features[..., hidden:], without[..., hidden:])


def test_keys_are_what_enters_the_modules_of_a_memory_and_reading_goes_as_deep(base, ran):
    ids = torch.randint(3, 600, (2, 9), generator=torch.Generator().manual_seed(0))
    names = ["model.layers.0.self_attn.o_proj", "model.layers.2.self_attn.o_proj"]
    seen = {}
    encoder = HiddenStatesEncoder(
        base.model, (1,), with_values=True, prefix=(7,), key_modules=names[::-1], tokenizer=base.tokenizer
    )
    features = encoder(ids)
    assert ran == [0, 1, 2]
    for name in names:
        base.model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.__setitem__(name, inputs[0])
        )
    base.model(torch.cat([torch.full((2, 1), 7), ids], dim=1))
    for i, name in enumerate(names):  # by layer, whatever order they were named in
        torch.testing.assert_close(features.keys[:, i], seen[name][:, 1:])
        base.model.get_submodule(name)._forward_pre_hooks.clear()


def test_bytes_of_a_character_begin_an_answer_without_the_space(base):
    tokenizer = make_tokenizer("a Øre, Ùb, Úc, Ûd, Ýe" * 9)  # whose first bytes are the same
    encoder = HiddenStatesEncoder(
        base.model, (1,), True, key_modules=["model.layers.0.self_attn.o_proj"], tokenizer=tokenizer
    )
    with_space, without = tokenizer.convert_tokens_to_ids(["ĠÃ", "Ã"])
    assert with_space and tokenizer.decode([with_space]) == " \ufffd"
    ids = torch.tensor([[with_space, without]])
    starts = encoder(ids).starts
    torch.testing.assert_close(starts, encoder.values(torch.tensor([[without, without]])))


def test_starts_are_the_values_of_how_an_answer_begins(base):
    ids = torch.tensor([encode_text(base.tokenizer, "the machine weighs 12 kg")])
    encoder = HiddenStatesEncoder(
        base.model, (1,), True, key_modules=["model.layers.0.self_attn.o_proj"], tokenizer=base.tokenizer
    )
    features = encoder(ids)
    for i, token in enumerate(ids[0].tolist()):
        text = base.tokenizer.decode([token]).strip()
        first = encode_inside(base.tokenizer, text)[0] if text else token
        torch.testing.assert_close(features.starts[0, i], encoder.values(torch.tensor([first]))[0])
    texts = [base.tokenizer.decode([token]) for token in ids[0].tolist()]
    assert any(text.startswith(" ") and text.strip() for text in texts)  # else this compares nothing
