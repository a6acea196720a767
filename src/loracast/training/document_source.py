"""Training episodes from real documents: people's questions whose answers stand in them, and rule-made ones."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from loracast.data.qa import QuestionedDocument
from loracast.data.questions.answers import find_answer
from loracast.data.questions.cloze import make_clozes
from loracast.data.spans import FactSpan
from loracast.errors import TrainingError
from loracast.scoring.episodes import Episode
from loracast.training.episode_maker import EpisodeMaker

Asked = list[tuple[str, str, FactSpan]]
"""Questions with their answers and where the document says them."""


def answered_questions(rng: random.Random, document: QuestionedDocument, n: int) -> Asked:
    """At most `n` of a document's questions whose answers it says, with the answers as it says them."""
    spans = document.spans
    rng.shuffle(spans)
    found = ((asked.question, find_answer(document.text, asked.question, asked.answers)) for asked in spans[:n])
    return [(question, stated.value, stated) for question, stated in found if stated is not None]


@dataclass(frozen=True)
class _Shelf:
    """Documents of one number of chunks, and how many questions each has to ask."""

    n_chunks: int
    documents: list[QuestionedDocument]
    weights: list[int]


class DocumentSource:
    """Documents by their number of chunks, so that those of one step need hardly any padding."""

    def __init__(
        self,
        documents: Sequence[QuestionedDocument],
        maker: EpisodeMaker,
        *,
        max_chunk_tokens: int,
        max_chunks: int,
        max_questions: int,
        reading_chunk_tokens: int,
    ):
        """Raises TrainingError where no document fits."""
        self.maker, self.max_chunk_tokens, self.max_questions = maker, max_chunk_tokens, max_questions
        self.reading_chunk_tokens = reading_chunk_tokens
        if not any(self._n_spans(document) for document in documents):
            raise TrainingError("the documents have no question whose answer stands in them (`span`)")
        by_chunks: dict[int, list[QuestionedDocument]] = defaultdict(list)
        tokenised = maker.tokenizer([d.text for d in documents], add_special_tokens=False, verbose=False)["input_ids"]
        for document, ids in zip(documents, tokenised, strict=True):
            n_chunks = ceil(len(ids) / max_chunk_tokens)
            if n_chunks <= max_chunks:
                by_chunks[n_chunks].append(document)
        if not by_chunks:
            raise TrainingError(
                f"no document has {max_chunks * max_chunk_tokens} tokens or fewer; raise data.max_chunks"
            )
        self._shelves = [_Shelf(n, some, [self._n_spans(d) for d in some]) for n, some in sorted(by_chunks.items())]

    def asked_by_people(self, rng: random.Random, n_questions: int, n_tokens: int) -> list[Episode]:
        """Documents with people's questions: about `n_questions` in all, of at most `n_tokens` tokens in all."""

        def said(rng: random.Random, document: QuestionedDocument) -> Asked:
            return answered_questions(rng, document, self.max_questions)

        shelf = rng.choices(self._shelves, [sum(shelf.weights) for shelf in self._shelves])[0]
        # By their questions: who reads a document for the sake of one learns little in a step.
        return self._step(rng, n_questions, n_tokens, shelf, shelf.weights, said, "questions")

    def asked_by_rule(self, rng: random.Random, n_questions: int, n_tokens: int) -> list[Episode]:
        """The same with rule-made questions."""

        def clozes(rng: random.Random, document: QuestionedDocument) -> Asked:
            made = make_clozes(rng, document.text, self.max_questions)
            return [(cloze.question, cloze.answer, cloze.stated) for cloze in made]

        shelf = rng.choices(self._shelves, [len(shelf.documents) for shelf in self._shelves])[0]
        return self._step(rng, n_questions, n_tokens, shelf, None, clozes, "cloze")

    def read(self, rng: random.Random, n_passages: int, n_tokens: int) -> list[Episode]:
        """Documents with passages to continue word for word: about `n_passages` in all, of at most `n_tokens` tokens in all."""
        shelf = rng.choices(self._shelves, [len(shelf.documents) for shelf in self._shelves])[0]
        n_documents = max(1, n_tokens // (shelf.n_chunks * self.max_chunk_tokens))
        episodes: list[Episode] = []
        for document in rng.choices(shelf.documents, k=20 * n_documents):  # some are too short
            if len(episodes) == n_documents:
                break
            texts = self.maker.chunk_texts(document.text, self.reading_chunk_tokens)
            episode = self.maker.passages(rng, texts, self.max_questions)
            if episode.questions:
                episodes.append(episode)
            if sum(len(episode.questions) for episode in episodes) >= n_passages:
                break
        if not episodes:
            raise TrainingError("the documents are too short to continue their passages; leave data.reading_share at 0")
        return episodes

    def _n_spans(self, document: QuestionedDocument) -> int:
        return min(self.max_questions, len(document.spans))

    def _step(
        self,
        rng: random.Random,
        n_questions: int,
        n_tokens: int,
        shelf: _Shelf,
        weights: Sequence[int] | None,
        ask: Callable[[random.Random, QuestionedDocument], Asked],
        task: str,
    ) -> list[Episode]:
        n_documents = max(1, n_tokens // (shelf.n_chunks * self.max_chunk_tokens))
        episodes: list[Episode] = []
        seen: set[str] = set()
        n_asked = 0
        asks_unrelated = self.maker.asks_unrelated(rng)
        for document in rng.choices(shelf.documents, weights, k=20 * n_documents):
            if n_asked >= n_questions or len(episodes) >= n_documents:
                break
            asked = [] if document.doc_id in seen else ask(rng, document)
            seen.add(document.doc_id)
            if asked:
                title = document.title if rng.random() < 0.5 else ""
                texts = self.maker.chunk_texts(document.text, self.max_chunk_tokens, title)
                pairs = [(question, answer) for question, answer, _ in asked]
                questions = self.maker.questions(rng, pairs, document.text, asks_unrelated=asks_unrelated)
                episodes.append(self.maker.episode(texts, questions, task, [stated for *_, stated in asked]))
                n_asked += len(asked)
        if not episodes:
            raise TrainingError("the documents have no question whose answer stands in them")
        return episodes
