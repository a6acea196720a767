"""`loracast models`, `convert` and `demo`: the known models, published checkpoints, and a first look."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.table import Column, Table
from rich.text import Text

from loracast.cli import options, terminal
from loracast.cli.learn import report, summary
from loracast.cli.options import open_model
from loracast.cli.terminal import print_json, print_result, print_table, printable, progress_bar, size
from loracast.files import bytes_in
from loracast.library.manifest import name_for


def models(*, as_json: options.Json = False) -> None:
    """List the embedded bases, the hypernetworks that ship, and the published ones with their bases.

    Sizes of models that are not on this machine are computed from their published configs; nothing is fetched.
    """
    from loracast.cast.catalogue import WINDOW, known_bases, known_hypernetworks

    bases, hypernetworks = known_bases(), known_hypernetworks()
    if as_json:
        listed = [{**asdict(one), "memory": one.memory} for one in hypernetworks]
        print_json({"window": WINDOW, "bases": [asdict(one) for one in bases], "hypernetworks": listed})
        return
    of_bases, of_hypernetworks = [], []
    for base in bases:
        cached = _gb(base.cached) if base.cached else "no"
        memory = [_gb(base.memory[dtype]) for dtype in ("bfloat16", "float32")]
        of_bases.append((base.name, base.source, _millions(base.n_parameters), _gb(base.disk), *memory, cached))
    for one in hypernetworks:
        cached = f"{_gb(one.cached)}{', converted' * one.converted}" if one.cached else "no"
        sizes = _millions(*one.n_parameters), _gb(*one.disk), _gb(*one.memory)
        of_hypernetworks.append((one.name, one.source, f"{one.modality}s", one.base, *sizes, cached))
    columns = (">parameters", ">disk", ">memory in bf16", ">in float32", "in the cache")
    print_table(("base", "from", *columns), of_bases, wrapped=("base",))
    print()
    more = ("from", "casts", "for the base", ">parameters", ">disk", ">memory", "in the cache")
    print_table(("hypernetwork", *more), of_hypernetworks, wrapped=("hypernetwork", "for the base"))
    print(
        f"\nMemory: of a base, its weights and what generation takes in a context of {WINDOW:,} tokens; of a "
        "hypernetwork, its weights in float32.\nDisk: weights in bf16; of a published hypernetwork, its converted form:"
        " the size of the published file is known once it is fetched.\nText-to-LoRA: a range, since a checkpoint may "
        "be of variant S, M or L."
    )


def _millions(*counts: int) -> str:
    return _span([f"{n / 1e6:,.1f}" for n in counts]) + " M"


def _gb(*n_bytes: int) -> str:
    return _span([f"{n / 1e9:,.2f}" for n in n_bytes]) + " GB"


def _span(numbers: list[str]) -> str:
    """One number, or a range: "smallest to largest"."""
    return " to ".join(dict.fromkeys(numbers))


Published = Annotated[Literal["doc-to-lora", "text-to-lora"], "Which of the two systems wrote the checkpoint."]


def convert(
    system: Published,
    source: Annotated[str, "Folder with the checkpoint, or OWNER/NAME/FOLDER on the hub."],
    *,
    out: Annotated[Path, "Folder for the hypernetwork."],
    base: Annotated[str | None, "Folder or hub id of the base; by default the one that the checkpoint names."] = None,
    encoder: Annotated[str | None, "Text encoder of a text-to-lora; by default the one it names."] = None,
    storage: Annotated[
        Literal["float32", "bfloat16", "int8"], "How the weights are kept; float32 as they are."
    ] = "float32",
    as_json: options.Json = False,
) -> None:
    """Convert a published checkpoint of Doc-to-LoRA or Text-to-LoRA into a hypernetwork in safetensors.

    Nothing of the published packages is needed, and no code in the checkpoint runs. `learn` and `task` take the
    published place itself with --hypernetwork and convert it on their own.
    """
    from loracast.cast.load import DOC_FILE, BaseFacts, base_named_in, locate
    from loracast.cast.load import convert as read
    from loracast.errors import ConfigError, HypernetworkError

    file = locate(source).published
    if file is None:
        raise HypernetworkError(f"{source} holds no published checkpoint (pytorch_model.bin or hypermod.pt)")
    if (file.name == DOC_FILE) != (system == "doc-to-lora"):
        raise ConfigError(f"{source} holds {file.name}, which is not a checkpoint of {system}: name the other system")
    hypernet = read(file, BaseFacts.read(base or base_named_in(file)), encoder)
    hypernet.save_pretrained(out, storage=storage)
    n = sum(parameter.numel() for parameter in hypernet.parameters())
    n_bytes, name = bytes_in(out), hypernet.made_for.base if hypernet.made_for else ""
    facts = {"out": str(out), "architecture": type(hypernet).__name__, "parameters": n, "base": name, "bytes": n_bytes}
    print_result(as_json, facts, f"{n / 1e6:,.1f}M parameters for {name}, {size(n_bytes)} in {out}")


QUESTIONS = (
    ("How long is the drain hose?", "1.4 metres"),
    ("What is the document number of the manual?", "QM-2718"),
    ("How loud is the Quillmere D-27 in night mode?", "34 decibels"),
    ("How much does the Quillmere D-27 weigh?", "13.6 kilograms"),
    ("What bonus does Quillmere pay for an old dehumidifier?", "15 euros"),
)
"""Questions about examples/manual.pdf, with what the manual says."""


def demo(
    file: Annotated[str, "The repository's examples/manual.pdf; any other is only learned."],
    *,
    naming: options.Naming,
    models: options.Models,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Learn the example manual and ask it five questions, beside the plain base.

    The adapter stays in the library, named after the file.
    """
    from loracast.base.generate import Sampling
    from loracast.documents import read_document

    document = read_document(file)
    questions = QUESTIONS if all(expected in document.text for _, expected in QUESTIONS) else ()
    name = naming.checked(library, name_for(document), document.sha256)
    model = open_model(models, library)
    for warning in document.warnings:
        terminal.warn(warning)
    with progress_bar("chunks", f"learning {name}") as progress:
        adapter = model.learn(document, name, progress=progress, replace=True)
    if not as_json:
        print(printable(summary(adapter, library)))

    sampling = Sampling(max_new_tokens=32)
    rows: list[dict[str, Any]] = []
    with terminal.stderr().status("asking") as status:
        for i, (question, expected) in enumerate(questions, 1):
            status.update(f"asking {i} of {len(questions)}")
            plain = model.answer(question, sampling=sampling)
            started = time.perf_counter()
            given = model.answer(question, adapter, sampling=sampling)
            row = {"question": question, "plain": plain.text, "adapter": given.text, "expected": expected}
            seconds = {"plain_s": round(plain.total_s, 3), "adapter_s": round(time.perf_counter() - started, 3)}
            rows.append({**row, "is_right": expected.casefold() in given.text.casefold(), **seconds})
    if as_json:
        print_json({**report(adapter), "answers": rows})
    if as_json or not rows:
        return
    columns = ("question", "plain base", "with the adapter", "expected", "seconds")
    table = Table(*(Column(name, overflow="fold") for name in columns), header_style="bold", show_lines=True)
    table.columns[-1].justify = "right"
    for row in rows:
        texts = [Text(printable(row[key])) for key in ("question", "plain", "adapter", "expected")]
        texts[2].stylize("green" if row["is_right"] else "red")
        table.add_row(*texts, f"{row['adapter_s']:.2f}")
    terminal.stdout().print(table)
    print(f"{sum(row['is_right'] for row in rows)} of {len(rows)} right with the adapter")
