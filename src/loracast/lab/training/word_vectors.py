"""Train the word vectors by which routing finds where an answer stands (reading/word_vectors.py).

Questions about generated documents, fact sheets and real texts, each to be told at which word of the document its
answer begins: cross-entropy over all words, with BM25 of their sentences beside the vectors, so that these learn what
BM25 misses. The vectors are linear maps of a sentence encoder's vector of each word alone, and a part of their own.
"""

from __future__ import annotations

import json
import math
import random
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.base.embedded import DEFAULT_ENCODER
from loracast.documents import Chunk
from loracast.documents.units import sentence_spans
from loracast.files import write_with
from loracast.hypernets.encoders import load_text_encoder
from loracast.lab.data.everyday import load_genres, make_document
from loracast.lab.data.facts import make_sheet
from loracast.lab.data.questions import find_answer
from loracast.lab.data.rows import QuestionedDocument
from loracast.library.index import read_sentences, write_index
from loracast.reading.search import sentence_scores
from loracast.reading.word_vectors import APART, GAP, MOST_NAMES, WORST, words_of_question, words_of_sentence
from loracast.text import stem_words

_N_EVERYDAY, _N_SHEETS, _N_TEXTS = 4000, 600, 9000
_MAX_QUESTIONS = 8  # about one document
_MAX_CHARACTERS = 6000  # of a real text
_MIN_COUNT, _MAX_WORDS = 5, 12_000
_WIDTH, _KINDS = 64, 32
_LR, _LR_MAPS = 2e-3, 1e-3
_EPOCHS, _DOCUMENTS_PER_STEP = 2.5, 16
_MAX_GRADIENT_NORM = 5.0
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Asked:
    """A document with questions whose answers stand in it."""

    source: str
    text: str
    questions: tuple[tuple[str, int, int], ...]
    """Each with the characters (start, end) of its answer; (0, 0) where the document does not answer it."""


@dataclass(frozen=True)
class Example:
    """An `Asked` as numbers; words are numbered through all sentences, and positions as in reading/word_vectors.py."""

    source: str
    names: Tensor
    """What each word of the text is called [t, 2]."""
    positions: Tensor
    """Of each word [t]."""
    sentences: Tensor
    """The sentence of each word [t]."""
    asked: Tensor
    """The words of all questions [w]."""
    questions: Tensor
    """The question of each of them [w]."""
    bm25: Tensor
    """Of each question and sentence, 1 for the best [q, s]."""
    right: Tensor
    """Whether the answer begins at the word; in the last column whether there is none [q, t + 1]."""


def draw_asked(documents: Sequence[QuestionedDocument], seed: int) -> Iterator[Asked]:
    """Everyday documents and sheets with the wordings of training, and real texts."""
    rng, genres = random.Random(seed), list(load_genres("train"))
    for i in range(_N_EVERYDAY):
        drawn = make_document(random.Random(f"{seed}/words/{i}"), split="train", genre=genres[i % len(genres)])
        found = list[tuple[str, int, int]]()
        for fact in drawn.facts:
            if fact.kind == "not said":
                found.append((fact.question, 0, 0))
            elif fact.statement:
                start = drawn.text.index(fact.statement) + (fact.value_at or 0)
                found.append((fact.question, start, start + 1))
        yield Asked("everyday", drawn.text, tuple(rng.sample(found, min(_MAX_QUESTIONS, len(found)))))
    for i in range(_N_SHEETS):
        rng = random.Random(f"{seed}/words/sheet/{i}")
        sheet = make_sheet(rng, rng.choice((5, 10, 20)), split="train")
        starts = [sheet.text.index(fact.statement) + fact.statement.index(fact.answer) for fact in sheet.facts]
        found = [(fact.question, start, start + 1) for fact, start in zip(sheet.facts, starts, strict=True)]
        yield Asked("sheet", sheet.text, tuple(rng.sample(found, min(_MAX_QUESTIONS, len(found)))))
    rng, strange = random.Random(seed), list[str]()
    for document in rng.sample(documents, min(_N_TEXTS, len(documents))):
        text = document.text[:_MAX_CHARACTERS]
        asked = rng.sample(document.spans, min(_MAX_QUESTIONS, len(document.spans)))
        found = []
        for span in asked:
            if answer := find_answer(text, span.question, span.answers):
                start = text.find(answer.value, text.index(answer.statement) + (answer.value_at or 0))
                found += [(span.question, start, start + 1)] * (start >= 0)
        found += [(question, 0, 0) for question in strange]
        strange = [found[0][0]] if found else []  # of the document before
        yield Asked(document.source, text, tuple(found))


def vocabulary(drawn: Sequence[Asked]) -> dict[str, int]:
    """The commonest words of sentences and questions, from 1 on; 0 is for all others."""
    counts: Counter[str] = Counter()
    for one in drawn:
        for start, end in sentence_spans(one.text):
            counts.update({name for word in words_of_sentence(one.text[start:end]) for name in word.names})
        for question, _, _ in one.questions:
            counts.update(set(words_of_question(question)))
    common = [word for word, n in counts.most_common(_MAX_WORDS) if n >= _MIN_COUNT]
    return {word: i for i, word in enumerate(common, 1)}


