"""One batched forward with a LoRA for each row, against PEFT and against merged weights."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from loracast.errors import AdapterError
from loracast.lora.algebra import LoRA, LoRABatch, concat, inject, stack
from loracast.lora.factors import Factors
from loracast.lora.target import KINDS, target_from_config
from tiny import make_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3")
MODEL = make_model()
IDS = torch.randint(3, 600, (4, 7), generator=torch.Generator().manual_seed(7))

kinds_of = st.sets(st.sampled_from(KINDS), min_size=1)
layers_of = st.sets(st.integers(0, 3), min_size=1)


def make_lora(model, seed: int, rank: int = 3, kinds=KINDS, layers=None, strength: float = 0.15) -> LoRA:
    """Random factors, large enough to change answers."""
    g = torch.Generator().manual_seed(seed)
    return LoRA(
        {
            m.name: Factors(
                torch.randn(rank, m.d_in, generator=g) * strength, torch.randn(m.d_out, rank, generator=g) * strength
            )
            for m in target_from_config(model.config, kinds, layers).modules
        }
    )


def as_dense(lora: LoRA) -> LoRA:
    return LoRA({}, {name: lora.delta(name) for name in lora.names})


def merged(model, lora: LoRA | None):
    """A copy of the model with the delta in its weights."""
    model = copy.deepcopy(model)
    for name in lora.names if lora else ():
        delta = lora.dense[name] if name in lora.dense else lora.factors[name].b @ lora.factors[name].a
        model.get_submodule(name).weight.data += delta
    return model


def peft_of(model, lora: LoRA):
    """PEFT's own model with the same weights: lora_alpha = r for every module."""
    from peft import LoraConfig, get_peft_model

    ranks = {f"^{re.escape(name)}$": factors.rank for name, factors in lora.factors.items()}
    config = LoraConfig(
        r=8, lora_alpha=8, target_modules=list(lora.names), rank_pattern=ranks, alpha_pattern=ranks, bias="none"
    )
    wrapped = get_peft_model(copy.deepcopy(model), config).eval()
    for name, (a, b) in lora.factors.items():
        layer = wrapped.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    return wrapped


@torch.no_grad()
def logits(model, ids=IDS, **options):
    return model(input_ids=ids, **options).logits


