"""What a classifier says of an input, in words: the likeliest names with their probabilities, each in a sentence.

Whatever gives labels with probabilities comes in here: a photo by a vision model, a sound, the readings of a sensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from loracast.errors import ConfigError

PICTURE = "The picture shows a {}."
"""The sentence about a name of a picture."""
N_NAMES = 12
"""The names that are told, the likeliest ones (chosen on dev images: docs/notebook, 2026-12-03)."""


@dataclass(frozen=True)
class Labels:
    """What an input probably is: names with probabilities, and the sentence that says a name of it."""

    probabilities: Mapping[str, float]
    """By name."""
    sentence: str = PICTURE
    """With {} in the place of a name."""
    title: str = ""
    """A caption, or the file's name made readable: words that are certain; empty where there are none."""
    file_name: str | None = None
    """Without its folders; None where the input was no file."""
    sha256: str = ""
    """Hash of the input's bytes; of the names and probabilities where it is not given."""
    kind: Literal["image", "labels"] = "labels"
    """The kind of its adapter."""

    def __post_init__(self) -> None:
        if self.sentence.count("{}") != 1:
            raise ConfigError(f"{self.sentence!r} has to have one {{}}, where the name goes")
        if not any(p > 0 for p in self.probabilities.values()) or not all(p >= 0 for p in self.probabilities.values()):
            raise ConfigError("labels are names with probabilities, at least one of them above 0 and none below it")
        if not self.sha256:
            said = json.dumps([self.sentence, self.title, dict(self.probabilities)])
            object.__setattr__(self, "sha256", hashlib.sha256(said.encode()).hexdigest())

    @property
    def likeliest(self) -> dict[str, float]:
        """The names that are told, the likeliest first, with their probabilities."""
        ordered = sorted(self.probabilities.items(), key=lambda pair: -pair[1])
        return {name: p for name, p in ordered[:N_NAMES] if p > 0}

    @property
    def weighted(self) -> dict[str, float]:
        """The sentences that are told, each with its weight: the root of the name's probability beside the likeliest's.

        A title is certain, and has the weight 1.
        """
        told = self.likeliest
        most = max(told.values())
        titled = {f"{self.title.rstrip('.')}.": 1.0} if self.title else {}
        return titled | {self.sentence.format(name): (p / most) ** 0.5 for name, p in told.items()}

    @property
    def text(self) -> str:
        """What an adapter keeps to be read: a sentence a line, with the probability behind it."""
        return "\n".join(f"{self.sentence.format(name)} ({p:.0%})" for name, p in self.likeliest.items())
