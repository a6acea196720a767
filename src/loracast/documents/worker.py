"""The child process that parses one PDF, DOCX, HTML or e-mail file: bytes on its input, one JSON object on its output.

    python -P -m loracast.documents.worker KIND LIMITS_JSON LABEL

Starts by giving up what it does not need: memory, processor time, output, the network, other programs, writing files.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict
from typing import Any

from loracast.documents.clean import brief
from loracast.documents.file_types import Limits, Parsed
from loracast.errors import DocumentError

_REFUSED = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "ctypes.dlopen")
_DAMAGED = {
    "pdf": ("a damaged PDF", "repair it with `qpdf in.pdf out.pdf`"),
    "docx": ("a truncated or damaged Word file", "download it again, or open it in Word and save it again"),
    "html": ("a damaged page", "save it again from a browser"),
    "message": ("a damaged e-mail", "save its text in a file"),
    "photos": ("a file whose pictures cannot be read", "learn it without them"),
}
"""What a file is that its parser fails at, and what to do."""
_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def limit_resources(limits: Limits) -> None:
    """Bounds this process. Where the platform has no such limits (Windows, some on macOS) the wall time must do."""
    try:
        import resource
    except ImportError:
        return
    wanted = {
        "RLIMIT_AS": limits.max_memory_bytes,
        "RLIMIT_CPU": limits.max_cpu_s,
        "RLIMIT_FSIZE": 2 * limits.max_text_bytes + 65_536,  # JSON escapes at most double a text without controls
        "RLIMIT_CORE": 0,
    }
    for name, value in wanted.items():
        try:
            which = getattr(resource, name)
            _, hard = resource.getrlimit(which)
            most = float("inf") if hard == resource.RLIM_INFINITY else hard
            # One more second for the hard limit: the soft one's signal names the cause, SIGKILL does not.
            resource.setrlimit(which, (int(min(value, most)), int(min(value + 1, most))))
        except (AttributeError, ValueError, OSError):
            continue


def forbid_side_effects() -> None:
    """Refuses network, programs and written files to Python code for the rest of this process; parsers need none."""

    def refuse(event: str, args: tuple[Any, ...]) -> None:
        is_write = event == "open" and isinstance(args[2], int) and args[2] & _WRITE
        if is_write or event.startswith(_REFUSED):
            raise PermissionError(f"a document parser may not use {event}")

    sys.addaudithook(refuse)


def parse(kind: str, data: bytes, label: str, limits: Limits) -> Parsed:
    """What the parser of a format reads; damage makes parsers raise nearly anything, and this a DocumentError."""
    try:
        return importlib.import_module(f"loracast.documents.{kind}").parse(data, label, limits)
    except (MemoryError, RecursionError, DocumentError):
        raise
    except Exception as error:
        what, remedy = _DAMAGED[kind]
        raise DocumentError(f"{label} is {what} ({brief(error)}): {remedy}") from None


def main() -> None:
    kind, limits_json, label = sys.argv[1:4]
    limits = Limits(**json.loads(limits_json))
    limit_resources(limits)
    reply: dict[str, Any]
    try:
        data = sys.stdin.buffer.read()
        importlib.import_module(f"loracast.documents.{kind}")
        forbid_side_effects()
        parsed = parse(kind, data, label, limits)
        reply = asdict(parsed)
        if len(parsed.text.encode()) > limits.max_text_bytes:
            reply = {"error": f"{label} unfolds into more than {limits.max_text_bytes:,} bytes of text: split it"}
    except DocumentError as error:
        reply = {"error": str(error)}
    except MemoryError:
        reply = {
            "error": f"{label} needs more than {limits.max_memory_bytes / 2**20:,.0f} MB of memory to parse: "
            "it is damaged, malicious or needs to be split"
        }
    except RecursionError:
        reply = {"error": f"{label} is nested too deeply to be parsed: export it again from the program that made it"}
    sys.stdout.buffer.write(json.dumps(reply, ensure_ascii=False).encode())


if __name__ == "__main__":
    main()
