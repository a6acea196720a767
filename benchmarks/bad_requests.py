"""Requests that a server has to refuse with a status of 4xx, and documents that it has to fail to learn."""

from __future__ import annotations

import json
from typing import Any

CHAT = "/v1/chat/completions"
_JSON = {"Content-Type": "application/json"}
_MESSAGES = [{"role": "user", "content": "What is the PIN?"}]


def _chat(name: str, **fields: Any) -> tuple[str, str, str, dict[str, Any]]:
    body = {"model": "doc-0", "messages": _MESSAGES, "max_tokens": 4, **fields}
    return name, "POST", CHAT, {"content": json.dumps(body).encode(), "headers": _JSON}  # NaN goes through


def _raw(name: str, content: bytes, kind: str = "application/json") -> tuple[str, str, str, dict[str, Any]]:
    return name, "POST", CHAT, {"content": content, "headers": {"Content-Type": kind}}


_BAD_FIELDS: dict[str, tuple[Any, ...]] = {
    "temperature": (-1, float("nan"), 1e300), "top_p": (float("inf"),), "max_tokens": (-5, 10**30), "n": (16_384, 0),
    "seed": (1e400,), "route": (-1,), "top_logprobs": (10**9,), "messages": ([], "text"), "unknown": (1,),
    "stop": (["x"] * 1000,), "adapters": ([{"id": "../x"}], [{"id": "doc-0", "scale": float("nan")}]),
    "memory": ("../x",), "style": ("nobody",),
}  # fmt: skip

BAD_REQUESTS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    *(
        _chat(f"model {model[:12]!r}", model=model)
        for model in ("nobody", "../x", "/etc/passwd", "%2e%2e", "\U0001f600", "x" * 10_240, "", "a\0b", "doc-0@", "+")
    ),
    *(_chat(f"{key} {value}", **{key: value}) for key, values in _BAD_FIELDS.items() for value in values),
    _chat("a prompt of 40,000 words", messages=[{"role": "user", "content": "word " * 40_000}]),
    _chat("half a surrogate pair", messages=[{"role": "user", "content": "\ud83d"}], model="nobody"),
    _raw("half a body", b'{"model": "doc-0", "messages"'),
    _raw("no text", b"\xff\xfe\x00"),
    _raw("an empty body", b""),
    _raw("100 levels", b'{"model": ' + b"[" * 100 + b"]" * 100 + b"}"),
    _raw("100,000 levels", b"[" * 100_000),
    _raw("another type", b"model=doc-0", "application/x-www-form-urlencoded"),
    _raw("a form without a file", b"--x--\r\n", "multipart/form-data; boundary=x"),
    _raw("a form without a boundary", b"x", "multipart/form-data"),
    ("a body of 5 MiB", "POST", CHAT, {"content": b" " * 5 * 2**20, "headers": _JSON}),
    ("another host", "GET", "/v1/models", {"headers": {"Host": "evil.example.org"}}),
    ("another origin", "POST", CHAT, {"json": {}, "headers": {"Origin": "https://evil.example.org"}}),
    ("no route", "GET", "/v1/nothing", {}),
    ("another method", "PUT", CHAT, {"json": {}}),
    ("a path in a path", "GET", "/v1/adapters/%2e%2e%2f%2e%2e%2fetc%2fpasswd", {}),
    ("two dots", "DELETE", "/v1/adapters/%2e%2e", {}),
    ("an unknown adapter", "DELETE", "/v1/adapters/nobody", {}),
    ("a name of 10 KB", "GET", "/v1/adapters/" + "x" * 10_240, {}),
    ("an emoji", "PATCH", "/v1/adapters/%F0%9F%98%80", {"json": {"note": "x"}}),
    ("a bad name", "POST", "/v1/adapters", {"files": {"file": ("a.txt", b"Text.")}, "data": {"name": "../x"}}),
    ("a form without `file`", "POST", "/v1/adapters", {"files": {"other": ("a.txt", b"Text.")}}),
    ("chunks of -1", "POST", "/v1/adapters", {"files": {"file": ("a.txt", b"A.")}, "data": {"chunk_tokens": "-1"}}),
    ("a path to load", "POST", "/v1/load_lora_adapter", {"json": {"lora_name": "x", "lora_path": "/etc"}}),
    ("no parts", "POST", "/v1/adapters/combine", {"json": {"name": "sum", "parts": []}}),
    ("no job", "GET", "/v1/jobs/../../etc", {}),
    ("no store", "GET", "/v1/vector_stores/nobody", {}),
)
"""Name, method, path and the rest of the request."""

BAD_DOCUMENTS: tuple[tuple[str, bytes], ...] = (
    ("empty.txt", b""),
    ("blank.txt", b" \n\t " * 100),
    ("truncated.pdf", b"%PDF-1.7\n1 0 obj\n<<"),
    ("broken.docx", b"PK\x03\x04" + b"\0" * 100),
    ("binary.txt", bytes(range(256)) * 8),
)
