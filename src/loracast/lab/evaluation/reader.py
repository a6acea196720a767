"""`loracast eval reader`: does the reader find the unit that answers, and refuse what the document does not say?

Beside it stand what routing does today (word vectors and BM25 together) and BM25 alone. People's questions are asked of
their document; with further paragraphs of its article after it, where the file names articles. No answer is generated.
"""

from __future__ import annotations

import random
import sqlite3
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loracast.answering.model import Model
from loracast.errors import ConfigError
from loracast.hypernets.reader import READER_FILE, Reader
from loracast.lab.data import asked
from loracast.lab.data.asked import AskedDocument
from loracast.lab.data.facts import Split
from loracast.lab.data.rows import read_questioned
from loracast.lab.evaluation.report import Progress, Report, columns, mean_if_any, no_progress
from loracast.lab.training.loop import TrainConfig
from loracast.lab.training.reader import Asking, AskingConfig, Episode, ReaderObjective, without_answer
from loracast.lab.training.states import ReadChunk, ReadFile
from loracast.library.index import write_index
from loracast.reading.matching import matches

READER_COLUMNS = columns(
    source="documents", kind="asked", n=("n", 0), reader=("reader's unit first %", "%"), today=("today's first %", "%"),
    bm25=("BM25's first %", "%"), begins=("right first word %", "%"), refused=("refused %", "%"),
    base=("left to the base %", "%"),
)  # fmt: skip


@dataclass(frozen=True)
class ReaderEvalConfig:
    """Settings of `loracast eval reader`."""

    documents: tuple[str, ...] = ()
    """Files of documents with questions."""
    sources: tuple[str, ...] = ()
    """Sources to take of documents with a `source` field; all if empty."""
    split: Split = "dev"
    """Split of generated documents and small talk."""
    n: int = 40
    """Generated documents of each kind, and half as many tables."""
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
        file = ReadFile(
            Path(folder) / "states.f16", model.base, hypernetwork, reader.config, drawn, asked.small_talk(config.split)
        )
        asking = Asking(file.documents, file.foreign, AskingConfig())
        objective = ReaderObjective(reader, file, asking, TrainConfig())
        rng, found = random.Random(config.seed), defaultdict[tuple[str, str], list[dict[str, Any]]](list)
        for i, one in enumerate(asking.documents):
            kinds, episode = _episode(rng, asking, i, config.extra)
            for kind, row in zip(kinds, _judge(objective, episode), strict=True):
                found[one.source, kind].append(row)
            progress(i + 1, len(asking.documents))
    rows = []
    for (source, kind), some in found.items():
        figures = {name: mean_if_any([row[name] for row in some if row[name] is not None]) for name in some[0]}
        rows.append({"source": source, "kind": kind, "n": len(some), **figures})
    return Report(out, "reader", READER_COLUMNS, config, model.base, model.documents.id).write(rows)


def _draw(config: ReaderEvalConfig) -> list[AskedDocument]:
    n, common = config.n, (config.seed, config.split)
    people = read_questioned(config.documents, config.sources) if config.documents else []
    return [
        *asked.draw_people(people, config.seed),
        *asked.draw_everyday(n, *common),
        *asked.draw_sheets(n // 2, *common),
        *asked.draw_tables(n // 2, *common),
        *asked.draw_corrections(n, *common),
        *asked.draw_near_misses(n, *common),
    ]


def _episode(rng: random.Random, asking: Asking, i: int, extra: int) -> tuple[list[str], Episode]:
    """A document with others of its group after it, and of each question what it is: its own, or one that is not."""
    one = asking.documents[i]
    near = asking.near(i)
    chunks: list[ReadChunk] = [*one.chunks, *(chunk for j in near[:extra] for chunk in asking.documents[j].chunks)]
    kinds = ["said" if question.unit >= 0 else "not said" for question in one.questions]
    questions = list(one.questions)
    for kind, pool in (("same group", near[extra:]), ("another document", asking.others(i))):
        if pool and (other := without_answer(rng.choice(asking.documents[rng.choice(pool)].questions), chunks)):
            kinds.append(kind)
            questions.append(other)
    if asking.foreign:
        kinds.append("small talk")
        questions.append(rng.choice(asking.foreign))
    return kinds, Episode(chunks, questions)


def _judge(objective: ReaderObjective, episode: Episode) -> list[dict[str, Any]]:
    """What each question's row counts: 1 or 0, or None where it does not apply."""
    rows = []
    chunks = [read.chunk for read in episode.chunks]
    with closing(sqlite3.connect(":memory:")) as index:
        write_index(index, chunks)
        every = zip(
            episode.questions, episode.rights, episode.tokens, objective.find(episode), episode.bm25(), strict=True
        )
        for question, right, token, found, bm25 in every:
            row: dict[str, Any] = dict.fromkeys(("reader", "today", "bm25", "begins"))
            if right >= 0:
                best = max(zip(found.of_units, found.units, strict=True))[1]
                row |= {"reader": best == right, "bm25": int(bm25.argmax()) == right}
                row["today"] = _today(index, question.text) == right
                row["begins"] = found.begins[0][0] == token if token >= 0 else None
            is_refused = not found.is_foreign and found.margin > objective.reader.refusing.item()
            row |= {"base": found.is_foreign, "refused": is_refused}
            rows.append(row)
    return rows


def _today(index: sqlite3.Connection, question: str) -> int:
    """The number, in the whole document, of the unit that routing weighs most today; -1 where none matches."""
    of_chunks = matches(index, question, None).sentences
    if of_chunks is None:
        return -1
    weights = [weight for chunk in sorted(of_chunks) for weight in of_chunks[chunk]]
    return weights.index(max(weights))
