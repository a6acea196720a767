"""The sessions of README and of the docs print what they show, on the embedded base.

A session is an indented block whose lines after `$ ` are commands; what is shown below a command is what it prints.
Sizes and times may differ. `python tests/project/test_readme.py` prints README with the outputs of now where they differ.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

import loracast
from loracast.cli import app

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
SESSION = re.compile(r"^ {4}\$ (loracast .*)\n((?:(?: {4}(?!\$ ).*)?\n)*?)(?=^ {4}\$ |\n*^\S|\Z)", re.MULTILINE)
ELLIPSIS = "..."
"""Stands for the rest of a line where a page cuts it."""


def sessions(page: Path) -> list[tuple[str, list[str]]]:
    """Each command of a page's sessions with the lines that it prints."""
    return [
        (command, [line[4:] for line in printed.splitlines() if line.strip()])
        for command, printed in SESSION.findall(page.read_text())
    ]


def run(command: str, library: Path) -> list[str]:
    """The lines that a command prints, run in the working directory with a library of its own, which it may name."""
    words = shlex.split(command.replace("loracast ", "", 1))
    done = CliRunner().invoke(app, [*words, "--library", str(library)])
    assert done.exit_code == 0, done.output
    lines = (line.removesuffix(f" --library {library}") for line in done.output.splitlines())
    return [line for line in lines if line.strip()]


def masked(line: str) -> str:
    """A line without what depends on the machine: seconds, and sizes to the last digit."""
    return re.sub(r"\b\d[\d,]*(\.\d+)? (ms|s|MB|kB)\b", r"N \2", line)


def same(shown: list[str], printed: list[str]) -> bool:
    if len(shown) != len(printed):
        return False
    return all(
        masked(said).startswith(masked(line.removesuffix(ELLIPSIS)))
        if line.endswith(ELLIPSIS)
        else masked(said) == masked(line)
        for line, said in zip(shown, printed, strict=True)
    )


@pytest.fixture(scope="module")
def learned(tmp_path_factory, load_embedded_base) -> Path:
    """A library with the manual."""
    library = tmp_path_factory.mktemp("learned") / "library"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loracast.answering.model.load_base", load_embedded_base)
        loracast.load(library=library, device="cpu").learn(ROOT / "examples" / "manual.pdf")
    return library


@pytest.fixture
def folder(tmp_path, monkeypatch, learned, one_embedded_base) -> Path:
    """A folder with the examples and a library, where commands and blocks run."""
    shutil.copytree(learned, tmp_path / "library")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.base
@pytest.mark.parametrize("page", [README, ROOT / "docs" / "library.md"], ids=lambda page: page.name)
def test_sessions_print_what_they_show(page, folder):
    found = sessions(page)
    assert found
    for command, shown in found:
        printed = run(command, folder / "library")
        assert same(shown, printed), (command, shown, printed)


@pytest.mark.base
def test_the_python_of_readme_prints_what_its_comments_say(folder, monkeypatch, capsys):
    load = loracast.load
    monkeypatch.setattr(loracast, "load", lambda **options: load(library=folder / "library", device="cpu", **options))
    (block,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.S | re.M)
    exec(block, {})
    expected = re.findall(r"^print\(.*\)  # (.*)$", block, re.M)
    assert expected and capsys.readouterr().out.splitlines() == expected


def test_readme_is_short():
    assert len(README.read_text().split()) < 900


def test_a_session_that_prints_something_else_is_found():
    assert same(["1 chunk, 3.7 MB, 0.2 s", "so it be..."], ["1 chunk, 3.6 MB, 12 s", "so it begins"])
    assert not same(["1 chunk"], ["2 chunks"]) and not same(["5283"], ["5284"]) and not same(["a"], ["a", "b"])
    text = "    $ loracast a\n    one\n\n    $ loracast b\n    two\n\n    three\n\nText\n\n    $ loracast c\n"
    page = Path(tempfile.mkdtemp()) / "page.md"
    page.write_text(text)
    assert sessions(page) == [("loracast a", ["one"]), ("loracast b", ["two", "three"]), ("loracast c", [])]


if __name__ == "__main__":
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as library:

        def written(session: re.Match) -> str:
            command, shown = session.groups()
            printed = run(command, Path(library))
            if same([line[4:] for line in shown.splitlines() if line.strip()], printed):
                return session[0]
            after = re.search(r"\n*\Z", shown)[0].removeprefix("\n" * bool(shown.strip()))
            return f"    $ {command}\n" + "".join(f"    {line}\n" for line in printed) + after

        sys.stdout.write(SESSION.sub(written, README.read_text()))
