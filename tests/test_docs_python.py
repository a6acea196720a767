"""The blocks of docs/python.md run, in their order, with a tiny base and its hypernetworks in place of the real ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import loracast

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.S | re.M)


def test_every_block_runs(tiny_folder, tiny_hypernet_folder, hypernetwork, tmp_path, monkeypatch, capsys):
    load = loracast.load

    def load_tiny(model=None, hypernet=tiny_hypernet_folder, **options):
        where = {"hypernetwork": hypernet, "task_hypernetwork": hypernetwork, "library": tmp_path / "library"}
        assert options.pop("revision", "main") == "main"  # a folder has none
        return load(tiny_folder if model is None else model, **{**where, **options})

    monkeypatch.setattr(loracast, "load", load_tiny)
    (tmp_path / "examples").symlink_to(DOCS.parent / "examples")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(tiny_hypernet_folder)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    found = blocks("python.md")
    for block in found:
        exec(block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_folder)), names)
    assert len(found) >= 7 and (tmp_path / "mine-to-share" / "README.md").is_file()
    assert names["wrapped"] is not None
    kept = [names[name].name for name in ("lantern", "manual", "sentiment")]
    assert kept == ["lantern", "manual", "sentiment"]
    assert names["answer"].sources[0].adapter == "manual" and "manual, chunk" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "library"), [(1, "langchain_core"), (2, "llama_index.core"), (3, "haystack")]
)  # fmt: skip
def test_other_frameworks_ask_an_adapter(number, library, model, monkeypatch, capsys):
    pytest.importorskip(library)
    question = "Who designed the Quillmere D-27?"
    monkeypatch.setattr(loracast, "load", lambda: model)
    monkeypatch.chdir(DOCS.parent)
    names: dict = {}
    start, *others = blocks("integrations.md")
    exec(start, names)
    capsys.readouterr()
    exec(others[number - 1], names)
    expected = model.ask(question, "manual")
    assert expected and expected != model.ask(question)
    assert capsys.readouterr().out == expected + "\n"
    if library == "llama_index.core":
        *_, last = names["llm"].stream_complete(question)
        assert last.text.strip() == expected
        assert names["llm"].complete(question).additional_kwargs["sources"][0].startswith("manual, chunk")
    if library == "langchain_core":
        assert names["llm"].batch([question, question]) == [expected] * 2  # from threads
