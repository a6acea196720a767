"""A memory that grows while a user talks: what is kept of a message, versions, forgetting, and what finds it."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from adapters import write
from loracast.base.generate import Sampling
from loracast.cast import memory as module
from loracast.cast.document import CachedRecast, cast_chunks
from loracast.cast.memory import Memory, statements_in
from loracast.cli import app
from loracast.documents import Document
from loracast.errors import AdapterError
from loracast.reading.routing import route_document

SAID = [
    "My dog is called Bella and she hates the stairs.",
    "I keep the spare key under the blue flower pot.",
    "My sister Ingrid lives in Bergen. She plays the cello.",
]


@pytest.fixture
def memory(model) -> Memory:
    found = model.memory("me")
    for message in SAID:
        found.remember(message)
    return found


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("My dog is called Bella.", "My dog is called Bella."),
        ("Hi there! I have just moved into a new flat.", "I have just moved into a new flat."),
        ("Hello, my name is Anna.", "my name is Anna."),
        ("Our wifi password is tangerine42. Do I need to change it?", "Our wifi password is tangerine42."),
        ("I was   born in Leeds.\x07", "I was born in Leeds."),
        ("When I was young, we lived in Galway.", "When I was young, we lived in Galway."),
        ("How old is Bella?", ""),
        ("what is my name", ""),
        ("Can you help me with my tax return", ""),
        ("Write a poem about my dog.", ""),
        ("When is the concert", ""),
        ("Thank you very much.", ""),
        ("Good morning!", ""),
        ("Yes.", ""),
        ("", ""),
    ],
)
def test_of_a_message_the_statements_are_kept(message, kept):
    assert statements_in(message) == kept


def test_what_is_said_becomes_chunks_of_an_adapter(memory, model):
    adapter = model.adapter("me")
    assert memory.messages() == SAID
    assert adapter.manifest.n_chunks == 3 and adapter.manifest.is_memory and adapter.manifest.storage == "text"
    lora, [(routed, route)] = model.lora_for("Where is my spare key?", "me")
    assert routed.version == adapter.version and route.chunks[0] == 1
    expected = route_document(adapter.index, "Where is my spare key?")
    assert (route.chunks, route.weights, route.sentences) == (expected.chunks, expected.weights, expected.sentences)
    assert lora.names


def test_a_message_of_several_chunks_is_one_message(memory):
    long = " ".join(
        f"My cousin number {i} lives in house {i} of the long street, and her cat is grey." for i in range(30)
    )
    adapter = memory.remember(long)
    memory.remember("I like tea with milk.")
    assert adapter.manifest.n_chunks > 4
    assert memory.messages() == [*SAID, long, "I like tea with milk."]
    assert memory.forget(4).message == long
    assert memory.messages() == [*SAID, "I like tea with milk."]


def test_what_says_nothing_new_makes_no_version(memory, model):
    n_versions = len(model.library.versions("me"))
    assert memory.remember("What is my dog called?") is None
    assert memory.remember(SAID[0]) is None
    assert len(model.library.versions("me")) == n_versions == 3


def test_the_oldest_messages_and_versions_go(model, monkeypatch):
    monkeypatch.setattr(module, "MOST_CHUNKS", 3)
    monkeypatch.setattr(module, "KEPT_VERSIONS", 2)
    memory = model.memory("me")
    for i in range(5):
        memory.remember(f"My friend number {i} is tall.")
    assert memory.messages() == [f"My friend number {i} is tall." for i in (2, 3, 4)]
    assert len(model.library.versions("me")) == 2
    assert b"friend number 0" not in _bytes(model.library.folder / "objects")


def test_what_is_forgotten_is_in_no_file(memory, model):
    assert b"Bella" in _bytes(model.library.folder)
    forgotten = memory.forget(1)
    assert (forgotten.message, forgotten.n_removed, forgotten.still_in) == (SAID[0], 3, ())
    assert memory.messages() == SAID[1:]
    assert len(model.library.versions("me")) == 1
    assert not any(word in _bytes(model.library.folder).lower() for word in (b"bella", b"hate"))
    assert b"Ingrid" in _bytes(model.library.folder)


def test_older_versions_without_the_message_stay(memory, model):
    older = [entry.version for entry in model.library.versions("me")][1:]
    assert memory.forget(3).n_removed == 1
    assert [entry.version for entry in model.library.versions("me")] == older
    with pytest.raises(AdapterError, match="has 2 messages, and none is number 3"):
        memory.forget(3)


def test_a_version_that_has_another_name_is_told_of(memory, model):

    [newest, *_] = model.library.versions("me")
    model.library.give_name("backup", newest.version, replace=False)
    assert memory.forget(2).still_in == (newest.version,)
    assert b"flower" in _bytes(model.library.folder)


def test_a_memory_without_messages_is_gone(memory, model):
    for _ in SAID:
        memory.forget(1)
    assert memory.messages() == []
    with pytest.raises(AdapterError, match="no adapter is called 'me'"):
        model.adapter("me")
    memory.remember(SAID[0])
    assert memory.messages() == SAID[:1]


def test_a_document_is_no_memory(model):
    model.learn(Document.from_text("# Kettle\n\nIt holds 1.7 litres."), "kettle")
    with pytest.raises(AdapterError, match="'kettle' is an adapter that no chat has made"):
        model.memory("kettle")
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        model.memory("../me")


def test_a_memory_can_be_renamed(memory, model):
    model.library.rename("me", "myself")
    assert model.memory("myself").messages() == SAID and model.memory("me").messages() == []


def test_threads_lose_no_message(model):
    memories = [model.memory("me") for _ in range(4)]

    def talk(i: int) -> None:
        for j in range(3):
            memories[i].remember(f"My friend {i} has house {j}.")

    threads = [threading.Thread(target=talk, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(memories[0].messages()) == sorted(f"My friend {i} has house {j}." for i in range(4) for j in range(3))


def test_remembering_in_the_background(model, caplog, monkeypatch):
    memory = model.memory("me")
    futures = [memory.remember_later(message) for message in SAID]
    assert [future.result(60).manifest.n_chunks for future in futures] == [1, 2, 3]
    assert memory.messages() == SAID

    def fail(*args, **kwargs):
        raise OSError("secret words")

    monkeypatch.setattr(module, "learn_document", fail)
    with pytest.raises(OSError, match="secret"):
        memory.remember_later("I like tea with milk.").result(60)
    module._BACKGROUND.submit(int).result(60)  # the failure is logged before the next job begins
    assert "a message could not be remembered: OSError" in caplog.text and "secret" not in caplog.text


@pytest.mark.parametrize(
    ("question", "is_empty"),
    [
        ("What is my dog called?", False),
        ("Where do I keep the spare key?", False),
        ("Where is the spare key, under which flower pot?", False),
        ("What is my job?", True),
        ("Good evening", True),
    ],
)
def test_what_a_memory_is_asked(memory, model, question, is_empty):
    _, [(_, route)] = model.lora_for(question, "me")
    assert route.is_empty == is_empty
    assert not model.lora_for(question, "me", always=True)[1][0][1].is_empty


def test_a_memory_has_no_outline_to_answer_with(memory, model):
    assert model.overview("What is this document about?", "me") is None


def test_factors_that_are_kept_in_memory_are_those_that_are_cast(memory, model, monkeypatch):
    prompts = [SAID[1], SAID[0], SAID[1]]
    cast = []
    monkeypatch.setattr(
        "loracast.cast.document.cast_chunks",
        lambda *args: (args[2] and cast.append(args[2])) or cast_chunks(*args),
    )
    found = model._recast(prompts)
    assert cast == []  # they were cast when they were said
    expected = CachedRecast(model.documents, model.base)(prompts)
    cast.clear()
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name].float(), expected[name].float(), atol=1e-2) for name in expected)
    model._recast(["new words", *prompts])
    assert cast == [["new words"]]
    cast.clear()
    of_one = CachedRecast(model.documents, model.base, most=1)
    for asked in (prompts, [SAID[0]], [SAID[1]]):
        of_one(asked)
    assert cast == [[SAID[1], SAID[0]], [SAID[1]]]


def _bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


# ---- on the command line


@pytest.fixture
def chat(model, tiny_folder, tiny_hypernet_folder):
    """Runs `loracast chat --remember me` over some lines; what it prints on standard output and on standard error."""

    def run(*lines: str, options: tuple[str, ...] = ("--remember", "me")) -> tuple[str, str]:
        where = ("--library", model.library, "--base", tiny_folder, "--hypernetwork", tiny_hypernet_folder)
        given = [str(one) for one in ("chat", *options, *where, "--device", "cpu", "--max-tokens", "4", "--local")]
        result = CliRunner().invoke(app, given, input="\n".join([*lines, ""]).encode("utf-8", "surrogateescape"))
        assert result.exit_code == 0, result.output
        return result.stdout, result.stderr

    return run


def test_a_line_in_another_encoding_ends_no_chat(chat):
    shown, said = chat("caf\udce9", SAID[0], "/memory")
    assert "error: this line is not valid UTF-8" in said and shown.splitlines()[-1] == f"  1 {SAID[0]}"


def test_chat_remembers_shows_and_forgets(chat, model):
    shown, _ = chat(SAID[0], "What is my dog called?", SAID[1], "/memory")
    assert shown.splitlines()[-2:] == [f"  1 {SAID[0]}", f"  2 {SAID[1]}"]
    shown, said = chat("/memory", "/forget 1", "/memory", "/forget 7")
    assert shown.splitlines() == [f"  1 {SAID[0]}", f"  2 {SAID[1]}", f"  1 {SAID[1]}"]
    assert f"(forgotten: {SAID[0]})" in said and "error: the memory 'me' has 1 messages, and none is number 7" in said
    assert model.memory("me").messages() == [SAID[1]]


def test_chat_answers_with_what_earlier_chats_have_kept(chat, memory):
    question = "Where do I keep the spare key?"
    assert chat(question)[0] == chat(question, options=("-a", "me"))[0] != chat(question, options=())[0]


def test_chat_remembers_nothing_unless_it_is_told_to(chat, model):
    _, said = chat(SAID[0], "/memory", "/forget 1", options=())
    assert said.count("error: this chat keeps no memory; begin it with --remember NAME") == 2
    assert model.library.names() == []


def test_chat_says_what_it_could_not_remember(chat, monkeypatch):
    def fail(*args, **kwargs):
        raise AdapterError("the disk is full")

    monkeypatch.setattr(module, "learn_document", fail)
    _, said = chat(SAID[0], "/memory")
    assert "(this could not be remembered: the disk is full)" in said


# ---- a style

HELD = "How much does the kettle hold?"


@pytest.fixture
def ask(tiny_folder, hypernetwork, model, monkeypatch):
    """What `loracast ask --json` says of a document with some options."""
    monkeypatch.setattr("loracast.answering.model.shipped_hypernetwork", lambda base, modality: hypernetwork)
    model.learn(Document.from_text("# Kettle\n\nIt holds 1.7 litres."), "kettle")

    def run(*options: str) -> dict:
        where = ("--library", model.library, "--base", tiny_folder, "--device", "cpu", "--local", "--json")
        given = [str(one) for one in ("ask", HELD, "-a", "kettle", *options, *where, "--max-tokens", "8")]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return run


def test_a_style_is_cast_once_and_goes_along(ask, model):
    first = ask("--style", "Shout it.")
    assert set(first["adapters"]) == {"kettle", "shout-it"} and model.adapter("shout-it").manifest.title == "Shout it."
    assert model.adapter("shout-it").manifest.strength == 0.5
    created = model.adapter("shout-it").manifest.created, model.library.versions("shout-it")
    assert ask("--style", "Shout it.")["answer"] == first["answer"]
    assert (model.adapter("shout-it").manifest.created, model.library.versions("shout-it")) == created
    assert first["answer"] == model.ask(HELD, ["kettle", "shout-it"], sampling=Sampling(8))


def test_styles_that_would_have_one_name_are_two(ask):
    for words, plain in (("Shout it.", "shout-it"), ("shout it", ""), ("Кратко", "document"), ("Длинно", "")):
        (name,) = ask("--style", words)["adapters"].keys() - {"kettle"}
        assert name == plain or (not plain and re.fullmatch(r"(shout-it|document)-[0-9a-f]{8}", name))
        assert ask("--style", words)["adapters"].keys() == {"kettle", name}


def test_a_style_for_another_base_is_left_alone(ask, model, tiny_folder):
    other = write(model.library, 1, name="shout-it", kind="task", title="Shout it.")
    for _ in range(2):
        (name,) = ask("--style", "Shout it.")["adapters"].keys() - {"kettle"}
        assert name.startswith("shout-it-") and model.adapter(name).manifest.title == "Shout it."
    assert [one.version for one in model.library.versions("shout-it")] == [other.manifest.version]
    where = ("--library", model.library, "--base", tiny_folder, "--device", "cpu", "--max-tokens", "2", "--local")
    given = [str(one) for one in ("ask", HELD, "--style", "Shout it.", "--json", *where)]
    assert json.loads(CliRunner().invoke(app, given).stdout)["adapters"].keys() == {name}