def example(one: Asked, numbers: dict[str, int]) -> Example:
    """Look up the words of a document and its questions, and match them by BM25."""
    spans = sentence_spans(one.text)
    names, positions, sentences, places, first = [], [], [], list[tuple[int, int]](), 0
    for i, (start, end) in enumerate(spans):
        words = words_of_sentence(one.text[start:end])
        for word in words:
            known = [numbers.get(name, 0) for name in word.names]
            names.append(known + [0] * (MOST_NAMES - len(known)))
            positions.append(first + word.position)
            sentences.append(i)
            places.append((start + word.start, start + word.end))
        first = positions[-1] + GAP if words else first
    right = torch.tensor(
        [[a < end and b > start for a, b in places] + [start == end] for _, start, end in one.questions]
    )
    bm25 = torch.zeros(len(one.questions), len(spans))
    with closing(sqlite3.connect(":memory:")) as index:
        write_index(index, [Chunk(one.text[a:b], 0, b - a, "", 0) for a, b in spans])  # a sentence may be cut again
        owners = torch.tensor([place.chunk for place in read_sentences(index)])
        for row, (question, _, _) in enumerate(one.questions):
            if (scores := sentence_scores(index, question)) is not None:
                bm25[row].scatter_reduce_(0, owners, torch.tensor(scores) / max(scores), "amax")
    of_questions = [(i, word) for i, (q, _, _) in enumerate(one.questions) for word in words_of_question(q)]
    known_words = [(numbers[word], i) for i, word in of_questions if word in numbers]
    asked, questions = torch.tensor(known_words, dtype=torch.long).view(-1, 2).unbind(1)
    said, at, of_sentences = (torch.tensor(values) for values in (names, positions, sentences))
    return Example(one.source, said, at, of_sentences, asked, questions, bm25, right)


