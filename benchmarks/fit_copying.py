"""Fit what decides whether an answer copies (base/copying.py): `python benchmarks/fit_copying.py DEV_DOCUMENTS`.

DEV_DOCUMENTS is OUT/squad_dev_articles.jsonl.gz of data_files.py: people's questions, whose answers stand in the text.
Beside them everyday documents of the dev split are asked. An answer counts as a copy where one of the likely texts
begins with it; questions that a document does not answer are left out. Prints the weights for `APPLIES`, and how often
they are right on questions held back.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

import numpy as np
import torch
import typer
from sklearn.linear_model import LogisticRegression

import loracast
from loracast.base.copying import CopyBias, signs
from loracast.lab.data.everyday import load_genres, make_document
from loracast.lab.data.rows import read_questioned
from loracast.lab.evaluation.documents import DocumentCase, DocumentSetup, adapter
from loracast.lab.evaluation.runner import made
from loracast.lora.algebra import inject

SEED = 5  # of the documents; evaluations draw others
EVERYDAY, PEOPLE, QUESTIONS = 168, 84, 6  # documents of each kind, and most questions about one


def questions(setup: DocumentSetup, path: str) -> Iterator[tuple[str, DocumentCase]]:
    """Each question with its kind; those of one document have the same `doc_id`."""
    genres = list(load_genres("dev"))
    for i in range(EVERYDAY):
        rng = random.Random(f"{SEED}/copying/{i}")
        drawn = make_document(rng, split="dev", genre=genres[i % len(genres)])
        document = setup.keep(drawn.text, drawn.title)
        facts = [fact for fact in drawn.facts if fact.kind != "not said"]
        for fact in rng.sample(facts, min(QUESTIONS, len(facts))):
            yield fact.kind, DocumentCase(document, fact.question, (fact.answer,), doc_id=f"everyday {i}")
    documents = read_questioned((path,))
    for one in random.Random(SEED).sample(documents, min(PEOPLE, len(documents))):
        document = setup.keep(one.text, one.title)
        for asked in one.spans[:QUESTIONS]:
            yield "people", DocumentCase(document, asked.question, asked.answers, doc_id=one.doc_id)


def main(dev_documents: str) -> None:
    """Fit on two thirds of the documents, measure on the others, then fit on all."""
    model = loracast.load()
    setup, request = DocumentSetup(model), adapter("document")
    rows, labels, kinds, ids = list[list[float]](), list[bool](), list[str](), list[str]()
    for kind, case in questions(setup, dev_documents):
        asked = request(setup, case)
        shares = CopyBias(model.base.tokenizer, asked.prepared.candidates, model.base.end_ids).shares(())
        if not shares:
            continue
        setup.cast_ahead([asked])
        with torch.no_grad(), inject(model.base.model, made(model.base, [asked])):
            logits = model.base.model(torch.tensor([asked.prepared.prompt])).logits[0, -1]
        found = signs(shares, logits)
        names = [name for name in found if name != "bias"]
        rows.append([found[name] for name in names])
        # A yes or no, or a count, is no copy, whatever word of the text is spelled like it.
        answers = [answer.lower() for answer in case.answers]
        is_text = any(text.lower().startswith(tuple(answers)) for text, _ in asked.prepared.candidates)
        labels.append(kind in ("span", "comparison", "people") and is_text)
        kinds.append(kind)
        ids.append(case.doc_id)
        if len(rows) % 100 == 0:
            print(f"{len(rows)} questions", file=sys.stderr, flush=True)
    x, y, of_kind = np.array(rows), np.array(labels), np.array(kinds)
    held = np.isin(ids, [*dict.fromkeys(ids)][::3])  # whole documents
    fit = LogisticRegression(C=10.0).fit(x[~held], y[~held])
    print(f"{len(y)} questions, {y.mean():.1%} copies; right on those held back: {fit.score(x[held], y[held]):.1%}, "
          f"always copying {y[held].mean():.1%}")  # fmt: skip
    for kind in dict.fromkeys(kinds):
        some = held & (of_kind == kind)
        print(f"  {kind}: {some.sum()} held back, {y[some].mean():.0%} copies, said {fit.predict(x[some]).mean():.0%}")
    fit = LogisticRegression(C=10.0).fit(x, y)
    weights = dict(zip([*names, "bias"], [*fit.coef_[0], fit.intercept_[0]], strict=True))
    print("APPLIES =", {name: round(float(value), 2) for name, value in weights.items()})


if __name__ == "__main__":
    typer.run(main)
