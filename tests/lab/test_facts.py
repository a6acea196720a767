"""Fact sheets: the content keeps its promises, and what is drawn from it is distinct, disjoint and reproducible."""

import itertools
import random
import re
from collections.abc import Iterator
from functools import cache

import pytest

from loracast.lab.data.facts import (
    FactSheet,
    Split,
    Table,
    entity_split,
    expand,
    make_entity,
    make_sheet,
    pattern_of_value,
    variants,
    wordings_of,
)
from loracast.lab.data.rows import read_content

KINDS = read_content("values")
GENERIC, DOMAINS = read_content("facts")["generic"], read_content("facts")["domain"]
ATTRIBUTES = [(domain["name"], attribute) for domain in DOMAINS for attribute in domain["attribute"]]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")


def normalise(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9{}]+", text.lower()))


def spelled_out(table: Table, split: Split) -> tuple[list[str], list[str]]:
    states, asks = (wordings_of(table, prefix, split) for prefix in ("state_", "ask_"))
    return list(itertools.chain(*map(variants, states))), list(itertools.chain(*map(variants, asks)))


def slots(text: str) -> list[str]:
    return sorted(re.findall(r"\{[^}]*\}", text))


def sheets(n_sheets: int, split: Split, seed: int = 0) -> Iterator[FactSheet]:
    rng = random.Random(seed)
    for _ in range(n_sheets):
        yield make_sheet(rng, rng.randint(1, 24), split=split)


@cache
def known_sheets(split: Split) -> list[FactSheet]:
    """Sheets of a split, made once for all tests."""
    return list(sheets(750, split))


# ------------------------------------------------------------------------------------------------------------ content


def test_there_is_enough_content() -> None:
    assert len(DOMAINS) >= 14
    assert len(ATTRIBUTES) >= 150
    assert all(len(domain["attribute"]) >= 9 for domain in DOMAINS)
    for kind, fewest in {"first": 150, "last": 150, "city": 150, "country": 80, "noun": 300, "adjective": 200}.items():
        assert len(KINDS[kind]) >= fewest, kind


def test_names_are_unique() -> None:
    names = [domain["name"] for domain in DOMAINS]
    assert len(set(names)) == len(names)
    for domain in DOMAINS:
        for values in ([a["name"] for a in domain["attribute"]], [a["noun"] for a in domain["attribute"]]):
            assert len(set(values)) == len(values), domain["name"]
    for kind, entries in KINDS.items():
        assert len(set(entries)) == len(entries), kind


def test_titles_suit_one_subject_and_several() -> None:
    for domain in DOMAINS:
        assert {title.count("{s}") for title in domain["title"]} == {0, 1}, domain["name"]
    assert all(slots(expand(random.Random(0), title)) == [] for title in GENERIC["title"])


@pytest.mark.parametrize(("domain", "attribute"), ATTRIBUTES, ids=lambda x: x if isinstance(x, str) else x["name"])
def test_wordings_have_exactly_their_placeholders(domain: str, attribute: Table) -> None:
    for split, fewest in zip(SPLITS, (4, 1, 2), strict=True):
        assert all(len(wordings_of(attribute, prefix, split)) >= fewest for prefix in ("state_", "ask_"))
        states, asks = spelled_out(attribute, split)
        assert all(slots(state) == ["{s}", "{v}"] for state in states)
        assert all(slots(ask) == ["{s}"] for ask in asks)
        assert all(state.endswith((".", "!")) for state in states)
        assert all(ask.endswith(("?", ".")) for ask in asks)
        assert not any(re.search(r"  |\b(a|an|the|my|your) \{s\}|the \{v\}'s", text) for text in states + asks)


@pytest.mark.parametrize("split", SPLITS)
def test_generic_wordings_have_exactly_their_placeholders(split: Split) -> None:
    states, asks = spelled_out(GENERIC, split)
    assert all(slots(state) == ["{noun}", "{s}", "{v}"] for state in states)
    assert all(slots(ask) == ["{noun}", "{s}"] for ask in asks)


@pytest.mark.parametrize("other", ["dev", "train"])
def test_wordings_of_splits_are_disjoint(other: Split) -> None:
    for wordings in [GENERIC, *(attribute for _, attribute in ATTRIBUTES)]:
        for texts, test in zip(spelled_out(wordings, other), spelled_out(wordings, "test"), strict=True):
            assert not {normalise(text) for text in texts} & {normalise(text) for text in test}
    everything = {
        split: {
            normalise(text)
            for wordings in [GENERIC, *(attribute for _, attribute in ATTRIBUTES)]
            for text in itertools.chain(*spelled_out(wordings, split))
        }
        for split in SPLITS
    }
    assert not everything[other] & everything["test"]  # not even across attributes


