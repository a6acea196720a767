"""The needle task: sentences with a random value, hidden in natural prose, and questions for the values.

It widens the task of Doc-to-LoRA's first experiment (arXiv 2602.15902): many kinds of values, many names for them, and
one to eight needles that only their keys distinguish. Wordings are in `content/needles.toml`, disjoint for train and
test.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from loracast.data.facts import Split, expand, fill
from loracast.data.rows import read_content

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'“(])")


@dataclass(frozen=True)
class Needle:
    """A sentence to hide, its question and the answer."""

    statement: str
    question: str
    answer: str
    key: str


def make_needles(rng: random.Random, n_needles: int, *, split: Split, kind: str | None = None) -> list[Needle]:
    """Draw the needles of one document: a single one may lack a key, several have different keys.

    All values are of `kind`, one of `[kinds]` of the content; with None each draws one, 4-digit numbers most often.
    """
    content = read_content("needles")
    frames = content["plain"] if n_needles == 1 and rng.random() < 0.3 else content["keyed"]
    needles: list[Needle] = []
    while len(needles) < n_needles:
        name = kind or rng.choice([*sorted(content["kinds"]), "number4", "number4", "number4"])
        table = content["kinds"][name]
        label, value = rng.choice(_of_split(table, "", split)), expand(rng, rng.choice(table["values"]))
        key = expand(rng, rng.choice(content["keys"]["things"]))
        state = fill(rng.choice(_of_split(frames, "state_", split)), label=label, key=key, v=value)
        question = fill(rng.choice(_of_split(frames, "ask_", split)), label=label, key=key, v=value)
        taken = any(key == other.key or value == other.answer for other in needles)
        if not taken and value.lower() not in question.lower():
            needles.append(Needle(state, question, value, key))
    return needles


def _of_split(table: dict[str, list[str]], prefix: str, split: Split) -> list[str]:
    """The wordings of a split; dev has the last two of the train list, and train the others."""
    if split == "test":
        return table[f"{prefix}test"]
    return table[f"{prefix}train"][-2:] if split == "dev" else table[f"{prefix}train"][:-2]


def sentences(text: str) -> list[str]:
    """Split a text roughly into sentences, between which a needle can be put."""
    return [piece for piece in _SENTENCE_END.split(" ".join(text.split())) if piece]


def hide(statements: Sequence[str], prose: Sequence[str], depths: Sequence[float]) -> list[str]:
    """Put each statement between two sentences of the prose, at its depth (0 is the beginning, 1 the end)."""
    slots = sorted(zip(depths, range(len(statements)), strict=True), reverse=True)
    mixed = list(prose)
    for depth, index in slots:  # from the back, so that earlier places do not move
        mixed.insert(round(depth * len(prose)), statements[index])
    return mixed
