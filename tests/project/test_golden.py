"""Adapters and hypernetworks of every version open for ever, and give the numbers that were recorded when they were made.

tests/files/golden/README.md says how. `python tests/project/test_golden.py` records files that have no numbers yet.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_shipped import N_DIRECTIONS, summary

import loracast
from loracast.base.load import Base, load_base
from loracast.cast.compact import compact
from loracast.hypernets.protocol import Hypernetwork
from loracast.library.adapter import Adapter
from loracast.library.index import read_chunks, read_sentences
from loracast.library.library import Library
from loracast.lora.algebra import LoRA
from loracast.reading.routing import route_adapter

GOLDEN = Path(__file__).parents[1] / "files" / "golden"
EXPECTED = GOLDEN / "expected.json"
QUESTION = "How long is the warranty?"
ADAPTERS = sorted(str(path.relative_to(GOLDEN)).removesuffix(".tar.gz") for path in GOLDEN.glob("*/*.tar.gz"))
HYPERNETWORKS = sorted(str(path.parent.relative_to(GOLDEN)) for path in GOLDEN.glob("*/*/config.json"))


def golden_base() -> Base:
    return load_base(GOLDEN / "base", device="cpu", dtype="float32")


def unpacked(name: str, library: Path) -> Adapter:
    """A golden adapter, opened as the library of a user opens it."""
    kind = name.rpartition("/")[2]
    shutil.unpack_archive(GOLDEN / f"{name}.tar.gz", library / kind, filter="data")
    assert Adapter(library / kind).faults() == []
    return Library(library).open(kind)


def parts(adapter: Adapter) -> dict[str, LoRA]:
    """The LoRA of the whole adapter, and that of chunks and sentences that are weighed, as a question weighs them."""
    found = {"whole": adapter.lora(dense=False)}
    if adapter.manifest.n_chunks > 1:
        found["weighed"] = adapter.lora({0: 1.0, 2: 0.25}, dense=False)
    if adapter.manifest.memory_kinds and adapter.manifest.kind == "document":
        # Weights of the test's own: how a question weighs sentences may change, what weighing them gives may not.
        counts = Counter(place.chunk for place in read_sentences(adapter.index, [0, 1]))
        sentences = {chunk: tuple(1 / (1 + i) for i in range(n)) for chunk, n in counts.items()}
        found["by sentence"] = adapter.lora(list(sentences), sentences, dense=False)
    return found


def logits(base: Base, lora: LoRA) -> list[float]:
    """The first logits of the answer to a question."""
    with torch.no_grad(), lora.applied(base.model):
        found = base.model(torch.tensor([base.chat.prompt(QUESTION)])).logits[0, -1]
    return [float(f"{x:.6g}") for x in found[:8]]


def observed(name: str, library: Path, base: Base) -> dict[str, Any]:
    """What is recorded of a golden adapter."""
    adapter = unpacked(name, library)
    loras = parts(adapter)
    return {
        "version": adapter.manifest.version,
        "chunks": [chunk.text for chunk in read_chunks(adapter.index)],
        "routed": list(route_adapter(adapter, QUESTION, k=1).chunks or ()),
        "factors": {part: summary(lora) for part, lora in loras.items()},
        "logits": {part: logits(base, lora) for part, lora in loras.items()},
    }


@pytest.fixture(scope="module")
def base() -> Base:
    return golden_base()


def test_every_format_has_its_files():
    recorded = json.loads(EXPECTED.read_text())
    assert recorded.keys() == {*ADAPTERS, *HYPERNETWORKS}
    kinds = [name.split("/") for name in recorded]
    assert {version for version, _ in kinds} == {"0.1", "0.2", "0.3", "0.4"}
    for whole in ("0.2", "0.3", "0.4"):
        assert {kind for version, kind in kinds if version == whole} == {
            "document", "task", "image", "document-hypernetwork", "task-hypernetwork"
        }  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_gives_what_it_always_gave(name, base, tmp_path):
    recorded, found = json.loads(EXPECTED.read_text())[name], observed(name, tmp_path, base)
    for key in ("version", "chunks", "routed"):
        assert found[key] == recorded[key]
    assert found["factors"].keys() == recorded["factors"].keys()
    for part, modules in recorded["factors"].items():
        assert found["factors"][part].keys() == modules.keys()
        for module, numbers in modules.items():
            slack = 1e-4 * N_DIRECTIONS * numbers[0]
            assert found["factors"][part][module] == pytest.approx(numbers, rel=1e-4, abs=slack), (part, module)
        assert found["logits"][part] == pytest.approx(recorded["logits"][part], rel=1e-3, abs=1e-3), part


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name < "0.4"])
def test_an_older_adapter_becomes_one_of_format_5_with_the_same_factors(name, tmp_path):
    older = unpacked(name, tmp_path)
    library, m = Library(tmp_path), older.manifest
    young = compact(library, older.name, m.storage)
    assert young.manifest.format == 5 and young.faults() == [] and young.manifest.merging == m.merging
    assert library.open(f"{older.name}@{m.version}").manifest == m
    before, after = parts(older), parts(young)
    assert before.keys() == after.keys()
    for part, lora in before.items():
        for module in lora.names:  # up to format 3 the static LoRA was in bf16 beside factors of a byte a number
            one, other = (found[part].to(dtype=torch.float32).delta(module) for found in (before, after))
            assert torch.dist(one, other) <= (0 if m.format > 3 else 0.01 * one.norm()), (part, module)


@pytest.mark.parametrize("name", HYPERNETWORKS)
def test_a_hypernetwork_casts_what_it_always_cast(name, base, tmp_path):
    """The same text becomes the golden adapter again, but for roundings: 0.1 read it with the base in bf16."""
    hypernet = Hypernetwork.from_pretrained(GOLDEN / name)
    assert {"id": hypernet.id, "former_ids": list(hypernet.former_ids)} == json.loads(EXPECTED.read_text())[name]
    golden = unpacked(name.removesuffix("-hypernetwork"), tmp_path / "golden")
    assert golden.manifest.hypernetwork in (hypernet.id, *hypernet.former_ids)
    model = loracast.Model(base, tmp_path / "new", hypernet, hypernet)
    if golden.manifest.kind == "task":
        made = model.task(golden.manifest.title, storage=golden.manifest.storage)
    else:
        document = loracast.Document.from_text((GOLDEN / "manual.md").read_text(), title=golden.manifest.title)
        made = model.learn(document, max_chunk_tokens=48, storage=golden.manifest.storage)
    for chunk in range(golden.manifest.n_chunks):  # how chunks are merged is the format's affair
        one, other = (adapter.lora([chunk], dense=False).to(dtype=torch.float32) for adapter in (made, golden))
        assert one.names == other.names
        for module in one.names:
            assert torch.dist(one.delta(module), other.delta(module)) < 0.03 * other.delta(module).norm(), module


if __name__ == "__main__":
    recorded = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for adapter in set(ADAPTERS) - recorded.keys():
            recorded[adapter] = observed(adapter, Path(folder) / adapter, golden_base())
    for name in set(HYPERNETWORKS) - recorded.keys():
        hypernet = Hypernetwork.from_pretrained(GOLDEN / name)
        recorded[name] = {"id": hypernet.id, "former_ids": list(hypernet.former_ids)}
    EXPECTED.write_text(json.dumps(dict(sorted(recorded.items())), ensure_ascii=False, indent=1) + "\n")
