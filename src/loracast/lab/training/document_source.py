"""Draw the documents and questions of each training step: needles, fact sheets, everyday and real documents.

A step depends on the seed and its number alone, so training resumes exactly, on any machine, at any step.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any, Literal, get_args

from loracast.base.chat import ChatFormat, encode_with_offsets
from loracast.documents import split_text
from loracast.documents.units import sentence_spans, token_sentences
from loracast.errors import ConfigError, TrainingError
from loracast.lab.data.everyday import EverydayFact, make_document
from loracast.lab.data.facts import INSIDE, FactSpan, Split, TokenLabel, label_tokens, make_sheet
from loracast.lab.data.needles import hide, make_needles, sentences
from loracast.lab.data.questions import find_answer, make_clozes
from loracast.lab.data.rows import DocumentQuestion, QuestionedDocument, read_questioned, read_texts, read_unrelated
from loracast.lab.training.losses import weights_of
from loracast.lab.training.scoring import Episode, Question

# System turns of training prompts; most are empty, since the template's own (None) is longer than a question.
SYSTEM_TURNS = ("", "", "", "Answer briefly.", "You answer questions.", None)
CONTINUE = ("Continue: {}", "Go on: {}", "How does the text go on? {}", "What comes after this? {}")
START_TOKENS, CONTINUED_TOKENS = 8, 24  # of a passage: those that the prompt gives, and those that the answer has
_MIN_CONTINUED_TOKENS = 4
PASSAGE_TOKENS = START_TOKENS + CONTINUED_TOKENS  # distance between passages, so that they do not overlap
UNRELATED_SHARE = 0.35  # of steps: their documents are also asked an unrelated question, if there are any

EpisodeKind = Literal["needle", "questions", "cloze", "reading", "everyday", "facts"]
KINDS: tuple[EpisodeKind, ...] = get_args(EpisodeKind)
"""Kinds of episodes, in the order in which a step draws one; fact sheets get the share that the others leave."""

Answered = Sequence[tuple[str, FactSpan]]
"""Questions with the statements that give their answers."""


def reading_prompt(chat: ChatFormat, document: str, question: str) -> list[int]:
    """The prompt of a reader that sees the document: the text, then the question, under an empty system turn."""
    content = f"{document}\n\nQuestion: {question}"
    return chat.conversation([{"role": "system", "content": ""}, {"role": "user", "content": content}])


Encoded = tuple[str, Sequence[int], Sequence[tuple[int, int]]]
"""A chunk's text, its token ids, and the (start, end) characters of these."""


def _episode(
    task: str, chunks: Sequence[Encoded], asked: Sequence[tuple[str, Question]], labels: Sequence[TokenLabel]
) -> Episode:
    """An episode whose questions, each with its text, weigh the document's sentences."""
    of_tokens, n = [], 0
    for text, _, offsets in chunks:
        spans = sentence_spans(text)
        of_tokens.append(tuple(n + i for i in token_sentences(spans, offsets)))
        n += len(spans)
    weights = weights_of([text for text, *_ in chunks], [text for text, _ in asked])
    questions = [replace(question, sentence_weights=own) for (_, question), own in zip(asked, weights, strict=True)]
    return Episode(tuple(tuple(ids) for _, ids, _ in chunks), tuple(questions), task, tuple(labels), tuple(of_tokens))


_MAX_UNASKED = 32  # answers of one document that are labelled without being asked for: each is looked up


def answered_questions(rng: random.Random, document: QuestionedDocument, n: int) -> Answered:
    """At most `n` of a document's questions whose answers stand in it, with the answers in the document's words."""
    rng.shuffle(spans := document.spans)
    return _with_answers(document, spans[:n])


def unasked_values(document: QuestionedDocument, answered: Answered) -> list[FactSpan]:
    """The answers to a document's other questions, where they stand in it."""
    asked = {question for question, _ in answered}
    others = [span for span in document.spans if span.question not in asked]
    return [fact for _, fact in _with_answers(document, others[:_MAX_UNASKED])]


def _with_answers(document: QuestionedDocument, asked: Sequence[DocumentQuestion]) -> Answered:
    """The questions whose answers are found in the document."""
    found = ((one.question, find_answer(document.text, one.question, one.answers)) for one in asked)
    return [(question, fact) for question, fact in found if fact is not None]


