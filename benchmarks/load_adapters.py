"""Adapters of the load test: documents that each hold a number, and what a request for one may get at a time."""

from __future__ import annotations

import asyncio
import random

PROSE = (
    "The gardener watered the roses before the sun was high.",
    "A narrow road leads from the village to the old mill.",
    "Nobody had expected so many visitors in the first week.",
    "The bread is baked in the night and sold in the morning.",
    "Rain fell on the hills, and the river rose a little.",
    "The committee meets in the hall behind the library.",
    "Two boats lay at the pier, one of them without a mast.",
    "In winter the shop closes an hour earlier than in summer.",
)


class Known:
    """One adapter's name, and what a request for it may get."""

    def __init__(self, name: str, statement: str, question: str):
        self.name, self.question = name, question
        self._statement = statement
        self.versions: list[str] = []
        """Hashes of the versions that were completed, oldest first."""
        self.n_learned = self.n_deleted = 0
        """Changes that were begun."""
        self.is_there = False
        """False from the answer to a deletion until the next version is completed."""
        self.is_gone = False
        """True from the answer to a deletion until the next version is sent."""
        self.deletes = False
        self.changing = asyncio.Lock()

    def document(self, rng: random.Random, number: str) -> bytes:
        prose = rng.sample(PROSE, 4)
        prose.insert(rng.randrange(5), self._statement.format(number))
        return " ".join(prose).encode()
