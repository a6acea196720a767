"""`loracast train reader`: train the reader (hypernets/reader.py) on states of the base that are read once.

A step draws documents: each is joined with chunks of others, and asked some of its own questions, some of other
documents, and now and then small talk. The loss is the cross-entropy of the first step over the units, that of the
second over the tokens of the best units, "nowhere in the document" and "meant for no document", and that of the words'
evidence alone.
"""

from __future__ import annotations

import random
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from loracast.base.load import Base
from loracast.hypernets.doc_to_lora import DocToLoRA
from loracast.hypernets.reader import READER_FILE, Found, Reader, ReaderConfig
from loracast.lab.data import asked
from loracast.lab.data.asked import AskedDocument
from loracast.lab.data.rows import QuestionedDocument
from loracast.lab.training.loop import OnMetrics, TrainConfig, train
from loracast.lab.training.states import FOREIGN, NOWHERE, ReadChunk, ReadDocument, ReadFile, ReadQuestion
from loracast.library.index import write_index
from loracast.lora.target import text_config
from loracast.reading.questions import match_tokens

_DEPTH = 0.47  # of the base, after which states are read: deeper ones tell little more, and cost more of a question
_ROWS_AT_ONCE = 16  # questions of the second step, of similar length
_MEASURED = 400  # documents from which the states' means and deviations are taken


@dataclass(frozen=True)
class ReaderData:
    """What is read and asked."""

    sources: tuple[str, ...] = ()
    """Sources of documents with people's questions; all if empty."""
    most: Mapping[str, int] = field(default_factory=dict)
    """Most documents of a source."""
    made: Mapping[str, int] = field(default_factory=dict)
    """Generated documents of each kind (lab/data/asked.py)."""
    near_misses: int = 240
    small_talk: int = 2000
    """Made from patterns, beside what is written."""
    held_out: float = 0.03
    """Share of the documents that are kept to choose from which margin on a question is refused."""
    seed: int = 0

    def draw(self, people: Sequence[QuestionedDocument]) -> list[AskedDocument]:
        """Documents with questions of all kinds."""
        rng, of_source = random.Random(self.seed), defaultdict[str, list[QuestionedDocument]](list)
        for one in people:
            of_source[one.source].append(one)
        chosen = [
            one
            for source, some in of_source.items()
            for one in rng.sample(some, min(len(some), self.most.get(source, len(some))))
        ]
        drawn = [*asked.draw_people(chosen, self.seed), *self._made("everyday", "sheet")]
        return [
            *asked.with_near_misses(drawn, self.seed),
            *self._made("correction", "table", "chat"),
            *asked.draw_near_misses(self.near_misses, self.seed, "train"),
        ]

    def _made(self, *kinds: str) -> Iterator[AskedDocument]:
        for kind in kinds:
            yield from asked.draw_made(kind, self.made.get(kind, 0), self.seed, "train")


