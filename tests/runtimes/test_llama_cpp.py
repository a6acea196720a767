"""llama.cpp answers with an exported adapter as loracast does, on the very Q4_1 weights that loracast's base was made from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from loracast.base import DEFAULT_BASE
from loracast.export.adapter import base_gguf, export_adapter

PACKAGE = Path(os.environ.get("LORACAST_NODE_LLAMA_CPP", "node_modules/node-llama-cpp"))


@pytest.mark.skipif(
    not (PACKAGE / "dist" / "index.js").is_file() or shutil.which("node") is None,
    reason=f"{PACKAGE} is not there: `npm install node-llama-cpp` and set LORACAST_NODE_LLAMA_CPP to its folder",
)
def test_the_same_answers(asked, tmp_path, record_property):
    same = n_texts = agreeing = n_tokens = moved = 0
    for number, adapter in enumerate(dict.fromkeys(row.adapter for row in asked)):
        (made,) = export_adapter(adapter, "gguf", tmp_path / adapter.name)
        rows = [row for row in asked if row.adapter is adapter]
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps([{"prompt": row.prompt, "answer": row.tokens} for row in rows]))
        command = [
            "node",
            Path(__file__).with_name("llama_cpp.mjs"),
            PACKAGE.resolve(),
            base_gguf(DEFAULT_BASE),
            made.path,
            file,
        ]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        for row, found in zip(rows, json.loads(done.stdout), strict=True):
            same += found["text"].strip() == row.text.strip()
            moved += found["text"].strip() != found["free"].strip()
            agreeing += sum(one == other for one, other in zip(found["forced"], row.tokens, strict=True))
            n_texts, n_tokens = n_texts + 1, n_tokens + len(row.tokens)
    print(
        f"\nllama.cpp: {same} of {n_texts} texts the same, {agreeing} of {n_tokens} tokens ({100 * agreeing / n_tokens:.1f} %) agree when told"
    )
    assert n_texts == 50 and moved > 45  # the adapter is no silent no-op
    assert agreeing >= 0.95 * n_tokens
