"""Make questions and answers about any text: by rule, with a base, or with a model behind an endpoint.

Make questions about any text by rule, without a model: remove a name, number or date from a sentence and ask for it.

After Lewis et al., "Unsupervised question answering by cloze translation", arXiv 1906.04980. Such a question shares its
words with the text, so it teaches to find a sentence by its words; people's questions use other words.

A writer is asked twice: for questions that a passage answers, and then for harder, different ones. A question is kept
if the same writer repeats its answer when shown the passage, and does not give it without the passage. Rule-made
questions need no writer.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loracast.base.chat import Message
from loracast.base.generate import Sampling, answers
from loracast.base.load import Base
from loracast.documents import Document
from loracast.errors import ConfigError, LoracastError
from loracast.lab.data.answer_metrics import token_f1
from loracast.lab.data.facts import FactSpan

# A wrapped line is no end, but a table's row is.
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|\n\s*\n|\n(?=[^\n]*\|)")
_WORD = re.compile(r"\w+")
_STEM = 5  # words that begin with as many equal characters count as the same: "settled" and "settling"


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Split a text roughly into sentences: (start, end) characters, without the blanks between them."""
    cuts = [0]
    for match in _SENTENCE_END.finditer(text):
        cuts += [match.start(), match.end()]
    cuts.append(len(text))
    return [(start, end) for start, end in zip(cuts[::2], cuts[1::2], strict=True) if text[start:end].strip()]


def find_answer(text: str, question: str, answers: Sequence[str]) -> FactSpan | None:
    """The sentence that answers a question, with the answer in its words; None if the text has no answer.

    Among equals the preferred answer wins, then the first place.
    """
    spans = sentence_spans(text)
    asked = _stems(question)
    found: list[tuple[float, FactSpan]] = []
    for rank, answer in enumerate(answers):
        for start, end in _places(text, answer):
            for low, high in [span for span in spans if span[0] <= start and end <= span[1]][:1]:
                shared = len(asked & (_stems(text[low:high]) - _stems(answer)))
                fact = FactSpan(text[low:high], "", text[start:end], start - low)
                found.append((shared - rank / len(answers), fact))
    return max(found, key=lambda one: one[0])[1] if found else None


def _places(text: str, answer: str) -> list[tuple[int, int]]:
    """Where an answer stands in a text as whole words, ignoring case."""
    pattern = rf"(?<!\w){re.escape(answer.strip())}(?!\w)"
    return [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)] if answer.strip() else []


def _stems(text: str) -> set[str]:
    return {word[:_STEM] for word in _WORD.findall(text.lower()) if len(word) > 2}


_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
_CAPITAL = r"[A-Z][\w'’-]+"
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("date", re.compile(rf"\b(?:{_MONTH})(?: \d{{1,2}})?,? \d{{4}}\b|\b\d{{1,2}} (?:{_MONTH})(?: \d{{4}})?\b"
                        rf"|\b(?:{_MONTH}) \d{{1,2}}\b")),
    ("year", re.compile(r"\b(?:1[0-9]|20)\d\d\b")),
    ("amount", re.compile(r"[$€£]\s?\d[\d,.]*(?: (?:million|billion|thousand))?"
                          r"|\b\d[\d,.]*\s?(?:%|percent|per cent)(?!\w)")),
    ("number", re.compile(r"\b\d[\d,]*(?:\.\d+)?(?: (?:million|billion|thousand|hundred))?\b(?!\w)")),
    ("name", re.compile(rf"{_CAPITAL}(?:(?: of the | of | the | and | de | )?{_CAPITAL})*")),
    ("thing", re.compile(r"(?<=\bthe )[a-z]+(?: [a-z]+)?(?= (?:of|in|was|is|were|are|and|to|that|which)\b)"
                         r"|(?<=\ba )[a-z]+ [a-z]+(?=[,.;])")),
)  # fmt: skip
_ASKS: dict[str, tuple[str, ...]] = {
    "date": ("When", "On what date", "When was it that"),
    "year": ("When", "In what year", "In which year"),
    "amount": ("How much", "What amount", "What percentage"),
    "number": ("How many", "What number", "What is the number:"),
    "name": ("Who", "What", "Which", "What is the name:", "Where", "Whose"),
    "thing": ("What", "Which", "What kind of thing"),
}
_WORDS = """
a an the of in on at to for and or but with by from as is was are were be been it its this that he she they his her
their which who when where had has have not also into than then there
"""
STOP_WORDS = frozenset(_WORDS.split())  # frequent words that say little about a sentence
_BLANK = ("Fill the gap: {}", "Complete: {}", "What is missing? {}", "{}", "What belongs in the gap? {}")
_TURNS = 5
_MIN_WORDS = 5
_MAX_WORDS = 22


