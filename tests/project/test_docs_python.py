"""The Python examples of docs and docstrings run, with a tiny base and its hypernetworks in place of the real ones."""

from __future__ import annotations

import ast
import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import loracast
from loracast.library.library import Library

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TUTORIAL = "tutorial.ipynb"  # its own test runs it
SERVING = "serving.md"  # test_serving_docs.py runs it with a server
OTHERS = "integrations.md"  # below, a library at a time


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.S | re.M)


def documented(node: Any) -> Iterator[Any]:
    """A module, class or function and what is defined in it; `ast.walk` goes through every expression too."""
    yield node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from documented(child)


def docstring_examples() -> Iterator[tuple[str, str]]:
    """The indented blocks of the docstrings of `src` that are Python and call something, with where they stand."""
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in documented(ast.parse(file.read_text())):
            text = ast.get_docstring(node, clean=not isinstance(node, ast.Module)) or ""
            for block in re.findall(r"\n\n((?: {4}.*\n?)+)", text):
                try:
                    calls = any(isinstance(part, ast.Call) for part in ast.walk(ast.parse(textwrap.dedent(block))))
                except SyntaxError:
                    continue
                if calls:
                    name = getattr(node, "name", "")
                    yield f"{file.relative_to(ROOT / 'src' / 'loracast')}:{name}", textwrap.dedent(block)


EXAMPLES = list(docstring_examples())


@pytest.fixture
def folder(tiny_folder, tiny_hypernet_folder, hypernetwork, tmp_path, monkeypatch) -> Path:
    """An own folder, in which `loracast.load` loads the tiny base and its hypernetworks where no others are named."""
    load = loracast.load

    def load_tiny(model=None, hypernetwork_=tiny_hypernet_folder, **options):
        where = {"hypernetwork": hypernetwork_, "task_hypernetwork": hypernetwork, "library": tmp_path / "library"}
        assert options.pop("revision", "main") == "main"  # a folder has none
        loaded = load(tiny_folder if model is None else model, **{**where, **options})
        loaded.base.model.generation_config.eos_token_id = [2, *range(20, 600, 40)]  # or random answers seldom end
        return loaded

    monkeypatch.setattr(loracast, "load", load_tiny)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(tiny_hypernet_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_of_the_page_about_python_runs(folder, tiny_folder, capsys):
    names: dict = {}
    found = blocks("python.md")
    for block in found:
        exec(block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_folder)), names)
    assert len(found) >= 7 and (folder / "mine-to-share" / "README.md").is_file()
    assert names["wrapped"] is not None
    kept = [names[name].name for name in ("lantern", "manual", "sentiment")]
    assert kept == ["lantern", "manual", "sentiment"]
    assert names["answer"].sources[0].adapter == "manual" and "manual, chunk" in capsys.readouterr().out


def test_the_block_of_the_page_about_the_library_runs(folder):
    for name in ("manual", "manuals-dehumidifier"):
        loracast.load().learn("examples/manual.pdf", name)
    Library(folder / "library").describe("manuals-dehumidifier", tags=["machine", "kitchen"])
    digits = Library(folder / "library").versions("manual")[0].version[:8]
    names = {"loracast": loracast, "folder": folder / "library"}
    (block,) = blocks("library.md")
    exec(block.replace("3f9a12c0", digits), names)
    assert names["found"] and names["sources"][0].adapter == "manual"


def test_the_block_of_the_page_about_memories_runs(folder):
    names: dict = {}
    (block,) = blocks("memory.md")
    exec(block, names)
    assert names["memory"].messages() == ["I keep the spare key under the blue flower pot."]


def test_the_block_of_the_page_about_images_runs(folder):
    names: dict = {}
    (block,) = blocks("images.md")
    exec(block, names)
    adapter = names["pump"]
    assert next(iter(names["labels"].likeliest)) == "overheating" and adapter.manifest.kind == "labels"


def test_every_page_with_python_is_run():
    pages = {page.name for page in DOCS.glob("*.md") if blocks(page.name)}
    assert pages == {"python.md", "library.md", "memory.md", "images.md", SERVING, OTHERS}


def test_there_are_examples_in_docstrings():
    assert {where for where, _ in EXAMPLES} >= {
        "answering/model.py:", "answering/model.py:load", "answering/model.py:ask", "lora/algebra.py:applied",
    }  # fmt: skip


@pytest.fixture(scope="module")
def learned(tiny_folder, tiny_hypernet_folder, tmp_path_factory) -> Path:
    """A library with the adapters that the examples of docstrings ask."""
    library = tmp_path_factory.mktemp("learned") / "library"
    model = loracast.load(tiny_folder, tiny_hypernet_folder, library=library, device="cpu")
    model.learn([ROOT / "examples" / "manual.pdf", ROOT / "examples" / "note.txt"], ["manual", "contract"])
    return library


@pytest.mark.parametrize("example", [text for _, text in EXAMPLES], ids=[where for where, _ in EXAMPLES])
def test_an_example_of_a_docstring_runs(example, folder, learned, tiny_folder, tiny_hypernet_folder):
    (folder / "manual.pdf").symlink_to(ROOT / "examples" / "manual.pdf")
    shutil.copytree(learned, folder / "library")
    model = loracast.load()
    names = {
        "loracast": loracast,
        "Document": loracast.Document,
        "model": model,
        "hf_model": model.base.model,
        "tokenizer": model.base.tokenizer,
        "prompt": model.base.tokenizer("The lantern", return_tensors="pt"),
        "lora": model.cast("examples/note.txt"),
    }
    for remote, local in (("me/my-base", tiny_folder), ("me/my-hypernetwork", tiny_hypernet_folder)):
        example = example.replace(remote, str(local))
    exec(example, names)


@pytest.mark.parametrize(
    ("number", "library"), [(1, "langchain_core"), (2, "llama_index.core"), (3, "haystack")]
)  # fmt: skip
def test_other_frameworks_ask_an_adapter(number, library, model, monkeypatch, capsys):
    pytest.importorskip(library)
    question = "Who designed the Quillmere D-27?"
    monkeypatch.setattr(loracast, "load", lambda: model)
    monkeypatch.chdir(DOCS.parent)
    names: dict = {}
    start, *others = blocks(OTHERS)
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
