"""Ask the frozen test: documents and questions that no developer may read, one look a release.

    python benchmarks/frozen.py manuals_dev --out OUT                    # for choosing: as often as you like
    python benchmarks/frozen.py everyday real --out OUT                  # a look: a line in frozen/looks.md

benchmarks/frozen/README.md says what is asked and how it was written. A file whose hash is not the one there, and a
second look in one release, are refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

import loracast
from loracast.base.generate import Sampling
from loracast.documents import read_document
from loracast.lab.data.answer_metrics import best, has_value, token_f1
from loracast.lab.evaluation.documents import DocumentCase, DocumentSetup, WindowedConfig
from loracast.lab.evaluation.qa import BASELINES
from loracast.lab.evaluation.report import Report, columns, mean, mean_with_interval
from loracast.lab.evaluation.runner import Answered, ask, choose_baselines, figures, grouped, warm_up
from loracast.lab.evaluation.synthetic import says_not_said

FOLDER = Path(__file__).resolve().parent / "frozen"
LOOKS, README = FOLDER / "looks.md", FOLDER / "README.md"
Set = Literal["everyday", "real", "manuals_dev", "manuals_test", "tables", "near_misses"]
SETS: tuple[Set, ...] = get_args(Set)
FOR_CHOOSING = {"manuals_dev"}
_MAX_NEW_TOKENS, _PER_GROUP = 32, 10

DEFAULT = ("adapter", "lora", "place", "merged", "none", "window", "bm25")

COLUMNS = columns(
    set="set", label="method", documents=("documents", 0), n=("questions", 0), right=("right %", "%"),
    right_low=("95 %", "interval"), f1=("F1 %", "%"), refused=("answerable refused %", "%"),
    not_said=("unanswerable refused %", "%"), prompt_tokens=("prompt tokens", 0),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FrozenConfig(WindowedConfig):
    """What is asked."""

    sets: tuple[str, ...]
    baselines: tuple[str, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class FrozenCase(DocumentCase):
    """A question of the frozen test; without answers where the document does not say it."""

    kind: str


def rows_of(name: str) -> list[dict[str, Any]]:
    """The documents of a set. Raises SystemExit where the file is not the one of README.md."""
    data = (FOLDER / f"{name}.jsonl").read_bytes()
    if hashlib.sha256(data).hexdigest() not in README.read_text(encoding="utf-8"):
        raise SystemExit(f"{name}.jsonl is not the frozen one: its hash is not in {README}")
    return [json.loads(line) for line in data.decode().splitlines()]


def check_looks(names: Sequence[str]) -> None:
    """Raise SystemExit where this release has looked at one of these sets already."""
    seen = LOOKS.read_text(encoding="utf-8")
    asked = [name for name in names if name not in FOR_CHOOSING]
    if again := [name for name in asked if f"| {loracast.__version__} | {name} |" in seen]:
        raise SystemExit(
            f"release {loracast.__version__} has looked at {', '.join(again)} already: the next look is the next "
            "release's; choose on manuals_dev, or on what is generated"
        )


def note_look(name: str, baselines: Sequence[str]) -> None:
    """Write a line for a set that is looked at."""
    if name not in FOR_CHOOSING:
        day = datetime.now(UTC).date().isoformat()
        with open(LOOKS, "a", encoding="utf-8") as file:
            file.write(f"| {day} | {loracast.__version__} | {name} | {', '.join(baselines)} |\n")


def cases_of(setup: DocumentSetup, rows: list[dict[str, Any]]) -> Iterator[list[FrozenCase]]:
    """The questions of each document, which is read from a file's bytes as a user's is."""
    files = [(io.BytesIO(row["document"].encode()), f"{row['doc_id']}.{row['format']}") for row in rows]
    adapters = [setup.keep(read_document(data, file_name=name)) for data, name in files]
    for i, row in enumerate(rows):
        other = adapters[(i + 1) % len(adapters)]
        yield [
            FrozenCase(
                adapters[i], q["question"], tuple(q["answers"]), doc_id=row["doc_id"], kind=q["kind"], other=other
            )
            for q in row["questions"]
        ]


def row(name: str, answered: list[Answered[FrozenCase]]) -> dict[str, Any]:
    """The figures of one baseline on one set: right are answers that contain a right one, and fitting refusals."""
    said = [a for a in answered if a.case.answers]
    unsaid = [a for a in answered if not a.case.answers]
    of_documents = grouped(answered, lambda a: a.case.doc_id).values()
    right, low, high = mean_with_interval([[_right(a) for a in some] for some in of_documents])
    return {
        "set": name, "baseline": answered[0].baseline, "label": BASELINES[answered[0].baseline].label,
        "documents": len(of_documents), **figures(answered), "right": right, "right_low": low, "right_high": high,
        "right_said": mean([_right(a) for a in said]),
        "f1": mean([best(token_f1, a.text, a.case.answers) for a in said]),
        "refused": mean([float(says_not_said(a.text)) for a in said]),
        "not_said": mean([float(says_not_said(a.text)) for a in unsaid]), "n_unsaid": len(unsaid),
    }  # fmt: skip


def _right(a: Answered[FrozenCase]) -> float:
    if not a.case.answers:
        return float(says_not_said(a.text))
    return best(has_value, re.sub(r"\s+", " ", a.text), a.case.answers)


def main(
    sets: list[Set],
    *,
    out: Annotated[Path, typer.Option(help="Folder of the tables and answers.")],
    baselines: Annotated[str, typer.Option(help="Comma-separated; those of README.md by default.")] = "",
    window_lora: Annotated[str, typer.Option(help="LoRA of `loracast train window`.")] = "",
) -> None:
    """Ask the sets and write tables and answers."""
    names = baselines.split(",") if baselines else DEFAULT + ("window_lora", "bm25_lora") * bool(window_lora)
    config = FrozenConfig(sets=tuple(sets), baselines=tuple(names), window_lora=window_lora)
    chosen = choose_baselines(BASELINES, config.baselines, config.missing)
    documents = {name: rows_of(name) for name in config.sets}
    model = loracast.load()
    setup = config.setup(model, _MAX_NEW_TOKENS)
    check_looks(config.sets)
    writer = Report(out, "frozen", COLUMNS, config, model.base, model.documents.id)
    warm_up(model.base)
    table: list[dict[str, Any]] = []
    for name, rows in documents.items():
        answered: list[Answered[FrozenCase]] = []
        of_documents = list(cases_of(setup, rows))
        for first in range(0, len(of_documents), _PER_GROUP):
            some = [case for cases in of_documents[first : first + _PER_GROUP] for case in cases]
            answered += ask(setup, chosen, dict.fromkeys(chosen, some), Sampling(max_new_tokens=_MAX_NEW_TOKENS))
            print(f"{name}: {min(len(rows), first + _PER_GROUP)} of {len(rows)} documents", flush=True)
        note_look(name, config.baselines)  # before anything of it is written
        for mine in grouped(answered, lambda a: a.baseline).values():
            table.append(row(name, mine))
        writer.add_answers(
            {"set": name, "baseline": a.baseline, "doc_id": a.case.doc_id, "kind": a.case.kind,
             "question": a.case.question, "answers": a.case.answers, **a.said, "right": _right(a)}
            for a in answered
        )  # fmt: skip
        writer.write(table, is_complete=name == config.sets[-1])
    print(writer.write(table).markdown())


if __name__ == "__main__":
    typer.run(main)
