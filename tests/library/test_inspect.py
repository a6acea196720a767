"""What an adapter does where: against dense products and numpy."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from loracast.cli import app
from loracast.documents import Document
from loracast.library.combine import differences, sizes
from loracast.library.library import Library
from loracast.library.save import save_lora
from loracast.lora.algebra import LoRA, svd
from loracast.lora.factors import Factors, effective_rank
from tiny import PROSE, make_model

FREE = torch.Generator().manual_seed(2)
NAMES = ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")


def make(rank: int = 3, names=NAMES) -> LoRA:
    return LoRA(
        {name: Factors(torch.randn(rank, 7, generator=FREE), torch.randn(5, rank, generator=FREE)) for name in names}
    )


def test_the_svd_of_factors_is_that_of_the_dense_product():
    lora = make()
    for name in lora.names:
        u, s, vh = svd(lora, name)
        torch.testing.assert_close((u * s) @ vh, lora.delta(name), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(s, torch.linalg.svdvals(lora.delta(name))[:3], atol=1e-5, rtol=1e-5)


def test_the_effective_rank():
    assert effective_rank(torch.ones(6)) == pytest.approx(6)
    assert effective_rank(torch.tensor([2.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    shares = [0.5, 0.25, 0.25]
    assert effective_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(
        math.exp(-sum(p * math.log(p) for p in shares))
    )


def test_sizes_are_in_the_order_of_layers_and_kinds():
    lora = make()
    found = sizes(lora)
    assert [(m.layer, m.kind) for m in found] == [(0, "down_proj"), (1, "q_proj"), (1, "down_proj")]
    assert found[1].norm == pytest.approx(lora.delta(NAMES[0]).norm().item(), rel=1e-5)
    assert found[1].rank == 3 and 1 < found[1].effective_rank <= 3


def test_differences_by_hand():
    one, other = make(), make(2, NAMES[1:])
    for m, name in zip(differences(one, other), (NAMES[1], NAMES[0], NAMES[2]), strict=True):
        a = one.delta(name)
        b = other.delta(name) if name in other.names else torch.zeros_like(a)
        assert m.norm == pytest.approx(a.norm().item(), rel=1e-4)
        assert m.other_norm == pytest.approx(b.norm().item(), rel=1e-4, abs=1e-6)
        assert m.distance == pytest.approx((a - b).norm().item(), rel=1e-4)
        expected = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
        assert m.cosine == pytest.approx(expected, abs=1e-4)
    assert all(m.cosine == pytest.approx(1) and m.distance < 1e-4 for m in differences(one, one))


def test_probes_tell_what_changes(base, tmp_path):
    """The divergence by hand from PEFT's logits; nothing changes where the LoRA is zero."""
    from loracast.lora.inject import linear_shapes
    from loracast.reading.probes import PROBES, probe

    shapes = linear_shapes(base.model)
    lora = LoRA({
        name: Factors(torch.randn(2, shapes[name][1], generator=FREE), torch.randn(shapes[name][0], 2, generator=FREE))
        for name in NAMES
    })  # fmt: skip
    found = probe(base, lora, PROBES[:3], n_tokens=4)
    prompt = torch.tensor([base.chat.prompt(PROBES[1])])
    plain = base.model(prompt).logits[0, -1]
    adapted = lora.to_peft(make_model())(prompt).logits[0, -1]
    p = torch.distributions.Categorical(logits=adapted)
    wanted = torch.distributions.kl_divergence(p, torch.distributions.Categorical(logits=plain)).item()
    assert found[1].kl == pytest.approx(wanted, rel=1e-3) and wanted > 0.01
    assert [one.prompt for one in found] == list(PROBES[:3])
    for one in probe(base, lora.scale(0.0), PROBES[:3], n_tokens=4):
        assert one.kl < 1e-6 and one.plain == one.adapted


def test_inspect_shows_norms_probes_and_the_whole_text(model, tiny_folder):
    model.learn(Document.from_text(f"# Lamp\n\n{PROSE}\x1b[2J"), "lamp", storage="bf16", max_chunk_tokens=40)
    words = ["inspect", "lamp", "--base", str(tiny_folder), "--device", "cpu", "--library", str(model.library)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    for said in ("effective rank", "What is 12 times 12?", "nats between the first tokens", "Lamp", "It is 4711."):
        assert said in done.stdout
    assert "\x1b" not in done.stdout
    result = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert len(result["probes"]) == 12 and "1.7 litres" in " ".join(part["text"] for part in result["text"])
    adapter = model.adapter("lamp")
    assert sum(m["norm"] ** 2 for m in result["modules"]) == pytest.approx(
        sum(n**2 for n in adapter.lora().norms().values()), rel=1e-3
    )
    (adapter.folder / "chunks.sqlite").write_bytes(b"another text")
    damaged = CliRunner().invoke(app, words)
    assert damaged.exit_code == 1 and "chunks.sqlite is damaged" in damaged.stderr


def test_the_commands(tmp_path, base):
    for name in ("one", "two"):
        save_lora(make(), Library(tmp_path), name, kind="task", title=name, made_for=base.fingerprint)

    def run(*arguments):
        done = CliRunner().invoke(app, [*map(str, arguments), "--library", str(tmp_path)])
        assert done.exit_code == 0, done.output
        return done.stdout

    shown = json.loads(run("show", "one", "--layers", "--plot", tmp_path / "one.png", "--json"))
    assert len(shown["modules"]) == 3 and shown["modules"][0]["effective_rank"] > 1
    assert "effective rank" in run("show", "one", "--layers") and "effective rank" not in run("show", "one")
    apart = json.loads(run("diff", "one", "two", "--plot", tmp_path / "both.png", "--json"))
    assert len(apart["modules"]) == 3 and -1 <= apart["cosine"] <= 1
    assert apart["distance"] ** 2 == pytest.approx(sum(m["distance"] ** 2 for m in apart["modules"]))
    assert json.loads(run("diff", "one", "one", "--json"))["cosine"] == pytest.approx(1)
    assert "in all: cosine" in run("diff", "one", "two")
    for plot in ("one.png", "both.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
