"""Train the word vectors by which routing finds sentences in other words (library/word_vectors.py).

Questions about generated documents, fact sheets and real texts, each to be told which of the document's sentences holds
its answer: cross-entropy over the sentences, with BM25 beside the vectors, so that they learn what BM25 misses. The
vectors are linear maps of a sentence encoder's vector of each word alone, and a part of their own.
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
from loracast.data.everyday import load_genres, make_document
from loracast.data.facts import make_sheet
from loracast.data.qa import QuestionedDocument
from loracast.data.questions.answers import find_answer
from loracast.documents import Chunk
from loracast.documents.sentences import sentence_spans
from loracast.encoders.sentence import load_text_encoder
from loracast.files import write_with
from loracast.library.bm25 import sentence_scores
from loracast.library.index import read_sentences, write_index
from loracast.library.relevance import stem_words
from loracast.library.word_vectors import WORST, words_of_question, words_of_sentence

_N_EVERYDAY, _N_SHEETS, _N_TEXTS = 4000, 600, 9000
_MOST_QUESTIONS = 8  # about one document
_MOST_CHARACTERS = 6000  # of a real text
_LEAST_COUNT, _MOST_WORDS = 5, 12_000
_WIDTH = 64
_LR, _LR_MAPS = 2e-3, 1e-3
_EPOCHS, _DOCUMENTS_PER_STEP = 2.5, 16
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Asked:
    """A document with questions whose answers stand in known sentences."""

    source: str
    sentences: tuple[str, ...]
    questions: tuple[str, ...]
    holders: tuple[frozenset[int], ...]
    """Of each question, the sentences with its answer."""


@dataclass(frozen=True)
class Example:
    """An `Asked` as numbers."""

    source: str
    words: Tensor
    """Of all sentences, one after the other [t]."""
    sentences: Tensor
    """The sentence of each of them [t]."""
    asked: Tensor
    """The words of all questions [w]."""
    questions: Tensor
    """The question of each of them [w]."""
    bm25: Tensor
    """Of each question and sentence, 1 for the best [q, s]."""
    holds: Tensor
    """Whether the sentence holds the answer [q, s]."""


def draw_asked(documents: Sequence[QuestionedDocument], seed: int) -> Iterator[Asked]:
    """Everyday documents and sheets with the wordings of training, and real texts."""
    genres = list(load_genres("train"))
    for i in range(_N_EVERYDAY):
        drawn = make_document(random.Random(f"{seed}/words/{i}"), split="train", genre=genres[i % len(genres)])
        spans = [(fact.question, fact.statement, fact.value_at or 0) for fact in drawn.facts if fact.statement]
        yield _asked("everyday", drawn.text, [(q, drawn.text.index(text) + at) for q, text, at in spans])
    for i in range(_N_SHEETS):
        rng = random.Random(f"{seed}/words/sheet/{i}")
        sheet = make_sheet(rng, rng.choice((5, 10, 20)), split="train")
        places = [(fact, sheet.text.index(fact.statement)) for fact in sheet.facts]
        found = [(fact.question, at + fact.statement.index(fact.answer)) for fact, at in places]
        yield _asked("sheet", sheet.text, rng.sample(found, len(found)))
    rng = random.Random(seed)
    for document in rng.sample(documents, min(_N_TEXTS, len(documents))):
        text = document.text[:_MOST_CHARACTERS]
        asked = rng.sample(document.spans, min(_MOST_QUESTIONS, len(document.spans)))
        answered = [(span.question, find_answer(text, span.question, span.answers)) for span in asked]
        yield _asked(document.source, text, [(q, text.index(fact.statement)) for q, fact in answered if fact])


def _asked(source: str, text: str, places: Sequence[tuple[str, int]]) -> Asked:
    spans = sentence_spans(text)
    found = [(q, frozenset(i for i, (a, b) in enumerate(spans) if a <= at < b)) for q, at in places]
    found = [(question, holders) for question, holders in found if holders][:_MOST_QUESTIONS]
    questions, holders = zip(*found, strict=True) if found else ((), ())
    return Asked(source, tuple(text[start:end] for start, end in spans), questions, holders)


def vocabulary(drawn: Sequence[Asked]) -> dict[str, int]:
    """The commonest words of sentences and questions, from 1 on; 0 is for all others."""
    counts: Counter[str] = Counter()
    for one in drawn:
        for text in one.sentences:
            counts.update(set(words_of_sentence(text)))
        for question in one.questions:
            counts.update(set(words_of_question(question)))
    common = [word for word, n in counts.most_common(_MOST_WORDS) if n >= _LEAST_COUNT]
    return {word: i for i, word in enumerate(common, 1)}


def example(one: Asked, numbers: dict[str, int]) -> Example:
    """Look up the words of a document and its questions, and match them by BM25."""
    of_sentences = [[numbers.get(word, 0) for word in words_of_sentence(text)] or [0] for text in one.sentences]
    of_questions = [[numbers[word] for word in words_of_question(q) if word in numbers] for q in one.questions]
    bm25 = torch.zeros(len(one.questions), len(one.sentences))
    holds = torch.zeros_like(bm25, dtype=torch.bool)
    with closing(sqlite3.connect(":memory:")) as index:
        write_index(index, [Chunk(text, 0, len(text), "", 0) for text in one.sentences])  # a sentence may be cut again
        owners = torch.tensor([place.chunk for place in read_sentences(index)])
        for row, question in enumerate(one.questions):
            holds[row, list(one.holders[row])] = True
            if (scores := sentence_scores(index, question)) is not None:
                bm25[row].scatter_reduce_(0, owners, torch.tensor(scores) / max(scores), "amax")
    return Example(
        one.source,
        torch.tensor([n for some in of_sentences for n in some]),
        torch.tensor([i for i, some in enumerate(of_sentences) for _ in some]),
        torch.tensor([n for some in of_questions for n in some], dtype=torch.long),
        torch.tensor([i for i, some in enumerate(of_questions) for _ in some], dtype=torch.long),
        bm25,
        holds,
    )


class Matcher(nn.Module):
    """Two vectors for each word, how much it counts, and how much BM25 counts."""

    def __init__(self, features: Tensor):
        """
        Args:
            features: of each word [v, f], zero for the one that stands for all others.
        """
        super().__init__()
        n_words, n_features = features.shape
        self.features = features
        self.own = nn.ParameterDict({side: torch.randn(n_words, _WIDTH) * 0.02 for side in ("asked", "said")})
        shared = nn.init.orthogonal_(torch.empty(n_features, _WIDTH))
        self.maps = nn.ParameterDict({side: shared.clone() for side in ("asked", "said")})
        self.raw_weights = nn.Parameter(torch.full((n_words,), 0.5))
        self.bm25 = nn.Parameter(torch.tensor(3.0))

    def tables(self) -> dict[str, Tensor]:
        """By side, the vectors of all words [v, d]."""
        return {side: self.own[side] + self.features @ self.maps[side] for side in self.own}

    def weights(self) -> Tensor:
        """How much each word counts in a question [v], above 0."""
        return functional.softplus(self.raw_weights)

    def forward(self, one: Example, tables: dict[str, Tensor]) -> Tensor:
        """The logit of each sentence for each question [q, s]."""
        n_sentences = one.bm25.shape[1]
        alike = tables["asked"][one.asked] @ tables["said"][one.words].T  # [w, t]
        alike = alike.masked_fill(one.words == 0, WORST)
        best = torch.full((len(one.asked), n_sentences), WORST)
        best = best.scatter_reduce(1, one.sentences.expand(len(one.asked), -1), alike, "amax")
        weighed = best * self.weights()[one.asked, None]
        return self.bm25 * one.bm25 + torch.zeros_like(one.bm25).index_add(0, one.questions, weighed)

    def save(self, numbers: dict[str, int], path: Path) -> None:
        """Write the vectors as library/word_vectors.py reads them, in a byte a number."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for side, table in self.tables().items():
            scale = table.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
            tensors |= {side: (table / scale).round().to(torch.int8), f"{side}.scale": scale.float()}
        tensors |= {"weights": self.weights(), "bm25": self.bm25[None]}
        metadata = {"words": json.dumps(["", *numbers])}
        write_with(path, lambda to: save_file({n: t.detach().contiguous() for n, t in tensors.items()}, to, metadata))


