"""mlx-lm answers with an exported adapter as loracast does, on the base that `loracast export-base` writes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from agreement import assert_agrees

from loracast.base.embedded import DEFAULT_BASE
from loracast.export.adapter import export_adapter
from loracast.export.base import write_base

PYTHON = os.environ.get("LORACAST_MLX_PYTHON", "")


@pytest.mark.skipif(
    not PYTHON, reason="set LORACAST_MLX_PYTHON to a Python that has mlx-lm (pip install 'mlx[cpu]' mlx-lm)"
)
def test_the_same_answers(asked, tmp_path):
    write_base(DEFAULT_BASE, tmp_path / "base", print)

    def answers(adapter, file):
        export_adapter(adapter, "mlx", tmp_path / adapter.name)
        script = Path(__file__).with_name("mlx_lm_answers.py")
        command = [PYTHON, script, tmp_path / "base", tmp_path / adapter.name, file]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    assert_agrees("mlx-lm", asked, tmp_path, answers)
