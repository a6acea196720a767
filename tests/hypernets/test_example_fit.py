"""LoRAs fitted to the examples of a task: the regression, what is read at examples, and the adapter."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from loracast.base.load import Base
from loracast.cast.task import TaskCaster
from loracast.documents.task_spec import Example, TaskSpec, as_examples
from loracast.hypernets import attention_delta
from loracast.hypernets.attention_delta_encoder import POSITIONS
from loracast.hypernets.descriptions import TaskReader
from loracast.hypernets.example_fit import RANK, behind_the_others, ridge, two_views
from loracast.library.library import Library
from loracast.lora.algebra import LoRA
from tiny import DESCRIPTIONS, FAMILIES, make_attention_delta, make_model, make_tokenizer

EXAMPLES = as_examples([("big", "small"), ("hot", "cold"), ("old", "new"), ("far", "near"), ("wet", "dry")])
TOLD = TaskSpec(DESCRIPTIONS[0], EXAMPLES)


@pytest.fixture(autouse=True)
def without_the_step(monkeypatch):
    """What is fitted alone, without the step behind it (test_gradient_step.py)."""
    monkeypatch.setattr(attention_delta, "gradient_step", lambda *given: LoRA())


def least_squares(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, strength: float) -> np.ndarray:
    """Ridge regression as least squares with extra rows, W [out, in] of y [t, out] on x [t, in]."""
    root = weights.double().sqrt().numpy()[:, None]
    inputs, outputs = x.double().numpy() * root, y.double().numpy() * root
    ridge = (strength * np.square(inputs).sum() / len(inputs)) ** 0.5 * np.eye(inputs.shape[1])
    nothing = np.zeros((len(ridge), outputs.shape[1]))
    return np.linalg.lstsq(np.concatenate([inputs, ridge]), np.concatenate([outputs, nothing]), rcond=None)[0].T


def scaled(xs: Sequence[torch.Tensor], weights: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """Inputs [t, d] side by side, each divided by the root of its weighted mean square; and these roots."""
    roots = [((x.square().sum(1) * weights).sum() / weights.sum()).sqrt().item() for x in xs]
    return torch.cat([x / root for x, root in zip(xs, roots, strict=True)], dim=1), roots


def test_the_regression_is_that_of_least_squares_with_extra_rows():
    made = torch.Generator().manual_seed(2)
    xs = [torch.randn(30, 8, generator=made), 20 * torch.randn(30, 3, generator=made)]
    y = torch.randn(30, 5, generator=made)
    weights = torch.rand(30, generator=made) + 0.1
    sides, b = ridge(xs, y, weights, 0.3)
    together, roots = scaled(xs, weights)
    expected = np.split(least_squares(together, y, weights, 0.3), [8], axis=1)
    for a, part, root in zip(sides, expected, roots, strict=True):
        np.testing.assert_allclose((b.T @ a).numpy(), part / root, atol=1e-5)


def test_a_regression_on_nothing_is_zero():
    (a,), b = ridge([torch.zeros(4, 3)], torch.zeros(4, 2), torch.ones(4), 0.1)
    assert not (b.T @ a).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_dummy_input_it_reads_what_the_hypernetwork_does(family):
    base = Base(family, make_model(family), make_tokenizer())
    hypernet = make_attention_delta(base)
    encoder, c = hypernet.text_encoder(base), hypernet.config
    at = encoder.at_example(DESCRIPTIONS[0], Example(c.dummy_input, (c.dummy_answer,)))
    expected = encoder([DESCRIPTIONS[0]]).view(len(POSITIONS), -1, 48)
    torch.testing.assert_close(at.deltas[:, at.n_input], expected[POSITIONS.index("start")], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(at.deltas[:, -1], expected[POSITIONS.index("answer")], atol=1e-5, rtol=1e-3)
    assert at.ids == [*base.chat.prompt(c.dummy_input, ""), *base.chat.reply(c.dummy_answer)[:-1]]


def test_the_inputs_of_projections_are_those_under_merged_weights(base):
    hypernet = make_attention_delta(base)
    encoder = hypernet.text_encoder(base)
    lora = hypernet(encoder(DESCRIPTIONS[:1])).take([0])
    ids = base.chat.prompt("big", "")
    merged = copy.deepcopy(base.model)
    with torch.no_grad():
        for name, (a, b) in lora.factors.items():
            merged.get_submodule(name).weight += b[0] @ a[0]
    names = [f"model.layers.{i}.{module}" for i in range(2) for module in ("self_attn.o_proj", "mlp.down_proj")]
    found = {}
    for name in names:
        merged.get_submodule(name).register_forward_pre_hook(
            lambda module, given, name=name: found.update({name: given[0][0]})
        )
    with torch.no_grad():
        merged(input_ids=torch.tensor([ids]))
        read = encoder.module_inputs(names, ids, lora)
    for name in names:
        torch.testing.assert_close(read[name], found[name], atol=1e-4, rtol=1e-3)
    assert not any(base.model.get_submodule(name)._forward_pre_hooks for name in names)


def test_no_example_stands_before_itself():
    pairs = behind_the_others([TOLD, TaskSpec("", EXAMPLES[:1])])  # before the second one's nothing is spec
    assert [example for _, example in pairs] == list(EXAMPLES)
    assert all(example not in spec.examples for spec, example in pairs)
    assert pairs[1][0] == TaskSpec(TOLD.description, (*EXAMPLES[2:], *EXAMPLES[:1]))


def test_of_many_examples_some_are_read_spread_over_all_groups():
    many = as_examples([(str(i), str(i + 1)) for i in range(32)])
    pairs = behind_the_others([TaskSpec("", many[:16]), TaskSpec("", many[16:])])
    assert [int(example.input) for _, example in pairs] == [0, 4, 8, 12, 16, 20, 24, 28]
    assert len(behind_the_others([TaskSpec("", many)], most=5)) == 5


def test_a_text_and_turns_count_half_each_where_both_are_known(base):
    encoder = make_attention_delta(base).text_encoder(base)
    spec, example = TaskSpec(DESCRIPTIONS[0], EXAMPLES[:2]), EXAMPLES[2]
    text, turns, both = (
        encoder.at_example(spec.text(), example),
        encoder.after_turns(spec, example),
        two_views(encoder, spec, example),
    )
    n = both.deltas.shape[1]
    assert n == min(text.deltas.shape[1], turns.deltas.shape[1])
    torch.testing.assert_close(2 * both.deltas, text.deltas[:, -n:] + turns.deltas[:, -n:])
    assert n - both.n_input == text.deltas.shape[1] - text.n_input == turns.deltas.shape[1] - turns.n_input


@pytest.mark.parametrize("kinds", [("o_proj",), ("q_proj", "o_proj", "down_proj")])
def test_it_joins_what_is_cast(base, tmp_path, kinds):
    hypernet = make_attention_delta(base, kinds, examples_at_once=5)
    caster = TaskCaster(hypernet.bind(base), Library(tmp_path))
    batch = hypernet.loras(_rows(caster, TOLD))
    cast, (fitted,) = batch.row(0), caster.loras([TOLD])
    encoder, weights, ys = hypernet.text_encoder(base), [], []
    names = [name for name in cast.names if name.endswith(("o_proj", "down_proj"))]
    xs = {name: [] for name in names}
    for spec, example in behind_the_others([TOLD]):
        at = two_views(encoder, spec, example)
        n = at.deltas.shape[1]
        for name, x in encoder.module_inputs(names, at.ids, batch).items():
            xs[name].append(x[-n:].detach())
        ys.append(at.deltas)
        weights += [0.1] * at.n_input + [1.0] * (n - at.n_input)
    y, weights = torch.cat(ys, dim=1).detach(), torch.tensor(weights)
    layers = [[name for name in names if f"layers.{layer}." in name] for layer in range(len(y))]
    for of_layer, expected_output in zip(layers, y, strict=True):
        inputs = [torch.cat(xs[name]) for name in of_layer]
        together, roots = scaled(inputs, weights)
        w = least_squares(together, expected_output, weights, 0.1)
        parts = np.split(w, np.cumsum([x.shape[1] for x in inputs])[:-1], axis=1)
        for name, part, root in zip(of_layer, parts, roots, strict=True):
            u, s, v = np.linalg.svd(part / root, full_matrices=False)
            share = 0.7 * (u[:, :RANK] * s[:RANK]) @ v[:RANK]
            np.testing.assert_allclose(
                (fitted.delta(name) - cast.delta(name)).numpy(), share, atol=2e-3 * s[0], rtol=1e-2
            )
    assert {n for n in cast.names if not torch.equal(cast.delta(n), fitted.delta(n))} == set(names)
    assert all(fitted.factors[n].rank == cast.factors[n].rank + RANK for n in names)


def _rows(caster, spec):
    return caster.caster.cast(caster.caster.encode([spec])).rows


@pytest.mark.parametrize("spec", [TaskSpec(DESCRIPTIONS[0]), TaskSpec("", EXAMPLES[:1])])
def test_a_description_or_one_example_is_cast_without(base, tmp_path, spec):
    hypernet = make_attention_delta(base)
    caster = TaskCaster(hypernet.bind(base), Library(tmp_path))
    (lora,) = caster.loras([spec])
    expected = hypernet.loras(_rows(caster, spec)).row(0)
    assert all(torch.equal(lora.factors[name].b, expected.factors[name].b) for name in expected.names)


def test_examples_so_long_that_each_is_read_alone_are_cast_without(base, tmp_path):
    long = as_examples([(" ".join(["word"] * 150), "a"), (" ".join(["other"] * 150), "b")])
    hypernet = make_attention_delta(base)
    caster = TaskCaster(hypernet.bind(base), Library(tmp_path))
    assert [len(group.examples) for group in caster.caster.encoder.groups(TaskSpec("", long))] == [1, 1]
    (lora,) = caster.loras([TaskSpec("", long)])
    assert {name: pair.rank for name, pair in lora.factors.items()} == {
        name: pair.a.shape[1] for name, pair in hypernet.loras(_rows(caster, TaskSpec("", long))).factors.items()
    }


def test_kept_and_opened_again(base, tmp_path):
    caster = TaskCaster(make_attention_delta(base, depth=2).bind(base), Library(tmp_path))
    adapter = caster.task(TOLD.description, "opposites", examples=TOLD.examples, storage="bf16")
    (expected,) = caster.loras([TOLD])
    opened = adapter.lora()
    assert adapter.manifest.ranks["o_proj"] == caster.hypernetwork.config.ranks["o_proj"] + RANK
    for name in expected.names:
        torch.testing.assert_close(opened.delta(name).float(), expected.delta(name), atol=2e-2, rtol=2e-2)


def test_examples_that_are_read_in_groups(base):
    hypernet = make_attention_delta(base, examples_at_once=2)
    reader = hypernet.encoder_for(base, None, print)
    assert isinstance(reader, TaskReader)
    assert [group.examples for group in reader.groups(TOLD)] == [EXAMPLES[:1], EXAMPLES[1:3], EXAMPLES[3:]]
