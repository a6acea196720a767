"""Data files at URLs that fsspec knows: read as those of this machine are, and kept until they change."""

from __future__ import annotations

import gzip
import json

import fsspec
import pytest

from loracast.data.qa import read_questioned
from loracast.data.rows import local_file, read_texts, read_unrelated
from loracast.errors import ConfigError
from loracast.paths import fetched_dir

ROWS = [
    {"document": "The lamp is red.", "questions": [{"question": "Which colour?", "answers": ["red"]}]},
    {"document": "The lamp is new.", "questions": [{"question": "How old?", "answers": ["new"]}]},
]


def put(url: str, data: bytes) -> str:
    with fsspec.open(url, "wb") as file:
        file.write(data)
    return url


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_a_url_is_read_as_a_file_is(home):
    packed = put("memory://rows/documents.jsonl.gz", gzip.compress(lines(ROWS)))
    plain = put("memory://rows/prose.txt", b"It rained. It was cold. It got late.")
    unrelated = put("memory://rows/questions.jsonl", lines([{"question": "Two and two?", "answer": "four"}]))
    assert read_texts([packed, plain]) == [row["document"] for row in ROWS] + ["It rained. It was cold. It got late."]
    assert [one.text for one in read_questioned([packed])] == [row["document"] for row in ROWS]
    assert read_unrelated([unrelated]) == [("Two and two?", "four")]
    assert {path.name for path in fetched_dir().rglob("*.*")} == {"documents.jsonl.gz", "prose.txt", "questions.jsonl"}


def test_a_copy_is_kept_until_the_file_changes(home, monkeypatch):
    url = put("memory://rows/changing.txt", b"before")
    copy = local_file(url)
    with monkeypatch.context() as patch:
        patch.setattr("fsspec.implementations.memory.MemoryFileSystem.get_file", None)  # nothing is fetched
        assert local_file(url) == copy
    put(url, b"behind")
    assert local_file(url).read_bytes() == b"behind"


@pytest.mark.parametrize("url", ["memory://rows/no-such-file.jsonl", "no-such-protocol://rows/a.jsonl"])
def test_a_url_that_cannot_be_read_is_named(url, home):
    with pytest.raises(ConfigError, match=f"{url} cannot be read"):
        read_texts([url])


def test_a_file_without_a_row_of_the_wanted_sources_is_refused(tmp_path):
    file = tmp_path / "prose.jsonl"
    file.write_bytes(lines([{"text": "It rained.", "source": "diary"}, {"text": "It was cold."}]))
    assert read_texts([str(file)], ["diary", "letters"]) == ["It rained."]
    with pytest.raises(ConfigError, match=r"prose\.jsonl is of the sources .* \(letters\).*data\.text_sources=\[\]"):
        read_texts([str(file)], ["letters"])


def test_a_key_that_a_row_lacks_is_named(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_bytes(lines([{"question": "Two and two?", "choices": ["four"]}]))
    with pytest.raises(ConfigError, match=r"questions\.jsonl, line 1: the row needs 'answer' \(a file of questions\)"):
        read_unrelated([str(file)])
