"""Everyday documents: the content keeps its promises, every question has one right answer, and splits are disjoint."""

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache

import pytest

from loracast.answering.answers import NOT_SAID
from loracast.errors import ConfigError
from loracast.lab.data.everyday import (
    KINDS,
    MAX_WORDS,
    MIN_WORDS,
    EverydayDocument,
    EverydayFact,
    Genre,
    Wordings,
    load_genres,
    make_document,
)
from loracast.lab.data.facts import AFTER, BEGIN, INSIDE, Split, entity_split, expand, variants
from loracast.lab.data.rows import read_content
from loracast.lab.evaluation.synthetic import is_right
from loracast.lab.training.document_source import DataConfig, EpisodeSource

SPLITS: tuple[Split, ...] = ("train", "dev", "test")
GENRES = load_genres("train")  # those of dev and test are among them


def normalise(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9{}<>]+", text.lower()))


def slots(text: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text))


@cache
def documents(split: Split) -> list[EverydayDocument]:
    """Six hundred documents of a split, made once for all tests."""
    return [make_document(random.Random(f"0/{i}"), split=split) for i in range(600)]


def spelled_out(wordings: Wordings, split: Split) -> list[str]:
    return [text for wording in wordings[split] for text in variants(wording)]


def said(genre: Genre) -> Iterator[Wordings]:
    """Statements and rows of a genre."""
    for saying in genre.sayings:
        yield from (one for one in (saying.state, saying.yes, saying.no) if one)
    if genre.list:
        yield genre.list.rows


def asked(genre: Genre) -> Iterator[Wordings]:
    """Questions of a genre."""
    for saying in genre.sayings:
        yield from saying.questions.values()
        yield from saying.check.values()
    if listing := genre.list:
        yield from (*listing.ask.values(), *listing.check.values(), *listing.backwards.values(), listing.count)
        yield from (comparison.ask for comparison in listing.compare)


# ------------------------------------------------------------------------------------------------------------- content


def test_there_is_enough_content() -> None:
    for split, fewest in zip(SPLITS, (2, 1, 2), strict=True):
        assert len(load_genres(split)) >= (60 if split == "train" else 20)
        for name, genre in load_genres(split).items():
            assert genre == GENRES[name]
            names = list(itertools.chain(*(saying.questions for saying in genre.sayings)))
            assert len(names) >= 6 and len(set(names)) == len(names), genre.name
            assert len(genre.layouts[split]) >= fewest, genre.name
            assert all(len(spelled_out(one, split)) >= fewest for one in said(genre)), genre.name


@pytest.mark.parametrize("genre", GENRES.values(), ids=GENRES)
def test_wordings_have_exactly_their_slots(genre: Genre) -> None:
    names = {"s", *genre.names}
    kinds = read_content("values")
    for split in (split for split in SPLITS if genre.name in load_genres(split)):
        for saying in genre.sayings:
            for text in spelled_out(saying.state, split) if saying.state else ():
                assert all(text.count(f"{{{name}}}") == 1 for name in saying.values), text
                assert slots(text) <= names | set(saying.values), text
            assert set(saying.ask) == set(saying.values) and set(saying.check) <= set(saying.values)
            for name, wordings in saying.questions.items():
                assert all(slots(text) <= names for text in spelled_out(wordings, split)), name
            for name, wordings in saying.check.items():
                assert all(name in slots(text) for text in spelled_out(wordings, split)), name
        if listing := genre.list:
            assert set(listing.ask) == set(listing.columns)
            for text in listing.rows[split]:
                columns = {"item", *listing.columns}
                assert slots(text) in (columns, columns | {f"{name}2" for name in columns}), text
        for text in genre.fillers[split]:
            assert slots(text) <= names, text
        for layout in genre.layouts[split]:
            assert layout.count("<say>") < len(genre.sayings)  # something is left to ask for
            assert layout.count("<filler>") <= len(genre.fillers[split])
            assert layout.count("<list>") == (genre.list is not None)
            assert slots(layout) <= names | set(kinds), layout
        texts = [text for one in asked(genre) for text in spelled_out(one, split)]
        assert all(text.endswith("?") for text in texts)


