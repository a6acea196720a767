"""llama.cpp answers with an exported adapter as loracast does, on the Q4_1 weights that its base was made from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from agreement import assert_agrees

from loracast.base.embedded import DEFAULT_BASE
from loracast.export.adapter import export_adapter
from loracast.export.base import base_gguf

PACKAGE = Path(os.environ.get("LORACAST_NODE_LLAMA_CPP", "node_modules/node-llama-cpp"))


@pytest.mark.skipif(
    not (PACKAGE / "dist" / "index.js").is_file() or shutil.which("node") is None,
    reason=f"{PACKAGE} is not there: `npm install node-llama-cpp` and set LORACAST_NODE_LLAMA_CPP to its folder",
)
def test_the_same_answers(asked, tmp_path):
    def answers(adapter, file):
        (made,) = export_adapter(adapter, "gguf", tmp_path / adapter.name)
        script = Path(__file__).with_name("llama_cpp.mjs")
        command = ["node", script, PACKAGE.resolve(), base_gguf(DEFAULT_BASE), made.path, file]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert_agrees("llama.cpp", asked, tmp_path, answers)
