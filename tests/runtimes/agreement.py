"""How far a runtime's answers are loracast's: the same for all that give text and the likeliest tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loracast.library.adapter import Adapter


def assert_agrees(
    runtime: str, asked: Sequence[Any], folder: Path, answers: Callable[[Adapter, Path], list[dict[str, Any]]]
) -> None:
    """Ask a runtime all questions, adapter by adapter, and compare.

    Args:
        folder: for files.
        answers: (adapter, file with [{prompt: [ids], answer: [ids]}]) -> for each row {text, free, forced}: what is generated with the adapter
            and without it, and the likeliest token at each place of the answer.
    """
    same = n_texts = agreeing = n_tokens = moved = 0
    for number, adapter in enumerate(dict.fromkeys(row.adapter for row in asked)):
        rows = [row for row in asked if row.adapter is adapter]
        file = folder / f"{number}.json"
        file.write_text(json.dumps([{"prompt": row.prompt, "answer": row.tokens} for row in rows]))
        for row, found in zip(rows, answers(adapter, file), strict=True):
            same += found["text"].strip() == row.text.strip()
            moved += found["text"].strip() != found["free"].strip()
            agreeing += sum(one == other for one, other in zip(found["forced"], row.tokens, strict=True))
            n_texts, n_tokens = n_texts + 1, n_tokens + len(row.tokens)
    share = f"{100 * agreeing / n_tokens:.1f} %"
    print(f"\n{runtime}: {same} of {n_texts} texts the same, {agreeing} of {n_tokens} tokens ({share}) agree when told")
    assert n_texts == 50 and moved > 45  # the adapter is no silent no-op
    assert agreeing >= 0.95 * n_tokens