@pytest.mark.parametrize(("one", "other"), itertools.combinations(SPLITS, 2))
def test_layouts_and_wordings_of_splits_are_disjoint(one: Split, other: Split) -> None:
    def everything(split: Split, part: str) -> set[str]:
        texts: list[str] = []
        for genre in load_genres(split).values():
            if part == "questions":
                texts += [text for wordings in asked(genre) for text in spelled_out(wordings, split)]
            elif part == "statements":
                texts += [text for wordings in said(genre) for text in spelled_out(wordings, split)]
            else:
                texts += [*genre.layouts[split], *genre.fillers[split], *genre.asides.get(split, ())]
                texts += [f"{genre.name} {title}" for title in genre.titles[split]]
        return {" ".join(text.lower().split()) for text in texts}

    for part in ("questions", "statements", "layouts"):
        shared = everything(one, part) & everything(other, part)
        assert not shared, shared


def test_no_question_belongs_to_two_attributes_of_a_genre() -> None:
    for genre in GENRES.values():
        owners: dict[str, int] = {}
        for number, wordings in enumerate(asked(genre)):
            splits = [split for split in SPLITS if genre.name in load_genres(split)]
            for text in itertools.chain(*(spelled_out(wordings, split) for split in splits)):
                assert owners.setdefault(normalise(text), number) == number, text


def test_entities_of_splits_are_disjoint() -> None:
    subjects = {}
    for split in SPLITS:
        drawn = documents(split)
        subjects[split] = {fact.subject for d in drawn for fact in d.facts if fact.attribute == "count"}
        listed = [fact for d in drawn for fact in d.facts if d.genre in ("minutes", "staff directory")]
        people = {fact.subject for fact in listed if fact.kind == "span" and fact.attribute in ("task", "job")}
        assert people and all(entity_split(person) == split for person in people)
    assert min(map(len, subjects.values())) > 200
    assert all(not subjects[a] & subjects[b] for a, b in itertools.combinations(SPLITS, 2))


# ----------------------------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize("split", SPLITS)
def test_every_statement_is_in_the_text_and_holds_its_answer(split: Split) -> None:
    for document in documents(split):
        assert MIN_WORDS <= len(document.text.split()) <= MAX_WORDS
        assert not re.search(r"[{}\[\]]|<(say|list|filler|#)>", document.text + document.title)
        for fact in document.facts:
            assert fact.question[0].isupper() and not re.search(r"[{}\[\]]", fact.question + fact.answer)
            if fact.kind == "span":
                assert document.text.count(fact.statement) == 1
                assert fact.statement[fact.value_at :].startswith(fact.answer)
                assert fact.answer.lower() not in fact.question.lower()
            else:
                assert fact.statement == "" and fact.value_at is None
                assert fact.rule in document.text and bool(fact.rule) == (
                    fact.kind == "yes/no" and "?" not in fact.attribute
                )


@pytest.mark.parametrize("split", SPLITS)
def test_every_question_has_one_right_answer(split: Split) -> None:
    for document in documents(split):
        about = Counter((fact.subject, fact.attribute) for fact in document.facts)
        assert max(about.values()) == 1, about.most_common(1)
        questions = Counter(fact.question for fact in document.facts)
        assert max(questions.values()) == 1, questions.most_common(1)
        for fact in document.facts:
            if fact.options:
                assert fact.answer in fact.options and len(set(fact.options)) == 2
        # No value is another one or a part of it, so that each belongs to one question, in both directions.
        spans = [fact for fact in document.facts if fact.kind == "span"]
        values = [fact.subject if fact.attribute.startswith("item of ") else fact.answer for fact in spans]
        for one, other in itertools.combinations(values, 2):
            assert one.lower() not in other.lower() and other.lower() not in one.lower()


