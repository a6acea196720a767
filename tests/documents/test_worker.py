"""The process that parses a file: its limits, what it may not do, and that it changes nothing."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from test_documents import FILES, read_bytes, refusal

from loracast.documents import Limits, read_document, worker
from loracast.documents.read import parse_in_child
from loracast.errors import DocumentError

pytestmark = pytest.mark.usefixtures("in_child")


@pytest.mark.parametrize(
    ("kind", "name"), [("pdf", "half_scanned.pdf"), ("docx", "letter.docx"), ("html", "page.html")]
)
def test_the_child_gives_what_its_parser_gives(kind: str, name: str) -> None:
    data = (FILES / name).read_bytes()
    assert parse_in_child(kind, data, name, Limits()) == worker.parse(kind, data, name, Limits())


def slow_pdf(n_operators: int) -> bytes:
    """A small file whose one page takes long: the same letter drawn again and again."""
    content = zlib.compress(b"BT /F 9 Tf 1 0 0 1 9 9 Tm (x) Tj ET\n" * n_operators, 9)
    return (
        b"%%PDF-1.4\n1 0 obj <</Type/Catalog/Pages 2 0 R>> endobj\n2 0 obj <</Type/Pages/Count 1/Kids[3 0 R]>> endobj\n"
        b"3 0 obj <</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Contents 4 0 R/Resources<</Font<</F 5 0 R>>>>>> endobj\n"
        b"4 0 obj <</Length %d/Filter/FlateDecode>> stream\n%s\nendstream endobj\n"
        b"5 0 obj <</Type/Font/Subtype/Type1/BaseFont/Helvetica>> endobj\n"
        b"trailer <</Root 1 0 R/Size 6>>\nstartxref\n0\n%%%%EOF\n" % (len(content), content)
    )


def test_wall_time_is_limited() -> None:
    message = refusal(io.BytesIO(slow_pdf(90_000)), file_name="slow.pdf", limits=Limits(timeout_s=0.5))
    assert "took more than 0.5 s to parse" in message


@pytest.mark.skipif(sys.platform != "linux", reason="rlimits are enforced on Linux")
def test_processor_time_and_memory_are_limited() -> None:
    message = refusal(io.BytesIO(slow_pdf(90_000)), file_name="slow.pdf", limits=Limits(max_cpu_s=1))
    assert "took more than 1 s of processor time" in message
    many = "<html>" + "<p>x" * 400_000
    message = refusal(io.BytesIO(many.encode()), file_name="x.html", limits=Limits(max_memory_bytes=120 << 20))
    assert "needs more than 120 MB of memory" in message


def test_a_parser_that_dies_is_reported() -> None:
    with pytest.raises(DocumentError, match=r"x made its parser fail \(exit code 1; ModuleNotFoundError"):
        parse_in_child("no_such_parser", b"", "x", Limits())


def test_nothing_is_fetched() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x"
        page = (
            f'<!DOCTYPE html SYSTEM "{url}"><html><head><base href="{url}"><link rel="stylesheet" href="{url}">'
            f'<meta http-equiv="refresh" content="0; url={url}"></head><body><img src="{url}"><iframe src="{url}">'
            f'</iframe><object data="{url}"></object><script src="{url}"></script>Seen &x;</body></html>'
        )
        assert read_bytes(page, "x.html").text == "Seen &x;"
        assert "XML entities" in refusal(FILES / "entity.docx")
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def run_child(code: str) -> str:
    source = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r})\n{code}"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_child_imports_nothing_heavy() -> None:
    imports = "from loracast.documents import worker, pdf, docx, html"
    code = f"{imports}; print({{'torch', 'transformers', 'numpy'}} & {{*sys.modules}})"
    assert run_child(code) == "set()"


def test_the_child_can_neither_connect_nor_run_nor_write(tmp_path: Path) -> None:
    target = tmp_path / "written"
    code = f"""
import os, socket, subprocess
from loracast.documents.worker import forbid_side_effects
forbid_side_effects()
for action in (lambda: socket.create_connection(("127.0.0.1", 9)), lambda: subprocess.run(["true"]),
               lambda: os.system("true"), lambda: open({str(target)!r}, "w")):
    try:
        action()
    except PermissionError:
        print("refused")
open({str(__file__)!r}).close()
"""
    assert run_child(code).split() == ["refused"] * 4
    assert not target.exists()


def test_the_child_gets_no_secrets_and_no_code_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pypdf.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "secret")
    seen: list[dict[str, str]] = []
    run = subprocess.run

    def spy(*args, **kwargs):
        seen.append(kwargs["env"])
        return run(*args, **kwargs)

    monkeypatch.setattr(subprocess, "run", spy)
    assert read_document(FILES / "report.pdf").n_pages == 2
    assert "HF_TOKEN" not in seen[0]