Cloze = tuple[str, FactSpan]
"""A question, and the sentence that gives its answer."""


def make_clozes(rng: random.Random, text: str, n: int) -> list[Cloze]:
    """Make at most `n` questions about a text, about different sentences if there are enough, in the text's order."""
    spans = [span for span in sentence_spans(text) if len(text[slice(*span)].split()) >= _MIN_WORDS]
    rng.shuffle(spans)
    made: list[tuple[int, Cloze]] = []
    asked: set[tuple[int, str]] = set()
    for start, end in spans * _TURNS:  # several about one sentence if there are few
        if len(made) == n:
            break
        sentence = text[start:end]
        cloze = _cloze(rng, sentence)
        if cloze is not None and (start, cloze[1].value) not in asked:
            asked.add((start, cloze[1].value))
            made.append((start, cloze))
    return [cloze for _, cloze in sorted(made, key=lambda pair: pair[0])]


def _cloze(rng: random.Random, sentence: str) -> Cloze | None:
    """A question about one sentence; None if nothing in it can be asked for."""
    found = [(kind, match) for kind, pattern in _KINDS for match in pattern.finditer(sentence) if _may_ask(kind, match)]
    if not found:
        return None
    kind = rng.choice(sorted({kind for kind, _ in found}))
    match = rng.choice([match for of_kind, match in found if of_kind == kind])
    answer = match.group()
    before, after = sentence[: match.start()], sentence[match.end() :]
    if re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", before + " " + after):
        return None  # the question would contain the answer
    question = _with_gap(rng, before, after) if rng.random() < 0.3 else _with_word(rng, kind, before, after)
    return (question, FactSpan(sentence, "", answer, match.start())) if question else None


def _may_ask(kind: str, match: re.Match[str]) -> bool:
    """Whether to ask for a match: the first word of a sentence or quotation is capitalised even if it is no name."""
    if kind != "name":
        return True
    before = match.string[: match.start()].rstrip()
    is_first = not before or before[-1] in "\"“'‘.!?;:|([—"
    return match.group().split()[0].lower() not in STOP_WORDS and (not is_first or " " in match.group())