@torch.no_grad()
def generate(model, prompts: list[list[int]], n: int = 6):
    """Greedy new tokens of prompts padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0
    )
    return out[:, longest:].tolist()


def close(x: torch.Tensor, y: torch.Tensor, tolerance: float = 2e-4) -> bool:
    return (x - y).abs().max().item() <= tolerance * max(1.0, y.abs().max().item())


@settings(max_examples=12, deadline=None, derandomize=True)
@given(kinds_of, layers_of, st.integers(1, 9), st.integers(0, 99))
def test_forward_equals_peft_and_merged_weights(kinds, layers, rank, seed):
    lora = make_lora(MODEL, seed, rank, kinds, layers)
    with inject(MODEL, lora):
        found = logits(MODEL)
    assert close(found, logits(peft_of(MODEL, lora)))
    assert close(found, logits(merged(MODEL, lora)))
    assert not close(found, logits(MODEL), 1e-3)


def test_ranks_may_differ_from_module_to_module():
    parts = [make_lora(MODEL, kind_rank, kind_rank, [kind]) for kind_rank, kind in enumerate(KINDS, start=1)]
    lora = LoRA({name: factors for part in parts for name, factors in part.factors.items()})
    with inject(MODEL, lora):
        found = logits(MODEL)
    assert close(found, logits(peft_of(MODEL, lora)))
    assert close(found, logits(merged(MODEL, lora)))


def test_generation_with_a_cache_equals_peft_and_merged_weights():
    lora = make_lora(MODEL, 1)
    prompts = [IDS[0].tolist()]
    with inject(MODEL, lora):
        found = generate(MODEL, prompts, 10)
    assert found == generate(peft_of(MODEL, lora), prompts, 10) == generate(merged(MODEL, lora), prompts, 10)
    assert found != generate(MODEL, prompts, 10)


rows_of = st.lists(
    st.none() | st.tuples(st.integers(0, 2), st.integers(1, 5), kinds_of, st.booleans()), min_size=1, max_size=4
)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(rows_of)
def test_each_row_of_a_mixed_batch_answers_as_if_alone(rows):
    loras = []
    for row in rows:
        lora = None if row is None else make_lora(MODEL, row[0], row[1], row[2])
        loras.append(as_dense(lora) if row and row[3] else lora)
    with inject(MODEL, loras):
        found = logits(MODEL, IDS[: len(rows)])
    for i, lora in enumerate(loras):
        assert close(found[i : i + 1], logits(merged(MODEL, lora), IDS[i : i + 1]))


def test_a_lora_may_hold_dense_and_factored_modules():
    whole = make_lora(MODEL, 5)
    names = whole.names[::2]
    mixed = LoRA(
        {k: f for k, f in whole.factors.items() if k not in names}, {name: whole.delta(name) for name in names}
    )
    with inject(MODEL, [mixed, None, whole, as_dense(whole)]):
        found = logits(MODEL)
    for i, lora in enumerate([mixed, None, whole, whole]):
        assert close(found[i : i + 1], logits(merged(MODEL, lora), IDS[i : i + 1]))


def test_left_padded_generation_of_a_mixed_batch():
    one, other = make_lora(MODEL, 1, 2), make_lora(MODEL, 2, 5, ["q_proj", "up_proj"])
    loras = [one, None, other, as_dense(one), one]
    prompts = [IDS[i % 4, : 3 + i].tolist() for i in range(5)]
    with inject(MODEL, loras):
        found = generate(MODEL, prompts)
    assert found == [generate(merged(MODEL, lora), [p])[0] for lora, p in zip(loras, prompts, strict=True)]
    assert len({tuple(row) for row in found}) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model = make_model(family)
    loras = [make_lora(model, 3, 2), None, make_lora(model, 4, 4, ["o_proj", "down_proj"], [1, 3])]
    with inject(model, loras):
        found = logits(model, IDS[:3])
        answers = generate(model, IDS[:3].tolist(), 4)
    for i, lora in enumerate(loras):
        alone = merged(model, lora)
        assert close(found[i : i + 1], logits(alone, IDS[i : i + 1]))
        assert answers[i] == generate(alone, IDS[i : i + 1].tolist(), 4)[0]
    assert not close(found, logits(model, IDS[:3]), 1e-3)


def test_one_lora_serves_any_number_of_rows_and_none_serves_the_base():
    lora = make_lora(MODEL, 1)
    with inject(MODEL, lora):
        found = logits(MODEL)
    with inject(MODEL, [lora] * 4):
        assert torch.equal(found, logits(MODEL))
    for nothing in (None, [None] * 4, LoRA()):
        with inject(MODEL, nothing):
            assert torch.equal(logits(MODEL), logits(merged(MODEL, None)))


def test_contexts_nest_and_add_up():
    one, other = make_lora(MODEL, 1, 2, ["q_proj"]), make_lora(MODEL, 2, 3, ["q_proj", "down_proj"])
    with inject(MODEL, one), inject(MODEL, other):
        found = logits(MODEL)
    assert close(found, logits(merged(merged(MODEL, one), other)))


def hooks(model) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def with_static(chunk: LoRA, static: LoRA) -> LoRA:
    return LoRA({**static.factors, **chunk.factors}, {}, frozenset(static.names))


def test_a_static_lora_is_added_to_the_weights():
    """Without a hook on its modules, and the weights are the model's own again afterwards."""
    static, second = (make_lora(MODEL, seed, kinds=("q_proj", "v_proj")) for seed in (5, 6))
    chunks = [make_lora(MODEL, seed, kinds=("down_proj",)) for seed in (1, 2, 3, 4)]
    weights = {name: value.clone() for name, value in MODEL.state_dict().items()}
    q_proj = MODEL.get_submodule(static.names[0])
    for part in (static, second, static):  # the copies are made anew for another one
        rows = [with_static(chunk, part) for chunk in chunks]
        with torch.no_grad(), inject(MODEL, rows):
            assert not q_proj._forward_hooks and not torch.equal(q_proj.weight, weights[f"{static.names[0]}.weight"])
            found = MODEL(IDS).logits
        for i, row in enumerate(rows):
            expected = merged(MODEL, row)(IDS[[i]]).logits[0]
            torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), inject(MODEL, rows):
        raise ZeroDivisionError
    assert all(torch.equal(value, weights[name]) for name, value in MODEL.state_dict().items())


