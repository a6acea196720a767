"""Options that several commands share, each defined once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from loracast.lora.quantize import DEFAULT_STORAGE, Storage

_DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")


def parse_route(text: str | int) -> int | None:
    """How many chunks a question is given: a number from 1 on, or None for "all"."""
    text = str(text).strip().lower()
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter("give the number of chunks, from 1 on, or 'all'")
    return int(text)


def check_device(device: str | None) -> str | None:
    if device is not None and not _DEVICE.fullmatch(device):
        raise typer.BadParameter("give cpu, cuda, cuda:N or mps")
    return device


def distinct(names: list[str] | None) -> list[str]:
    """Adapters in the order given: twice the same would be added twice."""
    return list(dict.fromkeys(names or []))


Base = Annotated[str | None, typer.Option("--base", help="Embedded base, local folder or hub id of a language model.")]
Hypernetwork = Annotated[
    str | None, typer.Option("--hypernetwork", help="Folder or hub id of a hypernetwork; the shipped one by default.")
]
AnswerersHypernetwork = Annotated[
    str | None,
    typer.Option("--hypernetwork", help="For adapters that keep only their text: the one that they were learned with."),
]
Library = Annotated[Path | None, typer.Option("--library", help="Folder of adapters; your own library by default.")]
Device = Annotated[
    str | None,
    typer.Option("--device", callback=check_device, help="cpu, cuda or mps; the fastest there is by default."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]

_tasks = typer.Option("--tasks", help="Tasks: a folder of JSON files, or a JSONL(.gz) file of examples.")
Tasks = Annotated[Path, _tasks]
OptionalTasks = Annotated[Path | None, _tasks]
Benchmarks = Annotated[
    list[Path] | None,
    typer.Option(
        "--benchmark", help="File of a benchmark (bench_NAME_test.jsonl.gz), in place of --tasks. Repeatable."
    ),
]

StorageOption = Annotated[
    Storage,
    typer.Option(
        "--storage",
        help="How a document's factors are kept: bf16, int8 (half the size), or text (none; made when asked).",
        show_default=DEFAULT_STORAGE,
    ),
]
ChunkTokens = Annotated[int, typer.Option(min=16, help="Longest chunk.")]

Adapters = Annotated[
    list[str] | None,
    typer.Option("-a", "--adapter", metavar="NAME", callback=distinct, help="Adapter to answer with; may be repeated."),
]
Route = Annotated[
    int | None,
    typer.Option(
        "--route", parser=parse_route, metavar="N|all", help="Chunks of each document that a question is given."
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")]
TopP = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="Draw from the likeliest tokens of this probability.")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of the draw.")]
System = Annotated[str | None, typer.Option("--system", help="Text of the system turn; an empty one by default.")]
