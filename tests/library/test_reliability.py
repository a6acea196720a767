"""docs/reliability.md names a test or a reason for every line, and the tests that no other subject has."""

from __future__ import annotations

import ast
import io
import re
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

import loracast
from adapters import write
from loracast.base.chat import ChatFormat
from loracast.documents import read_document
from loracast.errors import BaseModelError
from loracast.library.library import Library
from tiny import PROSE, make_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import faults

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
LINES = {
    "Rules": (
        "safetensors only", "published pickle", "no path is taken", "names are slugs", "all faults in one error", "writes are atomic",
        "the hash is stored", "sweep removes orphans", "parsed in a child process", "caps on size, pages", "never ends a batch",
        "nothing is fetched", "provenance", "revocation", "one adapter per owner", "caches are keyed", "never silently the base",
        "every route needs a key", "429", "caps on answers", "no text of documents in logs", "binds 127.0.0.1", "sandbox", "no code of a repository",
    ),
    "Documents": (
        "empty", "white space", "0-byte PDF", "encrypted", "truncated", "cyclic", "scan-only", "Flate bomb", "zip bomb", "external entity",
        "remote template", "file: and link-local", "BOM", "UTF-16", "invalid UTF-8", "NUL", "right-to-left", "zero-width", "50 MB line",
        "special-token", "longer than any window", "uploaded twice",
    ),
    "Adapters": (
        "wrong base", "rank 0 or 513", "missing lora_B", "extra keys", "A and B swapped", "NaN", "1e30", "float64", "bad offsets",
        "lying header length", "duplicate keys", "rsLoRA or patterns", "pickle renamed", "symlink", "directory", "half-written",
    ),
    "Requests": (
        "unknown model", "`../x`", "negative, huge and NaN", "n=16384", "invalid JSON", "nesting 100 deep", "wrong content type", "disconnects",
        "delete or replace", "the same name twice", "full disk", "read-only or locked", "SIGKILL and SIGTERM", "two servers", "clock", "Ctrl-C",
    ),
    "Releases": (
        "files of every version", "locked by hash", "licences", "known vulnerabilities", "bill of materials", "adapters are signed", "reproducible", "pinned actions",
    ),
}  # fmt: skip
"""What has to have a row, by the section of the page."""


def rows(section: str) -> list[list[str]]:
    """The rows of the table of a section: line, tests, result."""
    text = PAGE.read_text(encoding="utf-8").split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    found = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| ")
    ]
    return found[1:]


def file_of(name: str) -> Path:
    """The file of tests with this name, in the folder of its room."""
    return next((ROOT / "tests").glob(f"*/{name}"), ROOT / "tests" / name)


@cache
def functions(file: str) -> set[str]:
    tree = ast.parse(file_of(file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("section", LINES)
def test_every_line_has_a_test_that_exists_or_a_reason(section):
    found = rows(section)
    for wanted in LINES[section]:
        assert any(wanted in row[0] for row in found), f"no row for {wanted!r}"
    for row in found:
        assert len(row) == 3 and row[2], row
        named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", row[1])
        assert named or row[1].startswith("reason: "), row
        for file, function in named:
            assert file_of(file).is_file() and (not function or function in functions(file)), (file, function)


# ---- rules


def test_nothing_is_unpickled_or_evaluated():
    words = re.compile(r"pickle|marshal|shelve|\beval\(|\bexec\(|torch\.load|trust_remote_code|os\.system|yaml\.load\b")
    for path in sorted((ROOT / "src").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if words.search(text) else ():
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not names & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}, path
            elif isinstance(node, ast.Call):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "os.system", "yaml.load"), f"{path}: {name}"
                assert name != "torch.load" or given["weights_only"] == "True", path
                assert "trust_remote_code" not in given, path


def test_no_kernels_come_from_the_hub():
    """By default transformers runs code from the hub for a model that it loads, from 5.25 on."""
    loads = [
        (path, node)
        for path in sorted((ROOT / "src").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and re.fullmatch(r"AutoModel\w*\.from_pretrained|getattr\(transformers, model\)\..*", ast.unparse(node.func))
    ]
    assert len(loads) == 4
    for path, node in loads:
        assert "use_kernels=False" in [ast.unparse(keyword) for keyword in node.keywords], path


@pytest.mark.parametrize("attribute", ["__class__.__mro__", "__init__.__globals__"])
def test_a_chat_template_reaches_nothing_of_python(attribute):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = f"{{{{ messages[0]['content'].{attribute} }}}}" + tokenizer.chat_template
    with pytest.raises(BaseModelError, match=r"unsafe|undefined|access"):
        ChatFormat(tokenizer)


# ---- documents


def test_a_remote_template_of_word_is_not_fetched(monkeypatch):
    """The child process may open no socket, and would fail; what the file links to is not looked at."""
    made = io.BytesIO()
    link = '<Relationship Id="rId99" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/{}" Target="{}" TargetMode="External"/>'
    links = link.format("attachedTemplate", "http://169.254.169.254/x.dotm") + link.format(
        "image", "file:///etc/passwd"
    ).replace("99", "98")
    with zipfile.ZipFile(ROOT / "tests/files/letter.docx") as source, zipfile.ZipFile(made, "w") as package:
        for name in source.namelist():
            content = source.read(name)
            if name == "word/_rels/document.xml.rels":
                content = content.replace(b"</Relationships>", links.encode() + b"</Relationships>")
            package.writestr(name, content)
        package.writestr(
            "word/_rels/settings.xml.rels",
            f'<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">{links}</Relationships>',
        )
    read = read_document(io.BytesIO(made.getvalue()), file_name="letter.docx")
    assert read.text == read_document(ROOT / "tests/files/letter.docx").text


def test_files_and_addresses_in_html_are_left_alone(tmp_path):
    (tmp_path / "secret.txt").write_text("the vault")
    secret = (tmp_path / "secret.txt").as_uri()
    page = f'<html><body>Seen<img src="{secret}"><iframe src="{secret}"></iframe><img src="http://169.254.169.254/latest/meta-data/"><object data="{secret}"></object></body></html>'
    assert read_document(io.BytesIO(page.encode()), file_name="x.html").text == "Seen"


# ---- the library


def test_the_newest_version_is_that_which_was_made_last_whatever_the_clock_says(tmp_path, monkeypatch):
    made = [
        write(tmp_path, seed=i, replace=True, created=f"{year}-01-01T00:00:00+00:00")
        for i, year in enumerate((2038, 1970))
    ]
    assert Library(tmp_path).open("doc").manifest.version == made[1].manifest.version


def test_the_same_document_becomes_the_same_bits(model, tiny_folder, tiny_hypernet_folder, tmp_path):
    document = loracast.Document.from_text(PROSE * 3, title="Prose")
    other = loracast.load(tiny_folder, tiny_hypernet_folder, library=tmp_path / "other", device="cpu")
    one, two = (m.learn(document, "prose", max_chunk_tokens=40) for m in (model, other))
    for name in ("factors.safetensors", "chunks.sqlite"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    assert one.manifest.version == two.manifest.version


def test_a_few_faults_leave_a_whole_library(home):
    """benchmarks/faults.py, which runs hundreds of them."""
    counts = faults.run(rounds=10, seed=5, seconds=120)
    assert counts["broken"] == [] and counts["rounds"] == 10 and counts["took_effect"] >= 3
    assert counts["commands"]["serve"] == 1
