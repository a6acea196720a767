"""mlx-lm answers with an exported adapter as loracast does, on the base that `loracast export-base` writes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from loracast.base import DEFAULT_BASE
from loracast.export.adapter import export_adapter
from loracast.export.base import write_base

PYTHON = os.environ.get("LORACAST_MLX_PYTHON", "")


@pytest.mark.skipif(
    not PYTHON, reason="set LORACAST_MLX_PYTHON to a Python that has mlx-lm (pip install 'mlx[cpu]' mlx-lm)"
)
def test_the_same_answers(asked, tmp_path):
    write_base(DEFAULT_BASE, tmp_path / "base", print)
    same = n_texts = agreeing = n_tokens = moved = 0
    for number, adapter in enumerate(dict.fromkeys(row.adapter for row in asked)):
        export_adapter(adapter, "mlx", tmp_path / adapter.name)
        rows = [row for row in asked if row.adapter is adapter]
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps([{"prompt": row.prompt, "answer": row.tokens} for row in rows]))
        script = Path(__file__).with_name("mlx_lm_answers.py")
        command = [PYTHON, script, tmp_path / "base", tmp_path / adapter.name, file]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        for row, found in zip(rows, json.loads(done.stdout.splitlines()[-1]), strict=True):
            same += found["text"].strip() == row.text.strip()
            moved += found["text"].strip() != found["free"].strip()
            agreeing += sum(one == other for one, other in zip(found["forced"], row.tokens, strict=True))
            n_texts, n_tokens = n_texts + 1, n_tokens + len(row.tokens)
    print(
        f"\nmlx-lm: {same} of {n_texts} texts the same, {agreeing} of {n_tokens} tokens ({100 * agreeing / n_tokens:.1f} %) agree when told"
    )
    assert n_texts == 50 and moved > 45  # the adapter is no silent no-op
    assert agreeing >= 0.95 * n_tokens
