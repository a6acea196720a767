"""What the code does, as hashes: figures whose fingerprint differs from today's are stale (results.py).

    python benchmarks/fingerprint.py            # compare docs/fingerprint.json with what the code does now
    python benchmarks/fingerprint.py --write    # write it anew: figures of another behaviour are no longer shown

For each kind of measurement: the weights, the word data, the type of the numbers, and behaviour. That of documents is
what 200 questions about everyday documents and sheets of the dev split are routed to and answered with; of tasks the
answers of four tasks; of the gate its probabilities for the 200 questions; of the base alone its answers. Moving code
changes none of it. Answers are computed in float32, so that machines mostly agree on them, and cut after a few tokens;
another processor may still decide a tie otherwise.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import loracast
from loracast.answering.model import Model
from loracast.base.footprint import fastest_dtype
from loracast.base.generate import Sampling, answers
from loracast.lab.data.everyday import load_genres, make_document
from loracast.lab.data.facts import make_sheet
from loracast.lab.evaluation.documents import DocumentCase, DocumentSetup, LearnedDocument
from loracast.lab.evaluation.qa import BASELINES
from loracast.lab.evaluation.report import cpu_model
from loracast.lab.evaluation.runner import ask
from loracast.reading.routing import Route, route_adapter

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs" / "fingerprint.json"
SHIPPED = {"document": "doc-smollm2-135m", "task": "text-smollm2-135m"}
"""By what a measurement depends on, the shipped hypernetwork."""
EVERYDAY, SHEETS, QUESTIONS = 30, 10, 5
"""Documents of each kind, and questions about each: 200 in all."""
_SAMPLING = Sampling(max_new_tokens=8)
_TASKS = (
    ("Answer with the opposite word.", ()),
    ("Write the word in capital letters.", (("lamp", "LAMP"), ("river", "RIVER"))),
    ("", (("cat", "cats"), ("box", "boxes"), ("knife", "knives"))),
    ("Is the review positive or negative?", (("A joy to read.", "positive"), ("Dull and long.", "negative"))),
)
_INPUTS = (
    "hot",
    "tall",
    "a bright room",
    "It broke at once.",
    "city",
    "early",
    "I loved it.",
    "to open",
    "leaf",
    "full",
)


def questions(setup: DocumentSetup) -> Iterator[tuple[LearnedDocument, list[str]]]:
    """Documents with questions about each."""
    genres = list(load_genres("dev"))
    for i in range(EVERYDAY + SHEETS):
        is_sheet = i >= EVERYDAY
        rng = random.Random(f"fingerprint/sheet/{i - EVERYDAY}" if is_sheet else f"fingerprint/{i}")
        genre = genres[i % len(genres)]
        drawn: Any = make_sheet(rng, 20, split="dev") if is_sheet else make_document(rng, split="dev", genre=genre)
        yield setup.keep(drawn.text, drawn.title), [f.question for f in rng.sample(drawn.facts, QUESTIONS)]


def digest(value: Any) -> str:
    """A hash of anything that JSON can write."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]


def of_route(route: Route) -> list[Any]:
    """What a question gets, rounded so that machines agree on it."""

    def rounded(numbers: Sequence[float]) -> list[float]:
        return [round(x, 3) for x in numbers]

    sentences = None if route.sentences is None else [rounded(some) for some in route.sentences]
    likely = [(one.text, round(one.probability, 2)) for one in route.candidates[:3]]
    sure = [None if p is None else round(p, 3) for p in (route.about, route.nowhere)]
    return [route.chunks, rounded(route.weights), sentences, likely, *sure]


def behaviour(model: Model) -> dict[str, dict[str, str]]:
    """By kind of measurement, hashes of what the code does."""
    setup = DocumentSetup(model, max_new_tokens=_SAMPLING.max_new_tokens)
    asked = [(document, one) for document, some in questions(setup) for one in some]
    cases = [DocumentCase(document, question) for document, question in asked]
    others_first = [*asked[QUESTIONS:], *asked[:QUESTIONS]]  # each question is asked of another document too
    both = [(one, question) for of in (asked, others_first) for (_, question), (one, _) in zip(asked, of, strict=True)]
    routes = [of_route(route_adapter(document.adapter, question, reader=model.reader)) for document, question in both]
    others = {name: cases[:: max(1, len(cases) // 20)] for name in ("none", "window", "bm25")}
    given = ask(setup, BASELINES, {"adapter": cases, **others}, _SAMPLING)
    said = {name: [a.text for a in given if a.baseline == name] for name in ("adapter", *others)}
    return {
        "document": {"routes": digest(routes), "answers": digest(said.pop("adapter"))},
        "none": {"answers": digest(said)},
        "task": {"answers": digest(of_tasks(model))},
    }


def of_tasks(model: Model) -> list[str]:
    """Answers with the adapters of four tasks, from descriptions, examples and both."""
    said = []
    for i, (description, examples) in enumerate(_TASKS):
        lora = model.task(description, f"task-{i}", examples=examples).lora()
        prompts = [model.base.chat.prompt(one, "") for one in _INPUTS]
        said += [given.text for given in answers(model.base, prompts, [lora] * len(prompts), _SAMPLING)]
    return said


def of_files(model: Model) -> dict[str, dict[str, str]]:
    """By kind of measurement, the ids of weights and reader, and the type in which figures are computed."""
    from loracast.hypernets.protocol import Hypernetwork

    shipped = ROOT / "src" / "loracast" / "pretrained"
    weights = {kind: Hypernetwork.from_pretrained(shipped / name).id for kind, name in SHIPPED.items()}
    dtype = str(fastest_dtype("cpu")).removeprefix("torch.")
    reader = "" if model.reader is None else model.reader.reader.id
    return {
        "document": {"weights": weights["document"], "reader": reader, "dtype": dtype},
        "task": {"weights": weights["task"], "dtype": dtype},
        "none": {"weights": model.base.fingerprint.norms, "dtype": dtype},
    }


def now() -> dict[str, dict[str, str]]:
    """The fingerprint of what the code does now, by kind of measurement."""
    with tempfile.TemporaryDirectory(prefix="loracast-fingerprint-") as library:
        model = loracast.load(library=library, dtype="float32")
        did = behaviour(model)
        found = {kind: {**parts, **did[kind]} for kind, parts in of_files(model).items()}
        return {**found, "machine": {"processor": cpu_model()}}


def kept(path: Path = KEPT) -> dict[str, dict[str, str]]:
    """The fingerprint that the figures of the page have."""
    return json.loads(path.read_text(encoding="utf-8"))


def changed(before: Mapping[str, Mapping[str, str]], after: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The parts that differ, such as "document: routes"; not the machine and the type of numbers that it prefers."""
    return [
        f"{kind}: {part}"
        for kind in after.keys() - {"machine"}
        for part in after[kind]
        if part != "dtype" and before.get(kind, {}).get(part) != after[kind][part]
    ]


def main(write: Annotated[bool, typer.Option("--write", help="Write docs/fingerprint.json.")] = False) -> None:
    """Compare docs/fingerprint.json with what the code does now, or write it anew."""
    found = now()
    differing = changed(kept() if KEPT.exists() else {}, found)
    if write:
        KEPT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(differing) or "as it was")
    raise SystemExit(bool(differing and not write))


if __name__ == "__main__":
    typer.run(main)
