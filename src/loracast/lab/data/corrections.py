"""Draw texts that correct themselves and chats in which facts change, with questions whose newest answer is right.

`content/corrections.toml` has topics, each of one split, with the facts of a topic: how one is stated, changed and
asked for. A notice fills a layout, whose marks are `<say>` for the next fact, `<change>` and `<Change>` for a change
(with a small or a capital letter) and `<filler>`. A chat has lines of named speakers, or of a user and an assistant;
there a change may also be proposed and rejected. Some facts of the topic nobody tells, and they are asked for, too.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from pydantic import TypeAdapter

from loracast.answering.answers import NOT_SAID
from loracast.lab.data.everyday import EverydayDocument, EverydayFact
from loracast.lab.data.facts import Split, expand, fill, make_entity, pick_alternatives
from loracast.lab.data.rows import read_content

CHANGED = "changed: "
"""What the attribute of a fact that has changed begins with."""
P_CHAT = 0.5
P_GENERIC = 0.3  # of a change: worded by what the value is
P_AGAIN = 0.3  # of a further change: it changes the fact of the one before
P_PROPOSED = 0.3  # of a chat: a change is proposed and rejected
P_REPLY = 0.6  # of a line of a chat: the other speaker answers it
MIN_SAID = 4

_MARK = re.compile(r"<(say|change|Change|filler)>")


@dataclass(frozen=True)
class TopicFact:
    """A fact of a topic, with wordings in which it is stated, changed and asked for."""

    name: str
    noun: str  # with its article
    value: str  # pattern
    state: Sequence[str]
    change: Sequence[str]
    ask: Sequence[str]


@dataclass(frozen=True)
class Topic:
    """What a text is about."""

    split: Split
    name: str
    subjects: Sequence[str]  # patterns
    facts: Sequence[TopicFact]


@dataclass(frozen=True)
class Phrases:
    """What all texts of a split share: layouts, lines of chats, and how changes come."""

    change: Sequence[str]  # of any fact, by its noun
    notices: Sequence[str]
    fillers: Sequence[str]
    lines: Sequence[str]  # forms of a chat's line
    opens: Sequence[str]
    leads: Sequence[str]  # before a change in a chat
    replies: Sequence[str]
    proposes: Sequence[str]
    rejects: Sequence[str]


@cache
def load_topics() -> tuple[Sequence[Topic], Mapping[Split, Phrases]]:
    """Read the topics of all splits and the phrases of each, once."""
    content = dict(read_content("corrections"))
    topics = TypeAdapter(list[Topic], config={"extra": "forbid"}).validate_python(content.pop("topic"))
    return topics, TypeAdapter(dict[Split, Phrases]).validate_python(content)


def make_correction(rng: random.Random, split: Split, *, is_chat: bool | None = None) -> EverydayDocument:
    """Draw a notice or a chat, or either, with questions for facts that changed, that did not, and that nobody told.

    The answer to a question for a changed fact is the newest value; `options` has the older and rejected ones after it.
    """
    topics, phrases = load_topics()
    topic = rng.choice([one for one in topics if one.split == split])
    while True:
        draft = _Draft(rng, topic, phrases[split])
        document = draft.chat() if (rng.random() < P_CHAT if is_chat is None else is_chat) else draft.notice()
        statements = [fact.statement for fact in document.facts if fact.statement]
        if all(document.text.count(one) == 1 for one in statements) and draft.is_clear():
            return document


class _Draft:
    """A text that is being drawn: for each fact the values that it has had, and the statement of the newest."""

    def __init__(self, rng: random.Random, topic: Topic, phrases: Phrases):
        self.rng, self.topic, self.phrases = rng, topic, phrases
        self.subject = make_entity(rng, rng.choice(topic.subjects), topic.split)
        self.waiting = rng.sample(topic.facts, len(topic.facts))
        self.values: dict[str, list[str]] = {}  # of each fact that was told, the newest last
        self.stated: dict[str, tuple[str, int]] = {}  # the newest statement of each, and where it has the value
        self.rejected: list[tuple[str, str]] = []
        self.last_changed: TopicFact | None = None

    def is_clear(self) -> bool:
        """Whether no value is a part of another one or of the subject."""
        values = [self.subject, *(v for some in self.values.values() for v in some), *(v for _, v in self.rejected)]
        lowered = [value.lower() for value in values]
        return not any(a in b for i, a in enumerate(lowered) for j, b in enumerate(lowered) if i != j)

    def draw(self, fact: TopicFact) -> str:
        return expand(self.rng, pick_alternatives(self.rng, fact.value))

    def put(self, fact: TopicFact, wording: str, value: str, is_small: bool = False) -> str:
        """A filled wording, which becomes the newest statement of the fact."""
        slots = {"s": self.subject, "noun": fact.noun, "old": self.values.get(fact.name, [""])[-1], "v": value}
        filled = fill(wording, **slots)
        at = len(fill(wording[: wording.index("{v}") + 3], **slots)) - len(value)
        filled = filled[0].lower() + filled[1:] if is_small else filled
        self.values.setdefault(fact.name, []).append(value)
        self.stated[fact.name] = filled, at
        return filled

    def say(self) -> str:
        fact = self.waiting.pop()
        return self.put(fact, self.rng.choice(fact.state), self.draw(fact))

    def told(self) -> list[TopicFact]:
        return [fact for fact in self.topic.facts if fact.name in self.values]

    def change(self, is_small: bool) -> str:
        """A change of a fact that has not changed yet, or of the one that changed last."""
        rng = self.rng
        again = self.last_changed if rng.random() < P_AGAIN else None
        fact = again or rng.choice([one for one in self.told() if len(self.values[one.name]) == 1])
        self.last_changed = fact
        wordings = self.phrases.change if rng.random() < P_GENERIC else fact.change
        return self.put(fact, rng.choice(wordings), self.draw(fact), is_small)

    def notice(self) -> EverydayDocument:
        """A layout with its marks replaced: all statements first, since a change may stand above them."""
        layout = expand(self.rng, pick_alternatives(self.rng, self.rng.choice(self.phrases.notices)))
        fillers = self.rng.sample(self.phrases.fillers, len(self.phrases.fillers))
        marks = _MARK.findall(layout)
        said = iter([self.say() for mark in marks if mark == "say"])
        changes = iter([self.change(mark == "change") for mark in marks if mark in ("change", "Change")])
        texts = {"say": said, "change": changes, "Change": changes, "filler": iter(fillers)}
        return self.finish("notice", _MARK.sub(lambda mark: next(texts[mark[1]]), layout))

    def chat(self) -> EverydayDocument:
        """Lines in which facts are told one after the other, and changed afterwards."""
        rng, phrases = self.rng, self.phrases
        pair = [expand(rng, "{first}") for _ in range(2)] if rng.random() < 0.5 else ["User", "Assistant"]
        form, day = rng.choice(phrases.lines), expand(rng, "{day_of_year}")
        clock = rng.randint(7 * 60, 12 * 60)
        lines: list[str] = []

        def add(who: int, text: str) -> None:
            nonlocal clock
            clock += rng.randint(1, 25)
            time = f"{clock // 60:02d}:{clock % 60:02d}"
            lines.append(form.format(who=pair[who], text=text, time=time, day=day))
            if who == 0 and rng.random() < P_REPLY:
                add(1, rng.choice(phrases.replies))

        add(0, rng.choice(phrases.opens))
        n_left = rng.randint(MIN_SAID, len(self.topic.facts) - 1)
        while n_left > 0:
            n = min(n_left, rng.randint(1, 2))
            add(0, " ".join(self.say() for _ in range(n)))
            n_left -= n
        for _ in range(rng.randint(1, 3)):
            add(0, f"{rng.choice(phrases.leads)}{self.change(is_small=True)}.")
            if rng.random() < P_PROPOSED:
                fact = rng.choice(self.told())
                self.rejected.append((fact.name, value := self.draw(fact)))
                add(1, fill(rng.choice(phrases.proposes), noun=fact.noun, v=value))
                add(0, rng.choice(phrases.rejects))
        return self.finish("chat", "\n".join(lines))

    def finish(self, kind: str, text: str) -> EverydayDocument:
        """The document, with a question for every fact of the topic."""
        facts = []
        for fact in self.topic.facts:
            question = fill(self.rng.choice(fact.ask), s=self.subject)
            if fact.name not in self.values:
                facts.append(EverydayFact("not said", self.subject, fact.name, question, NOT_SAID))
                continue
            *old, answer = self.values[fact.name]
            statement, at = self.stated[fact.name]
            wrong = [*old, *(value for name, value in self.rejected if name == fact.name)]
            options = (answer, *wrong) if wrong else ()
            name = f"{CHANGED if old else ''}{fact.name}"
            answer = statement[at : at + len(answer)]
            facts.append(EverydayFact("span", self.subject, name, question, answer, statement, at, options))
        title = self.subject[0].upper() + self.subject[1:]
        return EverydayDocument(f"{kind}: {self.topic.name}", title, text.strip(), tuple(facts))
