"""The tutorial runs on the embedded base, cell by cell, and prints what it says that it prints.

`python tests/project/test_tutorial.py` runs it and writes its outputs anew.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.ipynb"


def run(cells: list[dict], folder: Path) -> list[list[str]]:
    """The lines that each code cell prints, run one after the other in a folder beside the examples."""
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "docs").mkdir()
    os.chdir(folder / "docs")
    names: dict = {}
    printed = []
    for cell in cells:
        with redirect_stdout(io.StringIO()) as stream:
            exec("".join(cell["source"]), names)
        printed.append(stream.getvalue().splitlines(keepends=True))
    return printed


@pytest.mark.base("efficientnet-lite0")
def test_every_cell_prints_what_the_page_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # and back afterwards
    cells = [cell for cell in json.loads(TUTORIAL.read_text())["cells"] if cell["cell_type"] == "code"]
    shown = 0
    for cell, printed in zip(cells, run(cells, tmp_path), strict=True):
        stored = [line for output in cell["outputs"] for line in output["text"]]
        if "varies" in cell["metadata"].get("tags", ()):  # what the plain base makes up depends on the processor
            assert printed and "30 months" not in "".join(printed)
        else:
            assert printed == stored
        shown += bool(stored)
    assert shown == 9


if __name__ == "__main__":
    notebook = json.loads(TUTORIAL.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    with tempfile.TemporaryDirectory() as work:
        for cell, lines in zip(code, run(code, Path(work)), strict=True):
            cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] * bool(lines)
    TUTORIAL.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
