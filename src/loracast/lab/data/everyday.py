"""Draw everyday documents, such as e-mails, contracts, recipes and price lists, with questions that a reader has.

`content/everyday.toml` has the genres: layouts, sentences with slots for values, lists, and questions for every value;
`content/everyday_train.toml` has further genres, which only training draws. Slots and alternatives are written as in
`lab/data/facts.py`. A layout also has marks: `<say>` takes the next sentence, `<list>` the list, `<filler>` a line that
holds no fact which is asked for, and `<#>` counts up from one.

A document leaves out some of its genre's sentences, and questions for those have the answer `NOT_SAID`. Train, dev and
test share values, never layouts, wordings or entities. The same rng state gives the same document in every process.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Annotated, Literal, get_args

from pydantic import Field, TypeAdapter

from loracast.answering.answers import NOT_SAID
from loracast.documents.read import Document
from loracast.lab.data.facts import Split, expand, fill, make_entity, pick_alternatives
from loracast.lab.data.rows import read_content

Kind = Literal["span", "yes/no", "count", "comparison", "not said"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Kinds of questions; only the answer to a span question is copied from the document."""
Wordings = Mapping[Split, Sequence[str]]

_MARK = re.compile(r"<(say|list|filler|#)>")
_LINE_START = re.compile(r"^the\b", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.!?])(\s+)")

MIN_WORDS, MAX_WORDS = 60, 350  # of a document
P_CHECK = 0.25  # of a value: asked for with yes or no too
P_BACKWARDS = 0.3  # of a line in a list: its item is asked for, by a value
MAX_LISTED = 6  # questions for values in a list
MAX_NOT_SAID = 2
N_TRIES = 200  # draws for a fresh value before the whole document is drawn anew


@dataclass(frozen=True)
class EverydayFact:
    """A question about a document with its one right answer."""

    kind: Kind
    subject: str
    attribute: str
    question: str
    answer: str
    statement: str = ""  # the sentence that holds the answer, verbatim; "" for all kinds but span
    value_at: int | None = None  # offset of the answer in the statement
    options: tuple[str, ...] = ()  # the answers to choose between, one of which is right
    rule: str = ""  # of a question whether a rule holds: the sentences that state it, verbatim
    also_right: tuple[str, ...] = ()  # further answers that count as right


@dataclass(frozen=True)
class EverydayDocument:
    """A text with questions; `genre` is its name in the content.

    `unasked` are the span facts of its list that are left over, so that all values of the document are known.
    `rows` are the characters of the text at which lines begin that are rows of tables.
    """

    genre: str
    title: str
    text: str
    facts: tuple[EverydayFact, ...]
    unasked: tuple[EverydayFact, ...] = ()
    rows: tuple[int, ...] = ()

    def as_document(self) -> Document:
        """The document as `read_document` gives it."""
        return replace(Document.from_text(self.text, self.title), rows=self.rows)


@dataclass(frozen=True)
class Saying:
    """What one or two sentences say: values, each with questions for it; or a rule that holds or does not."""

    values: Mapping[str, str] = field(default_factory=dict)  # patterns by name
    state: Wordings = field(default_factory=dict)
    ask: Mapping[str, Wordings] = field(default_factory=dict)  # by name of the value
    check: Mapping[str, Wordings] = field(default_factory=dict)  # questions with a value, true or not
    rule: str = ""  # name of the rule, which has no values
    yes: Wordings = field(default_factory=dict)
    no: Wordings = field(default_factory=dict)
    asks: Wordings = field(default_factory=dict)  # questions whether the rule holds

    @property
    def questions(self) -> dict[str, Wordings]:
        """Questions by the name of the value or the rule."""
        return {self.rule: self.asks} if self.rule else dict(self.ask)


@dataclass(frozen=True)
class Comparison:
    """Questions which of two items has the lower or the higher value in a column."""

    column: str
    pick: Literal["low", "high"]
    ask: Wordings


