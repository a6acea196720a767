"""Damages files: bytes, JSON, safetensors, SQLite, zip archives, pickles, PDF and markup, each by its structure."""

from __future__ import annotations

import io
import json
import pickletools
import random
import re
import sqlite3
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rng = random.Random
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 513, 2**31, 2**32 + 1, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
)  # fmt: skip
TEXTS = (
    "", " ", "\0", "../x", "/etc/passwd", "..", "a" * 300, "\ud800", "<|im_end|>", "\u202eabc", "\U0001f600", "NaN", "1",
    "(a+)+$", "[", "%s%n", "file:///etc/passwd", "'; DROP TABLE x; --", "lora_A", "doc@", "doc@0000", "e\u0301" * 30,
)  # fmt: skip
_VALUES: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": None}, *NUMBERS, *TEXTS)


# ---- bytes


def damaged(rng: Rng, data: bytes) -> bytes:
    """One change of a few bytes: flipped, set, cut, repeated, moved, or filled in."""
    if not data:
        return rng.randbytes(rng.randrange(1, 20))
    changed, at = bytearray(data), rng.randrange(len(data))
    length = min(1 + int(rng.expovariate(0.1)), len(data) - at)
    match rng.randrange(8):
        case 0:
            changed[at] ^= 1 << rng.randrange(8)
        case 1:
            changed[at : at + length] = rng.randbytes(length)
        case 2:
            del changed[at : at + length]
        case 3:
            changed[at:at] = changed[at : at + length] * rng.choice((1, 2, 50))
        case 4:
            del changed[at:]
        case 5:
            changed[at : at + length] = bytes([rng.choice((0, 255, 32, 127, 128))]) * length
        case 6:
            other = rng.randrange(len(data))
            changed[at:at] = data[other : other + length]
        case _:
            width = rng.choice((1, 2, 4, 8))
            number = rng.choice((0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), len(data), len(data) + 1))
            changed[at : at + width] = (number % 2 ** (8 * width)).to_bytes(width, rng.choice(("little", "big")))
    return bytes(changed)


# ---- JSON


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, child in children for place in ((*path, key), *places(child, (*path, key)))]


def changed_json(rng: Rng, value: Any) -> Any:
    """The value with one of its parts replaced, removed, doubled, swapped or wrapped."""
    value = json.loads(json.dumps(value))
    found = places(value)
    if not found:
        return rng.choice(_VALUES)
    *path, key = rng.choice(found)
    holder = value
    for step in path:
        holder = holder[step]
    other: Any = value
    for step in rng.choice(found):
        other = other[step]
    match rng.randrange(9):
        case 0:
            del holder[key]
        case 1:
            holder[key] = json.loads(json.dumps(other))
        case 2:
            holder[key] = [holder[key]] * rng.choice((1, 2, 40))
        case 3 if isinstance(holder, dict):
            holder[rng.choice(TEXTS)] = holder.pop(key)
        case 4 if isinstance(holder, dict):
            holder[rng.choice(TEXTS)] = rng.choice(_VALUES)
        case 5 if isinstance(holder[key], int | float):
            holder[key] += rng.choice((-1, 1, 10, 10**6))
        case 6:
            for _ in range(rng.choice((3, 100))):
                holder[key] = [holder[key]]
        case _:
            holder[key] = rng.choice(_VALUES)
    return value


