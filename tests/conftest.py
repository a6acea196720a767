"""Fixtures: a tiny random base with a real tokenizer and chat template, and a tiny hypernetwork for it."""

from __future__ import annotations

import functools
import gc
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loracast.documents import worker

# torch is imported inside the functions: the process that hands the tests to the workers needs none of it

os.environ.setdefault("HF_HUB_OFFLINE", "1")

FIRST = (
    "cli", "serve_command", "load", "workers", "serving_jobs", "serving_requests", "sync", "shared", "serving_files",
    "serving_clients", "serving_docs", "serving_openai", "vllm_engine", "engine_replicas", "library", "deploy", "replica",
    "attention_delta", "evaluation", "tutorial", "shipped", "readme", "memory_facts", "engine", "page", "plan",
)  # fmt: skip
"""Files whose tests go first, in this order: those that fork processes, so that one worker alone imports what the
processes need (other_processes.py); those that wait for servers, while other workers compute; and those that take long,
so that no worker is left with one of them at the end."""

MEMORY = Path("/dev/shm")
"""A file system in memory, where there is one: tests write small files that they sync to the disk thousands of times."""


def pytest_configure(config: pytest.Config) -> None:
    """Keep temporary folders in memory, where it has room for them and no other place is named."""
    if "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2**31:
        os.environ["TMPDIR"] = str(MEMORY)
        tempfile.tempdir = None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `base` where the embedded base, or an encoder that the mark names, has not been fetched."""
    for mark in item.iter_markers("base"):
        from loracast.base.embedded import DEFAULT_BASE, embedded_folder

        folders = {"": embedded_folder(DEFAULT_BASE)}
        folders |= {f" {name}": embedded_folder(name) for name in mark.args}
        for name, folder in folders.items():
            if not folder.is_dir():
                pytest.skip(f"run `loracast pull{name}` first")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: n for n, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem.removeprefix("test_"), len(rank)))


@contextmanager
def kept_from_collection() -> Iterator[None]:
    """Keep the garbage collector from going through what imports make, a million objects, now and afterwards."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    with kept_from_collection():
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def in_float32() -> Iterator[None]:
    """Load bases in float32 on every processor: in bf16, likely tokens of the tiny base are tied."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            patch.setattr(torch.cpu, check, lambda: False, raising=False)
        yield


@pytest.fixture
def in_child() -> None:
    """Files are parsed as users' files are, in a process of its own, which takes a third of a second."""


@pytest.fixture(autouse=True)
def parse_in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "in_child" not in request.fixturenames:
        monkeypatch.setattr("loracast.documents.read.parse_in_child", worker.parse)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """The tiny base as a Hugging Face folder, as a user would give it."""
    from tiny import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("tiny-base")
    with kept_from_collection():  # transformers imports the most when it makes its first model
        make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tiny_folder):
    """The tiny base, loaded in fp32."""
    from loracast.base.load import load_base

    return load_base(tiny_folder, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def load_embedded_base():
    """`load_base` for the embedded base, which it loads once."""
    from loracast.base.load import fastest_device, load_base

    kept = functools.cache(load_base)

    def load(source=None, *, device=None, chat_template=None, say=None, **others):
        assert not any(others.values()), others
        return kept(source, device=device or fastest_device(), chat_template=chat_template)

    return load


@pytest.fixture
def one_embedded_base(load_embedded_base, monkeypatch) -> None:
    """The embedded base is loaded once for all tests that ask for this; they must not change its modules."""
    for module in ("loracast.answering.model", "loracast.base.load"):
        monkeypatch.setattr(f"{module}.load_base", load_embedded_base)


@pytest.fixture(scope="session")
def tiny_hypernet_folder(base, tmp_path_factory) -> Path:
    """The tiny hypernetwork, saved."""
    from tiny import make_hypernet

    folder = tmp_path_factory.mktemp("tiny-hypernet")
    make_hypernet(base).save_pretrained(folder, storage="float32")
    return folder


@pytest.fixture
def no_copying(monkeypatch) -> None:
    """Answers go by the LoRA alone: the long answers of a tiny base are cut short where it copies its document."""
    monkeypatch.setattr("loracast.answering.model.Model.copy_bias", lambda self, prepared: None)


@pytest.fixture
def reading_folder(base, tiny_hypernet_folder, tmp_path) -> Path:
    """The folder of the tiny hypernetwork with a random reader beside it, which refuses nothing."""
    from loracast.hypernets.protocol import Hypernetwork
    from loracast.hypernets.reader import READER_FILE
    from tiny import make_reader

    folder = shutil.copytree(tiny_hypernet_folder, tmp_path / "hypernetwork")
    make_reader(base, Hypernetwork.from_pretrained(folder).config.prefix).save(folder / READER_FILE, {})
    return folder


@pytest.fixture
def reading(base, reading_folder, tmp_path):
    """The tiny base with the hypernetwork of `reading_folder` and an empty library."""
    import loracast

    return loracast.Model(base, tmp_path / "library", reading_folder)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A loracast home of this test's own."""
    monkeypatch.setenv("LORACAST_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(base, tiny_hypernet_folder, tmp_path):
    """The tiny base, which all tests share, with its hypernetwork and an empty library."""
    import loracast

    return loracast.Model(base, tmp_path / "adapters", tiny_hypernet_folder)


@pytest.fixture(scope="module")
def filled(tiny_folder, tiny_hypernet_folder, tmp_path_factory):
    """The tiny base and hypernetwork with a library of a module's own: two documents and a task."""
    import loracast
    from servers import fill

    folder = tmp_path_factory.mktemp("served") / "library"
    model = loracast.load(tiny_folder, tiny_hypernet_folder, library=folder, device="cpu")
    fill(model)
    return model


@pytest.fixture(scope="session")
def suite(tmp_path_factory) -> Path:
    """Three held-out tasks (one of them near) and one of the training, as files. Read only."""
    from suites import write_held_out_suite

    return write_held_out_suite(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="session")
def hypernetwork(base, tmp_path_factory) -> Path:
    """The folder of a random hypernetwork for the tiny base that reads tasks with a tiny sentence encoder."""
    from tiny import make_sentence_encoder, make_task_hypernet

    folder = tmp_path_factory.mktemp("hypernetwork")
    encoder = make_sentence_encoder(folder / "encoder")
    make_task_hypernet(base, encoder, 6, 40.0).save_pretrained(folder / "h", storage="float32")
    return folder / "h"


@pytest.fixture
def word_encoder(monkeypatch) -> None:
    """Every text encoder is `WordCounts`."""
    from suites import WordCounts

    for module in ("loracast.lab.training.text", "loracast.hypernets.text_to_lora"):
        monkeypatch.setattr(f"{module}.load_text_encoder", lambda *known: WordCounts())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub; `hub(folder, repository, revision)` puts a folder into it as a revision of a repository."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def publish(folder: Path, repository: str, revision: str = "main") -> None:
        place = cache / f"models--{repository.replace('/', '--')}"
        commit = hashlib.sha1(f"{folder}{revision}".encode()).hexdigest()
        shutil.copytree(folder, place / "snapshots" / commit, dirs_exist_ok=True)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / revision).write_text(commit)

    return publish


@pytest.fixture(scope="session")
def s3():
    """A bucket on a server that speaks S3."""
    import fsspec

    from s3 import BUCKET, s3_server

    with pytest.MonkeyPatch.context() as patch, s3_server() as variables:
        for name, value in variables.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir(BUCKET)
        yield BUCKET