@dataclass(frozen=True)
class Listing:
    """A list or table of items; a row that begins with "~" is a sentence, which stands on no line of its own."""

    items: Sequence[str]  # patterns of names
    size: tuple[int, int]  # fewest and most items
    columns: Mapping[str, Sequence[str]]  # patterns of values, one of which a document draws
    rows: Wordings  # the last line is a row of one item or two ({item2}, {price2}); those before it are the head
    ask: Mapping[str, Wordings]  # by column
    check: Mapping[str, Wordings] = field(default_factory=dict)
    backwards: Mapping[str, Wordings] = field(default_factory=dict)  # for the item, by column
    count: Wordings = field(default_factory=dict)
    compare: Sequence[Comparison] = ()
    order: str = ""  # the column by which the list is sorted; "-column" for falling values


@dataclass(frozen=True)
class Genre:
    """A kind of document."""

    name: str
    subjects: Sequence[str]  # patterns of what a document is about
    titles: Wordings
    layouts: Wordings
    fillers: Wordings
    sayings: Annotated[Sequence[Saying], Field(alias="saying")]
    names: Mapping[str, str] = field(default_factory=dict)  # patterns of what is drawn once for a document
    asides: Wordings = field(default_factory=dict)  # paragraphs without any fact that is asked for
    list: Listing | None = None
    is_ordered: bool = True  # whether the sentences keep the order of the content


@cache
def load_genres(split: Split) -> dict[str, Genre]:
    """Read the genres that documents of a split are drawn from, once."""
    names = ("everyday", "everyday_train") if split == "train" else ("everyday",)
    tables = [table for name in names for table in read_content(name)["genre"]]
    genres = TypeAdapter(list[Genre], config={"extra": "forbid"}).validate_python(tables)
    return {genre.name: genre for genre in genres}


def make_document(rng: random.Random, *, split: Split, genre: str | None = None) -> EverydayDocument:
    """Draw a document of a genre, or of any, with its questions; two facts never share subject and attribute."""
    genres = load_genres(split)
    chosen = genres[genre or rng.choice(list(genres))]
    while True:
        draft = _Draft(rng, chosen, split)
        document = draft.finish()
        if draft.is_fresh and MIN_WORDS <= len(document.text.split()) <= MAX_WORDS and _is_clear(document):
            return document


def _is_clear(document: EverydayDocument) -> bool:
    """Whether each statement stands once in the text, and no question stands twice or holds its own answer."""
    questions = [fact.question for fact in document.facts]
    spans = [fact for fact in document.facts if fact.kind == "span"]
    return (
        len(set(questions)) == len(questions)
        and all(document.text.count(fact.statement) == 1 for fact in spans)
        and not any(fact.answer.lower() in fact.question.lower() for fact in spans)
    )


