"""`loracast demo`: learn the example manual and ask it, beside the plain base."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from loracast.cli import options
from loracast.cli.demo_questions import QUESTIONS
from loracast.cli.learn import print_learned, report
from loracast.cli.output import print_json, printable, stderr, stdout
from loracast.cli.session import learn_visibly, open_model


def demo(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="The repository's examples/manual.pdf; any other is only learned.")
    ],
    base: options.Base = None,
    hypernetwork: options.Hypernetwork = None,
    library: options.Library = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Learn the example manual and ask it.

    Five questions, beside the plain base. The adapter stays in the library as "manual".
    """
    from loracast.documents import read_document
    from loracast.library.library import check_free
    from loracast.library.manifest import name_for
    from loracast.paths import library_dir

    document = read_document(file)
    is_manual = all(expected in document.text for _, expected in QUESTIONS)
    name = "manual" if is_manual else name_for(document)
    if not is_manual:
        check_free(library or library_dir(), name)
    model = open_model(base, hypernetwork, library, device)
    adapter = learn_visibly(model, document, name, replace=is_manual)
    if not as_json:
        print_learned(adapter)
    if not is_manual:
        if as_json:
            print_json(report(adapter))
        return

    from loracast.base.generate import Sampling

    sampling = Sampling(max_new_tokens=32)
    rows: list[dict[str, Any]] = []
    with stderr().status("asking") as status:
        for i, (question, expected) in enumerate(QUESTIONS, 1):
            status.update(f"asking {i} of {len(QUESTIONS)}")
            plain = model.answer(question, sampling=sampling)
            started = time.perf_counter()
            given = model.answer(question, adapter, sampling=sampling)
            rows.append(
                {
                    "question": question,
                    "plain": plain.text,
                    "adapter": given.text,
                    "expected": expected,
                    "is_right": expected.casefold() in given.text.casefold(),
                    "plain_s": round(plain.total_s, 3),
                    "adapter_s": round(time.perf_counter() - started, 3),
                }
            )
    if as_json:
        print_json({**report(adapter), "answers": rows})
        return

    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", show_lines=True)
    for column in ("question", "plain base", "with the adapter", "expected"):
        table.add_column(column, overflow="fold")
    table.add_column("seconds", justify="right")
    for row in rows:
        texts = [Text(printable(row[key])) for key in ("question", "plain", "adapter", "expected")]
        texts[2].stylize("green" if row["is_right"] else "red")
        table.add_row(*texts, f"{row['adapter_s']:.2f}")
    stdout().print(table)
    print(f"{sum(row['is_right'] for row in rows)} of {len(rows)} right with the adapter")
