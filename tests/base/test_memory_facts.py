"""Facts that a user tells in ten chats, asked for in an eleventh that has none of their history, on the real base.

The way in which a message becomes a chunk was chosen on the chats `dev` of files/chats.toml; those of `test` were
written before and only measured. `pytest -s` prints the answers.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import loracast
from loracast.base.generate import Sampling

pytestmark = pytest.mark.base
CHATS = tomllib.loads((Path(__file__).parents[1] / "files" / "chats.toml").read_text())
SHORT = Sampling(max_new_tokens=12)


def remembered(chats, library: Path):
    model = loracast.load(library=library)
    memory = model.memory("me")
    for chat in chats:
        for message in chat["said"]:
            memory.remember(message)
    return model, memory


@pytest.mark.usefixtures("one_embedded_base")
def test_facts_come_back_in_a_new_chat_and_not_once_they_are_forgotten(tmp_path):
    model, memory = remembered(CHATS["test"], tmp_path)
    facts = [tuple(fact) for chat in CHATS["test"] for fact in chat["facts"]]
    with_memory = dict(zip(facts, model.ask([question for question, _ in facts], "me", sampling=SHORT), strict=True))
    without = dict(zip(facts, model.ask([question for question, _ in facts], sampling=SHORT), strict=True))
    right = [fact for fact in facts if fact[1].lower() in with_memory[fact].lower()]
    for fact in facts:
        print(f"{'+' if fact in right else '-'} {fact[0]} {fact[1]} | {with_memory[fact]!r} | {without[fact]!r}")
    known_anyway = [fact for fact in facts if fact[1].lower() in without[fact].lower()]
    print(f"{len(right)} of {len(facts)} right, {len(known_anyway)} without the memory")
    assert len(facts) == 20 and len(right) >= 12 and len(known_anyway) <= 2

    gone = [fact for fact in right if fact not in known_anyway][:3]
    for _, answer in gone:
        for i, message in reversed(list(enumerate(memory.messages(), 1))):
            if answer.lower() in message.lower():
                memory.forget(i)
    again = model.ask([question for question, _ in gone], "me", sampling=SHORT)
    assert not any(answer.lower() in text.lower() for (_, answer), text in zip(gone, again, strict=True))