def test_the_copies_follow_a_model_that_changes():
    model = copy.deepcopy(MODEL)
    lora = make_lora(model, 5, kinds=("q_proj",))
    lora = LoRA(lora.factors, {}, frozenset(lora.names))
    parent, _, last = lora.names[0].rpartition(".")

    def replace_module():
        other = copy.deepcopy(model.get_submodule(lora.names[0]))
        other.weight.mul_(3)
        setattr(model.get_submodule(parent), last, other)

    doubled = lambda: model.get_submodule(lora.names[0]).weight.mul_(2)  # noqa: E731
    for change in (lambda: None, doubled, replace_module, model.double):
        with torch.no_grad():
            change()
            with inject(model, lora):
                found = model(IDS).logits
        torch.testing.assert_close(found, merged(model, lora)(IDS).logits, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_added_to_the_weights_is_a_hook():
    """Other static LoRAs in a batch, a row without one, one context in another, gradients."""
    static, second = (make_lora(MODEL, seed, kinds=("q_proj",)) for seed in (5, 6))
    chunk = make_lora(MODEL, 1, kinds=("down_proj",))
    one, other = with_static(chunk, static), with_static(chunk, second)
    for rows in ([one, other], [one, None], [None, one]):
        with torch.no_grad(), inject(MODEL, rows):
            found = MODEL(IDS[:2]).logits
        for i, row in enumerate(rows):
            torch.testing.assert_close(found[i], merged(MODEL, row)(IDS[[i]]).logits[0], rtol=1e-4, atol=1e-4)
    with torch.no_grad(), inject(MODEL, one), inject(MODEL, one):
        twice = MODEL(IDS).logits
    torch.testing.assert_close(twice, merged(MODEL, concat([one, one]))(IDS).logits, rtol=1e-4, atol=1e-4)
    leaf = LoRA({name: Factors(a.requires_grad_(), b) for name, (a, b) in static.factors.items()}, {}, one.static)
    with inject(MODEL, leaf):
        MODEL(IDS).logits.sum().backward()
    assert all(a.grad is not None for a, _ in leaf.factors.values())


def test_everything_that_does_not_fit_is_named_at_once():
    q, k = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
    fitting = make_lora(MODEL, 1).factors[q]
    bad = LoRA(
        {
            "model.layers.9.mlp.down_proj": Factors(torch.zeros(1, 96), torch.zeros(48, 1)),
            "model.norm": Factors(torch.zeros(1, 48), torch.zeros(48, 1)),
            k: Factors(torch.zeros(1, 32), torch.zeros(48, 1)),  # A and B swapped
            q: fitting,
        },
        {"model.layers.1.self_attn.q_proj": torch.zeros(48, 64)},
    )
    for loras in (bad, [None, bad, None, None]):
        with pytest.raises(AdapterError) as caught, inject(MODEL, loras):
            pass
        message = str(caught.value)
        for part in (
            "model.layers.9.mlp.down_proj",
            "model.norm",
            k,
            "[48, 32]",
            "[32, 48]",
            "layers.1.self_attn.q_proj",
        ):
            assert part in message
        assert q not in message
    assert hooks(MODEL) == 0


def test_shapes_are_checked_in_dense_and_factored_rows_alike():
    name = "model.layers.0.self_attn.q_proj"
    good = LoRA({}, {name: torch.zeros(64, 48)})
    bad = LoRA({name: Factors(torch.zeros(1, 48), torch.zeros(60, 1))})
    with pytest.raises(AdapterError, match=re.escape(name)), inject(MODEL, [bad, good]):
        pass
    batch = LoRABatch(2, {name: Factors(torch.zeros(2, 1, 48), torch.zeros(2, 60, 1))}, {name: torch.zeros(2, 64, 48)})
    with pytest.raises(AdapterError, match=re.escape(name)), inject(MODEL, batch):
        pass


@pytest.mark.parametrize("n", [1, 3, 5])
def test_another_number_of_rows_is_refused(n):
    lora = make_lora(MODEL, 1, 1, ["q_proj"])
    different = [make_lora(MODEL, i, 1, ["q_proj"]) for i in range(n)]
    for loras in ([lora] * n, different, stack(different) if n > 1 else different):
        with pytest.raises(AdapterError, match=f"{n} LoRAs .* 4 rows"), inject(MODEL, loras):
            logits(MODEL)
    assert hooks(MODEL) == 0


def test_hooks_go_whatever_happens():
    lora = make_lora(MODEL, 1)
    before = logits(MODEL)
    with pytest.raises(ZeroDivisionError), inject(MODEL, lora):
        assert hooks(MODEL) == len(lora.names)
        raise ZeroDivisionError
    assert hooks(MODEL) == 0
    assert torch.equal(logits(MODEL), before)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_equal_those_of_a_functional_formula(shared):
    loras = [make_lora(MODEL, i, 2, ["v_proj", "down_proj"], [0, 2]) for i in range(1 if shared else 3)]
    leaves = [[t.requires_grad_() for f in lora.factors.values() for t in f] for lora in loras]
    probe = torch.randn(3, 7, 600, generator=torch.Generator().manual_seed(0))
    with inject(MODEL, loras[0] if shared else loras):
        (MODEL(input_ids=IDS[:3]).logits * probe).sum().backward()
    found = [[t.grad.clone() for t in row] for row in leaves]
    for row in leaves:
        for t in row:
            t.grad = None

    weights = dict(MODEL.named_parameters())
    for i in range(3):
        lora = loras[0 if shared else i]
        changed = {f"{name}.weight": weights[f"{name}.weight"] + f.b @ f.a for name, f in lora.factors.items()}
        out = torch.func.functional_call(MODEL, {**weights, **changed}, kwargs={"input_ids": IDS[i : i + 1]})
        (out.logits * probe[i]).sum().backward()
    for row, grads in zip(leaves, found, strict=True):
        for t, grad in zip(row, grads, strict=True):
            assert t.grad.abs().max() > 0
            assert close(grad, t.grad, 1e-3)
    assert all(p.grad is None for p in MODEL.parameters())


class Copies(TorchDispatchMode):
    """Counts copies of tensors as large as a factor."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.n = shapes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.clone, torch.ops.aten.copy_):
            self.n += any(isinstance(a, torch.Tensor) and tuple(a.shape) in self.shapes for a in args)
        return func(*args, **(kwargs or {}))


def test_factors_are_not_copied_for_each_token():
    rank = 5  # a shape that nothing else has
    loras = [make_lora(MODEL, i, rank, ["down_proj"]).to(dtype=torch.bfloat16) for i in range(2)]
    shapes = {(2, rank, 96), (2, 48, rank), (2, 96, rank), (2, rank, 48)}
    counts = []
    for n in (2, 12):
        with inject(MODEL, loras), Copies(shapes) as copies:
            generate(MODEL, IDS[:2].tolist(), n)
        counts.append(copies.n)
    assert counts[0] == counts[1]


def test_a_bf16_lora_on_an_fp32_base_and_the_reverse():
    lora = make_lora(MODEL, 1).to(dtype=torch.bfloat16)
    with inject(MODEL, lora):
        found = logits(MODEL)
    assert close(found, logits(merged(MODEL, lora.to(dtype=torch.float32))))
    half = copy.deepcopy(MODEL).bfloat16()
    with inject(half, lora.to(dtype=torch.float32)):
        found = logits(half)
    assert found.dtype == torch.bfloat16
    with inject(half, lora):
        assert torch.equal(found, logits(half))