def features_of(numbers: dict[str, int], drawn: Sequence[Asked]) -> Tensor:
    """What a sentence encoder makes of each word alone [v, f]; of a stem, of its commonest word."""
    counts = Counter(
        word.lower() for one in drawn for text in (*one.sentences, *one.questions) for word in _WORD.findall(text)
    )
    words = [word for word, _ in counts.most_common()]
    whole: dict[str, str] = {}
    for word, stem in zip(words, stem_words(words), strict=True):
        whole.setdefault(stem, word)
    encoder = load_text_encoder(DEFAULT_ENCODER)
    vectors = encoder([whole.get(word, word.strip("<>").replace("_", " ")) for word in numbers])
    return functional.pad(functional.normalize(vectors, dim=-1), (0, 0, 1, 0))


def train_word_vectors(
    documents: Sequence[QuestionedDocument], out: Path, seed: int = 0, say: Callable[[str], None] = lambda text: None
) -> dict[str, tuple[int, float, float]]:
    """Train the vectors and write them.

    Args:
        documents: real texts with questions.
        out: the file to write.

    Returns:
        by source, of documents kept apart: questions, and for how many of them a sentence with the answer is the best
        one by vectors and BM25, and by BM25 alone.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    drawn = [one for one in draw_asked(documents, seed) if one.questions and len(one.sentences) > 1]
    rng.shuffle(drawn)
    numbers = vocabulary(drawn)
    say(f"{len(drawn)} documents, {sum(len(one.questions) for one in drawn)} questions, {len(numbers)} words")
    matcher = Matcher(features_of(numbers, drawn))
    examples = [example(one, numbers) for one in drawn]
    n_apart = len(examples) // 25
    apart, rest = examples[:n_apart], examples[n_apart:]
    maps = [*matcher.maps.parameters(), matcher.bm25]
    others = [*matcher.own.parameters(), matcher.raw_weights]
    optimizer = torch.optim.Adam([{"params": others, "lr": _LR}, {"params": maps, "lr": _LR_MAPS}])
    n_steps = round(_EPOCHS * len(rest) / _DOCUMENTS_PER_STEP)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.02, 1 - step / n_steps))
    for step in range(n_steps):
        tables, losses = matcher.tables(), []
        for one in rng.sample(rest, _DOCUMENTS_PER_STEP):
            logits = matcher(one, tables).log_softmax(1)
            losses.append(-logits.masked_fill(~one.holds, -math.inf).logsumexp(1))
        loss = torch.cat(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            say(f"step {step} of {n_steps}: loss {loss.item():.3f}")
    matcher.save(numbers, out)
    return measure(matcher, apart)


@torch.no_grad()
def measure(matcher: Matcher, examples: Sequence[Example]) -> dict[str, tuple[int, float, float]]:
    """By source: questions, and the share whose best sentence holds the answer, by all and by BM25 alone."""
    hits: dict[str, list[tuple[bool, bool]]] = {}
    tables = matcher.tables()
    for one in examples:
        rows = torch.arange(len(one.holds))
        both = one.holds[rows, matcher(one, tables).argmax(1)], one.holds[rows, one.bm25.argmax(1)]
        hits.setdefault(one.source, []).extend(zip(*(some.tolist() for some in both), strict=True))
    return {
        source: (len(some), sum(a for a, _ in some) / len(some), sum(b for _, b in some) / len(some))
        for source, some in sorted(hits.items())
    }
