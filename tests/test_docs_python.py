"""The blocks of docs/python.md run, in their order, with a tiny base and its hypernetworks in place of the real ones."""

from __future__ import annotations

import re
from pathlib import Path

import loracast

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.S | re.M)


def test_every_block_runs(tiny_folder, tiny_hypernet_folder, hypernetwork, tmp_path, monkeypatch, capsys):
    load = loracast.load

    def load_tiny(model=None, **options):
        where = {
            "hypernetwork": tiny_hypernet_folder,
            "task_hypernetwork": hypernetwork,
            "library": tmp_path / "library",
        }
        assert options.pop("revision", "main") == "main"  # a folder has none
        return load(tiny_folder if model is None else model, **{**where, **options})

    monkeypatch.setattr(loracast, "load", load_tiny)
    (tmp_path / "examples").symlink_to(DOCS.parent / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    found = blocks("python.md")
    for block in found:
        exec(block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_folder)), names)
    assert len(found) >= 6 and names["wrapped"] is not None
    assert [adapter.name for adapter in (names["lantern"], names["manual"], names["shout"])] == [
        "lantern",
        "manual",
        "shout",
    ]
    assert names["answer"].sources[0].adapter == "manual" and "manual, chunk" in capsys.readouterr().out
