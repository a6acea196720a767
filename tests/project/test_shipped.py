"""What ships, on the embedded base: LoRAs close to those of a committed file, and answers that are right.

After a change that is meant to cast other LoRAs: `python tests/project/test_shipped.py` writes the file anew.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch

import loracast
from loracast.base.generate import Sampling
from loracast.lab.data.answer_metrics import is_exact
from loracast.lab.data.facts import make_sheet
from loracast.lora.algebra import LoRA

pytestmark = pytest.mark.base("efficientnet-lite0")

EXAMPLES = Path(__file__).parents[2] / "examples"
GOLDEN = Path(__file__).parents[1] / "files" / "shipped.json"
SENTIMENT = "Classify the sentiment of a sentence as positive or negative"
OPPOSITE = "Answer with the opposite word"
N_DIRECTIONS = 4


def learn_all(folder: Path, base: str | None = None) -> tuple[loracast.Model, dict[str, loracast.Adapter]]:
    """The shipped model and adapters of the note, the manual, two tasks and two photos."""
    model = loracast.load(base, library=folder / "library", device="cpu")
    adapters = {
        "note": model.learn(EXAMPLES / "note.txt", "note", storage="bf16"),
        "manual": model.learn(EXAMPLES / "manual.pdf", "manual", storage="bf16"),
        "sentiment": model.task(SENTIMENT, "sentiment", storage="bf16"),
        "opposite": model.task(OPPOSITE, "opposite"),
    }
    photos = Path(sklearn.datasets.__file__).parent / "images"
    adapters |= {name: model.learn(photos / f"{name}.jpg", storage="bf16") for name in ("flower", "china")}
    return model, adapters


def summary(lora: LoRA) -> dict[str, list[float]]:
    """The weight change of the first, middle and last module of each kind: its norm, then it between random directions.

    An entry between two directions of the standard normal distribution is as large as the norm, on average.
    """
    of_kind: dict[str, list[str]] = {}
    for name in lora.names:
        of_kind.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    found = {}
    for names in of_kind.values():
        for name in {names[0], names[len(names) // 2], names[-1]}:
            delta = lora.delta(name).double().numpy()
            random = np.random.RandomState(0)
            left, right = (random.standard_normal((N_DIRECTIONS, d)) for d in delta.shape)
            entries = left @ delta @ right.T
            found[name] = [float(f"{x:.6g}") for x in (np.linalg.norm(delta), *entries.flat)]
    return dict(sorted(found.items()))


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return learn_all(tmp_path_factory.mktemp("shipped"))


@pytest.mark.parametrize("name", ["note", "manual", "sentiment", "flower"])
def test_factors_are_those_of_the_file(learned, name):
    """Processors add up products of bfloat16 in different orders; in float32 all is off by 0.01 and 0.05 at most.

    Of the first chunk: which keys of several are merged may hang by a rounding.
    """
    golden, found = json.loads(GOLDEN.read_text())[name], summary(learned[1][name].lora([0]))
    assert found.keys() == golden.keys()
    for module, (norm, *entries) in golden.items():
        error = np.linalg.norm(np.subtract(found[module][1:], entries)) / (N_DIRECTIONS * norm)
        assert found[module][0] == pytest.approx(norm, rel=0.02) and error < 0.08, (module, error)


ASKED = [
    ("note", "Please name the access number of the amber lantern.", "5283"),
    ("manual", "Who designed the Quillmere D-27?", "Ingrid Solvang"),
    ("manual", "How long does the warranty of the Quillmere D-27 last?", "30 months"),
    ("sentiment", "I loved every minute", "positive"),
    ("sentiment", "The battery died after an hour.", "negative"),
    ("opposite", "hot", "cold"),
    ("flower", "What does the picture show?", "a daisy"),
    ("china", "What does the picture show?", "a palace"),
]


def test_answers_are_right_and_the_base_alone_does_not_know(learned):
    model, adapters = learned
    questions, short = [question for _, question, _ in ASKED], Sampling(max_new_tokens=12)
    given = model.ask(questions, [adapters[name] for name, _, _ in ASKED], sampling=short)
    assert given == [expected for _, _, expected in ASKED]
    known = model.ask(questions, sampling=short)
    assert not [answer for answer, (_, _, expected) in zip(known, ASKED, strict=True) if expected in answer]


def test_three_facts_of_five_on_a_sheet_of_the_test_split_are_answered(learned):
    """`loracast eval facts` has four of five over many such sheets (docs/results.md); here is one, of 20 facts."""
    model, _ = learned
    sheet = make_sheet(random.Random("0/20/0"), 20, split="test")
    adapter = model.learn(loracast.Document.from_text(sheet.text, title=sheet.title))
    given = model.ask([fact.question for fact in sheet.facts], adapter, sampling=Sampling(max_new_tokens=12))
    right = sum(is_exact(answer, fact.answer) for answer, fact in zip(given, sheet.facts, strict=True))
    assert right >= 12


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        _, made = learn_all(Path(folder))
        golden = {name: summary(made[name].lora([0])) for name in ("note", "manual", "sentiment", "flower")}
        GOLDEN.write_text(json.dumps(golden) + "\n")
