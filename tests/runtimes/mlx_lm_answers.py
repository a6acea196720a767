"""Greedy text and teacher-forced tokens of mlx-lm.

Run by test_mlx.py in an environment that has mlx-lm and nothing of loracast:

python mlx_lm_answers.py BASE_FOLDER ADAPTER_FOLDER ROWS.json

ROWS.json holds [{prompt: [ids], answer: [ids]}]; the output, as JSON, for each row {text, free, forced}: what is
generated with the adapter and without it, and the likeliest token at each place of the answer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm import generate, load

base, adapter, rows_file = sys.argv[1:]
rows = json.loads(Path(rows_file).read_text())
model, tokenizer = load(base, adapter_path=adapter)
plain, _ = load(base)
found = []
for row in rows:
    text, free = (generate(m, tokenizer, prompt=row["prompt"], max_tokens=24) for m in (model, plain))
    ids = mx.array([[*row["prompt"], *row["answer"][:-1]]])
    likeliest = mx.argmax(model(ids)[0], axis=-1).tolist()
    found.append({"text": text, "free": free, "forced": likeliest[len(row["prompt"]) - 1 :]})
print(json.dumps(found))
