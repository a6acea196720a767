"""Other processes: programs that can be interrupted, and the LoRAs that they cast from descriptions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SEEDS = ("0", "3")  # with these, sets of names of modules come in different orders
_IN_ANOTHER_PROCESS = """
import hashlib, sys
from loracast.base.load import load_base
from loracast.cast.load import load_caster
from loracast.cast.task import TaskCaster
base = load_base(sys.argv[1], device="cpu", dtype="float32")
for folder in sys.argv[2].split(":"):
    loras = TaskCaster(load_caster(folder, "task", base)).loras(sys.argv[3:])
    digest = hashlib.sha256()
    for lora in loras:
        for name, factors in lora.factors.items():
            digest.update(name.encode())
            for factor in factors:
                digest.update(factor.contiguous().numpy().tobytes())
    print(digest.hexdigest())
"""


def interruptible() -> None:
    """For `preexec_fn`: let SIGINT end the child, also where the tests run in the background of a script."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def digests_in_other_processes(base: Path, hypernetworks: Sequence[Path], texts: Sequence[str]) -> set[tuple[str, ...]]:
    """The hash of the LoRAs that descriptions become with each hypernetwork, in two processes with other hash seeds."""
    folders = ":".join(str(folder) for folder in hypernetworks)
    command = [sys.executable, "-c", _IN_ANOTHER_PROCESS, str(base), folders, *texts]
    return {
        tuple(
            subprocess.run(
                command,
                env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()
        )
        for seed in SEEDS
    }
