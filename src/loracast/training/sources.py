"""Draw the documents and questions of each training step: needles, fact sheets, everyday and real documents.

A step depends on the seed and its number alone, so training resumes exactly, on any machine, at any step.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from loracast.base.chat import ChatFormat
from loracast.data.everyday import EverydayFact, make_document
from loracast.data.facts import Split, make_sheet
from loracast.data.needles import hide, make_needles, sentences
from loracast.data.qa import read_questioned
from loracast.data.rows import read_texts, read_unrelated
from loracast.data.spans import FactSpan
from loracast.errors import ConfigError, TrainingError
from loracast.scoring.episodes import Episode
from loracast.training.document_source import DocumentSource
from loracast.training.episode_maker import EpisodeMaker

EpisodeKind = Literal["needle", "questions", "cloze", "reading", "everyday", "facts"]
KINDS: tuple[EpisodeKind, ...] = get_args(EpisodeKind)
"""Kinds of episodes, in the order in which a step draws one; fact sheets get the share that the others leave."""


@dataclass(frozen=True)
class DataConfig:
    """Documents and questions of a training run."""

    seed: int = 0
    """Seed of the data."""
    questions_per_step: int = 96
    """Distinct questions in one step, over all its documents."""
    context_tokens_per_step: int = 24_000
    """Most tokens of documents in one step of needles or real documents: long documents come with fewer questions."""
    needle_share: float = 0.0
    """Share of steps that hide needles in prose; steps of no other share learn fact sheets."""
    max_needles: int = 8
    """Most needles in one document."""
    needle_kinds: tuple[str, ...] = ()
    """Kinds of value that needles have (as in content/needles.toml); all if empty."""
    min_facts: int = 1
    """Fewest facts on one sheet."""
    max_facts: int = 5
    """Most facts on one sheet."""
    diluted_share: float = 0.0
    """Share of fact sheets whose statements are scattered in prose, as in a real manual."""
    min_chunk_tokens: int = 32
    """Shortest chunk of a needle document."""
    max_chunk_tokens: int = 256
    """Longest chunk."""
    max_chunks: int = 1
    """Most chunks of a document."""
    texts: tuple[str, ...] = ()
    """Files of prose around needles: JSONL (optionally gzipped) with a `document` or `text` field, or plain text."""
    text_sources: tuple[str, ...] = ()
    """Of JSONL rows with a `source` field, take only these sources (for their licence)."""
    question_share: float = 0.0
    """Share of steps with people's questions about real documents; only questions whose answers stand there."""
    cloze_share: float = 0.0
    """Share of steps with rule-made questions about the same documents."""
    reading_share: float = 0.0
    """Share of steps that continue passages of the same documents word for word."""
    reading_chunk_tokens: int = 256
    """Longest chunk of those; where it is the memory's rank, every token can be stored."""
    documents: tuple[str, ...] = ()
    """Files of documents with questions: JSONL (optionally gzipped) rows of `document` and `questions`."""
    document_sources: tuple[str, ...] = ()
    """Of rows with a `source` field, take only these sources."""
    merged_share: float = 0.25
    """Share of steps whose questions get the whole memory; in the others they weigh it by sentence, as `ask` does."""
    max_questions: int = 8
    """Most questions about one real or everyday document in a step."""
    everyday_share: float = 0.0
    """Share of steps with generated everyday documents: e-mails, contracts, recipes, price lists and others."""
    unrelated: tuple[str, ...] = ()
    """Files of questions unrelated to any document; the base shall answer them as it does without a LoRA."""

    def __post_init__(self) -> None:
        if (self.needle_share > 0 or self.diluted_share > 0) and not self.texts:
            raise ConfigError("needles and diluted sheets need prose around them: give a file of texts (--texts FILE)")
        if self.document_share > 0 and not self.documents:
            raise ConfigError("questions and reading need documents: give a file of them (--documents FILE)")
        if self.needle_share + self.document_share + self.everyday_share > 1 + 1e-9:
            shares = "needle_share, question_share, cloze_share, reading_share and everyday_share"
            raise ConfigError(f"{shares} are more than 1 together")

    @property
    def document_share(self) -> float:
        """Share of steps with real documents."""
        return self.question_share + self.cloze_share + self.reading_share


def _fact_span(fact: EverydayFact) -> FactSpan:
    return FactSpan(fact.statement, fact.subject, fact.answer, fact.value_at)


