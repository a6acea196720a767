"""Checkpointed blocks and rows in groups of similar length give the results and gradients of one plain pass."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loracast.base.forward import length_groups, names_within
from loracast.base.scoring import Episode, Passes, Question, pack
from loracast.hypernets.encoders import HiddenStatesEncoder
from loracast.lab.training.doc import answer_questions, read_in_groups
from loracast.lora.target import target_from_config
from tiny import DOC_TO_LORA, make_model, make_tokenizer

DOCUMENTS = [(3, 2), (30, 1), (9, 3), (25, 2), (4, 1), (11, 1)]  # tokens, questions
PLAIN = Passes()
OTHERS = [Passes(True), Passes(False, 3), Passes(True, 2)]


def episodes() -> list[Episode]:
    """Documents of unequal lengths in two chunks, with questions of unequal lengths about their three sentences."""
    free = torch.Generator().manual_seed(0)

    def some(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 599, (n,), generator=free).tolist())

    made = []
    for n_tokens, n_questions in DOCUMENTS:
        chunks = (some(n_tokens), some(n_tokens // 2 + 1))
        questions = [
            Question((5, 6, *some(n_tokens // 3 + i)), some(2 + i), sentence_weights=(0.2, 1.0, 0.5))
            for i in range(n_questions)
        ]
        owners = tuple(tuple(i % 3 for i in range(len(chunk))) for chunk in chunks)
        made.append(Episode(chunks, tuple(questions), token_sentences=owners))
    return made


def scored(family: str, passes: Passes, has_memory: bool):
    """Loss, what the memory's modules receive, and gradients, of a hypernetwork with every part in place."""
    from loracast.hypernets.doc_to_lora import DocToLoRA, DocToLoRAConfig

    model = make_model(family)
    torch.manual_seed(1)
    rows = target_from_config(model.config, ("q_proj",), (0, 1)).rows
    options = {**DOC_TO_LORA, "encoder_modules": rows, "encoder_rank": 2}
    if has_memory:
        memory = target_from_config(model.config, ("o_proj",), (1, 3)).rows
        options |= {"d_values": 48, "memory_modules": memory, "memory_rank": 6, "memory_question_rank": 4}
    target = target_from_config(model.config, ("v_proj", "down_proj"))
    hypernet = DocToLoRA(DocToLoRAConfig.for_target(target, 48 + options.get("d_values", 0), **options))
    for name, p in hypernet.named_parameters():
        if name.endswith(("scaler_b", "memory.scale", "q_proj.b")):
            torch.nn.init.constant_(p, 0.3 if "memory" not in name else 1e-3)
    keys = [name for name, *_ in hypernet.config.memory_modules]
    encoder = HiddenStatesEncoder(
        model, (2,), with_values=has_memory, key_modules=keys, lora=hypernet.encoder_lora_batch,
        tokenizer=make_tokenizer(),
    )  # fmt: skip
    kept = [0]

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[0] += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        scores, losses, _ = answer_questions(model, encoder, hypernet, pack(episodes(), 0), passes)
    total = scores.by_question.sum()
    total = total if losses.loss is None else total + losses.loss
    for x in scores.module_inputs.values():  # as the retrieval loss does
        total = total + x.square().mean()
    total.backward()
    return total.detach(), {n: p.grad for n, p in hypernet.named_parameters() if p.grad is not None}, kept[0]


@pytest.mark.parametrize(
    ("family", "has_memory"), [("llama", True), ("gemma2", False), ("gemma3_text", True), ("qwen3", True)]
)
def test_results_and_gradients_are_those_of_one_plain_pass(family, has_memory):
    expected, gradients, kept = scored(family, PLAIN, has_memory)
    assert any("encoder_lora" in name and g.abs().max() > 0 for name, g in gradients.items())
    for passes in OTHERS:
        total, found, fewer = scored(family, passes, has_memory)
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            tolerance = 1e-4 * gradient.abs().max().item() + 1e-7
            torch.testing.assert_close(
                found[name], gradient, rtol=1e-3, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
            )
        assert fewer < kept, passes


def test_a_block_is_itself_again_after_the_pass():
    model = make_model()
    scored("llama", Passes(True), False)
    assert all("forward" not in vars(block) for block in model.model.layers)


def test_a_blocks_modules_have_their_names_in_the_whole_model():
    model = make_model()
    wanted = {name for name, _ in model.named_modules() if f"{name}.".startswith("model.layers.1.")}
    assert names_within(model, model.model.layers[1]) == wanted and "model.layers.1.mlp.down_proj" in wanted


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 4))
@settings(deadline=None, derandomize=True)
def test_groups_waste_the_least(lengths, n):
    """Against all ways to cut the sorted lengths."""
    groups = length_groups(lengths, n)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    assert len(groups) <= n and all(groups)
    ordered = sorted(lengths, reverse=True)
    ways = [
        sum(ordered[a] * (b - a) for a, b in itertools.pairwise([0, *cuts, len(ordered)]))
        for k in range(min(n, len(ordered)))
        for cuts in itertools.combinations(range(1, len(ordered)), k)
    ]
    assert sum(lengths[group[0]] * len(group) for group in groups) == min(ways)
    assert all(lengths[group[0]] == max(lengths[i] for i in group) for group in groups)


def test_chunks_are_read_in_groups():
    """States of real tokens are those of one pass."""
    batch = pack(episodes(), 0)
    encoder = HiddenStatesEncoder(make_model(), (2,))
    plain, grouped = (read_in_groups(encoder, batch.chunk_ids, batch.chunk_mask, n).states for n in (1, 3))
    torch.testing.assert_close(grouped[batch.chunk_mask], plain[batch.chunk_mask], atol=1e-4, rtol=1e-4)
    assert grouped.shape == plain.shape
