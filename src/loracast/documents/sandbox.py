"""Parses one file in a child process, so that a bomb or a crash in a parser cannot take the caller down.

The bytes go in through a pipe; the answer comes back through a temporary file, whose size the kernel limits. The child
(worker.py) bounds its own memory and processor time; the wall time is bounded here. The child inherits no secrets from
the environment and imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from loracast.documents.document import Limits, Parsed
from loracast.errors import DocumentError

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])
# What an interpreter may need to start; everything else (tokens, keys, proxies) stays with the parent.
_KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "SYSTEMROOT", "TMPDIR", "TEMP", "TMP", "LANG")
_SIGXCPU = getattr(signal, "SIGXCPU", None)


def parse_in_child(kind: str, data: bytes, label: str, limits: Limits) -> Parsed:
    """The parsed text of `data`. Raises DocumentError for any failure.

    Args:
        kind: "pdf", "docx", "html" or "message", the module that parses it.
    """
    # -P: without it the current folder comes first on the path, and a stray pypdf.py there would be run.
    command = [sys.executable, "-P", "-m", "loracast.documents.worker", kind, json.dumps(asdict(limits)), label]
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    search_path = [_PACKAGE_PARENT, *(folder for folder in sys.path if folder)]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(search_path))
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as complaints:
        try:
            done = subprocess.run(
                command, check=False, input=data, stdout=answer, stderr=complaints,
                timeout=limits.timeout_s, env=environment,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise DocumentError(
                f"{label} took more than {limits.timeout_s:g} s to parse and was stopped: "
                "it is damaged, malicious or needs to be split"
            ) from None
        size = answer.seek(0, os.SEEK_END)
        if done.returncode == 0 and size <= 2 * limits.max_text_bytes + 65_536:  # where there are no rlimits
            answer.seek(0)
            reply = json.loads(answer.read())
            if "error" in reply:
                raise DocumentError(reply["error"])
            return Parsed(**{**reply, "warnings": tuple(reply["warnings"])})
        complaints.seek(max(0, complaints.seek(0, os.SEEK_END) - 500))
        last_words = complaints.read().decode(errors="replace").strip().rsplit("\n", 1)[-1]
    if _SIGXCPU is not None and done.returncode == -_SIGXCPU:
        raise DocumentError(
            f"{label} took more than {limits.max_cpu_s} s of processor time to parse and was stopped: "
            "it is damaged, malicious or needs to be split"
        )
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    raise DocumentError(
        f"{label} made its parser fail ({how}; {last_words or 'no message'}): the file is damaged; export it again"
    )