class _Draft:
    """A document that is being drawn: what it is about, its facts so far, and the values that it has used."""

    def __init__(self, rng: random.Random, genre: Genre, split: Split):
        self.rng, self.genre, self.split = rng, genre, split
        self.is_fresh = True  # whether no value is part of another one, so that each belongs to one question
        self.names = {"s": make_entity(rng, rng.choice(genre.subjects), split)}
        for name, pattern in genre.names.items():
            self.names[name] = self.fresh(pattern, self.names.values())
        self.facts: list[EverydayFact] = []
        self.unasked: list[EverydayFact] = []
        self.used = list(self.names.values())

    def finish(self) -> EverydayDocument:
        """Fill a layout, and ask for what it left out."""
        genre, rng = self.genre, self.rng
        layout = self.with_asides(self.choose(genre.layouts))
        order = rng.sample(range(len(genre.sayings)), layout.count("<say>"))
        said = [genre.sayings[i] for i in (sorted(order) if genre.is_ordered else order)]
        fillers = list(genre.fillers[self.split])
        rng.shuffle(fillers)
        number = 0
        sayings = iter(said)

        def put(mark: re.Match[str]) -> str:
            nonlocal number
            if mark[1] == "say":
                return self.say(next(sayings))
            if mark[1] == "list" and genre.list:
                return self.list_items(genre.list)
            if mark[1] == "filler":
                return self.fill(pick_alternatives(self.rng, fillers.pop()))
            number += 1
            return str(number)

        # Names are filled in first, since what a mark stands for is filled on its own; a line begins with a capital.
        outline = _LINE_START.sub("The", expand(rng, self.fill(layout)))
        text = _MARK.sub(put, outline)
        self.ask_unsaid([saying for saying in genre.sayings if saying not in said])
        title = expand(rng, self.word(genre.titles))
        return EverydayDocument(genre.name, title, text.strip(), tuple(self.facts), tuple(self.unasked))

    def with_asides(self, layout: str) -> str:
        """The layout with any number of its genre's asides between its paragraphs."""
        paragraphs = layout.split("\n\n")
        asides = self.genre.asides.get(self.split, ())
        if len(paragraphs) > 1:
            for aside in self.rng.sample(asides, self.rng.randint(0, len(asides))):
                paragraphs.insert(self.rng.randrange(1, len(paragraphs)), pick_alternatives(self.rng, aside))
        return "\n\n".join(paragraphs)

    def choose(self, wordings: Wordings) -> str:
        """A wording of the split, with its alternatives picked."""
        return pick_alternatives(self.rng, self.rng.choice(wordings[self.split]))

    def fill(self, wording: str, **slots: str) -> str:
        return fill(wording, **self.names, **slots)

    def word(self, wordings: Wordings, **slots: str) -> str:
        return self.fill(self.choose(wordings), **slots)

    def fresh(self, pattern: str, taken: Iterable[str]) -> str:
        """Draw what is no part of anything taken, nor the other way round; if there is none, nothing is fresh."""
        taken = [one.lower() for one in taken]
        for _ in range(N_TRIES):
            drawn = expand(self.rng, pattern)
            if not any(drawn.lower() in one or one in drawn.lower() for one in taken):
                return drawn
        self.is_fresh = False
        return drawn

    def say(self, saying: Saying) -> str:
        """The sentences of a saying; its questions join the facts."""
        subject = self.names["s"]
        if saying.rule:
            holds = self.rng.random() < 0.5
            question = self.word(saying.asks)
            stated = self.word(saying.yes if holds else saying.no)
            self.add_yes_no(subject, saying.rule, question, holds, stated)
            return stated
        values: dict[str, str] = {}
        for name, pattern in saying.values.items():
            values[name] = self.fresh(pattern, self.used)
            self.used.append(values[name])
        pieces = _SENTENCE_END.split(self.choose(saying.state))  # sentence, space, ..., space, sentence
        filled = [self.fill(piece, **values) for piece in pieces]
        for name, value in values.items():
            place = next(i for i, piece in enumerate(pieces) if f"{{{name}}}" in piece)
            at = self.offset(pieces[place], name, values)
            question = self.word(saying.ask[name])
            self.facts.append(_span(subject, name, question, value, filled[place], at))
            if name in saying.check and self.rng.random() < P_CHECK:
                shown = value if self.rng.random() < 0.5 else self.fresh(saying.values[name], self.used)
                self.add_yes_no(subject, f"{name}?", self.word(saying.check[name], **{name: shown}), shown == value)
        return "".join(filled)

    def offset(self, wording: str, name: str, slots: Mapping[str, str]) -> int:
        """Where a filled wording has the value of a slot."""
        slot = f"{{{name}}}"
        head = self.fill(wording[: wording.index(slot) + len(slot)], **slots)
        return len(head) - len(slots[name])

    def add_yes_no(self, subject: str, attribute: str, question: str, holds: bool, rule: str = "") -> None:
        answer, options = "Yes" if holds else "No", ("Yes", "No")
        self.facts.append(EverydayFact("yes/no", subject, attribute, question, answer, options=options, rule=rule))

    def list_items(self, listing: Listing) -> str:
        """The list, whose questions join the facts."""
        rng = self.rng
        *head, row = self.choose(listing.rows).split("\n")
        between = " " if row.startswith("~") else "\n"
        row = row.removeprefix("~")
        suffixes = ("", "2") if "{item2}" in row else ("",)
        per_row = len(suffixes)
        n = rng.randint(*listing.size) // per_row * per_row
        items = self.distinct_items(listing, n + 1)
        columns: dict[str, list[str]] = {name: [] for name in listing.columns}
        for name, patterns in listing.columns.items():
            pattern = rng.choice(patterns)
            for _ in range(n):
                columns[name].append(self.fresh(pattern, self.used))
                self.used.append(columns[name][-1])
        if listing.order:
            columns[listing.order.removeprefix("-")].sort(key=_size, reverse=listing.order.startswith("-"))
        rows: list[str] = []
        spans: list[EverydayFact] = []
        for first in range(0, n, per_row):
            slots: dict[str, str] = {}
            for k, suffix in enumerate(suffixes):
                slots[f"item{suffix}"] = items[first + k]
                slots |= {f"{name}{suffix}": column[first + k] for name, column in columns.items()}
            rows.append(self.fill(row, **slots))
            for suffix in suffixes:
                spans += self.of_row(listing, row, suffix, slots, rows[-1])
        rng.shuffle(spans)
        self.facts += spans[:MAX_LISTED]
        self.unasked += spans[MAX_LISTED:]
        self.ask_about_list(listing, items, columns)
        return "\n".join([*head, between.join(rows)])

    def distinct_items(self, listing: Listing, n: int) -> list[str]:
        items: list[str] = []
        while len(items) < n:
            item = make_entity(self.rng, self.rng.choice(listing.items), self.split)
            if not any(item.lower() in other.lower() or other.lower() in item.lower() for other in items):
                items.append(item)
        return items

    def of_row(
        self, listing: Listing, row: str, suffix: str, slots: Mapping[str, str], statement: str
    ) -> list[EverydayFact]:
        """Span questions for one item of a list: for each of its values, or for the item itself by that value."""
        item = slots[f"item{suffix}"]
        facts = []
        for name in listing.columns:
            value = slots[f"{name}{suffix}"]
            at = self.offset(row, f"{name}{suffix}", slots)
            fact = _span(item, name, self.word(listing.ask[name], item=item), value, statement, at)
            if name in listing.backwards:
                question = self.word(listing.backwards[name], **{name: value})
                at = self.offset(row, f"item{suffix}", slots)
                other = _span(value, f"item of {name}", question, item, statement, at)
                fact, other = (other, fact) if self.rng.random() < P_BACKWARDS else (fact, other)
                self.unasked.append(other)
            facts.append(fact)
        return facts

    def ask_about_list(self, listing: Listing, items: Sequence[str], columns: Mapping[str, Sequence[str]]) -> None:
        """Ask whether, how many, which of two, and for the last item, which is not listed."""
        rng = self.rng
        *listed, absent = items
        if listing.check:
            name = rng.choice(sorted(listing.check))
            i, j = rng.sample(range(len(listed)), 2)
            value, shown = columns[name][i], columns[name][i if rng.random() < 0.5 else j]
            question = self.word(listing.check[name], item=listed[i], **{name: shown})
            self.add_yes_no(listed[i], f"{name}?", question, shown == value)
        if listing.count:
            question = self.word(listing.count)
            self.facts.append(EverydayFact("count", self.names["s"], "count", question, str(len(listed))))
        if listing.compare:
            comparison = rng.choice(listing.compare)
            i, j = rng.sample(range(len(listed)), 2)
            sizes = [_size(columns[comparison.column][k]) for k in (i, j)]
            if sizes[0] != sizes[1]:
                question = self.word(comparison.ask, a=listed[i], b=listed[j])
                answer = listed[i if (sizes[0] < sizes[1]) == (comparison.pick == "low") else j]
                attribute = f"{comparison.pick} {comparison.column}"
                options = (listed[i], listed[j])
                self.facts.append(
                    EverydayFact("comparison", " or ".join(options), attribute, question, answer, options=options)
                )
        name = rng.choice(sorted(listing.ask))
        question = self.word(listing.ask[name], item=absent)
        self.facts.append(EverydayFact("not said", absent, name, question, NOT_SAID))

    def ask_unsaid(self, unsaid: Sequence[Saying]) -> None:
        """Ask for what sentences would have said that the layout had no place for."""
        questions = [pair for saying in unsaid for pair in saying.questions.items()]
        for name, ask in self.rng.sample(questions, min(MAX_NOT_SAID, len(questions))):
            self.facts.append(EverydayFact("not said", self.names["s"], name, self.word(ask), NOT_SAID))


def _span(subject: str, attribute: str, question: str, value: str, statement: str, at: int) -> EverydayFact:
    """A fact whose answer is the value as the statement spells it, perhaps with a capital at its beginning."""
    answer = statement[at : at + len(value)]
    return EverydayFact("span", subject, attribute, question, answer, statement, at)


def _size(value: str) -> float:
    """The number in a value of a list ("£4.50", "09:15", "1,200 g"), to compare it with others of the same form."""
    return float(re.sub(r"[^\d.]", "", value))
