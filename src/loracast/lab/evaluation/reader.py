"""`loracast eval reader`: does the reader find the unit that answers, and refuse what the document does not say?

Beside it stands BM25 alone. People's questions are asked of their document; with further paragraphs of its article
after it, where the file names articles. What the document does not say is asked, too: of another part of the same
article, of another document, unrelated questions and small talk. No answer is generated.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loracast.answering.model import Model
from loracast.errors import ConfigError
from loracast.hypernets.reader import READER_FILE, Reader
from loracast.lab.data import asked
from loracast.lab.data.asked import AskedDocument
from loracast.lab.data.facts import Split
from loracast.lab.data.rows import read_questioned, read_unrelated
from loracast.lab.evaluation.report import Progress, Report, columns, mean_if_any, no_progress
from loracast.lab.training.loop import TrainConfig
from loracast.lab.training.reader import Asking, AskingConfig, Episode, ReaderObjective, without_answer
from loracast.lab.training.states import ReadChunk, ReadFile, ReadQuestion

READER_COLUMNS = columns(
    source="documents", kind="asked", n=("n", 0), reader=("reader's unit first %", "%"), 
    bm25=("BM25's first %", "%"), begins=("right first word %", "%"), refused=("refused %", "%"),
    base=("left to the base %", "%"),
)  # fmt: skip


@dataclass(frozen=True)
class ReaderEvalConfig:
    """Settings of `loracast eval reader`."""

    documents: tuple[str, ...] = ()
    """Files of documents with questions."""
    unrelated: tuple[str, ...] = ()
    """Files of questions that are about no document."""
    sources: tuple[str, ...] = ()
    """Sources to take of documents with a `source` field; all if empty."""
    split: Split = "dev"
    """Split of generated documents and small talk."""
    n: int = 40
    """Generated documents of each kind."""
    extra: int = 3
    """Further documents of the same group that follow a document, such as paragraphs of an article."""
    seed: int = 1
    """Seed of all that is drawn."""
    reader: str = ""
    """Folder of a reader; the one beside the hypernetwork if empty."""


def evaluate_reader(model: Model, config: ReaderEvalConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Ask every document its questions, some of others and small talk; errors as of `read_questioned`."""
    hypernetwork: Any = model.documents.hypernetwork
    reader = Reader.read(Path(config.reader) / READER_FILE) if config.reader else hypernetwork.reader
    if reader is None:
        raise ConfigError("no reader stands beside the hypernetwork: give the folder of one with --reader")
    drawn = _draw(config)
    with TemporaryDirectory() as folder:
        talk, unrelated = asked.small_talk(config.split), [q for q, _ in read_unrelated(config.unrelated)]
        states = Path(folder) / "states.f16"
        file = ReadFile(states, model.base, hypernetwork, reader.config, drawn, [*talk, *unrelated])
        apart = {"small talk": file.foreign[: len(talk)], "unrelated": file.foreign[len(talk) :]}
        asking = Asking(file.documents, (), AskingConfig())
        objective = ReaderObjective(reader, file, asking, TrainConfig())
        rng, found = random.Random(config.seed), defaultdict[tuple[str, str], list[dict[str, Any]]](list)
        for i, one in enumerate(asking.documents):
            kinds, episode = _episode(rng, asking, i, config.extra, apart)
            for kind, row in zip(kinds, _judge(objective, episode), strict=True):
                found[one.source, kind].append(row)
            progress(i + 1, len(asking.documents))
    rows = []
    for (source, kind), some in found.items():
        figures = {name: mean_if_any([row[name] for row in some if row[name] is not None]) for name in some[0]}
        rows.append({"source": source, "kind": kind, "n": len(some), **figures})
    return Report(out, "reader", READER_COLUMNS, config, model.base, model.documents.id).write(rows)


def _draw(config: ReaderEvalConfig) -> list[AskedDocument]:
    people = read_questioned(config.documents, config.sources) if config.documents else []
    made = [asked.draw_made(kind, config.n, config.seed, config.split) for kind in asked.KINDS]
    near_misses = asked.draw_near_misses(config.n, config.seed, config.split)
    return [*asked.draw_people(people, config.seed), *chain.from_iterable(made), *near_misses]


def _episode(
    rng: random.Random, asking: Asking, i: int, extra: int, apart: Mapping[str, Sequence[ReadQuestion]]
) -> tuple[list[str], Episode]:
    """A document with others of its group after it, and of each question what it is: its own, or one that is not.

    Args:
        apart: questions that are about no document, by what they are called.
    """
    one = asking.documents[i]
    near = asking.near(i)
    chunks: list[ReadChunk] = [*one.chunks, *(chunk for j in near[:extra] for chunk in asking.documents[j].chunks)]
    kinds = ["said" if question.unit >= 0 else "not said" for question in one.questions]
    questions = list(one.questions)
    for kind, pool in (("same group", near[extra:]), ("another document", asking.others(i))):
        if pool and (other := without_answer(rng.choice(asking.documents[rng.choice(pool)].questions), chunks)):
            kinds.append(kind)
            questions.append(other)
    for kind, some in apart.items():
        if some:
            kinds.append(kind)
            questions.append(rng.choice(some))
    return kinds, Episode(chunks, questions)


def _judge(objective: ReaderObjective, episode: Episode) -> list[dict[str, Any]]:
    """What each question's row counts: 1 or 0, or None where it does not apply."""
    rows = []
    every = zip(episode.questions, episode.rights, episode.tokens, objective.find(episode), episode.words, strict=True)
    for _, right, token, found, (bm25, _) in every:
        row: dict[str, Any] = dict.fromkeys(("reader", "bm25", "begins"))
        if right >= 0:
            best = max(zip(found.of_units, found.units, strict=True))[1]
            row |= {"reader": best == right, "bm25": int(bm25.argmax()) == right}
            row["begins"] = found.begins[0][0] == token if token >= 0 else None
        is_refused = not found.is_foreign and found.margin > objective.reader.refusing.item()
        row |= {"base": found.is_foreign, "refused": is_refused}
        rows.append(row)
    return rows
