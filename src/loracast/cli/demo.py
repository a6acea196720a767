"""`loracast demo`: learn the example manual and ask it, beside the plain base."""

from __future__ import annotations

import time
from typing import Annotated, Any

from loracast.cli import options
from loracast.cli.learn import learned, report
from loracast.cli.output import print_json, printable, stderr, stdout
from loracast.cli.session import learn_visibly, open_model
from loracast.library.manifest import name_for

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
    adapter = learn_visibly(model, document, name, replace=True)
    if not as_json:
        print(printable(learned(adapter, library)))

    sampling = Sampling(max_new_tokens=32)
    rows: list[dict[str, Any]] = []
    with stderr().status("asking") as status:
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