def test_generic_wordings_do_not_give_away_test_wordings() -> None:
    for domain, attribute in ATTRIBUTES:
        for which in (0, 1):
            generic = {
                split: {
                    normalise(text.replace("{noun}", attribute["noun"])) for text in spelled_out(GENERIC, split)[which]
                }
                for split in SPLITS
            }
            own = {split: {normalise(text) for text in spelled_out(attribute, split)[which]} for split in SPLITS}
            shared = (generic["train"] | own["train"]) & (generic["test"] | own["test"])
            assert not shared, f"{domain}.{attribute['name']}"


def test_wordings_are_not_repeated() -> None:
    for domain, attribute in ATTRIBUTES:
        for split in SPLITS:
            for texts in spelled_out(attribute, split):
                counted = [normalise(text) for text in texts]
                assert len(set(counted)) == len(counted), f"{domain}.{attribute['name']}"


def test_no_question_belongs_to_two_attributes_of_a_domain() -> None:
    for domain in DOMAINS:
        owners: dict[str, str] = {}
        for attribute in domain["attribute"]:
            for split in SPLITS:
                for ask in spelled_out(attribute, split)[1]:
                    assert owners.setdefault(normalise(ask), attribute["name"]) == attribute["name"], ask


def test_a_value_starts_a_sentence_only_where_it_needs_no_capital() -> None:
    rng = random.Random(0)
    for domain, attribute in ATTRIBUTES:
        states = [state for split in SPLITS for state in spelled_out(attribute, split)[0]]
        if any(state.startswith("{v}") for state in states):
            answers = [expand(rng, pattern_of_value(attribute)) for _ in range(50)]
            # an email address keeps its small letters at the start of a sentence too
            assert all(not answer[0].islower() or "@" in answer for answer in answers), f"{domain}.{attribute['name']}"


def test_every_slot_of_every_kind_can_be_filled() -> None:
    rng = random.Random(0)
    patterns = [pattern_of_value(attribute) for _, attribute in ATTRIBUTES]
    patterns += [pattern for domain in DOMAINS for pattern in domain["subjects"]]
    patterns += list(itertools.chain(*KINDS.values()))
    for pattern in patterns:
        assert "{" not in expand(rng, pattern), pattern


# --------------------------------------------------------------------------------------------------------- the notation


def test_expand() -> None:
    rng = random.Random(0)
    assert {expand(rng, "{3-5}") for _ in range(200)} == {"3", "4", "5"}
    assert {expand(rng, "{00-45/15}") for _ in range(200)} == {"00", "15", "30", "45"}
    assert expand(rng, "no slot") == "no slot"
    assert {expand(rng, "{weekday}") for _ in range(300)} == set(KINDS["weekday"])
    assert expand(rng, "{^noun}")[0].isupper() and expand(rng, "{noun}")[0].islower()


def test_variants() -> None:
    assert variants("[a|b] c[ d|]") == ("a c d", "a c", "b c d", "b c")
    assert variants("plain") == ("plain",)


# ------------------------------------------------------------------------------------------------------------- entities


def test_there_are_over_a_million_names() -> None:
    rng = random.Random(0)
    n_draws = 100_000
    n_distinct = len({expand(rng, "{name}") for _ in range(n_draws)})
    # n draws from K equally likely names repeat about n^2 / 2K times, from unequal ones more often
    assert n_draws - n_distinct < n_draws**2 / (2 * 1_000_000)


def test_a_name_belongs_to_one_split_whatever_it_names() -> None:
    rng = random.Random(0)
    for split in SPLITS:
        for pattern in ("the {name} kettle", "{name} Ltd", "{name}", "{first} {last}"):
            for _ in range(50):
                name = (
                    make_entity(rng, pattern, split).removeprefix("the ").removesuffix(" kettle").removesuffix(" Ltd")
                )
                assert entity_split(name) == entity_split(name.upper()) == split
    assert 0.05 < sum(entity_split(expand(rng, "{name}")) == "test" for _ in range(2_000)) / 2_000 < 0.15


def test_train_and_test_entities_are_disjoint() -> None:
    train, dev, test = (
        {fact.subject.casefold() for sheet in known_sheets(split) for fact in sheet.facts} for split in SPLITS
    )
    assert min(len(train), len(dev), len(test)) > 2_500
    assert not train & test and not train & dev and not dev & test


# --------------------------------------------------------------------------------------------------------------- sheets