@pytest.mark.parametrize("split", SPLITS)
def test_what_is_not_said_does_not_stand_in_the_document(split: Split) -> None:
    """No sentence of the text is a wording that would answer, and an item that is not listed is not named."""
    for document in documents(split):
        genre, rest = GENRES[document.genre], document.text
        for filler in genre.fillers[split]:  # "There were songs and flags." does not say how many people came
            rest = rest.replace(filler, "")
        for fact in document.facts:
            if fact.kind != "not said":
                continue
            assert fact.answer == NOT_SAID
            if genre.list and not any(fact.attribute in saying.questions for saying in genre.sayings):
                assert fact.attribute in genre.list.ask and fact.subject.lower() not in document.text.lower()
            for saying in genre.sayings:
                if fact.attribute in saying.questions:
                    wordings = [one for one in (saying.state, saying.yes, saying.no) if one]
                    for text in itertools.chain(*(spelled_out(one, split) for one in wordings)):
                        pattern = re.sub(r"\\{\w+\\}", "[^.]{1,40}?", re.escape(text))
                        assert not re.search(pattern, rest, re.IGNORECASE), (text, document.text)


def test_counts_and_comparisons_hold() -> None:
    """Counted and compared anew, from the rows of lists that have one item a line."""
    n_counted = n_compared = 0
    for number in range(400):
        document = make_document(random.Random(number), split="train", genre="menu")
        if "Dish | Price\n" not in document.text:
            continue
        table = document.text.split("Dish | Price\n")[1].split("\n\n")[0]
        prices = {dish: float(price[1:]) for dish, price in (line.split(" | ") for line in table.split("\n"))}
        for fact in document.facts:
            if fact.kind == "count":
                assert int(fact.answer) == len(prices)
                n_counted += 1
            if fact.kind == "comparison":
                pick = min if fact.attribute.startswith("low") else max
                assert fact.answer == pick(fact.options, key=lambda option: prices[option])
                n_compared += 1
    assert n_counted > 10 and n_compared > 10


def test_yes_and_no_are_balanced_and_every_kind_is_asked() -> None:
    for split in SPLITS:
        facts = [fact for document in documents(split) for fact in document.facts]
        assert {fact.kind for fact in facts} == set(KINDS)
        answers = Counter(fact.answer for fact in facts if fact.kind == "yes/no")
        assert set(answers) == {"Yes", "No"} and 0.45 < answers["Yes"] / answers.total() < 0.55
        options = Counter(fact.options.index(fact.answer) for fact in facts if fact.kind == "comparison")
        assert 0.4 < options[0] / options.total() < 0.6


def test_some_values_share_a_sentence_and_some_stand_behind_a_pronoun() -> None:
    spans = [fact for document in documents("train") for fact in document.facts if fact.kind == "span"]
    statements = Counter(fact.statement for fact in spans)
    assert sum(n > 1 for n in statements.values()) > 200
    assert sum(fact.statement.startswith("It ") for fact in spans) > 100


def test_other_seeds_make_other_documents() -> None:
    assert make_document(random.Random(0), split="train") != make_document(random.Random(1), split="train")


def test_every_pattern_can_be_filled() -> None:
    rng = random.Random(0)
    for genre in GENRES.values():
        patterns = [*genre.subjects, *genre.names.values()]
        patterns += [pattern for saying in genre.sayings for pattern in saying.values.values()]
        if genre.list:
            patterns += [*genre.list.items, *itertools.chain(*genre.list.columns.values())]
        for pattern in patterns:
            assert "{" not in expand(rng, pattern), pattern


# ------------------------------------------------------------------------------------------------ training and scoring


def test_labels_lie_on_the_answers_and_questions_without_a_span_have_none(base) -> None:
    source = EpisodeSource(DataConfig(everyday_share=1.0, max_chunk_tokens=256, questions_per_step=24), base.tokenizer,
                           base.chat)  # fmt: skip
    n_values = n_without = 0
    for number in range(4):
        episodes = source.step(number)
        prompts = [question.prompt for episode in episodes for question in episode.questions]
        assert len(prompts) == 24 and all(episode.task == "everyday" for episode in episodes)
        for episode in episodes:
            spelled: dict[int, list[int]] = {}
            for label in episode.token_labels:
                if label.gate != AFTER and label.statement >= 0:
                    spelled.setdefault(label.statement, []).append(episode.chunks[label.chunk][label.token])
            begun = Counter(label.statement for label in episode.token_labels if label.gate == BEGIN)
            assert all(n == 1 for statement, n in begun.items() if statement >= 0)
            for i, question in enumerate(episode.questions):
                answer = base.tokenizer.decode(question.answer, skip_special_tokens=True).strip()
                assert answer != NOT_SAID
                if answer in ("Yes", "No"):
                    assert i not in spelled
                    n_without += 1
                elif i in spelled:
                    assert answer in base.tokenizer.decode(spelled[i])
                    n_values += 1
    assert n_values > 40 and n_without > 5