_Group = tuple[int, list[QuestionedDocument], list[int]]
"""A number of chunks, the documents that have so many, and their weights: the questions that are asked of them."""


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
    def shares(self) -> dict[EpisodeKind, float]:
        """The share of steps of each kind of episode; that of fact sheets, the last, is what the others leave."""
        given = (self.needle_share, self.question_share, self.cloze_share, self.reading_share, self.everyday_share)
        return dict(zip(KINDS, (*given, 1 - sum(given)), strict=True))

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
    """Draws the episodes of a step, all of one kind, for one base: its tokenizer and its chat format."""

    def __init__(
        self, config: DataConfig, tokenizer: Any, chat: ChatFormat, split: Split = "train", is_taught: bool = False
    ):
        """With `is_taught`, questions about real documents also have the prompt of a teacher that sees them.

        Raises TrainingError if the config's files have no prose, or no document that fits.
        """
        self.config, self.tokenizer, self.chat = config, tokenizer, chat
        self.split, self.is_taught = split, is_taught
        self.unrelated = read_unrelated(config.unrelated)
        self.prose = Prose(read_texts(config.texts, config.text_sources), tokenizer) if config.texts else None
        self._groups = self._by_chunks() if config.documents else []

    def _by_chunks(self) -> list[_Group]:
        """The real documents; those of one step have equally many chunks, so they need little padding."""
        c = self.config
        documents = read_questioned(c.documents, c.document_sources, "train")
        if not any(document.spans for document in documents):
            raise TrainingError("the documents have no question whose answer stands in them (`span`)")
        by_chunks: dict[int, list[QuestionedDocument]] = defaultdict(list)
        tokenised = self.tokenizer([d.text for d in documents], add_special_tokens=False, verbose=False)["input_ids"]
        for document, ids in zip(documents, tokenised, strict=True):
            n_chunks = ceil(len(ids) / c.max_chunk_tokens)
            if n_chunks <= c.max_chunks:
                by_chunks[n_chunks].append(document)
        if not by_chunks:
            most = c.max_chunks * c.max_chunk_tokens
            raise TrainingError(f"no document has {most} tokens or fewer; raise data.max_chunks")
        return [(n, some, [min(c.max_questions, len(d.spans)) for d in some]) for n, some in sorted(by_chunks.items())]

    def step(self, number: int) -> list[Episode]:
        """The episodes of batch `number`."""
        rng = random.Random(f"{self.config.seed}/0/{number}")  # the 0 keeps what recipes drew before
        drawn = rng.random()
        for kind, share in self.config.shares.items():  # noqa: B007 the last kind takes what is left
            if drawn < share:
                break
            drawn -= share
        episodes = self._draw(kind, rng)
        is_merged = random.Random(f"{self.config.seed}/0/{number}/merged").random() < self.config.merged_share
        return [episode.merged() for episode in episodes] if is_merged else episodes

    def of_kind(self, kind: EpisodeKind, number: int) -> list[Episode]:
        """The episodes of one step of a kind, whatever its share."""
        return self._draw(kind, random.Random(f"{self.config.seed}/{kind}/{number}"))

    def _draw(self, kind: EpisodeKind, rng: random.Random) -> list[Episode]:
        generated = {"facts": self._fact_step, "needle": self._needle_step, "everyday": self._everyday_step}
        return generated[kind](rng) if kind in generated else self._real_step(rng, kind)

    def _real_step(self, rng: random.Random, kind: EpisodeKind) -> list[Episode]:
        """Real documents with people's questions, with rule-made ones, or with passages to continue."""
        c = self.config
        if not self._groups:
            raise ConfigError(f"{kind} need documents: give a file of them (--documents FILE)")
        # Weighted by people's questions: a document that is read for a single question teaches little in a step.
        is_weighted = kind == "questions"
        sizes = [sum(weights) if is_weighted else len(documents) for _, documents, weights in self._groups]
        n_chunks, documents, weights = rng.choices(self._groups, sizes)[0]
        n_documents = max(1, c.context_tokens_per_step // (n_chunks * c.max_chunk_tokens))
        asks_unrelated = kind != "reading" and self.asks_unrelated(rng)
        episodes: list[Episode] = []
        seen: set[str] = set()
        n_asked = 0
        for document in rng.choices(documents, weights if is_weighted else None, k=20 * n_documents):
            if n_asked >= c.questions_per_step or len(episodes) >= n_documents:
                break
            if kind == "reading":
                texts = self.chunk_texts(document.text, c.reading_chunk_tokens)
                found = [self.passages(rng, texts, c.max_questions)]
            else:
                found = [] if document.doc_id in seen else self._asked(rng, kind, document, asks_unrelated)
            seen.add(document.doc_id)
            for episode in found:
                n_asked += sum(not question.is_unrelated for question in episode.questions)
                episodes += [episode] if episode.questions else []
        if not episodes:
            raise TrainingError(f"no document has what data steps of {kind} ask for; leave their share at 0")
        return episodes

    def _asked(
        self, rng: random.Random, kind: EpisodeKind, document: QuestionedDocument, asks_unrelated: bool
    ) -> list[Episode]:
        """A document with people's questions or with rule-made ones, if it has any."""
        c = self.config
        if kind == "questions":
            asked = answered_questions(rng, document, c.max_questions)
        else:
            asked = make_clozes(rng, document.text, c.max_questions)
        if not asked:
            return []
        texts = self.chunk_texts(document.text, c.max_chunk_tokens, document.title if rng.random() < 0.5 else "")
        unasked = unasked_values(document, asked) if kind == "questions" else []
        return [self.episode(rng, texts, asked, kind, asks_unrelated, document=document.text, unasked=unasked)]

    def _needle_step(self, rng: random.Random) -> list[Episode]:
        """Needle documents that all have the same number of chunks."""
        c = self.config
        n_chunks = rng.choice([1, *range(1, c.max_chunks + 1)])
        counts = (1, 1, 1, 2, 4, 8) if n_chunks == 1 else (2, 4, 8)
        n_questions = rng.choice([n for n in counts if n <= c.max_needles] or [1])
        n_tokens = rng.randint(c.min_chunk_tokens, c.max_chunk_tokens) if n_questions < 8 else c.max_chunk_tokens
        n_documents = max(1, c.questions_per_step // n_questions)
        n_documents = max(1, min(n_documents, c.context_tokens_per_step // (n_tokens * n_chunks)))
        drawn = n_questions, n_tokens, n_chunks, self.asks_unrelated(rng)
        return [self.needle_episode(rng, *drawn) for _ in range(n_documents)]

    def _fact_step(self, rng: random.Random) -> list[Episode]:
        c = self.config
        n_facts = rng.randint(c.min_facts, c.max_facts)
        shortest = max(c.min_chunk_tokens, 48) if c.max_chunks > 1 else c.max_chunk_tokens
        n_tokens = rng.choice([c.max_chunk_tokens, rng.randint(shortest, c.max_chunk_tokens)])
        asks_unrelated = self.asks_unrelated(rng)
        n_documents = max(1, c.questions_per_step // n_facts)
        return [self.fact_episode(rng, n_facts, n_tokens, asks_unrelated) for _ in range(n_documents)]

    def _everyday_step(self, rng: random.Random) -> list[Episode]:
        """Everyday documents whose questions are all different, until the step has its questions."""
        c = self.config
        asks_unrelated = self.asks_unrelated(rng)
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
        texts = self.chunk_texts(document.text, self.config.max_chunk_tokens, document.title)
        answered = [(fact.question, _fact_span(fact)) for fact in facts]
        return self.episode(rng, texts, answered, "everyday", asks_unrelated, unasked=unasked)

    def sample_text(self, rng: random.Random, n_tokens: int) -> str:
        """Text like that of the documents, for measuring a base's activations."""
        if self.prose is not None:
            return " ".join(self.prose.span(rng, n_tokens))
        return make_sheet(rng, max(4, n_tokens // 16), split=self.split).text

    def needle_episode(
        self, rng: random.Random, n_needles: int, n_tokens: int, n_chunks: int, asks_unrelated: bool = False
    ) -> Episode:
        """Prose in `n_chunks` chunks of about `n_tokens` tokens with hidden needles, each asked for."""
        if self.prose is None:
            raise ConfigError("needles need prose around them: give a file of texts (--texts FILE)")
        kinds = self.config.needle_kinds
        needles = make_needles(rng, n_needles, split=self.split, kind=rng.choice(kinds) if kinds else None)
        room = max(8, n_tokens - 16 * n_needles)
        homes = [rng.randrange(n_chunks) for _ in needles]
        texts = []
        for chunk in range(n_chunks):
            here = [needle.statement for needle, home in zip(needles, homes, strict=True) if home == chunk]
            texts.append(" ".join(hide(here, self.prose.span(rng, room), [rng.random() for _ in here])))
        owners = [needle.key if needle.key in needle.statement else "" for needle in needles]
        answered = [(n.question, FactSpan(n.statement, own, n.answer)) for n, own in zip(needles, owners, strict=True)]
        return self.episode(rng, texts, answered, "needle", asks_unrelated)

    def fact_episode(
        self, rng: random.Random, n_facts: int, max_chunk_tokens: int, asks_unrelated: bool = False
    ) -> Episode:
        """A fact sheet, perhaps diluted with prose, with a question for each fact."""
        sheet = make_sheet(rng, n_facts, split=self.split)
        text = sheet.text
        if self.prose is not None and rng.random() < self.config.diluted_share:
            prose = self.prose.span(rng, rng.randint(1, 2) * max_chunk_tokens // 2)
            text = " ".join(hide([fact.statement for fact in sheet.facts], prose, [rng.random() for _ in sheet.facts]))
        texts = self.chunk_texts(text, max_chunk_tokens, sheet.title)
        answered = [(fact.question, FactSpan(fact.statement, fact.subject, fact.answer)) for fact in sheet.facts]
        return self.episode(rng, texts, answered, "facts", asks_unrelated)

    def chunk_texts(self, text: str, max_tokens: int, title: str = "") -> list[str]:
        """A document's chunks, as the encoder reads them."""
        encode = partial(encode_with_offsets, self.tokenizer)
        return [chunk.prompt for chunk in split_text(text, encode, max_tokens=max_tokens, title=title)]

    def asks_unrelated(self, rng: random.Random) -> bool:
        """Draw whether all documents of a step get an unrelated question or none: rows are padded to its length."""
        return bool(self.unrelated) and rng.random() < UNRELATED_SHARE

    def episode(
        self,
        rng: random.Random,
        texts: Sequence[str],
        answered: Answered,
        task: str,
        asks_unrelated: bool,
        *,
        document: str | None = None,
        unasked: Sequence[FactSpan] = (),
    ) -> Episode:
        """An episode from chunk texts, with its questions under one system turn and token labels for its statements.

        `document` is the text that a teacher may see; an unrelated question comes last if `asks_unrelated`. A memory
        has to write values before it knows the questions, so values not asked for are labelled too (`unasked`).
        """
        system = rng.choice(SYSTEM_TURNS)
        asked = []
        for text, fact in answered:
            shown = reading_prompt(self.chat, document, text) if document and self.is_taught else ()
            prompt = tuple(self.chat.prompt(text, system))
            asked.append((text, Question(prompt, tuple(self.chat.answer(fact.value)), window_prompt=tuple(shown))))
        if asks_unrelated:
            text, answer = rng.choice(self.unrelated)
            prompt = tuple(self.chat.prompt(text, system))
            asked.append((text, Question(prompt, tuple(self.chat.reply(answer)), is_unrelated=True)))
        chunks = [(text, *encode_with_offsets(self.tokenizer, text)) for text in texts]
        labels: list[TokenLabel] = []
        for i, (text, _, offsets) in enumerate(chunks):
            labels += label_tokens(i, text, offsets, [fact for _, fact in answered])
            taken = {label.token for label in labels if label.chunk == i}
            for fact in unasked:  # a value that shares a token with another one is left out
                found = label_tokens(i, text, offsets, [fact])
                if taken.isdisjoint(tokens := {label.token for label in found}):
                    labels += [label._replace(statement=-1) for label in found]
                    taken |= tokens
        return _episode(task, chunks, asked, labels)

    def passages(self, rng: random.Random, texts: Sequence[str], n: int) -> Episode:
        """A document with at most `n` passages, none overlapping, to continue word for word from their first tokens."""
        chunks = [(text, *encode_with_offsets(self.tokenizer, text)) for text in texts]
        places: list[tuple[int, int]] = []  # chunk, first token
        for i, (_, ids, _) in enumerate(chunks):
            last = len(ids) - START_TOKENS - _MIN_CONTINUED_TOKENS
            places += [(i, first) for first in range(rng.randrange(PASSAGE_TOKENS), last + 1, PASSAGE_TOKENS)]
        asked, labels = [], []
        for number, (chunk, first) in enumerate(rng.sample(places, min(n, len(places)))):
            text, ids, offsets = chunks[chunk]
            begins = first + START_TOKENS  # of what is to be continued
            continued = rng.choice(CONTINUE).format(text[offsets[first][0] : offsets[begins - 1][1]].strip())
            answer = tuple(ids[begins : begins + CONTINUED_TOKENS])
            asked.append((continued, Question(tuple(self.chat.prompt(continued, rng.choice(("", None)))), answer)))
            labels += [TokenLabel(chunk, begins + i, INSIDE, -1, i, -1, number) for i in range(len(answer))]
        return _episode("reading", chunks, asked, labels)