@dataclass(frozen=True)
class AskingConfig:
    """What a step of training asks."""

    documents: int = 16
    """Documents in a step."""
    questions: int = 4
    """Most questions of its own that a document is asked."""
    extra: int = 6
    """Most chunks of others that a document is joined with."""
    p_group: float = 0.5
    """That these, and the question of another document, are of the same group, such as an article, if it has more."""
    unanswered: int = 2
    """Questions of other documents that a document is asked."""
    p_apart: float = 0.2
    """That such a question is of a document of another source."""
    p_foreign: float = 0.25
    """That a document meets small talk."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """How often a document of a source is drawn; 1 where none is given."""
    refused: float = 0.12
    """Share of the answered questions that are kept back which the reader refuses in the end."""


@dataclass(frozen=True)
class ReaderRecipe:
    """The tables of a recipe."""

    data: ReaderData = field(default_factory=ReaderData)
    asking: AskingConfig = field(default_factory=AskingConfig)
    training: TrainConfig = field(default_factory=TrainConfig)


class Episode:
    """A document, joined with chunks of others, and the questions that it is asked."""

    def __init__(self, chunks: Sequence[ReadChunk], questions: Sequence[ReadQuestion], first: int = 0):
        """
        Args:
            first: the place in `chunks` of the first chunk of the questions' own document.
        """
        self.chunks, self.questions = chunks, questions
        of_units = [0, *accumulate(chunk.n_units for chunk in chunks)]
        of_tokens = [0, *accumulate(len(chunk.ids) for chunk in chunks)]
        self.n_units = of_units[-1]
        self.units = torch.tensor([of_units[i] + unit for i, chunk in enumerate(chunks) for unit in chunk.units])
        """The unit of each token."""
        self.rights = [q.unit if q.unit < 0 else of_units[first + q.chunk] + q.unit for q in questions]
        """Of each question the right unit, `NOWHERE` or `FOREIGN`."""
        self.tokens = [-1 if q.token < 0 else of_tokens[first + q.chunk] + q.token for q in questions]
        """Of each question the token with which its answer begins, or -1."""

    @cached_property
    def words(self) -> list[tuple[Tensor, Tensor]]:
        """What the words of each question have in common with the document, as of `match_tokens`."""
        chunk_of = torch.tensor([i for i, chunk in enumerate(self.chunks) for _ in range(chunk.n_units)])
        with closing(sqlite3.connect(":memory:")) as index:
            write_index(index, [read.chunk for read in self.chunks])
            return [match_tokens(index, one.text, one.spans, chunk_of) for one in self.questions]


class Asking:
    """Draws episodes: which documents, joined with which chunks, are asked what."""

    def __init__(self, documents: Sequence[ReadDocument], foreign: Sequence[ReadQuestion], config: AskingConfig):
        self.documents = [one for one in documents if one.questions]
        self.foreign, self.config = foreign, config
        self._weights = [config.shares.get(one.source, 1.0) for one in self.documents]
        self._near, self._all = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
        for i, one in enumerate(self.documents):
            self._near[f"{one.source}/{one.group}"].append(i)
            self._all[one.source].append(i)

    def draw(self, rng: random.Random) -> Episode:
        """A document, its questions and others."""
        c = self.config
        (i,) = rng.choices(range(len(self.documents)), self._weights)
        one, other = self.documents[i], self._other(rng, i)
        before, after = list[ReadChunk](), list[ReadChunk]()
        for _ in range(rng.choice((0, c.extra // 2, rng.randint(0, c.extra)))):
            more = self._other(rng, i)
            if more is not None and more is not other:
                rng.choice((before, after)).append(rng.choice(more.chunks))
        chunks = [*before, *one.chunks, *after]
        asked = rng.sample(one.questions, min(c.questions, len(one.questions)))
        for theirs in (other, *(self._other(rng, i) for _ in range(c.unanswered - 1))):
            theirs = rng.choice(self.documents) if theirs is None or rng.random() < c.p_apart else theirs
            if theirs is not one and (question := without_answer(rng.choice(theirs.questions), chunks)):
                asked.append(question)
        if self.foreign and rng.random() < c.p_foreign:
            asked.append(rng.choice(self.foreign))
        return Episode(chunks, asked, len(before))

    def near(self, i: int) -> list[int]:
        """The other documents of a document's group."""
        one = self.documents[i]
        return [j for j in self._near[f"{one.source}/{one.group}"] if j != i]

    def others(self, i: int) -> list[int]:
        """The other documents of a document's source."""
        return [j for j in self._all[self.documents[i].source] if j != i]

    def _other(self, rng: random.Random, i: int) -> ReadDocument | None:
        """Another document, of the same group or source."""
        near = self.near(i) if rng.random() < self.config.p_group else []
        pool = near or self.others(i)
        return self.documents[rng.choice(pool)] if pool else None


def without_answer(question: ReadQuestion, chunks: Sequence[ReadChunk]) -> ReadQuestion | None:
    """A question of another document as one whose answer stands nowhere; None where these chunks may answer it."""
    if question.unit < 0:
        return question
    is_known = bool(question.answer) and not any(
        question.answer.lower() in read.chunk.prompt.lower() for read in chunks
    )
    return ReadQuestion(question.ids, question.row, question.text, question.spans) if is_known else None


