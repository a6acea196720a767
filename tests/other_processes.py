"""What descriptions become in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_IN_ANOTHER_PROCESS = """
import hashlib, sys
from loracast.base.load import load_base
from loracast.cast.load import load_caster
from loracast.cast.task import TaskCaster
base = load_base(sys.argv[1], device="cpu", dtype="float32")
loras = TaskCaster(load_caster(sys.argv[2], "task", base)).loras(sys.argv[3:])
digest = hashlib.sha256()
for lora in loras:
    for name, factors in lora.factors.items():
        digest.update(name.encode())
        for factor in factors:
            digest.update(factor.contiguous().numpy().tobytes())
print(digest.hexdigest())
"""


def digests_in_other_processes(base: Path, hypernetwork: Path, texts: Sequence[str]) -> set[str]:
    """The hash of the LoRAs that descriptions become, in two processes with hash seeds of their own."""
    command = [sys.executable, "-c", _IN_ANOTHER_PROCESS, str(base), str(hypernetwork), *texts]
    return {
        subprocess.run(
            command,
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("0", "1")
    }
