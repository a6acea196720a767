"""The fingerprint of what the code does: it changes with a constant of routing and with weights, not when code moves."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loracast.answering.model import Model
from tiny import make_hypernet

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("fingerprint", ROOT / "benchmarks" / "fingerprint.py")
assert _spec is not None and _spec.loader is not None
fingerprint = importlib.util.module_from_spec(_spec)
sys.modules["fingerprint"] = fingerprint
_spec.loader.exec_module(fingerprint)

ROUTES = """
import sys
sys.path.insert(0, {benchmarks!r})
import fingerprint
from loracast.base.load import load_base
from loracast.answering.model import Model
from loracast.hypernets.protocol import Hypernetwork
fingerprint.EVERYDAY, fingerprint.SHEETS = 2, 1
model = Model(load_base({base!r}, dtype="float32"), {library!r}, Hypernetwork.from_pretrained({hypernet!r}))
setup = fingerprint.DocumentSetup(model)
asked = [(document, one) for document, some in fingerprint.questions(setup) for one in some]
print(fingerprint.digest([fingerprint.of_route(fingerprint.route_adapter(d.adapter, one)) for d, one in asked]))
"""


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(fingerprint, "EVERYDAY", 2)
    monkeypatch.setattr(fingerprint, "SHEETS", 1)
    monkeypatch.setattr(fingerprint, "of_tasks", lambda model: ["cold"])


def test_a_constant_of_routing_and_other_weights_change_it(base, tmp_path, monkeypatch, few):
    model = Model(base, tmp_path, make_hypernet(base, seed=1))
    before = fingerprint.behaviour(model)
    assert before == fingerprint.behaviour(model)
    after = fingerprint.behaviour(Model(base, tmp_path, make_hypernet(base, seed=2)))
    assert fingerprint.changed(before, after) == ["document: answers"]
    monkeypatch.setattr("loracast.reading.search._PAIR_WEIGHT", 5.0)
    assert "document: routes" in fingerprint.changed(before, fingerprint.behaviour(model))


def test_code_that_moves_does_not_change_it(model, few, tmp_path, tiny_folder, tiny_hypernet_folder):
    """A renamed module, in a process of its own, routes questions as the modules of this one do."""
    source = tmp_path / "src"
    shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "pretrained"))
    (source / "loracast" / "reading" / "matching.py").rename(source / "loracast" / "reading" / "candidates.py")
    for path in source.rglob("*.py"):
        path.write_text(path.read_text().replace("loracast.reading.matching", "loracast.reading.candidates"))
    script = ROUTES.format(
        benchmarks=str(ROOT / "benchmarks"),
        base=str(tiny_folder),
        library=str(tmp_path),
        hypernet=str(tiny_hypernet_folder),
    )
    env = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    setup = fingerprint.DocumentSetup(model)
    routes = [
        fingerprint.of_route(fingerprint.route_adapter(document.adapter, one))
        for document, some in fingerprint.questions(setup)
        for one in some
    ]
    assert done.stdout.split()[-1] == fingerprint.digest(routes)


@pytest.mark.base
def test_the_figures_of_the_page_were_made_by_what_the_code_does_now():
    """If this fails, behaviour has changed: `python benchmarks/fingerprint.py --write`, then measure anew (results.py)."""
    kept = json.loads(fingerprint.KEPT.read_text())
    if kept["machine"]["processor"] != fingerprint.cpu_model():
        pytest.skip(
            f"compared on the processor that wrote it ({kept['machine']['processor']}): ties may fall otherwise"
        )
    assert fingerprint.changed(kept, fingerprint.now()) == []
