"""How near the test wordings of generated questions are to training's: `python benchmarks/wordings.py`.

A wording is a pattern of a question in content/everyday.toml, without its slots. Two wordings are near where they share
half of their words (Jaccard index), function words left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from loracast.lab.data.questions import STOP_WORDS
from loracast.lab.data.rows import read_content
from loracast.text import stem_words

QUESTIONS = {"ask", "check", "asks", "backwards", "count"}
"""Keys of the content below which questions stand, by split."""


def wordings(content: Any, split: str, is_asking: bool = False) -> Iterator[str]:
    """The patterns of questions of a split."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key == split and is_asking and isinstance(value, list):
                yield from value
            yield from wordings(value, split, is_asking or key in QUESTIONS)
    elif isinstance(content, list):
        for value in content:
            yield from wordings(value, split, is_asking)


def words_of(wording: str) -> frozenset[str]:
    """The stems of a wording, without slots and function words."""
    found = re.findall(r"[a-z]+", re.sub(r"{[^}]*}", " ", wording.lower()))
    return frozenset(stem_words([word for word in found if word not in STOP_WORDS]))


def main() -> None:
    """Print the share of test wordings that are near one of training."""
    train = {words_of(one) for name in ("everyday", "everyday_train") for one in wordings(read_content(name), "train")}
    test = [words_of(one) for one in wordings(read_content("everyday"), "test")]
    near = sum(any(2 * len(one & other) >= len(one | other) > 0 for other in train) for one in test)
    print(f"{near} of {len(test)} test wordings share half of their words with one of training: {near / len(test):.0%}")


if __name__ == "__main__":
    main()
