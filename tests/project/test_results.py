"""docs/results.md and README's table: made from kept figures of the weights that ship, and README says nothing else."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from commands import every_command, options_of
from loracast.cli import app

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
assert _spec is not None and _spec.loader is not None
results = importlib.util.module_from_spec(_spec)
sys.modules["results"] = results
_spec.loader.exec_module(results)

# A figure of a text: a number with a unit of measure behind it, or in a row of a table.
FIGURE = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?= ?(?:%|points|kB|MB a token|times the base))")
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*\.\d+")


@pytest.fixture(scope="module")
def plan():
    return results.read_plan()


def test_the_page_is_made_of_the_figures_that_are_kept(plan):
    """So no figure of other weights is on it: those are not shown, and the page is made from nothing else."""
    assert results.PAGE.read_text() == results.page(plan), "run `python benchmarks/results.py page`"


def test_readme_has_the_table_of_the_page(plan):
    readme = (ROOT / "README.md").read_text()
    block = results.picture_line(plan) + results.readme_table(plan)
    assert results.with_table(readme, block) == readme, "run `python benchmarks/results.py page`"


def figures(markdown: str) -> set[str]:
    """The figures of a text outside of code: numbers with a unit, and numbers with a decimal point in tables."""
    text = re.sub(r"^( {4}|\t).*$|```.*?```|`[^`]*`", "", markdown, flags=re.MULTILINE | re.DOTALL)
    rows = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    return {*FIGURE.findall(text), *NUMBER.findall(rows)}


def test_every_figure_of_readme_is_on_the_page(plan):
    said = set(re.findall(r"[+-]?\d[\d,]*(?:\.\d+)?", results.page(plan)))
    missing = figures((ROOT / "README.md").read_text()) - said
    assert not missing, f"README.md has {sorted(missing)}, and docs/results.md has not"


def test_figures_of_a_text():
    text = "In 95.4 % of 1,000 images; +0.2 points.\n\n| a | 3.5 | 12 |\n\n    code 7 %\n\nSince 2026 `8 %` for Python 3.11.\n"
    assert figures(text) == {"95.4", "+0.2", "3.5"}


def test_commands_are_those_that_exist(plan):
    known = {words: set().union(*options_of(command)) for words, command in every_command()}
    for one in plan.measurements:
        words = shlex.split(one.command)
        if words[0] == "python":
            assert (ROOT / words[1]).is_file() and "--out" not in words
            continue
        assert words[:2] == ["loracast", "eval"] and "--out" not in words, one.id
        unknown = {word for word in words if word.startswith("--")} - known[tuple(words[1:3])]
        assert not unknown, (one.id, unknown)


@pytest.mark.parametrize("path", sorted(results.FIGURES.glob("*.json")), ids=lambda path: path.stem)
def test_kept_figures_belong_to_a_measurement_and_name_no_path(plan, path):
    assert path.stem in {one.id for one in plan.measurements}
    kept = json.loads(path.read_text())
    assert "/work" not in path.read_text() and "/root" not in path.read_text() and "/home" not in path.read_text()
    assert kept["rows"] and kept["machine"]["cpu"] and re.fullmatch(r"\d{4}-\d\d-\d\d", kept["date"])


def test_a_measurement_is_run_kept_and_shown_until_the_weights_change(
    plan, tmp_path, monkeypatch, tiny_folder, tiny_hypernet_folder
):
    """A section of sheets with a tiny base: the real command, its figures on the page, and the page after new weights."""
    section = next(one for one in plan.sections if one.title == "Sheets of facts (generated)")
    one = dataclasses.replace(
        section.measurements[0], rows={}, command="loracast eval facts --facts 5 --sheets 2 --baselines routed,none"
    )
    small = dataclasses.replace(plan, sections=(dataclasses.replace(section, measurements=(one,)),))
    answered: list[dict] = []

    def run(arguments):
        given = [*arguments, "--base", str(tiny_folder), "--hypernetwork", str(tiny_hypernet_folder)]
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 0, done.output
        answered.extend(json.loads((Path(arguments[-1]) / "results.json").read_text())["rows"])

    from loracast.hypernets.protocol import Hypernetwork

    shipped = Hypernetwork.from_pretrained(tiny_hypernet_folder).id
    now = {"document": {"weights": shipped, "routes": "a", "dtype": "float32"}}
    monkeypatch.setattr(results.fingerprint, "kept", lambda: now)
    before = results.page(small, tmp_path)
    assert results.UNMEASURED in before
    results.measure(one, results.keys_of(small, section), {}, tmp_path, run)
    page = results.page(small, tmp_path)
    for row in answered:
        low, high = row["cluster_low"], row["cluster_high"]
        exact = f"{100 * row['exact']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        assert f"| 5 facts, {row['label']} | {exact} | {100 * row['has_value']:.1f} | 10 |" in page
    assert results.UNMEASURED not in page and shipped in page and one.command in page
    kept = json.loads((tmp_path / f"{one.id}.json").read_text())
    assert kept["command"] == one.command and set(kept["machine"]) == {"cpu", "cores", "threads", "device"}

    another = dataclasses.replace(one, command=one.command.replace("2", "3"))
    assert results.figures_of(one, tmp_path) is not None and results.figures_of(another, tmp_path) is None
    for changed, told in (
        ({"weights": "other weights"}, "other weights ships"),
        ({"dtype": "bfloat16"}, "measured in float32, and the page's figures are in bfloat16"),
    ):
        now = {"document": {"weights": shipped, "routes": "a", "dtype": "float32", **changed}}
        assert results.page(small, tmp_path) == before
        with pytest.raises(SystemExit, match=told):
            results.measure(one, results.keys_of(small, section), {}, tmp_path, run)
    now = {"document": {"weights": shipped, "routes": "b", "dtype": "float32"}}  # the code does something else
    assert results.page(small, tmp_path) == before


def test_a_table_of_cells_says_what_others_say(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(results.fingerprint, "kept", lambda: {"document": {}, "none": {}, "task": {}})
    section = next(one for one in plan.sections if one.cells)
    assert results.cells_table(plan, section.columns, section.cells, tmp_path).count("\n") == 1  # nothing is measured
    facts = next(one for one in plan.measurements if one.id == "facts")
    row = {"baseline": "merged", "exact": 0.5, "cluster_low": 0.4, "cluster_high": 0.6}
    kept = {
        "command": facts.command,
        "fingerprint": {},
        "rows": [{**row, "facts": 5}, {**row, "facts": 20, "exact": 0.55}],
    }
    (tmp_path / "facts.json").write_text(json.dumps(kept))
    rows = [{"says": "merged", "cells": [["facts", {"facts": 20}, "exact_by_sheet"], ["xquad", {}, "f1"], "-"]}]
    table = results.cells_table(plan, ["", "a", "b", "c"], rows, tmp_path)
    assert table.splitlines()[-1] == f"| merged | 55.0 (40.0 to 60.0) | {results.MISSING} | - |"


def test_what_is_not_complete_is_not_kept(plan, tmp_path):
    one = plan.measurements[0]

    def run(arguments):
        Path(arguments[-1], "results.json").write_text(json.dumps({"is_complete": False}))

    with pytest.raises(SystemExit, match="did not come to its end"):
        results.measure(one, ["n"], {"DATA": tmp_path}, tmp_path / "kept", run)
    assert not (tmp_path / "kept").exists()


def test_folders_stand_for_their_names(plan, tmp_path):
    one = next(one for one in plan.measurements if "DATA" in one.command)
    asked: list[str] = []

    def run(arguments):
        asked.extend(arguments)
        raise typer.Exit

    with pytest.raises(typer.Exit):
        results.measure(one, ["n"], {"DATA": Path("/some/where")}, tmp_path, run)
    assert not any("DATA" in argument for argument in asked) and any("/some/where/" in argument for argument in asked)


@pytest.mark.parametrize("name", results.fingerprint.SHIPPED.values())
def test_provenance_leads_back_to_a_run_that_starts_from_nothing(name):
    config = json.loads((ROOT / "src" / "loracast" / "pretrained" / name / "config.json").read_text())
    stages = config["provenance"].get("ancestors") or config["provenance"]["history"]
    assert "--init-from" not in stages[0]["command"] and "--shared-from" not in stages[0]["command"]
    assert all(stage.get("command") or stage.get("note") for stage in stages)
    assert not re.search(r"/root|/work|/home", json.dumps(stages))