def written_json(rng: Rng, value: Any) -> bytes:
    """A JSON value as bytes; rarely with a key twice, nested without end, or with digits without end."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.9)
    match rng.randrange(60):
        case 0 if isinstance(value, dict) and value:
            key = rng.choice(list(value))
            text = f"{text[:-1]}, {json.dumps(key)}: {json.dumps(rng.choice(_VALUES))}}}"
        case 1:
            text = text.replace("1", rng.choice(("[" * 100_000, "9" * 5000, "1e999", "-", "01", "1_0")), 1)
    return text.encode(errors=rng.choice(("surrogatepass", "replace")))


def json_file(rng: Rng, data: bytes) -> bytes:
    """A JSON file with one to three changes of its parts, or else of its bytes."""
    if rng.random() < 0.15:
        return damaged(rng, data)
    value = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        value = changed_json(rng, value)
    return written_json(rng, value)


# ---- safetensors


def safetensors_file(rng: Rng, data: bytes) -> bytes:
    """A safetensors file with another header, other numbers or other bytes."""
    length = int.from_bytes(data[:8], "little")
    header, numbers = data[8 : 8 + length], data[8 + length :]
    match rng.randrange(6):
        case 0:
            return damaged(rng, data)
        case 1:
            at = rng.randrange(max(1, len(numbers) - 4))
            bad = rng.choice((b"\x00\x00\xc0\x7f", b"\x80\x7f\x80\x7f", b"\xff\xff\xff\xff", b"\xca\xf2\x49\x71"))
            return data[: 8 + length] + numbers[:at] + bad + numbers[at + 4 :]
        case 2:
            claim = rng.choice((0, 1, 2, length - 1, length + 1, len(data), 2**31, 2**62, 2**64 - 1))
            return claim.to_bytes(8, "little") + data[8:]
        case 3:
            value = _renamed(rng, json.loads(header))
        case _:
            value = json.loads(header)
            for _ in range(rng.randint(1, 3)):
                value = changed_json(rng, value)
    text = written_json(rng, value)
    return len(text).to_bytes(8, "little") + text + numbers


def _renamed(rng: Rng, header: dict[str, Any]) -> dict[str, Any]:
    """The header with names swapped, or another shape or type of the same size."""
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.choice(names), rng.choice(names)
    match rng.randrange(4):
        case 0:
            header[one], header[other] = header[other], header[one]
        case 1:
            header[one]["shape"].reverse()
        case 2:
            header[one]["shape"].insert(rng.randrange(3), rng.choice((1, 0, 2)))
        case _:
            types = ("F64", "F32", "BF16", "F16", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "", None, [])
            header[one]["dtype"] = rng.choice(types)
    return header


# ---- SQLite


def sqlite_file(rng: Rng, data: bytes, folder: Path) -> bytes:
    """A database with other values, tables, views or bytes; `folder` is for a temporary file."""
    if rng.random() < 0.4:
        return damaged(rng, data)
    path = folder / "change.sqlite"
    path.write_bytes(data)
    database = sqlite3.connect(path)
    try:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        table = rng.choice(tables)
        columns = [row[1] for row in database.execute(f"PRAGMA table_info('{table}')")]
        column = rng.choice(columns or ["x"])
        value = rng.choice((*_VALUES[:3], *NUMBERS, *TEXTS, b"\xff\x00", 10**18))
        value = value if not isinstance(value, int) or abs(value) < 2**63 else float(10**30)
        endless = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n)"
        query, values = rng.choice((
            (f"UPDATE '{table}' SET '{column}' = ?", (value,)),
            (f"DELETE FROM '{table}'", ()),
            (f"DROP TABLE '{table}'", ()),
            (f"ALTER TABLE '{table}' RENAME TO other", ()),
            (f"INSERT INTO '{table}' ('{column}') VALUES (?)", (value,)),
            (f"CREATE VIEW 'v' AS {endless} SELECT i FROM n", ()),
            (f"CREATE TRIGGER t AFTER INSERT ON '{table}' BEGIN SELECT load_extension('x'); END", ()),
            (f"PRAGMA user_version = {rng.randrange(-5, 5)}", ()),
        ))  # fmt: skip
        database.execute(query, values)
        if rng.random() < 0.15:  # a view that never ends, in place of a table
            database.execute(f"ALTER TABLE '{table}' RENAME TO gone")
            named = ", ".join(f"i AS '{name}'" for name in columns) or "i"
            database.execute(f"CREATE VIEW '{table}' AS {endless} SELECT {named} FROM n")
        database.commit()
    except (sqlite3.Error, UnicodeEncodeError):
        pass
    finally:
        database.close()
    return path.read_bytes()


# ---- zip archives and pickles


def zip_file(rng: Rng, data: bytes, change: Callable[[Rng, str, bytes], bytes]) -> bytes:
    """An archive with a changed, renamed, doubled or missing member, or other bytes; `change` damages a member."""
    if rng.random() < 0.15:
        return damaged(rng, data)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(made, "w") as copy:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
        kinds = {info.filename: info.compress_type for info in archive.infolist()}
        sizes = [len(content) for content in members.values()]
        one = rng.choices(list(members), weights=[min(size, 4000) + 1 for size in sizes])[0]
        match rng.randrange(10):
            case 0:
                members.pop(one)
            case 1:
                members[rng.choice(("../x", "/x", "x", one + "x", "a\0b"))] = members.pop(one)
            case 2:
                members[one] = members[rng.choice(list(members))]
            case _:
                for _ in range(rng.randint(1, 3)):
                    members[one] = change(rng, one, members[one])
        for name, content in members.items():
            copy.writestr(name, content, kinds.get(name, zipfile.ZIP_STORED))
    return made.getvalue()


GLOBALS = (
    b"posix system", b"builtins eval", b"builtins getattr", b"torch._utils _rebuild_tensor_v2", b"torch FloatStorage",
    b"collections OrderedDict", b"torch.serialization load", b"torch._utils _rebuild_parameter", b"torch Size",
    b"peft.tuners.lora.config LoraConfig", b"torch device", b"_codecs encode", b"torch.hub load", b"torch._tensor _rebuild_from_type_v2",
)  # fmt: skip


def pickle_file(rng: Rng, data: bytes) -> bytes:
    """A pickle with another operation: dropped, doubled, moved, or with another number, text or global name."""
    if rng.random() < 0.2:
        return damaged(rng, data)
    try:
        ops = list(pickletools.genops(data))
    except Exception:  # damaged by an earlier change
        return damaged(rng, data)
    ends = [*(op[2] for op in ops[1:]), len(data)]
    i = rng.randrange(len(ops))
    start, end = ops[i][2], ends[i]
    piece = data[start:end]
    j = rng.randrange(len(ops))
    match rng.randrange(6):
        case 0:
            new = b""
        case 1:
            new = piece * rng.choice((2, 200))
        case 2:
            new = data[ops[j][2] : ends[j]]
        case 3:
            new = b"c" + rng.choice(GLOBALS).replace(b" ", b"\n") + b"\n"
        case 4:
            new = rng.choice(
                (
                    b"J\xff\xff\xff\x7f",
                    b"J\xff\xff\xff\xff",
                    b"K\x00",
                    b"N",
                    b"]",
                    b"}",
                    b")",
                    b"R",
                    b"b",
                    b"\x85",
                    b"G\x7f\xf8" + bytes(6),
                )
            )
        case _:
            new = b"X\x03\x00\x00\x00" + rng.choice((b"cpu", b"../", b"cud", b"met"))
    return data[:start] + new + data[end:]


# ---- PDF and markup

_OBJECT = re.compile(rb"\d+ 0 obj.*?endobj", re.S)
_TOKENS = re.compile(rb"\d+ 0 R|/[A-Za-z0-9]+|-?\d+\.?\d*|<<|>>|\[|\]|\([^)]*\)|<[0-9A-Fa-f]*>|[A-Za-z']+")


def plain_pdf(data: bytes) -> bytes:
    """A PDF whose Flate streams are unpacked, so that changes reach the operators in them."""

    def unpack(found: re.Match[bytes]) -> bytes:
        try:
            content = zlib.decompress(found[2])
        except zlib.error:
            return found[0]
        head = re.sub(rb"/Filter\s*/FlateDecode", b"", found[1])
        head = re.sub(rb"/Length \d+", b"/Length %d" % len(content), head)
        return head + b"stream\n" + content + b"\nendstream"

    return re.sub(rb"(<<(?:(?!endobj).)*?>>\s*)stream\r?\n(.*?)\r?\nendstream", unpack, data, flags=re.S)


def pdf_file(rng: Rng, data: bytes) -> bytes:
    """A PDF with another token, object or filter, or other bytes."""
    objects = list(_OBJECT.finditer(data))
    if not objects or rng.random() < 0.2:
        return damaged(rng, data)
    one = rng.choice(objects)
    body, other = one[0], rng.choice(objects)[0]
    match rng.randrange(10):
        case 0:
            body = b""
        case 1:
            body = body.split(b"obj", 1)[0] + b"obj" + other.split(b"obj", 1)[1]
        case 2:
            filters = b"/FlateDecode " * rng.choice((1, 3, 40)) + rng.choice(
                (b"/LZWDecode", b"/ASCII85Decode", b"/RunLengthDecode", b"/DCTDecode", b"/X")
            )
            body = body.replace(b"<<", b"<</Filter[" + filters + b"]", 1)
        case 3:
            nested = rng.choice((b"[", b"<<", b"(", b"<</A")) * rng.choice((5, 300, 30_000))
            body = body.replace(b"<<", b"<</X " + nested, 1)
        case _:
            tokens = list(_TOKENS.finditer(body))
            token = rng.choice(tokens)
            number = rng.choice((b"0", b"-1", b"2147483648", b"9" * 40, b"1e9", b".", b"0.00001", b"65535"))
            new = rng.choice(
                (number, b"%d 0 R" % rng.randrange(1, 12), rng.choice(tokens)[0], b"null", b"<<>>", b"[]", b"")
            )
            body = body[: token.start()] + new + body[token.end() :]
    return data[: one.start()] + body + data[one.end() :]


_TAGS = re.compile(rb"<[^>]*>|&[^;]*;|[^<&]+")


def markup(rng: Rng, data: bytes) -> bytes:
    """XML or HTML with a tag or text doubled, moved, dropped, nested or replaced, or other bytes."""
    pieces = _TAGS.findall(data)
    if not pieces or rng.random() < 0.2:
        return damaged(rng, data)
    i, j = rng.randrange(len(pieces)), rng.randrange(len(pieces))
    match rng.randrange(6):
        case 0:
            pieces[i] = b""
        case 1:
            pieces[i] = pieces[j]
        case 2:
            pieces[i] *= rng.choice((2, 30, 3000))
        case 3:
            pieces[i : j + 1] = pieces[i : j + 1] * 3
        case 4:
            value = rng.choice((*TEXTS, *map(str, NUMBERS))).encode(errors="surrogatepass")
            pieces[i] = re.sub(rb'"[^"]*"', lambda _: b'"' + value + b'"', pieces[i], count=1)
        case _:
            pieces[i] = rng.choice((
                b"<!DOCTYPE x [<!ENTITY a 'b'>]>", b"&a;", b"&#0;", b"&#xD800;", b"<![CDATA[", b"<!--", b"<meta charset=utf-7>",
                b"<table><tr><td colspan=999999999>", b"<ol start=-99999999999999999999>", b"<pre>", b"<?xml encoding='x'?>",
            ))  # fmt: skip
    return b"".join(pieces)
