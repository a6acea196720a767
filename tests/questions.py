"""A few documents with questions, for the tests of training and evaluation."""

from __future__ import annotations

import json
from pathlib import Path

ROWS = [
    {
        "doc_id": f"doc-{i}",
        "source": "tales" if i % 2 else "letters",
        "title": f"Notice {i}",
        "document": (
            f"The mill in {town} was built in {1800 + i}. Its owner was {owner}, who kept {i + 3} donkeys. "
            f"In the winter of {1900 + i} the river froze, and the mill stood still until {month}. "
            "Nobody remembers what the flour was like. The children of the village still play by the wheel."
        ),
        "questions": [
            {"question": "When was the mill built?", "answers": [str(1800 + i)], "span": True},
            {"question": "Who was its owner?", "answers": [owner, owner.split()[0]], "span": True},
            {"question": "Until when did the mill stand still?", "answers": [month], "span": True},
            {"question": "Was the flour good?", "answers": ["nobody knows"], "span": False},
        ],
    }
    for i, (town, owner, month) in enumerate(
        [
            ("Varn", "Osla Brandt", "March"),
            ("Kelby", "Tom Hale", "April"),
            ("Ostra", "Mina Voss", "May"),
            ("Dunmere", "Ari Lund", "June"),
            ("Pell", "Ida Rosen", "February"),
            ("Rook", "Ben Asher", "March"),
        ]
    )
]


def write_documents(path: Path) -> str:
    path.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    return str(path)


def write_unrelated(path: Path) -> str:
    rows = [
        {"question": "Which of these is a planet?", "choices": ["Mars", "a shoe"], "answer": 0},
        {"question": "How many legs has a spider?", "answer": "8"},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)
