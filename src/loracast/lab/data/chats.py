"""Draw conversations of two friends over several days, with questions whose answers are known.

`content/chats.toml` has the themes: what somebody may say of themselves, change later, and be asked for. Both friends
speak of some of the same themes, so that who said it decides; and of each a theme is asked for that only the other one,
or nobody, spoke of. A message is a row with its speaker and time, as documents/conversation.py reads it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Literal

from pydantic import TypeAdapter

from loracast.answering.answers import NOT_SAID
from loracast.documents.conversation import Message
from loracast.documents.tables import take_marks
from loracast.lab.data.everyday import EverydayDocument, EverydayFact
from loracast.lab.data.facts import Split, expand, fill, pick_alternatives
from loracast.lab.data.rows import read_content

Asks = Literal["said", "changed", "who", "when", "other said", "nobody said"]
"""What a question of a conversation asks for: the first words of its fact's attribute."""
_P_SHARED = 0.5  # of a theme: both speak of it
_P_CHANGE = 0.5  # of a theme that may change: it does
_P_FILLER = 0.6  # of a message: one that says nothing comes before it
_MOST_MISSING = 6  # questions for what one did not say
_DAYS = (4, 9)  # on which the two talk


@dataclass(frozen=True)
class Theme:
    """What somebody may say of themselves; the wordings have {v} for the value and {who} for the speaker."""

    split: Split
    name: str
    value: str  # pattern
    say: Sequence[str]
    ask: Sequence[str]
    who: Sequence[str]
    change: Sequence[str] = ()
    when: Sequence[str] = ()  # of what happened on the day of its message


@dataclass(frozen=True)
class Phrases:
    """What all conversations of a split share."""

    fillers: Sequence[str]


@dataclass(frozen=True)
class _Told:
    """A message that states the value of a theme."""

    theme: Theme
    speaker: int
    text: str
    value: str
    value_at: int  # in the text
    is_change: bool = False


@cache
def load_themes() -> tuple[Sequence[Theme], Mapping[Split, Phrases]]:
    """Read the themes of all splits and the phrases of each, once."""
    content = dict(read_content("chats"))
    themes = TypeAdapter(list[Theme], config={"extra": "forbid"}).validate_python(content.pop("theme"))
    return themes, TypeAdapter(dict[Split, Phrases]).validate_python(content)


def make_chat(rng: random.Random, split: Split) -> EverydayDocument:
    """Draw a conversation of two friends, with questions for what they said, who said it, when, and what nobody did."""
    while True:
        document = _draw(rng, split)
        said = [fact for fact in document.facts if fact.kind == "span"]
        if all(document.text.count(fact.statement) == 1 and fact.answer not in fact.question for fact in said):
            return document


def _draw(rng: random.Random, split: Split) -> EverydayDocument:
    themes, phrases = load_themes()
    names: list[str] = []
    while len(set(names)) < 2:
        names = [expand(rng, "{first}") for _ in range(2)]
    of_split = [theme for theme in themes if theme.split == split]
    told = list[_Told]()
    for theme in rng.sample(of_split, rng.randint(4, min(9, len(of_split)))):
        speakers = [0, 1] if rng.random() < _P_SHARED else [rng.randrange(2)]
        told += [_state(rng, theme, speaker) for speaker in speakers]
    rng.shuffle(told)
    changes = [
        _state(rng, one.theme, one.speaker, one) for one in told if one.theme.change and rng.random() < _P_CHANGE
    ]
    messages = _spread(rng, [*told, *changes], phrases[split].fillers, names)
    text, rows = take_marks("\n".join(message.line for message, _ in messages))
    facts = _ask(rng, [(said, message.line[1:]) for message, said in messages if said], of_split, names)
    return EverydayDocument("chat", f"Conversation of {names[0]} and {names[1]}", text, tuple(facts), rows=rows)


def _state(rng: random.Random, theme: Theme, speaker: int, before: _Told | None = None) -> _Told:
    wording = rng.choice(theme.say if before is None else theme.change)
    value = expand(rng, pick_alternatives(rng, theme.value))
    while before is not None and value == before.value:
        value = expand(rng, pick_alternatives(rng, theme.value))
    slots = {"old": "" if before is None else before.value, "v": value}
    at = len(fill(wording[: wording.index("{v}") + 3], **slots)) - len(value)
    return _Told(theme, speaker, fill(wording, **slots), value, at, before is not None)


def _spread(
    rng: random.Random, told: Sequence[_Told], fillers: Sequence[str], names: Sequence[str]
) -> list[tuple[Message, _Told | None]]:
    """Messages in the order of `told` over several days, with some between them that say nothing."""
    moment = datetime(rng.randint(2021, 2025), rng.randint(1, 12), rng.randint(1, 28), rng.randint(8, 20))
    starts = set(rng.sample(range(1, len(told)), min(len(told) - 1, rng.randint(*_DAYS))))
    messages = list[tuple[Message, _Told | None]]()
    for i, one in enumerate(told):
        if i in starts:
            moment = (moment + timedelta(days=rng.randint(1, 30))).replace(hour=rng.randint(8, 20))
        if rng.random() < _P_FILLER:
            moment += timedelta(minutes=rng.randint(1, 9))
            messages.append((Message(names[rng.randrange(2)], rng.choice(fillers), moment), None))
        moment += timedelta(minutes=rng.randint(1, 9))
        messages.append((Message(names[one.speaker], one.text, moment), one))
    return messages


def _ask(
    rng: random.Random, told: Sequence[tuple[_Told, str]], themes: Sequence[Theme], names: Sequence[str]
) -> list[EverydayFact]:
    """Questions for the newest of what each said of a theme, for who and when it was, and for what one did not say."""
    facts, newest = list[EverydayFact](), {(said.theme.name, said.speaker): (said, line) for said, line in told}
    values = [said.value for said, _ in newest.values()]

    def add(kind: Asks, theme: Theme, question: str, answer: str = NOT_SAID, line: str = "", at: int = 0) -> None:
        is_said = bool(line)
        facts.append(
            EverydayFact(
                "span" if is_said else "not said", question, f"{kind}: {theme.name}", question, answer, line,
                at if is_said else None,
            )
        )  # fmt: skip

    for said, line in newest.values():
        theme, who = said.theme, names[said.speaker]
        offset = len(line) - len(said.text)
        old = [one.value for one, _ in told if one.theme is theme and one.speaker == said.speaker and one is not said]
        ask = fill(rng.choice(theme.ask), who=who)
        add("changed" if old else "said", theme, ask, said.value, line, offset + said.value_at)
        if values.count(said.value) == 1 and not old:
            add("who", theme, fill(rng.choice(theme.who), v=said.value), who, line, 0)
        if theme.when:
            date = line[line.index("(") + 1 : line.index(",")].partition(" ")[2]  # without the weekday
            add("when", theme, fill(rng.choice(theme.when), who=who), date, line, line.index(date))
    missing = [(theme, i) for theme in themes for i in range(2) if (theme.name, i) not in newest]
    for theme, speaker in rng.sample(missing, min(len(missing), _MOST_MISSING)):
        kind: Asks = "other said" if (theme.name, 1 - speaker) in newest else "nobody said"
        add(kind, theme, fill(rng.choice(theme.ask), who=names[speaker]))
    return facts
