"""Adapters added up, subtracted, compressed; and other tools' LoRAs taken in."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from adapters import TARGET, deltas, random_factors, write
from loracast.answering.model import load
from loracast.cli import app
from loracast.errors import AdapterError, BaseModelError
from loracast.library.adapter import Adapter
from loracast.library.combine import Part, combined
from loracast.library.library import Library
from loracast.library.save import save_lora, target_of
from loracast.lora.algebra import LoRA, concat, inject
from loracast.lora.factors import Factors
from loracast.reading.matching import Route
from loracast.reading.routing import loras_together
from tiny import PROSE, make_model

IDS = torch.randint(3, 600, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def library(tiny_folder, tiny_hypernet_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    model = load(tiny_folder, tiny_hypernet_folder, library=folder, device="cpu")
    for name, text in (("one", "The lamp on the desk was made in the north."), ("two", PROSE)):
        (folder / f"{name}.txt").write_text(text)
        model.learn(folder / f"{name}.txt", name, max_chunk_tokens=60)
    return folder


def delta(lora: LoRA) -> dict[str, torch.Tensor]:
    return {name: lora.delta(name).float() for name in lora.names}


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_sum_is_the_weighted_sum_of_the_deltas(library):
    one, two = (Library(library).open(name) for name in ("one", "two"))
    for weight in (math.nan, math.inf):
        with pytest.raises(AdapterError, match="finite"):
            combined([Part(one), Part(two, weight)])
    both = combined([Part(one), Part(two, -0.5)])
    assert both.error == 0 and not both.static.names
    for name, found in delta(both.lora).items():
        expected = one.lora().delta(name).float() - 0.5 * two.lora().delta(name).float()
        torch.testing.assert_close(found, expected, atol=1e-2 * expected.abs().max().item(), rtol=1e-2)
    nothing = combined([Part(one), Part(one, -1)]).lora
    assert all(d.abs().max() < 1e-6 for d in delta(nothing).values())
    small = combined([Part(one), Part(two)], rank=1)
    assert small.lora.rank == 1 and 0 < small.error < 1
    with pytest.raises(AdapterError, match="at least one"):
        combined([])


def test_the_static_lora_comes_in_once_whatever_the_order_the_weights_and_the_company(tmp_path):
    """By hand: the numbers that were written, added up in fp32."""
    generator = torch.Generator().manual_seed(5)
    static = {
        f"{kind}.shared.{side}": torch.randn(2, 3, d, generator=generator)
        for kind in ("q_proj", "down_proj")
        for side, d in zip("ab", (TARGET.of_kind(kind)[0].d_in, TARGET.of_kind(kind)[0].d_out), strict=True)
    }
    a, b = (write(tmp_path, 2, name=name, seed=seed, shared=static) for name, seed in (("a", 1), ("b", 2)))
    bare = [deltas(random_factors(2, seed), [0, 1]) for seed in (1, 2)]
    common = {
        m.name: static[f"{m.kind}.shared.b"][i].T @ static[f"{m.kind}.shared.a"][i]
        for kind in TARGET.kinds
        for i, m in enumerate(TARGET.of_kind(kind))
    }

    def assert_sum(loras, weights: tuple[float, float], n_static: int = 1):
        found = concat(loras).to(dtype=torch.float32)
        for name in TARGET.names:
            expected = weights[0] * bare[0][name] + weights[1] * bare[1][name] + n_static * common[name]
            torch.testing.assert_close(found.delta(name), expected, atol=0.02 * expected.abs().max().item(), rtol=0.02)

    for parts in ([Part(a), Part(b, -1)], [Part(b, -1), Part(a)]):
        both = combined(parts)
        assert_sum([both.lora, both.static], (1, -1))
        assert_sum([both.lora], (1, -1), n_static=0)
    kept = save_lora(
        both.lora,
        Library(tmp_path),
        "both",
        kind="combined",
        title="a + b:-1",
        made_for=a.manifest.made_for,
        static=both.static,
    )
    assert kept.faults() == []
    assert_sum([Adapter(kept.folder).lora()], (1, -1))
    for picked in ([(kept, Route()), (a, Route())], [(a, Route()), (kept, Route())]):
        assert_sum(loras_together(picked), (2, -1))
    assert_sum([(again := combined([Part(kept), Part(b)])).lora, again.static], (1, 0))
    other = write(
        tmp_path, 2, name="other", seed=2, shared={k: 2 * v for k, v in static.items()}, hypernetwork="o" * 16
    )
    mixed = combined(
        [Part(a), Part(other)]
    )  # of another hypernetwork: its own static LoRA, whose B and A are twice as large
    assert_sum([mixed.lora, mixed.static], (1, 1), n_static=1 + 4)


def test_adapters_of_different_bases_do_not_add_up(library, tmp_path, base):
    made_for = type(base.fingerprint)("other", "c" * 16, "n" * 16, "m" * 16)
    lora = Library(library).open("one").lora()
    other = save_lora(lora, Library(tmp_path), "other", kind="imported", title="other", made_for=made_for)
    with pytest.raises(BaseModelError, match="was made for the base"):
        combined([Part(Library(library).open("one")), Part(other)])


def test_the_command(library, tiny_folder):
    done = run("combine", "one", "two:0.5", "--rank", 3, "--name", "both", "--library", library, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["parts"] == ["one", "two:0.5"] and set(report["ranks"].values()) == {3} and report["error"] > 0
    both = Library(library).open("both")
    assert both.manifest.kind == "combined" and both.manifest.title == "one + two:0.5"
    shown = run("show", "both", "--library", library)
    assert shown.exit_code == 0 and "one + two:0.5" in shown.stdout and "combined" in shown.stdout
    assert "combined" in run("list", "--library", library).stdout
    answered = run("ask", "-a", "both", "Who built it?", "--max-tokens", 3, "--library", library, "--base", tiny_folder)
    assert answered.exit_code == 0, answered.output
    taken = run("combine", "one", "--name", "both", "--library", library)
    assert taken.exit_code == 1 and "already" in taken.stderr
    odd = run("combine", "one:half", "--name", "odd", "--library", library)
    assert odd.exit_code == 2 and "write NAME:0.5" in odd.stderr
    none = run("combine", "nobody", "--name", "odd", "--library", library)
    assert none.exit_code == 1 and "no adapter is called 'nobody'" in none.stderr


def test_a_lora_that_peft_trained_is_taken_in(library, tiny_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    wrapped = get_peft_model(
        make_model(),
        LoraConfig(
            r=4, lora_alpha=24, use_rslora=True, target_modules=["q_proj", "down_proj"], layers_to_transform=[1, 3]
        ),
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    wrapped.save_pretrained(tmp_path / "Trained elsewhere")
    done = run("import", tmp_path / "Trained elsewhere", "--base", tiny_folder, "--library", library, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["name"] == "trained-elsewhere"
    adapter = Library(library).open("trained-elsewhere")
    assert adapter.manifest.kind == "imported" and adapter.manifest.source == "Trained elsewhere"
    model = make_model()
    with torch.no_grad():
        expected = wrapped(input_ids=IDS).logits
        with inject(model, adapter.lora()):
            found = model(input_ids=IDS).logits
        plain = model(input_ids=IDS).logits
    assert (found - expected).abs().max() < 0.05 * (expected - plain).abs().max()  # bf16
    # And back to where it came from.
    out = tmp_path / "back"
    assert run("export", "trained-elsewhere", "--to", "peft", "--out", out, "--library", library).exit_code == 0
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4


def test_what_does_not_fit_the_base_is_refused(library, tiny_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(make_model("qwen3"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "fits")
    other = make_model()
    other.model.layers[1].mlp.down_proj = torch.nn.Linear(96, 40, bias=False)
    get_peft_model(other, LoraConfig(target_modules=["down_proj"])).save_pretrained(tmp_path / "odd")
    done = run("import", tmp_path / "odd", "--base", tiny_folder, "--library", library)
    assert done.exit_code == 1 and "the LoRA is for [40, 96], the base has [48, 96]" in done.stderr
    assert not (library / "odd").exists()
    with pytest.raises(AdapterError, match="modules that cannot be kept"):
        target_of(LoRA({"lm_head": Factors(torch.zeros(1, 4), torch.zeros(5, 1))}))