class Matcher(nn.Module):
    """The vectors of each word, how much it counts, how a match fades, and how much BM25 counts."""

    def __init__(self, features: Tensor):
        """
        Args:
            features: of each word [v, f], zero for the one that stands for all others.
        """
        super().__init__()
        n_words, n_features = features.shape
        self.features = features
        widths = {"asked": _WIDTH, "said": _WIDTH, "wanted": 2 * _KINDS}
        widths |= dict.fromkeys(("own", "before", "behind"), _KINDS)
        large = dict.fromkeys(("wanted", "own"), 0.1)  # a product of two small factors would learn late
        self.own = nn.ParameterDict(
            {name: torch.randn(n_words, n) * large.get(name, 0.02) for name, n in widths.items()}
        )
        shared = nn.init.orthogonal_(torch.empty(n_features, _WIDTH))
        small = {name: torch.randn(n_features, widths[name]) * 0.02 for name in ("wanted", "own")}
        self.maps = nn.ParameterDict({"asked": shared.clone(), "said": shared.clone(), **small})
        self.raw_weights = nn.Parameter(torch.full((n_words,), 0.5))
        self.least = nn.Parameter(torch.full((n_words,), -1.0))
        self.fade = nn.Parameter(torch.tensor(0.1))
        self.bm25 = nn.Parameter(torch.tensor(3.0))

    def tables(self) -> dict[str, Tensor]:
        """By name, the vectors of all words; the first is zero where it stands in a text, of no kind."""
        is_known = self.features.new_ones(len(self.features), 1)
        is_known[0] = 0
        tables = {
            name: own + self.features @ self.maps[name] if name in self.maps else own for name, own in self.own.items()
        }
        return {name: table * is_known for name, table in tables.items()}

    def weights(self) -> Tensor:
        """How much each word counts in a question [v], above 0."""
        return functional.softplus(self.raw_weights)

    def forward(self, one: Example, tables: dict[str, Tensor]) -> Tensor:
        """The logit of each word of the text, as the place where the answer begins, and of no answer [q, t + 1]."""
        known, names = one.names.unique(return_inverse=True)
        alike = (tables["asked"][one.asked] @ tables["said"][known].T).masked_fill(known == 0, WORST)  # [w, u]
        best = alike[:, names].amax(2).clamp_min(WORST)  # [w, t]
        lost = self.fade * one.positions + APART * one.sentences
        before = (best + lost).cummax(1).values - lost
        behind = (best - lost).flip(1).cummax(1).values.flip(1) + lost
        matched = before.maximum(behind) * self.weights()[one.asked, None]
        wanted = torch.zeros(len(one.bm25), 2 * _KINDS).index_add(0, one.questions, tables["wanted"][one.asked])
        beside = torch.zeros(int(one.positions[-1]) + 5, _KINDS)
        for distance, share in ((1, 1.0), (2, 0.5)):
            for side, at in (("behind", one.positions + 2 - distance), ("before", one.positions + 2 + distance)):
                beside = beside.index_add(0, at, share * tables[side][one.names].sum(1))
        kinds = torch.cat([tables["own"][one.names].sum(1), beside[one.positions + 2]], 1)  # [t, 2 k]
        logits = torch.zeros(len(one.bm25), len(one.names)).index_add(0, one.questions, matched)
        logits = logits + wanted @ kinds.T + self.bm25 * one.bm25[:, one.sentences]
        missed = (self.weights() * self.least)[one.asked]
        return torch.cat([logits, torch.zeros(len(one.bm25)).index_add(0, one.questions, missed)[:, None]], 1)

    def save(self, numbers: dict[str, int], path: Path) -> None:
        """Write the vectors as reading/word_vectors.py reads them, in a byte a number."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for name, table in self.tables().items():
            scale = table.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
            tensors |= {name: (table / scale).round().to(torch.int8), f"{name}.scale": scale.float()}
        scalars = torch.stack([self.fade, self.bm25])
        tensors |= {"weights": self.weights(), "least": self.least, "scalars": scalars}
        metadata = {"words": json.dumps(["", *numbers])}
        write_with(path, lambda to: save_file({n: t.detach().contiguous() for n, t in tensors.items()}, to, metadata))


def features_of(numbers: dict[str, int], drawn: Sequence[Asked]) -> Tensor:
    """What a sentence encoder makes of each word alone [v, f]; of a stem, of its commonest word."""
    texts = (text for one in drawn for text in (one.text, *(question for question, _, _ in one.questions)))
    counts = Counter(word.lower() for text in texts for word in _WORD.findall(text))
    words = [word for word, _ in counts.most_common()]
    whole: dict[str, str] = {}
    for word, stem in zip(words, stem_words(words), strict=True):
        whole.setdefault(stem, word)
    encoder = load_text_encoder(DEFAULT_ENCODER)
    vectors = encoder([whole.get(word, word.strip("<>").replace("_", " ")) for word in numbers])
    return functional.pad(functional.normalize(vectors, dim=-1), (0, 0, 1, 0))


def train_word_vectors(
    documents: Sequence[QuestionedDocument], out: Path, seed: int = 0, say: Callable[[str], None] = lambda text: None
) -> dict[str, Found]:
    """Train the vectors and write them.

    Args:
        documents: real texts with questions.
        out: the file to write.

    Returns:
        by source, what they find in documents that were kept apart.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    drawn = [one for one in draw_asked(documents, seed) if one.questions]
    rng.shuffle(drawn)
    numbers = vocabulary(drawn)
    read = (example(one, numbers) for one in drawn)
    examples = [one for one in read if one.bm25.shape[1] > 1 and one.right.any(1).all()]
    n_questions = sum(len(one.right) for one in examples)
    say(f"{len(examples)} documents, {n_questions} questions, {len(numbers)} words")
    matcher = Matcher(features_of(numbers, drawn))
    apart, rest = examples[: len(examples) // 25], examples[len(examples) // 25 :]
    scalars = [matcher.fade, matcher.bm25]
    of_words = {"params": [*matcher.own.parameters(), matcher.raw_weights, matcher.least], "lr": _LR}
    optimizer = torch.optim.Adam([of_words, {"params": [*matcher.maps.parameters(), *scalars], "lr": _LR_MAPS}])
    n_steps = round(_EPOCHS * len(rest) / _DOCUMENTS_PER_STEP)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.02, 1 - step / n_steps))
    for step in range(n_steps):
        tables, losses = matcher.tables(), []
        for one in rng.sample(rest, _DOCUMENTS_PER_STEP):
            logits = matcher(one, tables).log_softmax(1)
            losses.append(-logits.masked_fill(~one.right, -math.inf).logsumexp(1))
        loss = torch.cat(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(matcher.parameters(), _MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            say(f"step {step} of {n_steps}: loss {loss.item():.3f}")
    matcher.save(numbers, out)
    return measure(matcher, apart)


@dataclass(frozen=True)
class Found:
    """For how many questions of a source the best sentence holds the answer, and the best word begins it."""

    n: int
    sentence: float
    """Share of the questions whose best sentence by its words together holds the answer."""
    bm25: float
    """The same by BM25 alone."""
    place: float
    """Share of those whose best word begins the answer."""


@torch.no_grad()
def measure(matcher: Matcher, examples: Sequence[Example]) -> dict[str, Found]:
    """By source, what the vectors find, of the questions that a document answers."""
    hits: dict[str, list[tuple[bool, ...]]] = {}
    tables = matcher.tables()
    for one in examples:
        answered = ~one.right[:, -1]
        logits, right, bm25 = matcher(one, tables)[answered, :-1], one.right[answered, :-1], one.bm25[answered]
        inside = one.sentences == torch.arange(bm25.shape[1])[:, None]  # [s, t]
        of_sentences = logits[:, None].masked_fill(~inside, -math.inf).logsumexp(2)  # [q, s]
        holds = (right[:, None] & inside).any(2)  # [q, s]
        best = (holds, of_sentences), (holds, bm25), (right, logits)
        is_right = [rows.gather(1, by.argmax(1, keepdim=True))[:, 0].tolist() for rows, by in best]
        hits.setdefault(one.source, []).extend(zip(*is_right, strict=True))
    return {
        source: Found(len(some), *(sum(column) / len(some) for column in zip(*some, strict=True)))
        for source, some in sorted(hits.items())
        if some
    }
