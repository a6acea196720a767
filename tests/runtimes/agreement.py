"""How far a runtime's answers are right and are loracast's: the same for all runtimes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loracast.library.adapter import Adapter


def assert_agrees(
    runtime: str, asked: Sequence[Any], folder: Path, answers: Callable[[Adapter, Path], list[dict[str, Any]]]
) -> None:
    """Ask a runtime all questions, adapter by adapter; compare with loracast's answers and with what the documents say.

    Args:
        asked: fifty questions, as the fixture `asked` holds them.
        folder: for files.
        answers: (adapter, file with [{prompt: [ids], answer: [ids]}]) -> for each row {text, free, forced}: what is
            generated with the adapter and without it, and the likeliest token at each place of loracast's answer. A
            runtime that cannot say the last leaves `forced` out.
    """
    same = right = moved = agreeing = n_tokens = 0
    for number, adapter in enumerate(dict.fromkeys(row.adapter for row in asked)):
        rows = [row for row in asked if row.adapter is adapter]
        file = folder / f"{number}.json"
        file.write_text(json.dumps([{"prompt": row.prompt, "answer": row.tokens} for row in rows]))
        for row, found in zip(rows, answers(adapter, file), strict=True):
            same += found["text"].strip() == row.text.strip()
            right += row.is_right(found["text"])
            moved += found["text"].strip() != found["free"].strip()
            if "forced" in found:
                agreeing += sum(one == other for one, other in zip(found["forced"], row.tokens, strict=True))
                n_tokens += len(row.tokens)
    ours = sum(row.is_right(row.text) for row in asked)
    forced = f", {agreeing} of {n_tokens} tokens ({agreeing / n_tokens:.1%}) agree when forced" if n_tokens else ""
    print(f"\n{runtime}: {same} of {len(asked)} texts the same{forced}; {right} right, {ours} of loracast's")
    assert len(asked) == 50 and moved > 45  # the adapter is no silent no-op
    assert ours >= 40 and right >= ours - 3  # the answers say what the documents say
    assert agreeing >= 0.95 * n_tokens if n_tokens else same >= 45