def _with_gap(rng: random.Random, before: str, after: str) -> str:
    """The sentence with a gap, cut to a few words on both sides."""
    left, right = before.split(), after.split()
    room = rng.randint(_MIN_WORDS + 1, _MAX_WORDS)
    n_left = min(len(left), max(room // 2, room - len(right)))
    kept = [*left[len(left) - n_left :], "___", *right[: room - n_left]]
    return rng.choice(_BLANK).format(" ".join(kept))


def _with_word(rng: random.Random, kind: str, before: str, after: str) -> str | None:
    """A question word and the rest of the sentence, with some words dropped and its two parts perhaps swapped."""
    left, right = (_thinned(rng, part.split()) for part in (before, after))
    words = [*right, *left] if rng.random() < 0.5 else [*left, *right]
    telling = [word for word in words if word.strip(",.;:()\"'").lower() not in STOP_WORDS]
    if len(telling) < 2:
        return None
    first = rng.randrange(max(1, len(words) - _MAX_WORDS + 1))
    body = " ".join(words[first : first + _MAX_WORDS]).strip(" ,.;:\"'()")
    if rng.random() < 0.2:
        body = body.lower()
    return f"{rng.choice(_ASKS[kind])} {body}?"


def _thinned(rng: random.Random, words: Sequence[str]) -> list[str]:
    """Drop some of the words, stop words twice as often."""
    drop = rng.choice((0.0, 0.1, 0.3))
    return [
        word
        for word in words
        if rng.random() >= (min(1.0, drop * 2) if word.strip(",.;").lower() in STOP_WORDS else drop)
    ]


_TRIES = 4
_FIRST_WAIT_S = 2.0


@dataclass(frozen=True)
class BaseWriter:
    """Decodes greedily with a base on this machine."""

    base: Base

    @property
    def name(self) -> str:
        """The name that its rows give in `made_by`."""
        return self.base.name

    def write(self, messages: Sequence[Message], max_tokens: int) -> str:
        """Write the assistant's next turn."""
        prompt = self.base.chat.conversation(messages)
        return answers(self.base, [prompt], [None], Sampling(max_new_tokens=max_tokens))[0].text


@dataclass(frozen=True)
class EndpointWriter:
    """Asks a model behind an OpenAI-compatible endpoint; `url` is the part before /chat/completions."""

    url: str
    name: str
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0

    def write(self, messages: Sequence[Message], max_tokens: int) -> str:
        """Write the assistant's next turn. Raises LoracastError if the endpoint refuses or fails repeatedly."""
        order = {"model": self.name, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        where = f"{self.url.rstrip('/')}/chat/completions"
        if not where.startswith(("http://", "https://")):
            raise ConfigError(f"{self.url!r} is no endpoint; give its address, such as http://localhost:8000/v1")
        request = urllib.request.Request(where, json.dumps(order).encode(), headers)
        for attempt in range(_TRIES):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    said = response.read()
                return str(json.loads(said)["choices"][0]["message"]["content"] or "")
            except urllib.error.HTTPError as error:
                problem = f"{where} answers {error.code}: {error.read(500).decode(errors='replace')}"
                if error.code < 500 and error.code != 429:  # the request itself is wrong, so another try would fail too
                    raise LoracastError(problem) from error
            except OSError as error:
                problem = f"{where} cannot be reached: {error}"
            except (ValueError, LookupError, TypeError) as error:
                problem = f"{where} gives an answer without choices[0].message.content ({error!r}): {said[:200]!r}"
            if attempt < _TRIES - 1:
                time.sleep(_FIRST_WAIT_S * 2**attempt)
        raise LoracastError(f"{problem} (after {_TRIES} tries)")


Writer = BaseWriter | EndpointWriter


_LINE = re.compile(
    r"^\W*(?:\d+[.)]\s*)?(?:q(?:uestion)?\s*\d*\s*[:.][\s*]*)?(?P<question>[^?\n]{8,200}\?)(?P<rest>.*)$", re.IGNORECASE
)
_ANSWER = re.compile(r"^\W*(?:a(?:nswer)?\s*\d*\s*[:.][\s*]*)?(?P<answer>.+)$", re.IGNORECASE)
_EXAMPLE = (
    "The Hartwell Bridge was opened in 1897 and is 312 metres long. "
    "It was designed by Clara Menzies, who had built two lighthouses before.",
    "Q: When was the Hartwell Bridge opened?\nA: 1897\nQ: Who designed the bridge?\nA: Clara Menzies",
)
_AGREES = 0.6  # token F1 from which two answers count as the same; "24 miles" and "30 miles" have 0.5
_SAME_QUESTION = 0.7  # share of common words from which two questions count as the same
_LONGEST_ANSWER_WORDS = 20
_TOKENS_OF_A_PAIR = 40


@dataclass(frozen=True)
class MakeConfig:
    """Settings of `loracast make-questions`."""

    per_passage: int = 5
    """Most questions of each level about one passage."""
    levels: int = 2
    """1 asks for questions that the passage answers; 2 then also for harder, different ones."""
    seed: int = 0
    """Seed of rule-made questions."""

    def __post_init__(self) -> None:
        if self.per_passage < 1 or self.levels not in (1, 2):
            raise ConfigError("per_passage must be at least 1, and levels 1 or 2")


Made = dict[str, Any]
"""A question that is kept, as it stands in a row: `question`, `answers`, `span` and `level`."""


@dataclass
class Tally:
    """Counts of the questions that were kept and dropped."""

    kept: int = 0
    repeated: int = 0  # another question asks the same
    not_answerable: int = 0  # the writer, shown the passage, gives another answer
    known_anyway: int = 0  # the writer gives the same answer without the passage


@dataclass(frozen=True)
class Passage:
    """A piece of a file to ask about."""

    doc_id: str
    title: str
    text: str


def passages_of(document: Document, split: Callable[[str], Sequence[str]]) -> list[Passage]:
    """A document's passages, with ids from its file name and their text, so a changed passage gets new questions."""
    name = document.file_name or "document"
    return [
        Passage(f"{name}#{hashlib.sha256(text.encode()).hexdigest()[:12]}", document.title, text)
        for text in split(document.text)
    ]


def make_questions(
    passages: Sequence[Passage],
    out: Path,
    writer: Writer | None,
    config: MakeConfig = MakeConfig(),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tally:
    """Append a row of questions for each passage to a JSONL file; passages that it has already are skipped.

    The writer writes and answers the questions; without one they are made by rule.
    """
    known = {row["doc_id"] for row in _rows(out)}
    tally = Tally()
    todo = [passage for passage in passages if passage.doc_id not in known]
    with open(out, "a", encoding="utf-8") as file:
        for done, passage in enumerate(todo, start=1):
            made = _by_rule(passage, config, tally) if writer is None else _written(passage, writer, config, tally)
            row = {
                "doc_id": passage.doc_id, "source": "self-made", "title": passage.title, "document": passage.text,
                "made_by": "rule" if writer is None else writer.name, "questions": made,
            }  # fmt: skip
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            progress(done, len(todo))
    return tally


def _rows(out: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; an incomplete last line, which a killed run leaves, is removed from it."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        return
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        out.write_bytes(whole)
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            row["doc_id"], row["questions"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{out}, line {number}, is not a row of questions ({error!r}); give another --out"
            ) from error
        yield row


def _by_rule(passage: Passage, config: MakeConfig, tally: Tally) -> list[Made]:
    rng = random.Random(f"{config.seed}/{passage.doc_id}")
    clozes = make_clozes(rng, passage.text, config.per_passage)
    tally.kept += len(clozes)
    return [{"question": question, "answers": [fact.value], "span": True, "level": 0} for question, fact in clozes]


def _written(passage: Passage, writer: Writer, config: MakeConfig, tally: Tally) -> list[Made]:
    kept: list[Made] = []
    for level in range(1, config.levels + 1):
        order = _ask_for(passage.text, config.per_passage, kept if level == 2 else ())
        pairs = parse(writer.write(order, config.per_passage * _TOKENS_OF_A_PAIR))
        for question, answer in pairs[: config.per_passage]:
            if any(_alike(question, other["question"]) for other in kept):
                tally.repeated += 1
            elif token_f1(writer.write(_answer_with(passage.text, question), _TOKENS_OF_A_PAIR), answer) < _AGREES:
                tally.not_answerable += 1
            elif token_f1(writer.write(_answer_with(None, question), _TOKENS_OF_A_PAIR), answer) >= _AGREES:
                tally.known_anyway += 1
            else:
                is_span = find_answer(passage.text, question, (answer,)) is not None
                kept.append({"question": question, "answers": [answer], "span": is_span, "level": level})
                tally.kept += 1
    return kept


def _ask_for(text: str, n: int, known: Sequence[Made]) -> list[Message]:
    """The conversation that asks for questions, with an example, which small models follow better than instructions."""
    first = "Write {} questions that the text answers, each with its short answer."
    order = first.format(n)
    if known:
        listed = "\n".join(f"- {one['question']}" for one in known)
        order = (
            f"Write {n} harder questions about the text, each with its short answer. "
            f"They must ask for something else than these:\n{listed}"
        )
    example, answered = _EXAMPLE
    return [
        {"role": "user", "content": f"{example}\n\n{first.format(2)}"},
        {"role": "assistant", "content": answered},
        {"role": "user", "content": f"{text}\n\n{order}"},
    ]


def _answer_with(text: str | None, question: str) -> list[Message]:
    """The conversation that asks a question, with the passage or without it."""
    example, _ = _EXAMPLE
    shown, before = (f"{text}\n\n", f"{example}\n\n") if text is not None else ("", "")
    return [
        {"role": "user", "content": f"{before}Question: Who designed the Hartwell Bridge?\nShort answer:"},
        {"role": "assistant", "content": "Clara Menzies"},
        {"role": "user", "content": f"{shown}Question: {question}\nShort answer:"},
    ]


def parse(text: str) -> list[tuple[str, str]]:
    """Parse a writer's text into (question, answer) pairs; an answer follows its question, perhaps on the next line."""
    pairs: list[tuple[str, str]] = []
    waiting: str | None = None
    for line in filter(None, map(str.strip, text.splitlines())):
        asked = _LINE.match(line)
        if asked:
            waiting, line = asked["question"].strip(), asked["rest"].strip()
        answered = _ANSWER.match(line) if line else None
        if waiting is not None and answered:
            answer = answered["answer"].strip().rstrip(".")
            if answer and len(answer.split()) <= _LONGEST_ANSWER_WORDS:
                pairs.append((waiting, answer))
            waiting = None
    return pairs


def _alike(one: str, other: str) -> bool:
    a, b = (set(re.findall(r"\w+", text.lower())) for text in (one, other))
    return len(a & b) >= _SAME_QUESTION * min(len(a), len(b))