@pytest.mark.parametrize("split", SPLITS)
def test_facts_hold_together(split: Split) -> None:
    for sheet in known_sheets(split):
        for fact in sheet.facts:
            assert fact.answer in fact.statement
            assert fact.subject.casefold() in fact.statement.casefold()
            assert fact.subject.casefold() in fact.question.casefold()
            assert fact.answer.casefold() not in fact.question.casefold()
            assert not re.search(r"[{}\[\]|]|  ", fact.statement + fact.question + sheet.title), fact
        assert len({(fact.subject, fact.attribute) for fact in sheet.facts}) == len(sheet.facts)
        assert len({fact.question for fact in sheet.facts}) == len(sheet.facts)
        joined = sheet.text.removeprefix("- ").replace("\n\n", " ").replace("\n- ", " ")
        assert joined == " ".join(fact.statement for fact in sheet.facts)


def test_values_of_an_attribute_differ_on_a_sheet() -> None:
    weekdays = {
        f"{name}.{attribute['name']}" for name, attribute in ATTRIBUTES if pattern_of_value(attribute) == "{weekday}"
    }
    for sheet in known_sheets("train"):
        seen = [(fact.attribute, fact.answer) for fact in sheet.facts if fact.attribute not in weekdays]
        assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("n_facts", [1, 5, 20, 30, 100])
def test_sheets_of_every_size(n_facts: int, split: Split) -> None:
    rng = random.Random(n_facts)
    for _ in range(20):
        sheet = make_sheet(rng, n_facts, split=split)
        assert len(sheet.facts) == n_facts
        assert len({fact.subject for fact in sheet.facts}) <= 12


@pytest.mark.parametrize(("n_facts", "n_subjects"), [(1, 1), (10, 1), (5, 5), (12, 12), (30, 3), (24, 12), (7, 2)])
def test_the_number_of_subjects_is_kept(n_facts: int, n_subjects: int) -> None:
    rng = random.Random(0)
    for _ in range(30):
        sheet = make_sheet(rng, n_facts, split="train", n_subjects=n_subjects)
        assert len({fact.subject for fact in sheet.facts}) == n_subjects


@pytest.mark.parametrize(("n_facts", "n_subjects"), [(0, None), (1, 2), (30, 1), (20, 13), (5, 0), (1_000, None)])
def test_impossible_sheets_are_refused(n_facts: int, n_subjects: int | None) -> None:
    with pytest.raises(ValueError, match="subjects"):
        make_sheet(random.Random(0), n_facts, split="train", n_subjects=n_subjects)


def test_most_sheets_stay_in_one_domain_and_some_share_attributes() -> None:
    rng = random.Random(0)
    drawn = [make_sheet(rng, 8, split="train", n_subjects=4) for _ in range(400)]
    n_mixed = sum(len({fact.attribute.split(".")[0] for fact in sheet.facts}) > 1 for sheet in drawn)
    n_tables = sum(len({fact.attribute for fact in sheet.facts}) == 2 for sheet in drawn)
    assert 0.2 < n_mixed / len(drawn) < 0.4
    assert 0.25 < n_tables / len(drawn) < 0.5


def test_wordings_are_those_of_the_split() -> None:
    """Each statement and question is one of its split's own or generic wordings, filled in."""
    kinds = {f"{name}.{attribute['name']}": attribute for name, attribute in ATTRIBUTES}
    for split in SPLITS:
        for sheet in known_sheets(split)[:100]:
            for fact in sheet.facts:
                attribute = kinds[fact.attribute]
                for said, which in ((fact.statement, 0), (fact.question, 1)):
                    own = spelled_out(attribute, split)[which] + spelled_out(GENERIC, split)[which]
                    filled = {
                        re.sub(r"\b(a) \{v\}", r"\1n {v}", text, flags=re.IGNORECASE) if an else text
                        for text in own
                        for an in (False, True)
                    }
                    filled = {
                        text.replace("{noun}", attribute["noun"])
                        .replace("{s}", fact.subject)
                        .replace("{v}", fact.answer)
                        for text in filled
                    }
                    assert said.casefold() in {text.casefold() for text in filled}, said


def test_a_becomes_an_before_a_vowel() -> None:
    for sheet in known_sheets("train"):
        for fact in sheet.facts:
            assert not re.search(rf"\b[Aa] {re.escape(fact.answer)}", fact.statement) or fact.answer[0] not in "aeio"


# ---------------------------------------------------------------------------------------------------------- determinism


def test_the_same_rng_gives_the_same_sheet() -> None:
    assert list(sheets(30, "train", 7)) == list(sheets(30, "train", 7))
    assert list(sheets(3, "train", 7)) != list(sheets(3, "train", 8))
