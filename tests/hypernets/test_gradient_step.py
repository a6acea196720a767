"""The step towards the answers of a task's examples: its direction, its size, and the adapter that has it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from loracast.base.forward import capture_inputs
from loracast.base.load import Base
from loracast.cast.task import TaskCaster
from loracast.documents.task_spec import Example, TaskSpec, as_examples
from loracast.hypernets import attention_delta
from loracast.hypernets import example_fit as gradient_step
from loracast.library.library import Library
from loracast.lora.algebra import LoRA, LoRABatch, concat, inject, stack
from loracast.lora.factors import Factors
from tiny import DESCRIPTIONS, FAMILIES, make_attention_delta, make_model, make_tokenizer

EXAMPLES = as_examples([("big", "small"), ("hot", "cold"), ("old", "new")])
KINDS = ("self_attn.o_proj", "mlp.down_proj")


def modules_of(base: Base) -> list[str]:
    """Output projections of attention and of the MLP, of all layers."""
    return [f"model.layers.{i}.{kind}" for kind in KINDS for i in range(base.model.config.num_hidden_layers)]


def some_lora(base: Base, names: list[str]) -> LoRABatch:
    """A random LoRA of rank 2 for some modules."""
    made = torch.Generator().manual_seed(3)
    pairs = {}
    for name in names:
        d_out, d_in = base.model.get_submodule(name).weight.shape
        pairs[name] = Factors(torch.randn(2, d_in, generator=made), 0.02 * torch.randn(d_out, 2, generator=made))
    return stack([LoRA(pairs)])


def loss_of(base: Base, example: Example) -> torch.Tensor:
    """Mean cross-entropy of an answer's tokens."""
    prompt, reply = base.chat.prompt(example.input, ""), base.chat.reply(example.outputs[0])
    logits = base.model(input_ids=torch.tensor([[*prompt, *reply]])).logits[0]
    return functional.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(reply))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ridge", [0.003, 0.1])
def test_the_step_is_the_gradient_of_the_weights_over_the_moments_of_the_inputs(family, ridge, monkeypatch):
    base = Base(family, make_model(family), make_tokenizer())
    names = modules_of(base)
    lora = some_lora(base, names)
    monkeypatch.setattr(gradient_step, "STEP_RANK", 64)
    monkeypatch.setattr(gradient_step, "_STEP_RIDGE", ridge)
    step = gradient_step.gradient_step(base, EXAMPLES, names, lora)
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    weights = [base.model.get_submodule(name).weight.requires_grad_() for name in names]
    with inject(base.model, lora):
        loss = torch.zeros(())
        for example in EXAMPLES:
            with capture_inputs(base.model, names) as found:
                loss = loss + loss_of(base, example) / len(EXAMPLES)
            for name in names:
                inputs[name].append(found[name][0, :-1].detach())  # the last token of the answer predicts nothing here
    gradients = torch.autograd.grad(loss, weights)
    expected = {}
    for name, gradient in zip(names, gradients, strict=True):
        x = torch.cat(inputs[name]).double()
        x = x / x.square().sum(1).mean().sqrt()
        moments = x.T @ x + ridge * len(x) * torch.eye(x.shape[1])
        expected[name] = -(gradient.double() @ torch.linalg.inv(moments))
    for name in names:
        cosine = functional.cosine_similarity(step.delta(name).double().flatten(), expected[name].flatten(), dim=0)
        assert cosine.item() == pytest.approx(1, abs=1e-3), name


def test_the_step_has_a_share_of_the_norm_of_what_was_cast_and_makes_the_answers_likelier(base):
    names = modules_of(base)
    lora = some_lora(base, names)
    step = gradient_step.gradient_step(base, EXAMPLES, names, lora)
    norm, norm_cast = (torch.tensor([*one.norms().values()]).norm() for one in (step, lora.row(0)))
    assert (norm / norm_cast).item() == pytest.approx(gradient_step._SIZE, rel=1e-3)

    def loss_with(more: LoRA) -> float:
        with torch.no_grad(), inject(base.model, concat([lora.row(0), more])):
            return sum(loss_of(base, example).item() for example in EXAMPLES)

    assert loss_with(step) < loss_with(LoRA()) < loss_with(step.scale(-1))


def test_a_map_is_fitted_to_the_tokens_that_should_change_the_most(base, monkeypatch):
    names = modules_of(base)
    monkeypatch.setattr(gradient_step, "_MOST_TOKENS", 3)
    step = gradient_step.gradient_step(base, EXAMPLES, names, some_lora(base, names))
    assert {torch.linalg.matrix_rank(step.delta(name), rtol=1e-4).item() for name in names} == {3}


def test_answers_that_are_certain_have_no_step(base, monkeypatch):
    monkeypatch.setattr(gradient_step.functional, "cross_entropy", lambda logits, reply: 0 * logits.sum())
    names = modules_of(base)
    assert not gradient_step.gradient_step(base, EXAMPLES, names, some_lora(base, names)).names


@pytest.mark.parametrize("n_examples", [1, 3])
def test_what_is_cast_from_examples_has_the_step(base, tmp_path, monkeypatch, n_examples):
    caster = TaskCaster(
        make_attention_delta(base, ("o_proj", "down_proj"), examples_at_once=5).bind(base), Library(tmp_path)
    )
    task = TaskSpec(DESCRIPTIONS[0], EXAMPLES[:n_examples])
    (cast,) = caster.loras([task])
    monkeypatch.setattr(attention_delta, "gradient_step", lambda *given: LoRA())
    (without,) = caster.loras([task])
    added = {name: cast.delta(name) - without.delta(name) for name in cast.names}
    assert all(added[name].any() for name in modules_of(base))
    whole, more = (
        sum(d.square().sum().item() for d in deltas) for deltas in ([*map(without.delta, added)], added.values())
    )
    assert (more / whole) ** 0.5 == pytest.approx(gradient_step._SIZE, rel=1e-2)