def test_values_that_no_question_asks_for_are_labelled_too(base) -> None:
    source = EpisodeSource(DataConfig(max_chunk_tokens=2_000), base.tokenizer, base.chat)
    n_unasked = 0
    for seed in range(12):
        episode = source.everyday_episode(random.Random(seed), 3, set())
        assert len(episode.chunks) == 1 and len(episode.questions) == 3
        document = make_document(random.Random(seed), split="train")
        ids, spelled = episode.chunks[0], set[str]()
        begins = [label.token for label in episode.token_labels if label.gate == BEGIN]
        inside = {label.token for label in episode.token_labels if label.gate == INSIDE}
        for token in begins:
            end = token + 1
            while end in inside:
                end += 1
            spelled.add(base.tokenizer.decode(ids[token:end]).strip())
        n_unasked += sum(label.statement == -1 for label in episode.token_labels)
        for fact in (*document.facts, *document.unasked):
            if fact.kind == "span":
                assert any(fact.answer in text for text in spelled), fact
    assert n_unasked > 100


def test_questions_of_a_step_are_distinct_and_other_steps_are_as_without_a_share(base) -> None:
    tokenizer, chat = base.tokenizer, base.chat
    source = EpisodeSource(DataConfig(everyday_share=0.5, questions_per_step=32), tokenizer, chat)
    for episodes in (source.of_kind("everyday", number) for number in range(3)):
        system = {tuple(question.prompt) for episode in episodes for question in episode.questions}
        assert len(system) == sum(len(episode.questions) for episode in episodes) == 32
    without = EpisodeSource(DataConfig(questions_per_step=32), tokenizer, chat)
    kinds = [episodes[0].task for episodes in map(source.step, range(6))]
    assert {"everyday", "facts"} == set(kinds)
    assert all(source.step(n) == without.step(n) for n, kind in enumerate(kinds) if kind == "facts")
    with pytest.raises(ConfigError, match="more than 1"):
        DataConfig(everyday_share=1.1)


def fact(kind: str, answer: str, options: Sequence[str] = (), question: str = "") -> EverydayFact:
    return EverydayFact(kind, "", "", question, answer, options=tuple(options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "about", "right"),
    [
        ("It costs £41.", fact("span", "£41"), True),
        ("It costs £415.", fact("span", "£41"), False),
        ("43", fact("span", "43 people", question="How many may come?"), True),
        ("143 people", fact("span", "43 people", question="How many may come?"), False),
        ("43", fact("span", "43 minutes", question="How long is it baked?"), False),
        ("Yes, it may.", fact("yes/no", "Yes", ("Yes", "No")), True),
        ("No. Yes.", fact("yes/no", "Yes", ("Yes", "No")), False),
        ("Nobody knows", fact("yes/no", "No", ("Yes", "No")), False),
        ("The lentil pie is cheaper than the nut loaf.", fact("comparison", "nut loaf", ("nut loaf", "lentil pie")), False),
        ("The nut loaf, not the lentil pie.", fact("comparison", "nut loaf", ("nut loaf", "lentil pie")), True),
        ("There are six of them.", fact("count", "6"), True),
        ("16", fact("count", "6"), False),
        ("The document doesn't say.", fact("not said", NOT_SAID), True),
        ("£12", fact("not said", NOT_SAID), False),
    ],
)  # fmt: skip
def test_what_counts_as_right(answer: str, about: EverydayFact, right: bool) -> None:
    assert is_right(answer, about) is right
