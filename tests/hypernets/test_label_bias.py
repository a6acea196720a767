"""The bias of a task's labels: the fit, the change of logits that it makes, and when there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from loracast.base.forward import capture_inputs
from loracast.base.load import Base
from loracast.cast.task import TaskCaster
from loracast.documents.task_spec import TaskSpec, as_examples
from loracast.hypernets import attention_delta
from loracast.hypernets.example_fit import fitted_bias, label_bias
from loracast.library.library import Library
from loracast.lora.algebra import LoRA, LoRABatch, inject, stack
from loracast.lora.factors import Factors
from tiny import DESCRIPTIONS, FAMILIES, make_attention_delta, make_model, make_tokenizer

LABELS = as_examples([("big", "hot"), ("small", "cold"), ("old", "hot"), ("far", "hot"), ("wet", "cold")])


def nothing(base: Base) -> LoRABatch:
    """A LoRA that changes nothing."""
    d_in, d_out = base.model.config.intermediate_size, base.model.config.hidden_size
    return stack([LoRA({last_mlp(base): Factors(torch.zeros(1, d_in), torch.zeros(d_out, 1))})])


def last_mlp(base: Base) -> str:
    return f"model.layers.{base.model.config.num_hidden_layers - 1}.mlp.down_proj"


def test_the_bias_is_that_of_regularised_logistic_regression():
    made = torch.Generator().manual_seed(1)
    z, labels = torch.randn(9, 3, generator=made) * 2, torch.tensor([0, 0, 1, 0, 2, 0, 1, 0, 0])

    def objective(b: np.ndarray) -> float:
        biased = z.double().numpy() + b
        return float(np.sum(np.logaddexp.reduce(biased, 1) - biased[range(9), labels]) + 0.3 * np.square(b).sum())

    np.testing.assert_allclose(fitted_bias(z, labels).numpy(), minimize(objective, np.zeros(3)).x, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_of_the_labels_change_by_the_bias_where_one_is_chosen(family):
    base = Base(family, make_model(family), make_tokenizer())
    lora = label_bias(base, LABELS, last_mlp(base), nothing(base)).scale(0.1)  # as the bias is met to first order
    prompts = [base.chat.prompt(example.input, "") for example in LABELS]
    hot, cold = (base.chat.reply(label)[0] for label in ("hot", "cold"))

    def leads(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """By how much "hot" leads, after each of the rows without the LoRA and with it."""
        found = []
        for given in (LoRA(), lora):
            with torch.no_grad(), inject(base.model, given):
                logits = [base.model(input_ids=torch.tensor([row])).logits[0, -1] for row in rows]
            found.append(torch.stack([one[hot] - one[cold] for one in logits]))
        return found[0], found[1]

    before, after = leads(prompts)
    labels = torch.tensor([int(example.outputs[0] == "cold") for example in LABELS])
    b = 0.1 * fitted_bias(torch.stack([before, torch.zeros(5)], dim=1), labels)
    ((a, _),) = lora.factors.values()

    def share(rows: list[list[int]]) -> float:
        """How much of the bias is added behind the rows: 1 at best."""
        with torch.no_grad(), capture_inputs(base.model, [last_mlp(base)]) as found:
            shares = []
            for row in rows:
                base.model(input_ids=torch.tensor([row]))
                shares.append((found[last_mlp(base)][0, -1] @ a[0]).item())
        return sum(shares) / len(shares)

    assert (after - before).mean().item() == pytest.approx(share(prompts) * (b[0] - b[1]).item(), rel=0.05)
    labelled = [[*prompt, label] for prompt, label in zip(prompts, (hot, cold, hot, hot, cold), strict=True)]
    assert 0.3 < share(prompts) < 1.1 and share(labelled) < 0.9 * share(prompts)


def test_labels_that_begin_alike_are_told_where_they_differ(base):
    alike = as_examples([("big", "the hot"), ("small", "the cold"), ("old", "the hot"), ("far", "the hot")])
    (pair,) = label_bias(base, alike, last_mlp(base), nothing(base)).factors.values()
    assert pair.rank == 1 and pair.b.any()


@pytest.mark.parametrize(
    "answers",
    [("hot", "hot", "hot", "hot", "hot"), ("hot", "cold", "old", "far", "wet"), ("hot", "cold", "old", "hot")],
)
def test_answers_that_are_no_labels_have_no_bias(base, answers):
    examples = as_examples([("big", answer) for answer in answers])
    assert not label_bias(base, examples, last_mlp(base), nothing(base)).names


def test_what_is_cast_for_labels_has_the_bias(base, tmp_path, monkeypatch):
    hypernet = make_attention_delta(base, ("o_proj", "down_proj"), examples_at_once=5)
    caster = TaskCaster(hypernet.bind(base), Library(tmp_path))
    (cast,) = caster.loras([TaskSpec(DESCRIPTIONS[0], LABELS)])
    monkeypatch.setattr(attention_delta, "label_bias", lambda *given: LoRA())
    (without,) = caster.loras([TaskSpec(DESCRIPTIONS[0], LABELS)])
    for name in cast.names:
        added = cast.delta(name) - without.delta(name)
        if name == last_mlp(base):
            assert torch.linalg.matrix_rank(added, rtol=1e-3) == 1
        else:
            torch.testing.assert_close(cast.delta(name), without.delta(name))
