"""The algebra of LoRAs, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loracast.errors import AdapterError
from loracast.lora.algebra import LoRA, LoRABatch, compress, concat, stack
from loracast.lora.factors import Factors

quick = settings(max_examples=25, deadline=None, derandomize=True)
sizes = st.integers(1, 12)
seeds = st.integers(0, 2**31)


def make_lora(seed: int, rank: int, shapes: dict[str, tuple[int, int]], dtype=torch.float64) -> LoRA:
    """A random LoRA; `shapes` are (in, out) by module."""
    g = torch.Generator().manual_seed(seed)
    return LoRA(
        {
            name: Factors(
                torch.randn(rank, d_in, generator=g, dtype=torch.float64).to(dtype),
                torch.randn(d_out, rank, generator=g, dtype=torch.float64).to(dtype),
            )
            for name, (d_in, d_out) in shapes.items()
        }
    )


def dense(lora: LoRA, name: str) -> torch.Tensor:
    """The delta by hand, without `LoRA.delta`."""
    if name in lora.dense:
        return lora.dense[name].double()
    a, b = lora.factors[name]
    return sum(torch.outer(b[:, i].double(), a[i].double()) for i in range(a.shape[0]))


def close(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.allclose(x.double(), y.double(), rtol=1e-9, atol=1e-9)


@quick
@given(st.lists(st.tuples(seeds, st.integers(1, 5)), min_size=1, max_size=5), sizes, sizes, st.booleans())
def test_concat_is_the_sum_of_the_deltas(parts, d_in, d_out, allow_dense):
    loras = [make_lora(seed, rank, {"m": (d_in, d_out), f"only{i}": (3, 4)}) for i, (seed, rank) in enumerate(parts)]
    joined = concat(loras, dense_past_break_even=allow_dense)
    assert close(joined.delta("m"), sum(dense(lora, "m") for lora in loras))
    for i, lora in enumerate(loras):
        assert close(joined.delta(f"only{i}"), dense(lora, f"only{i}"))
    total_rank = sum(rank for _, rank in parts)
    weighs_more = total_rank * (d_in + d_out) > d_in * d_out
    assert ("m" in joined.dense) == (allow_dense and weighs_more)
    if "m" in joined.factors:
        assert joined.factors["m"].rank == total_rank


@quick
@given(st.integers(1, 40), seeds)
def test_merging_chunk_after_chunk_stays_flat_and_exact(n_chunks, seed):
    loras = [make_lora(seed + i, 2, {"m": (8, 6)}) for i in range(n_chunks)]
    running = LoRA()
    for lora in loras:
        running = concat([running, lora])
        assert running.n_bytes <= 8 * 6 * 8 + 1
    assert close(running.delta("m"), sum(dense(lora, "m") for lora in loras))
    assert running.rank <= 6


@quick
@given(seeds, st.integers(1, 4), st.floats(-3, 3), st.booleans())
def test_scale(seed, rank, strength, is_dense):
    lora = make_lora(seed, rank, {"m": (5, 7)})
    if is_dense:
        lora = LoRA({}, {"m": dense(lora, "m")})
    assert close(lora.scale(strength).delta("m"), strength * dense(lora, "m"))


@quick
@given(seeds, st.integers(1, 14), sizes, sizes, st.booleans())
def test_norms_are_those_of_the_dense_deltas(seed, rank, d_in, d_out, is_dense):
    lora = make_lora(seed, rank, {"m": (d_in, d_out)})
    expected = torch.linalg.norm(dense(lora, "m")).item()
    if is_dense:
        lora = LoRA({}, {"m": dense(lora, "m")})
    assert lora.norms()["m"] == pytest.approx(expected, rel=1e-9)


def test_norm_of_cancelling_factors_is_zero():
    lora = make_lora(0, 3, {"m": (5, 5)})
    assert concat([lora, lora.scale(-1)], dense_past_break_even=False).norms()["m"] == pytest.approx(0, abs=1e-6)


@quick
@given(seeds, st.integers(1, 10), st.integers(1, 12), st.integers(2, 14), st.integers(2, 14))
def test_compression_is_the_best_there_is(seed, rank, budget, d_in, d_out):
    shapes = {"f": (d_in, d_out), "d": (d_out, d_in)}
    lora = make_lora(seed, rank, shapes)
    lora = LoRA({"f": lora.factors["f"]}, {"d": dense(lora, "d")})
    small, error = compress(lora, budget)
    tails, energies = [], []
    for name in shapes:
        s = torch.linalg.svdvals(dense(lora, name))
        tails.append(s[budget:].square().sum())
        energies.append(s.square().sum())
        lost = (dense(lora, name) - dense(small, name)).square().sum()
        assert lost.item() == pytest.approx(tails[-1].item(), abs=1e-4 * energies[-1].item())
        assert small.factors[name].rank <= budget
    assert error == pytest.approx((sum(tails) / sum(energies)).sqrt().item(), abs=1e-3)
    actual = sum((dense(lora, name) - dense(small, name)).square().sum() for name in shapes)
    assert error == pytest.approx((actual / sum(energies)).sqrt().item(), abs=1e-3)


def test_compression_to_the_full_rank_or_of_nothing_loses_nothing():
    lora = make_lora(1, 4, {"m": (9, 11)}, torch.float32)
    small, error = compress(lora, 4)
    assert error == pytest.approx(0, abs=1e-3) and torch.allclose(small.delta("m"), lora.delta("m"), atol=1e-4)
    small, error = compress(lora.scale(0), 2)
    assert error == 0 and small.norms()["m"] == 0
    with pytest.raises(AdapterError, match="at least 1"):
        compress(lora, 0)


def test_compression_keeps_the_type_and_the_modules():
    lora = make_lora(1, 6, {"m": (9, 11), "n": (4, 4)}, torch.bfloat16)
    small, _ = compress(lora, 2)
    assert set(small.names) == {"m", "n"}
    assert {t.dtype for f in small.factors.values() for t in f} == {torch.bfloat16}


def test_to_changes_the_type_only():
    lora = make_lora(3, 2, {"m": (4, 5)})
    lora = LoRA(lora.factors, {"d": torch.randn(3, 3, dtype=torch.float64)})
    moved = lora.to(dtype=torch.bfloat16)
    assert {t.dtype for f in moved.factors.values() for t in f} | {moved.dense["d"].dtype} == {torch.bfloat16}
    assert torch.equal(moved.factors["m"].a, lora.factors["m"].a.bfloat16())
    assert moved.n_bytes * 4 == lora.n_bytes == 8 * (2 * 9 + 9)
    assert lora.to("cpu").factors["m"].a.dtype == torch.float64


def test_an_empty_lora():
    assert (LoRA().rank, LoRA().n_bytes, LoRA().names, concat([]).names) == (0, 0, (), ())
    assert compress(LoRA(), 3)[1] == 0


def test_mismatched_factors_are_refused_together():
    with pytest.raises(AdapterError) as caught:
        LoRA(
            {
                "rank": Factors(torch.zeros(2, 4), torch.zeros(5, 3)),
                "dims": Factors(torch.zeros(1, 2, 4), torch.zeros(5, 2)),
                "both": Factors(torch.zeros(2, 4), torch.zeros(5, 2)),
            },
            {"both": torch.zeros(5, 4), "flat": torch.zeros(5)},
        )
    for name in ("rank", "dims", "both", "flat"):
        assert f"{name}: " in str(caught.value)


@pytest.mark.parametrize("join", [concat, stack])
def test_loras_of_different_bases_cannot_be_joined(join):
    shapes = {"m": (4, 5), "n": (4, 4), "same": (3, 3)}
    one, other = make_lora(0, 2, shapes), make_lora(0, 2, {**shapes, "m": (6, 5)})
    other = LoRA({k: f for k, f in other.factors.items() if k != "n"}, {"n": torch.zeros(7, 4, dtype=torch.float64)})
    with pytest.raises(AdapterError) as caught:
        join([one, other])
    assert "m is (5, 4) and (5, 6)" in str(caught.value) and "n is (4, 4) and (7, 4)" in str(caught.value)
    assert "same" not in str(caught.value)


@quick
@given(st.lists(st.none() | st.tuples(seeds, st.integers(1, 4), st.booleans()), min_size=1, max_size=5))
def test_a_stacked_batch_holds_each_rows_delta(rows):
    loras = []
    for row in rows:
        lora = row and make_lora(row[0], row[1], {"m": (4, 5)})
        loras.append(LoRA({}, {"m": dense(lora, "m")}) if row and row[2] else lora)
    batch = stack(loras)
    assert batch.n == len(rows) or (batch.n == 1 and len({id(lora) for lora in loras}) == 1)
    for i in range(batch.n):
        delta = torch.zeros(5, 4, dtype=torch.float64)
        if "m" in batch.factors:
            delta = delta + batch.factors["m"].b[i] @ batch.factors["m"].a[i]
        if "m" in batch.dense:
            delta = delta + batch.dense["m"][i]
        assert close(delta, dense(loras[i], "m") if loras[i] else torch.zeros(5, 4))


def test_the_rows_of_a_batch_and_their_norms():
    free = torch.Generator().manual_seed(3)
    factors = {
        name: Factors(torch.randn(4, 2, d_in, generator=free), torch.randn(4, d_out, 2, generator=free))
        for name, d_in, d_out in (("one", 7, 5), ("two", 3, 9))
    }
    batch = LoRABatch(4, factors, {})
    some = batch.take([1, 2])
    assert some.n == 2
    for i, squared in enumerate(batch.squared_norms()):
        row = batch.row(i)
        assert squared.item() == pytest.approx(
            sum(row.delta(name).square().sum().item() for name in row.names), rel=1e-5
        )
        if 1 <= i < 3:
            assert all(torch.equal(some.row(i - 1).delta(name), row.delta(name)) for name in row.names)
