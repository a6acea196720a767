"""How chunks become one LoRA, against numpy and against what an associative memory is for."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from adapters import TARGET, random_factors, write
from loracast.errors import AdapterError
from loracast.library.manifest import Manifest
from loracast.lora.merge import MOST_ROUTED, Merging, decorrelate_keys, row_lengths, row_weights

Picked = list[tuple[torch.Tensor, torch.Tensor]]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def join(
    merging: Merging, a: torch.Tensor, b: torch.Tensor, picked: Picked | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join A and B [layers, chunks, r, d] of chunks, of which a question gets some rows with their weights."""
    return merging.join("o_proj", a.unbind(-3), b.unbind(-3), picked)


def dense(picked: Picked, n_rows: int) -> torch.Tensor:
    """The weights [chunks, n_rows] of all rows, of which a question gets some."""
    return torch.stack([torch.zeros(n_rows).index_copy(0, kept, weights) for kept, weights in picked])


def joined_keys(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The keys [..., m, in] of chunks [..., chunks, r, in] that are merged with a ridge of 3."""
    owners = torch.arange(a.shape[-3]).repeat_interleave(a.shape[-2])
    return decorrelate_keys(a.flatten(-3, -2), b.flatten(-3, -2), owners, 3.0)


@pytest.mark.parametrize("n_zeros", [0, 3])
@pytest.mark.parametrize("d_in", [16, 10, 7], ids=["few rows", "more rows than inputs", "many more"])
def test_chunks_are_told_apart_as_least_squares_would_have_it(d_in, n_zeros):
    a, b = draw(2, 3, 4, d_in), draw(2, 3, 4, 5)  # modules, chunks, rank, width
    b[:, 1, 4 - n_zeros :] = 0
    found = joined_keys(a, b)
    assert found.shape == (2, 12, d_in)
    for module in range(2):
        keys, values = (side[module].reshape(12, -1).double().numpy() for side in (a, b))
        length = np.linalg.norm(keys, axis=1, keepdims=True)
        weight = np.linalg.norm(values, axis=1)
        weight = weight / weight.max()
        together = np.outer(weight, weight) * (keys / length @ (keys / length).T)
        alone = np.kron(np.eye(3), np.ones((4, 4))) * together
        expected = length * (np.linalg.inv(together + 3 * np.eye(12)) @ (alone + 3 * np.eye(12)) @ (keys / length))
        np.testing.assert_allclose(found[module], expected, atol=1e-5, rtol=1e-4)


def test_a_chunk_alone_and_chunks_without_a_common_key_stay_as_they_are():
    a, b = draw(2, 1, 4, 16), draw(2, 1, 4, 5)
    torch.testing.assert_close(joined_keys(a, b), a.flatten(1, 2))
    separate = torch.zeros(1, 2, 4, 16)
    separate[0, 0, :, :8], separate[0, 1, :, 8:] = draw(4, 8), draw(4, 8)
    torch.testing.assert_close(joined_keys(separate, draw(1, 2, 4, 5)), separate.flatten(1, 2))
    padded = torch.cat([a, torch.zeros_like(a)], dim=1)  # a chunk of padding
    torch.testing.assert_close(joined_keys(padded, torch.cat([b, torch.zeros_like(b)], dim=1)), padded.flatten(1, 2))


def test_rows_that_a_question_gets_keep_their_keys():
    a, b = draw(2, 3, 30, 16), draw(2, 3, 30, 5)
    kept = [torch.arange(1, 18), torch.zeros(0, dtype=torch.long), torch.arange(3, 6)]
    rows = [(numbers, torch.linspace(0.1, 1, len(numbers))) for numbers in kept]
    order = [*range(1, 18), 63, 64, 65]
    for ridges in ({}, {"o_proj": 3.0}):
        keys, values = join(Merging(ridges=ridges), a, b, rows)
        torch.testing.assert_close(keys, a.flatten(1, 2)[:, order])
        expected = torch.einsum("mcro,cr,mcri->moi", b, dense(rows, 30), a)
        torch.testing.assert_close(values.mT @ keys, expected)


def test_a_question_gets_the_64_rows_with_the_longest_values():
    b, sentences = draw(2, 3, 30, 5), [[0.5, 1.0, 0.0], [0.2], []]
    owners = [torch.arange(30) % 4 - 1, torch.zeros(30, dtype=torch.int16), torch.full((30,), -1)]
    alone = np.array(
        [[of[s] if 0 <= s < len(of) else 0.0 for s in rows] for rows, of in zip(owners, sentences, strict=True)]
    )
    assert 0 < (alone > 0).sum() < MOST_ROUTED == 64  # all of them
    found = row_weights(owners, [row_lengths(one) for one in b.unbind(1)], sentences)
    np.testing.assert_allclose(dense(found, 30), alone)
    assert sum(len(kept) for kept, _ in found) == MOST_ROUTED

    sentences = [[0.5, 1.0, 0.3], [0.2], [0.1]]
    owners = [torch.arange(30) % 3, torch.zeros(30, dtype=torch.int16), torch.zeros(30, dtype=torch.int16)]
    alone = np.array([[of[s] for s in rows] for rows, of in zip(owners, sentences, strict=True)])
    lengths = np.linalg.norm(b.numpy() * alone[..., None], axis=(0, 3))
    longest = lengths >= np.sort(lengths.flatten())[-MOST_ROUTED]
    found = row_weights(owners, [row_lengths(one) for one in b.unbind(1)], sentences)
    np.testing.assert_allclose(dense(found, 30), np.where(longest, alone, 0.0))
    subtracted = [[-one for one in of_chunk] for of_chunk in sentences]  # a negative scale takes the same rows
    found = row_weights(owners, [row_lengths(one) for one in b.unbind(1)], subtracted)
    np.testing.assert_allclose(dense(found, 30), np.where(longest, -alone, 0.0))


def test_a_question_for_one_chunk_hears_less_of_the_others():
    common = draw(64)
    keys = torch.nn.functional.normalize(draw(4, 8, 64) + 1.4 * common, dim=-1)  # four chunks
    values = torch.eye(32).view(4, 8, 32)
    heard = {}
    for ridges in ({}, {"o_proj": 3.0}):
        a, b = join(Merging(ridges=ridges), keys[None], values[None])
        a, b = a[0], b[0]
        answer = keys.flatten(0, 1) @ a.T @ b  # [asked, said]
        own = answer.diagonal()
        elsewhere = answer * (torch.arange(32)[:, None] // 8 != torch.arange(32) // 8)
        heard[bool(ridges)] = float(elsewhere.abs().sum(1).mean() / own.mean())
    assert heard[True] < 0.7 * heard[False]


def test_of_more_keys_than_a_module_can_tell_apart_those_with_the_longest_values_are_merged():
    a, b = draw(2, 3, 10, 16), draw(1, 3, 10, 5)  # layers, chunks, rank; 8 rows are half of 16 inputs
    keys, values = join(Merging(ridges={"o_proj": 3.0}), a, b)
    order = sorted(range(30), key=lambda i: -b.flatten(1, 2)[0, i].norm())
    kept = sorted(order[:8])
    assert kept != sorted(order[-8:]) and keys.shape == (2, 8, 16)
    torch.testing.assert_close(values, b.flatten(1, 2)[:, kept])
    expected = decorrelate_keys(a.flatten(1, 2)[:, kept], values, torch.tensor(kept) // 10, 3.0)
    torch.testing.assert_close(keys, expected)
    assert join(Merging(), a, b)[0].shape == (2, 30, 16)  # without a ridge all of them are


def test_adapters_are_merged_as_their_manifest_says(tmp_path):
    kind = TARGET.kinds[0]
    plain, apart = write(tmp_path / "plain", 3), write(tmp_path / "apart", 3, key_decorrelation={kind: 3.0})
    a, b = (side.bfloat16() for side in random_factors(3)[kind])
    keys = joined_keys(a.transpose(0, 1), b.transpose(0, 1)).unflatten(1, (3, -1))  # [layers, chunks, r, in]
    for layer, module in enumerate(TARGET.of_kind(kind)):
        torch.testing.assert_close(
            apart.lora().delta(module.name).float(),
            sum(b[i, layer].T.float() @ keys[layer, i].float() for i in range(3)),
            atol=0.05, rtol=0.02,
        )  # fmt: skip
    assert torch.equal(apart.lora([1]).delta(module.name), plain.lora([1]).delta(module.name))
    for module in TARGET.of_kind(TARGET.kinds[1]):
        assert torch.equal(apart.lora().delta(module.name), plain.lora().delta(module.name))
    assert apart.version != plain.version
    assert apart.manifest.cache_keys() != plain.manifest.cache_keys()  # what the library takes for learned already


def test_a_ridge_that_is_no_positive_number_is_refused(tmp_path):
    path = write(tmp_path, 2).folder / "adapter.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    for ridge in (0.0, -1.0, float("nan"), "3"):
        (tmp_path / "adapter.json").write_text(json.dumps(stored | {"merge_ridges": {"down_proj": ridge}}))
        with pytest.raises(AdapterError, match="damaged"):
            Manifest.read(tmp_path / "adapter.json")


def test_keys_are_solved_for_in_a_program_that_sets_the_number_of_threads():
    """MKL's LU of several matrices fails there."""
    program = (
        "import torch; torch.set_num_threads(2); from loracast.lora.merge import decorrelate_keys;"
        "keys = torch.randn(8, 192, 576); owners = torch.arange(192) // 96;"
        "assert decorrelate_keys(keys, torch.randn(8, 192, 576), owners, 3.0).isfinite().all()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