class _Row(NamedTuple):
    """A question with the best units of its document, as the second step reads them."""

    asked: Tensor
    """Its standardised tokens [m, d]."""
    matched: Tensor
    """How well these are matched, as of `Reader.matched`."""
    text: Tensor
    """The vectors of the units' tokens [t, width]."""
    units: Tensor
    """The unit of each [t]."""
    scores: Tensor
    """Late interaction and BM25 of each unit [k, 2]."""
    right: int
    """The place of the right unit, `NOWHERE` or `FOREIGN`."""
    begin: int = -1
    """The token with which the answer begins, or -1."""


class ReaderObjective:
    """The loss of a step: its number -> loss and figures."""

    def __init__(self, reader: Reader, file: ReadFile, asking: Asking, config: TrainConfig):
        self.reader, self.file, self.asking, self.config = reader, file, asking, config

    def __call__(self, number: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"{self.config.seed}/{number}")
        episodes = [self.asking.draw(rng) for _ in range(self.asking.config.documents)]
        with self.config.autocast(self.reader.mean.device):
            return self.loss(episodes)

    def loss(self, episodes: Sequence[Episode]) -> tuple[Tensor, dict[str, float]]:
        """The loss of both steps over all questions, and how often the second is right."""
        reader, c, standard = self.reader, self.reader.config, self.reader.standard
        n_tokens = [len(one.units) for one in episodes]
        texts = reader.vectors(standard(self.file.tokens(read for one in episodes for read in one.chunks)))
        lengths = [len(question.ids) for one in episodes for question in one.questions]
        asked = standard(self.file.tokens(q for one in episodes for q in one.questions)).split(lengths)
        of_episode = iter(asked)
        first, rows = list[Tensor](), list[_Row]()
        for one, text in zip(episodes, texts.split(n_tokens), strict=True):
            its = [next(of_episode) for _ in one.questions]
            padded, mask = _padded(its)
            late, cosines = reader.late(reader.question(padded, mask), text, one.units, one.n_units)
            bm25 = torch.stack([of_one for of_one, _ in one.words])
            logits = reader.first(late, bm25)
            for i, (right, token) in enumerate(zip(one.rights, one.tokens, strict=True)):
                best = logits[i].topk(min(c.n_best, one.n_units)).indices
                if right >= 0:
                    first.append(functional.cross_entropy(logits[i], torch.tensor(right)))
                    if right not in best:
                        best[-1] = right
                best = best.sort().values
                read, of_rows = reader.rows_of(best, one.units)
                place = int((best == right).nonzero()[0, 0]) if right >= 0 else right
                begin = (read == token).nonzero()[:1, 0].tolist() if token >= 0 else []
                scores = torch.stack([late[i], bm25[i]], -1)[best]
                matched = reader.matched(
                    torch.tensor(one.questions[i].ids), cosines[i, : len(its[i])], one.words[i][1], best
                )
                rows.append(_Row(its[i][-c.most_tokens :], matched, text[read], of_rows, scores, place, *begin))
        rows.sort(key=lambda row: len(row.text))  # so that little is read that is only padding
        judged = [self._second(rows[i : i + _ROWS_AT_ONCE]) for i in range(0, len(rows), _ROWS_AT_ONCE)]
        second, is_right = (torch.cat(some) for some in zip(*judged, strict=True))
        rights = torch.tensor([row.right for row in rows])
        groups = {"unit": rights >= 0, "nowhere": rights == NOWHERE, "foreign": rights == FOREIGN}
        figures = {name: is_right[group].float().mean().item() for name, group in groups.items() if group.any()}
        return (torch.stack(first).mean() if first else 0.0) + second.mean(), figures

    def _second(self, rows: Sequence[_Row]) -> tuple[Tensor, Tensor]:
        """The second step's loss of some questions, and whether it is right [questions] each."""
        padded, mask = _padded([row.asked for row in rows])
        matched = pad_sequence([row.matched for row in rows], batch_first=True)
        k = max(len(row.scores) for row in rows)
        text = pad_sequence([row.text for row in rows], batch_first=True)
        units = pad_sequence([row.units for row in rows], batch_first=True, padding_value=k)
        scores = pad_sequence([row.scores for row in rows], batch_first=True)
        places = self.reader.places(padded, mask, matched, text, units, scores)
        # A question of one unit fewer than k must not choose the missing one: its tokens' logits are very low.
        wanted = torch.tensor([row.right if row.right >= 0 else k - 1 - row.right for row in rows])
        tokens, of_all = torch.tensor([row.begin for row in rows]), places.all()
        of_units = functional.cross_entropy(of_all, wanted, reduction="none")
        of_tokens = functional.cross_entropy(
            torch.cat([places.begins, of_all[:, k:]], 1), tokens.clamp_min(0), reduction="none"
        )
        is_absent = torch.tensor([float(row.right < 0) for row in rows])
        of_words = functional.binary_cross_entropy_with_logits(places.absent, is_absent, reduction="none")
        return torch.where(tokens >= 0, of_tokens, of_units) + of_words, of_all.argmax(1) == wanted

    @torch.no_grad()
    def find(self, episode: Episode) -> list[Found]:
        """What the reader finds for each question, as in use."""
        reader, lengths = self.reader, [len(question.ids) for question in episode.questions]
        text = reader.unpacked(reader.kept(reader.vectors(reader.standard(self.file.tokens(episode.chunks)))))
        asked = reader.standard(self.file.tokens(episode.questions)).split(lengths)
        return [
            reader.find(row, torch.tensor(question.ids), text, episode.units, *of_one)
            for row, question, of_one in zip(asked, episode.questions, episode.words, strict=True)
        ]


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows [n, m, d], and a mask that is true where they are real [n, m]."""
    padded = pad_sequence(list(rows), batch_first=True)
    return padded, torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]


def train_reader(
    base: Base,
    recipe: ReaderRecipe,
    hypernetwork: DocToLoRA,
    people: Sequence[QuestionedDocument],
    out: Path,
    *,
    init_from: Path | None = None,
    command: str = "",
    on_metrics: OnMetrics = lambda metrics: None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Reader:
    """Train a reader, or resume the run in `out`, and write `reader.safetensors` there.

    Args:
        hypernetwork: its encoder LoRA reads documents.
        people: documents with people's questions.
        init_from: folder of a reader that a fresh run starts from.
        progress: receives the tokens that are read before training, and all tokens.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.training.seed)
    of_base = text_config(base.model.config)
    layer = round(_DEPTH * of_base.num_hidden_layers)
    embeddings = base.model.get_input_embeddings().weight
    reader = Reader(ReaderConfig(embeddings.shape[1], len(embeddings), layer, tuple(hypernetwork.config.prefix)))
    if init_from is not None:
        reader.load_state_dict(Reader.read(init_from / READER_FILE).state_dict())
    drawn = recipe.data.draw(people)
    talk = asked.small_talk("train", recipe.data.small_talk, recipe.data.seed)
    file = ReadFile(out / "states.f16", base, hypernetwork, reader.config, drawn, talk, progress)
    rng = random.Random(recipe.data.seed)
    n_held = round(recipe.data.held_out * len(file.documents))
    held_out = set(rng.sample(range(len(file.documents)), n_held))
    kept = [one for i, one in enumerate(file.documents) if i not in held_out]
    some = rng.sample(kept, min(_MEASURED, len(kept)))
    if init_from is None:
        chunks = [read for one in some for read in one.chunks]
        reader.measure(file.tokens(chunks), torch.tensor([i for read in chunks for i in read.ids]))
    objective = ReaderObjective(reader, file, Asking(kept, file.foreign, recipe.asking), recipe.training)
    provenance = {"command": command, **asdict(recipe)}

    def save(folder: Path) -> None:
        reader.save(folder / READER_FILE, provenance)

    settings = {"data": asdict(recipe.data), "asking": asdict(recipe.asking), "reader": asdict(reader.config)}
    train(reader, objective, recipe.training, out, save_model=save, settings=settings, on_metrics=on_metrics)
    calibrate(objective, [file.documents[i] for i in sorted(held_out)], recipe.asking.refused)
    save(out)
    return reader


def calibrate(objective: ReaderObjective, documents: Sequence[ReadDocument], refused: float) -> None:
    """Choose from which margin on a question is refused, so that this share of answered questions is."""
    objective.reader.eval()
    margins = [
        found.margin
        for one in documents
        for question, found in zip(one.questions, objective.find(Episode(one.chunks, one.questions)), strict=True)
        if question.unit != NOWHERE and question.unit != FOREIGN
    ]
    if margins:
        objective.reader.refusing.fill_(torch.tensor(margins).quantile(1 - refused))
