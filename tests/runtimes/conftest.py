"""Exported adapters in the runtimes that people use, on the embedded base and the shipped hypernetworks.

A suite of its own: `make runtimes` (docs/export.md). What a runtime needs is installed beside the tests, never by
them; a test whose runtime is not there is skipped and says what to install.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path

import pytest

from loracast.answering.model import ASK_SYSTEM_TURN, Model, load
from loracast.base.embedded import DEFAULT_BASE, embedded_folder
from loracast.base.generate import Sampling, _generate
from loracast.base.load import Base
from loracast.lab.data.facts import make_sheet
from loracast.library.adapter import Adapter
from loracast.lora.algebra import LoRA

N_DOCUMENTS = 10
FACTS = 5


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.runtime)
            item.add_marker(pytest.mark.timeout(3600))
            if not embedded_folder(DEFAULT_BASE).is_dir():
                item.add_marker(pytest.mark.skip(reason="run `loracast pull` first"))


@dataclass(frozen=True)
class Asked:
    """A question about a document that was learned, as loracast answers it."""

    adapter: Adapter
    prompt: list[int]
    text: str
    tokens: list[int]
    """Of the answer, with the end of its turn."""
    expected: str
    """What the document says."""

    def is_right(self, text: str) -> bool:
        return self.expected.casefold() in text.casefold()

    @cached_property
    def lora(self) -> LoRA:
        return self.adapter.lora()


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Model:
    return load(library=tmp_path_factory.mktemp("library"), device="cpu")


@pytest.fixture(scope="session")
def base(model) -> Base:
    return model.base


@pytest.fixture(scope="session")
def asked(model, tmp_path_factory) -> list[Asked]:
    """Fifty questions about ten fact sheets of one chunk each, answered greedily with the adapters of the library."""
    import random

    folder = tmp_path_factory.mktemp("sheets")
    rows = []
    for i in range(N_DOCUMENTS):
        sheet = make_sheet(random.Random(i), FACTS, split="test")
        path = folder / f"sheet-{i}.txt"
        path.write_text(sheet.text, encoding="utf-8")
        adapter = model.learn(path, f"sheet-{i}")
        for fact in sheet.facts:
            prompt = model.base.chat.conversation(
                [{"role": "system", "content": ASK_SYSTEM_TURN}, {"role": "user", "content": fact.question}]
            )
            (ids,), *_ = _generate(model.base, [prompt], [adapter.lora()], Sampling(max_new_tokens=24), [None], None)
            said = list(takewhile(lambda i: i not in model.base.end_ids, ids))
            rows.append(Asked(adapter, prompt, model.base.tokenizer.decode(said), ids[: len(said) + 1], fact.answer))
    return rows
