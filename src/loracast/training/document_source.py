"""Training episodes from real documents: people's questions, rule-made questions, and passages to continue."""

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
from loracast.training.episode_maker import Answered, EpisodeMaker

_MOST_UNASKED = 32  # answers of one document that are labelled without being asked for: each is looked up


def answered_questions(rng: random.Random, document: QuestionedDocument, n: int) -> Answered:
    """At most `n` of a document's questions whose answers stand in it, with the answers in the document's words."""
    rng.shuffle(spans := document.spans)
    found = ((span.question, find_answer(document.text, span.question, span.answers)) for span in spans[:n])
    return [(question, fact.value, fact) for question, fact in found if fact is not None]


def unasked_values(document: QuestionedDocument, answered: Answered) -> list[FactSpan]:
    """The answers to a document's other questions, where they stand in it."""
    asked = {question for question, *_ in answered}
    others = [span for span in document.spans if span.question not in asked][:_MOST_UNASKED]
    found = (find_answer(document.text, span.question, span.answers) for span in others)
    return [fact for fact in found if fact is not None]


@dataclass(frozen=True)
class _Group:
    """Documents with the same number of chunks, weighted by their numbers of questions."""

    n_chunks: int
    documents: list[QuestionedDocument]
    weights: list[int]


class DocumentSource:
    """Draws documents with questions; those of one step have equally many chunks, so they need little padding."""

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
        """Raises TrainingError if no document fits."""
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
        self._groups = [_Group(n, some, [self._n_spans(d) for d in some]) for n, some in sorted(by_chunks.items())]

    def asked_by_people(self, rng: random.Random, n_questions: int, n_tokens: int) -> list[Episode]:
        """Documents of at most `n_tokens` tokens in all with people's questions, about `n_questions` in all."""
        # Weighted by questions: a document that is read for a single question teaches little in a step.
        group = rng.choices(self._groups, [sum(group.weights) for group in self._groups])[0]
        return self._step(rng, n_questions, n_tokens, group, group.weights, answered_questions, "questions")

    def asked_by_rule(self, rng: random.Random, n_questions: int, n_tokens: int) -> list[Episode]:
        """The same with rule-made questions."""

        def clozes(rng: random.Random, document: QuestionedDocument, n: int) -> Answered:
            return [(cloze.question, cloze.answer, cloze.fact) for cloze in make_clozes(rng, document.text, n)]

        group = rng.choices(self._groups, [len(group.documents) for group in self._groups])[0]
        return self._step(rng, n_questions, n_tokens, group, None, clozes, "cloze")

    def read(self, rng: random.Random, n_passages: int, n_tokens: int) -> list[Episode]:
        """Documents with passages to continue word for word: about `n_passages` in all, `n_tokens` as above."""
        group = rng.choices(self._groups, [len(group.documents) for group in self._groups])[0]
        n_documents = self._n_documents(group, n_tokens)
        episodes: list[Episode] = []
        for document in rng.choices(group.documents, k=20 * n_documents):  # some are too short
            n_asked = sum(len(episode.questions) for episode in episodes)
            if n_asked >= n_passages or len(episodes) >= n_documents:
                break
            texts = self.maker.chunk_texts(document.text, self.reading_chunk_tokens)
            episode = self.maker.passages(rng, texts, self.max_questions)
            episodes += [episode] if episode.questions else []
        if not episodes:
            raise TrainingError("the documents are too short to continue their passages; leave data.reading_share at 0")
        return episodes

    def _n_documents(self, group: _Group, n_tokens: int) -> int:
        return max(1, n_tokens // (group.n_chunks * self.max_chunk_tokens))

    def _n_spans(self, document: QuestionedDocument) -> int:
        return min(self.max_questions, len(document.spans))

    def _step(
        self,
        rng: random.Random,
        n_questions: int,
        n_tokens: int,
        group: _Group,
        weights: Sequence[int] | None,
        ask: Callable[[random.Random, QuestionedDocument, int], Answered],
        task: str,
    ) -> list[Episode]:
        n_documents = self._n_documents(group, n_tokens)
        episodes: list[Episode] = []
        seen: set[str] = set()
        n_asked = 0
        asks_unrelated = self.maker.asks_unrelated(rng)
        for document in rng.choices(group.documents, weights, k=20 * n_documents):
            if n_asked >= n_questions or len(episodes) >= n_documents:
                break
            answered = [] if document.doc_id in seen else ask(rng, document, self.max_questions)
            seen.add(document.doc_id)
            if answered:
                title = document.title if rng.random() < 0.5 else ""
                texts = self.maker.chunk_texts(document.text, self.max_chunk_tokens, title)
                unasked = unasked_values(document, answered) if task == "questions" else []
                episode = self.maker.episode(
                    rng, texts, answered, task, asks_unrelated=asks_unrelated, document=document.text, unasked=unasked
                )
                episodes.append(episode)
                n_asked += len(answered)
        if not episodes:
            raise TrainingError("the documents have no question whose answer stands in them")
        return episodes
