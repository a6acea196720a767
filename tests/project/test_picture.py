"""README's picture: its bars are the figures of the files, and a figure that is missing is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import picture
import results


@pytest.fixture
def figures(tmp_path) -> Path:
    def write(name: str, *rows: dict) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))

    def answered(label: str, contained: float, tokens: int, kind: str = "source") -> dict:
        return {"label": label, "kind": kind, "contained": contained, "prompt_tokens": tokens}

    write(
        "xquad", answered("another's adapter", 0.01, 27), answered("adapter", 0.4, 27), answered("adapter", 1, 1, "n")
    )
    write("xquad-bm25", answered("BM25, 1 passage", 0.3, 228))
    write("xquad-window", answered("in the window", 0.45, 375))
    write("xquad-none", answered("no document", 0.03, 27))
    times = (("no document", 0.02), ("adapter, routed 2", 0.05), ("in the window", 0.5))
    write("first-token", *({"label": label, "first_token_s": seconds} for label, seconds in times))
    return tmp_path


def test_bars_are_the_figures(figures):
    right, tokens, seconds = ([value for _, value in shown] for shown in picture.bars(figures).values())
    assert right == pytest.approx([40, 30, 45, 3]) and tokens == [27, 228, 375, 27]
    assert seconds == pytest.approx([50, 500, 20])


def test_the_picture_is_the_same_twice(figures, tmp_path):
    for name in ("a.svg", "b.svg"):
        picture.draw(picture.bars(figures), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def test_a_missing_figure_is_said(figures):
    (figures / "xquad.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(SystemExit, match="has 0 rows 'adapter'"):
        picture.bars(figures)
    (figures / "first-token.json").unlink()
    with pytest.raises(SystemExit, match="is missing"):
        picture.row(figures, "first-token", "adapter")


def test_readme_shows_the_picture_once_its_figures_are_measured(figures):
    plan = results.read_plan()
    measured = {one.id: one for one in plan.measurements}
    assert measured.keys() >= picture.FILES and results.picture_line(plan, figures / "none") == ""
    for name in picture.FILES:
        kept = json.loads((figures / f"{name}.json").read_text())
        of = {"command": measured[name].command, "fingerprint": results.fingerprint.kept()[measured[name].depends]}
        (figures / f"{name}.json").write_text(json.dumps({**kept, **of}))
    assert results.picture_line(plan, figures).endswith("(docs/images/results.svg)\n\n")
