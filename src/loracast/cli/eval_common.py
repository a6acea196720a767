"""What the commands of `loracast eval` share: options, how they are read, and how a report is shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, get_args

import typer

from loracast.cli.output import print_json, say, stdout

if TYPE_CHECKING:
    from loracast.data.tasks import DescriptionKind
    from loracast.evaluation.report import Report

Number = TypeVar("Number", int, float)

Out = Annotated[Path, typer.Option(help="Folder for results.json, table.md and pictures.")]
Texts = Annotated[
    list[str] | None, typer.Option(help="Prose that no training has seen: JSONL(.gz) or plain text. Repeatable.")
]
Systems = Annotated[
    str, typer.Option(help="Rivals to run, with commas: merged, routed, none, other, window, bm25, bm25k; or all.")
]
Route = Annotated[int, typer.Option(help="Chunks that a question is given when routed.", min=1)]
ChunkTokens = Annotated[int, typer.Option(help="Longest chunk, in tokens.", min=16)]
Seed = Annotated[int, typer.Option(help="Seed of documents and questions.")]
Budget = Annotated[float | None, typer.Option("--budget-s", help="Stop drawing documents after this many seconds.")]
Trained = Annotated[bool, typer.Option("--trained", help="The tasks of the training, in place of those held out.")]
TaskHypernetwork = Annotated[
    str | None,
    typer.Option("--hypernetwork", help="Folder or hub id of a text-to-LoRA hypernetwork; the shipped one by default."),
]
Descriptions = Annotated[str, typer.Option(help="Kind of description: heldout, train or paraphrase.")]
Split = Annotated[str, typer.Option(help="Wordings and entities: dev to choose between settings, test to report.")]


Documents = Annotated[list[str], typer.Option(help="Documents with questions: JSONL(.gz) rows. Repeatable.")]
Sources = Annotated[str | None, typer.Option(help="Of documents with a source, only these, with commas.")]
DocumentSplit = Annotated[str, typer.Option("--split", help="Of documents with a split, only this one.")]


def numbers(text: str, kind: type[Number]) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers with commas between them") from None


def names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text else ()


def systems_of(text: str) -> tuple[str, ...]:
    from loracast.evaluation.baseline import check_names
    from loracast.evaluation.synthetic import BASELINES

    return tuple(BASELINES) if text == "all" else check_names([name.strip() for name in text.split(",")], BASELINES)


def kind_of(text: str) -> DescriptionKind:
    from loracast.data.tasks import DescriptionKind

    if text not in get_args(DescriptionKind):
        raise typer.BadParameter(f"give one of {', '.join(get_args(DescriptionKind))}")
    return text  # type: ignore[return-value]


def split_of(text: str) -> Literal["dev", "test"]:
    if text not in ("dev", "test"):
        raise typer.BadParameter("give dev or test; what was trained on tells nothing")
    return "dev" if text == "dev" else "test"


def show(report: Report, out: Path, as_json: bool) -> None:
    if as_json:
        print_json(report.to_dict())
    else:
        report.show(stdout())
        say(f"written to {out}")