class Prose:
    """Sentences of natural text with their token counts, from which spans of a wanted length are cut."""

    def __init__(self, texts: Sequence[str], tokenizer: Any):
        self._documents: list[list[tuple[str, int]]] = []
        for text in texts:
            pieces = sentences(text)
            if len(pieces) >= 3:
                lengths = [len(ids) for ids in tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]]
                self._documents.append(list(zip(pieces, lengths, strict=True)))
        if not self._documents:
            raise TrainingError("the given texts hold no prose (no document of three sentences)")

    def span(self, rng: random.Random, n_tokens: int) -> list[str]:
        """Successive sentences of about `n_tokens` tokens; another document follows an end or an overlong sentence."""
        chosen: list[str] = []
        room = n_tokens
        for _ in range(100):  # more than enough, unless there are only long sentences
            document = rng.choice(self._documents)
            for sentence, length in document[rng.randrange(len(document)) :]:
                if length > room + 15:
                    break
                chosen.append(sentence)
                room -= length
                if room <= 0:
                    return chosen
            if chosen and room < n_tokens / 2:
                break
        if not chosen:
            few = f"no sentence of at most {n_tokens + 15} tokens"
            raise TrainingError(f"the texts hold {few}; give others, or longer chunks")
        return chosen


class EpisodeSource:
    """Draws the episodes of a step, all of one kind."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Any,
        chat: ChatFormat,
        split: Split = "train",
        shows_documents: bool = False,
    ):
        self.config, self.split = config, split
        self.maker = EpisodeMaker(tokenizer, chat, read_unrelated(config.unrelated), shows_documents)
        self.prose = Prose(read_texts(config.texts, config.text_sources), tokenizer) if config.texts else None
        self.documents: DocumentSource | None = None
        if config.documents:
            self.documents = DocumentSource(
                read_questioned(config.documents, config.document_sources, "train"), self.maker,
                max_chunk_tokens=config.max_chunk_tokens, max_chunks=config.max_chunks,
                max_questions=config.max_questions, reading_chunk_tokens=config.reading_chunk_tokens,
            )  # fmt: skip

    def step(self, number: int) -> list[Episode]:
        """The episodes of batch `number`."""
        rng = random.Random(f"{self.config.seed}/0/{number}")  # the 0 keeps what recipes drew before
        c = self.config
        shares = (c.needle_share, c.question_share, c.cloze_share, c.reading_share, c.everyday_share)
        drawn = rng.random()
        kind: EpisodeKind = "facts"
        for of_share, share in zip(KINDS, shares, strict=False):
            if drawn < share:
                kind = of_share
                break
            drawn -= share
        episodes = self._draw(kind, rng)
        is_merged = random.Random(f"{self.config.seed}/0/{number}/merged").random() < c.merged_share
        return [episode.merged() for episode in episodes] if is_merged else episodes

    def of_kind(self, kind: EpisodeKind, number: int) -> list[Episode]:
        """The episodes of one step of a kind, whatever its share."""
        return self._draw(kind, random.Random(f"{self.config.seed}/{kind}/{number}"))

    def _draw(self, kind: EpisodeKind, rng: random.Random) -> list[Episode]:
        c = self.config
        if kind == "facts":
            return self._fact_step(rng)
        if kind == "needle":
            return self._needle_step(rng)
        if kind == "everyday":
            return self._everyday_step(rng)
        if self.documents is None:
            raise ConfigError(f"{kind} need documents: give a file of them (--documents FILE)")
        ask = {"questions": self.documents.asked_by_people, "cloze": self.documents.asked_by_rule}
        return ask.get(kind, self.documents.read)(rng, c.questions_per_step, c.context_tokens_per_step)

    def _needle_step(self, rng: random.Random) -> list[Episode]:
        """Needle documents that all have the same number of chunks."""
        if self.prose is None:
            raise ConfigError("needles need prose around them: give a file of texts (--texts FILE)")
        c = self.config
        n_chunks = rng.choice([1, *range(1, c.max_chunks + 1)])
        counts = (1, 1, 1, 2, 4, 8) if n_chunks == 1 else (2, 4, 8)
        n_questions = rng.choice([n for n in counts if n <= c.max_needles] or [1])
        n_tokens = rng.randint(c.min_chunk_tokens, c.max_chunk_tokens) if n_questions < 8 else c.max_chunk_tokens
        n_documents = max(1, c.questions_per_step // n_questions)
        n_documents = max(1, min(n_documents, c.context_tokens_per_step // (n_tokens * n_chunks)))
        asks_unrelated = self.maker.asks_unrelated(rng)
        drawn = n_questions, n_tokens, n_chunks, asks_unrelated
        return [self.needle_episode(rng, self.prose, *drawn) for _ in range(n_documents)]

    def _fact_step(self, rng: random.Random) -> list[Episode]:
        c = self.config
        n_facts = rng.randint(c.min_facts, c.max_facts)
        shortest = max(c.min_chunk_tokens, 48) if c.max_chunks > 1 else c.max_chunk_tokens
        n_tokens = rng.choice([c.max_chunk_tokens, rng.randint(shortest, c.max_chunk_tokens)])
        asks_unrelated = self.maker.asks_unrelated(rng)
        n_documents = max(1, c.questions_per_step // n_facts)
        return [self.fact_episode(rng, n_facts, n_tokens, asks_unrelated) for _ in range(n_documents)]

    def _everyday_step(self, rng: random.Random) -> list[Episode]:
        """Everyday documents whose questions are all different, until the step has its questions."""
        c = self.config
        asks_unrelated = self.maker.asks_unrelated(rng)
        episodes: list[Episode] = []
        asked: set[str] = set()
        while (n_left := c.questions_per_step - len(asked)) > 0:
            episodes.append(self.everyday_episode(rng, min(c.max_questions, n_left), asked, asks_unrelated))
        return episodes

    def everyday_episode(
        self, rng: random.Random, n_questions: int, asked: set[str], asks_unrelated: bool = False
    ) -> Episode:
        """An everyday document with at most so many questions, none of which is in `asked`; they join it.

        Questions that it does not answer are left out: they make the base refuse many that it does answer.
        """
        facts: list[EverydayFact] = []
        while not facts:
            document = make_document(rng, split=self.split)
            new = [fact for fact in document.facts if fact.kind != "not said" and fact.question not in asked]
            facts = rng.sample(new, min(n_questions, len(new)))
        asked.update(fact.question for fact in facts)
        unasked = [_fact_span(fact) for fact in (*document.facts, *document.unasked) if fact not in facts]
        texts = self.maker.chunk_texts(document.text, self.config.max_chunk_tokens, document.title)
        answered = [(f.question, f.answer, _fact_span(f)) for f in facts]
        return self.maker.episode(rng, texts, answered, "everyday", asks_unrelated=asks_unrelated, unasked=unasked)

    def sample_text(self, rng: random.Random, n_tokens: int) -> str:
        """Text like that of the documents, for measuring a base's activations."""
        if self.prose is not None:
            return " ".join(self.prose.span(rng, n_tokens))
        return make_sheet(rng, max(4, n_tokens // 16), split=self.split).text

    def needle_episode(
        self,
        rng: random.Random,
        prose: Prose,
        n_needles: int,
        n_tokens: int,
        n_chunks: int = 1,
        asks_unrelated: bool = False,
    ) -> Episode:
        """Prose in `n_chunks` chunks of about `n_tokens` tokens with hidden needles, each asked for."""
        kinds = self.config.needle_kinds
        needles = make_needles(rng, n_needles, split=self.split, kind=rng.choice(kinds) if kinds else None)
        room = max(8, n_tokens - 16 * n_needles)
        homes = [rng.randrange(n_chunks) for _ in needles]
        texts = []
        for chunk in range(n_chunks):
            here = [needle.statement for needle, home in zip(needles, homes, strict=True) if home == chunk]
            texts.append(" ".join(hide(here, prose.span(rng, room), [rng.random() for _ in here])))
        owners = [needle.key if needle.key in needle.statement else "" for needle in needles]
        facts = [FactSpan(n.statement, owner, n.answer) for n, owner in zip(needles, owners, strict=True)]
        answered = [(n.question, n.answer, fact) for n, fact in zip(needles, facts, strict=True)]
        return self.maker.episode(rng, texts, answered, "needle", asks_unrelated=asks_unrelated)

    def fact_episode(
        self, rng: random.Random, n_facts: int, max_chunk_tokens: int, asks_unrelated: bool = False
    ) -> Episode:
        """A fact sheet, perhaps diluted with prose, with a question for each fact."""
        sheet = make_sheet(rng, n_facts, split=self.split)
        text = sheet.text
        if self.prose is not None and rng.random() < self.config.diluted_share:
            prose = self.prose.span(rng, rng.randint(1, 2) * max_chunk_tokens // 2)
            text = " ".join(hide([fact.statement for fact in sheet.facts], prose, [rng.random() for _ in sheet.facts]))
        texts = self.maker.chunk_texts(text, max_chunk_tokens, sheet.title)
        answered = [(f.question, f.answer, FactSpan(f.statement, f.subject, f.answer)) for f in sheet.facts]
        return self.maker.episode(rng, texts, answered, "facts", asks_unrelated=asks_unrelated)
