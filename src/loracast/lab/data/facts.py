"""Draw fact sheets: synthetic documents about invented entities, each fact with a question in other words.

`content/facts.toml` has the domains, attributes and wordings, `content/values.toml` the kinds of values. Labels say
which tokens of a generated document are a fact's value, and which name its owner: from them a hypernetwork with an
associative memory learns what to write.

Span supervision: which tokens of a generated document are a fact's value, and which name its owner.

A hypernetwork with an associative memory learns from these labels what to write; from answers alone it would have to
find out. This module knows texts and character offsets, no tensors.

A sheet states facts ("The Velmo kettle is guaranteed for 24 months.") and asks for each ("How long is the Velmo kettle
covered for repairs?"). `content/facts.toml` has the domains, attributes and wordings, `content/values.toml` the kinds
of values. Two small notations keep them short:

- a slot in a value, a name or a title: `{city}` draws from that kind, `{^noun}` capitalises what it drew, `{10-99}` is
  an integer, `{000-990/10}` an integer in steps of ten, padded to the width of the lower bound;
- alternatives in a wording: `{s} [costs|sells for] {v}.` is one wording with two variants.

Train, dev and test share values, never wordings nor entities: a wording is listed for one split, and the hash of an
entity's invented name picks its split. The same rng state gives the same sheet in every process.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any, Literal, NamedTuple

from loracast.lab.data.rows import read_content

INSIDE, BEGIN, AFTER = range(3)
"""Gates of an associative memory: a token continues a value, begins one, or follows its end."""


class TokenLabel(NamedTuple):
    """A labelled token of a chunk."""

    chunk: int
    token: int
    gate: int  # INSIDE, BEGIN or AFTER
    owner: int  # the last token of the owner's name; -1 if there is none
    place: int  # index of the token in the answer
    end: int  # the last token of the statement; -1 if unknown
    statement: int  # index of the statement in the document, which is its question's; -1 if no question asks for it


class FactSpan(NamedTuple):
    """A statement in a document, its subject's name ("" if none) and the value that answers its question."""

    statement: str
    owner: str
    value: str
    value_at: int | None = None  # offset in the statement; None: its last occurrence outside the owner's name


def label_tokens(
    chunk: int, text: str, offsets: Sequence[tuple[int, int]], facts: Iterable[FactSpan]
) -> list[TokenLabel]:
    """Label the tokens of one chunk's text; a statement that is not whole in it gets no labels.

    The first token of a value is labelled BEGIN, its other tokens INSIDE, and the token after the last one AFTER.
    """
    labels: list[TokenLabel] = []
    for number, (statement, owner, value, known_at) in enumerate(facts):
        start = text.find(statement)
        if start < 0:
            continue
        owner_at = find_owner(statement, owner)
        value_at = _find_value(statement, value, owner_at) if known_at is None else known_at
        if value_at < 0:
            continue
        owner_tokens = [] if owner_at is None else tokens_between(offsets, start + owner_at[0], start + owner_at[1])
        owner_token = owner_tokens[-1] if owner_tokens else -1
        value_tokens = tokens_between(offsets, start + value_at, start + value_at + len(value))
        end = tokens_between(offsets, start, start + len(statement))[-1]
        for place, token in enumerate(value_tokens):
            labels.append(TokenLabel(chunk, token, INSIDE if place else BEGIN, owner_token, place, end, number))
        if value_tokens and value_tokens[-1] + 1 < len(offsets):
            place = len(value_tokens)
            labels.append(TokenLabel(chunk, value_tokens[-1] + 1, AFTER, owner_token, place, end, number))
    return labels


def find_owner(statement: str, owner: str) -> tuple[int, int] | None:
    """Where a statement names its owner, ignoring case and, if need be, a leading "the"."""
    lowered = statement.lower()
    for name in (owner.lower(), owner.lower().removeprefix("the ")):
        if name and (at := lowered.find(name)) >= 0:
            return at, at + len(name)
    return None


def _find_value(statement: str, value: str, owner_at: tuple[int, int] | None) -> int:
    """Offset of the last occurrence of the value, or of the first one if the last is inside the owner's name."""
    last = statement.rfind(value)
    is_inside = owner_at is not None and owner_at[0] <= last < owner_at[1]
    return statement.find(value) if is_inside else last


def tokens_between(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """The tokens that have a character in start..end."""
    return [i for i, (low, high) in enumerate(offsets) if low < end and high > start and high > low]


Split = Literal["train", "dev", "test"]
Table = Mapping[str, Any]
"""A table of the content: a domain, or an attribute with its wordings."""

MAX_SUBJECTS = 12
P_GENERIC = 0.25  # a wording for every attribute, through its noun, instead of one of the attribute's own
P_MIXED = 0.3  # subjects of different domains on one sheet
P_TABLE = 0.5  # the same few attributes for all subjects, so that only the subject distinguishes the facts
P_LIST = 0.25  # a list with dashes instead of paragraphs
INVENTED = ("{name}", "{place_name}")  # slots that are filled with invented names
N_TRIES = 200  # draws for a fresh value before a repeated one is accepted (a sheet may outgrow a small kind)

_SLOT = re.compile(r"\{(?:(?P<low>\d+)-(?P<high>\d+)(?:/(?P<step>\d+))?|(?P<capital>\^?)(?P<kind>[a-z0-9_]+))\}")
_ANY_SLOT = re.compile(r"(\{[^}]*\})")
ALTERNATIVES = re.compile(r"\[([^\]]*)\]")
_VOWEL_SOUND = re.compile(r"[aeio]|u(?!k|ni|se)|8|1[18](?!\d)", re.IGNORECASE)


@dataclass(frozen=True)
class Fact:
    """One fact of a sheet; `attribute` is qualified by its domain ("product.warranty")."""

    subject: str
    attribute: str
    statement: str
    question: str
    answer: str


@dataclass(frozen=True)
class FactSheet:
    """A document: the text (without the title) holds every statement verbatim, in the order of the facts."""

    title: str
    text: str
    facts: tuple[Fact, ...]


@cache
def variants(wording: str) -> tuple[str, ...]:
    """Spell out the alternatives of a wording: "[a|b] c" is ("a c", "b c")."""
    pieces = [piece.split("|") if i % 2 else [piece] for i, piece in enumerate(ALTERNATIVES.split(wording))]
    return tuple("".join(choice) for choice in itertools.product(*pieces))


def wordings_of(table: Table, prefix: str, split: Split, n_dev: int = 1) -> list[str]:
    """The wordings of a split in a table of the content; dev has the last of the train list, and train the others."""
    if split == "test":
        return table[f"{prefix}test"]
    return table[f"{prefix}train"][-n_dev:] if split == "dev" else table[f"{prefix}train"][:-n_dev]


def pick_alternatives(rng: random.Random, wording: str) -> str:
    """Draw one of a wording's variants."""
    return ALTERNATIVES.sub(lambda given: rng.choice(given[1].split("|")), wording)


def expand(rng: random.Random, pattern: str) -> str:
    """Fill the slots of a pattern recursively."""

    def draw(slot: re.Match[str]) -> str:
        if kind := slot["kind"]:
            text = expand(rng, rng.choice(read_content("values")[kind]))
            return text[0].upper() + text[1:] if slot["capital"] else text
        low, high, step = int(slot["low"]), int(slot["high"]), int(slot["step"] or 1)
        return f"{rng.randrange(low, high + 1, step):0{len(slot['low'])}d}"

    return _SLOT.sub(draw, pattern) if "{" in pattern else pattern


def entity_split(name: str) -> Split:
    """One invented name in ten belongs to the test split and one to the dev split, whatever it names."""
    share = int.from_bytes(hashlib.sha256(name.lower().encode()).digest()[:8], "big") % 10
    return "test" if share == 0 else "dev" if share == 1 else "train"


def make_entity(rng: random.Random, pattern: str, split: Split) -> str:
    """Invent an entity of a split. Its invented name decides its split; without one, all its slots together do."""
    pieces = _ANY_SLOT.split(pattern)  # literal, slot, literal, ..., slot, literal
    slots = pieces[1::2]
    while True:
        drawn = [expand(rng, slot) for slot in slots]
        invented = [text for slot, text in zip(slots, drawn, strict=True) if slot in INVENTED] or drawn
        if entity_split(" ".join(invented)) == split:
            pieces[1::2] = drawn
            return "".join(pieces)


def make_sheet(rng: random.Random, n_facts: int, *, split: Split, n_subjects: int | None = None) -> FactSheet:
    """Draw a sheet of `n_facts` facts about `n_subjects` subjects (at most 12; any feasible number when None).

    Raises ValueError when that many subjects cannot carry that many facts.
    """
    domains = _choose_domains(rng, n_facts, n_subjects)
    subjects: dict[str, None] = {}  # ordered, all different
    while len(subjects) < len(domains):
        subjects[make_entity(rng, rng.choice(domains[len(subjects)]["subjects"]), split)] = None
    names = list(subjects)
    facts: list[Fact] = []
    for i, attribute in _choose_pairs(rng, domains, n_facts):
        facts.append(_make_fact(rng, names[i], domains[i], attribute, split, facts))
    return FactSheet(_title(rng, domains, names), _compose(rng, facts), tuple(facts))


def _choose_domains(rng: random.Random, n_facts: int, n_subjects: int | None) -> list[Table]:
    """One domain for each subject, each with attributes enough for its share of the facts."""
    domains = read_content("facts")["domain"]
    fewest = ceil(n_facts / max(len(domain["attribute"]) for domain in domains))
    most = min(n_facts, MAX_SUBJECTS)
    if n_facts < 1 or not fewest <= (fewest if n_subjects is None else n_subjects) <= most:
        raise ValueError(f"{n_facts} facts need {fewest} to {most} subjects, not {n_subjects}")
    if n_subjects is None:
        n_subjects = rng.randint(fewest, most)
    share = ceil(n_facts / n_subjects)
    roomy = [domain for domain in domains if len(domain["attribute"]) >= share]
    if rng.random() < P_MIXED:
        return rng.choices(roomy, k=n_subjects)
    return [rng.choice(roomy)] * n_subjects


def _choose_pairs(rng: random.Random, domains: Sequence[Table], n_facts: int) -> list[tuple[int, Table]]:
    """Distinct (index of the subject, attribute), at least one for each subject, in the order of the document."""
    pools = [rng.sample(domain["attribute"], len(domain["attribute"])) for domain in domains]
    if len({domain["name"] for domain in domains}) == 1 and rng.random() < P_TABLE:
        pools = [pools[0][: ceil(n_facts / len(domains))]] * len(domains)
    firsts = [(i, rng.randrange(len(pool))) for i, pool in enumerate(pools)]
    others = [(i, j) for i, pool in enumerate(pools) for j in range(len(pool)) if j != firsts[i][1]]
    pairs = firsts + rng.sample(others, n_facts - len(firsts))
    match rng.choice(["by subject", "by subject", "by attribute", "shuffled"]):
        case "by subject":
            rng.shuffle(pairs)
            pairs.sort(key=lambda pair: pair[0])
        case "by attribute":
            pairs.sort(key=lambda pair: pair[1])
        case "shuffled":
            rng.shuffle(pairs)
    return [(i, pools[i][j]) for i, j in pairs]


def _make_fact(
    rng: random.Random, subject: str, domain: Table, attribute: Table, split: Split, before: Sequence[Fact]
) -> Fact:
    """Draw wordings and a value that the question does not contain and no earlier fact has."""
    key, noun = f"{domain['name']}.{attribute['name']}", attribute["noun"]
    questions = {fact.question for fact in before}
    values = {fact.answer for fact in before if fact.attribute == key}
    n_tries = 0
    while True:
        n_tries += 1
        state, ask = _choose_wordings(rng, attribute, split)
        question, answer = fill(ask, noun=noun, s=subject), expand(rng, pattern_of_value(attribute))
        is_fresh = answer not in values or n_tries > N_TRIES
        if is_fresh and question not in questions and answer.lower() not in question.lower():
            return Fact(subject, key, fill(state, noun=noun, s=subject, v=answer), question, answer)


def pattern_of_value(attribute: Table) -> str:
    """The pattern of an attribute's values, which the content may give as the bare name of a kind."""
    value = attribute["value"]
    return value if "{" in value else f"{{{value}}}"


def _choose_wordings(rng: random.Random, attribute: Table, split: Split) -> tuple[str, str]:
    """A wording of the statement and one of the question."""
    generic = read_content("facts")["generic"]
    state, ask = (generic if rng.random() < P_GENERIC else attribute for _ in range(2))
    drawn = ((state, "state_"), (ask, "ask_"))
    statement, question = (rng.choice(variants(rng.choice(wordings_of(*one, split)))) for one in drawn)
    return statement, question


def fill(wording: str, **slots: str) -> str:
    """Fill the slots of a wording, with "an" before a vowel, and capitalise it unless the value is first."""
    is_value_first = wording.startswith("{v}")
    for slot, text in slots.items():
        if _VOWEL_SOUND.match(text):
            wording = re.sub(rf"\b([Aa]) (?=\{{{slot}\}})", r"\1n ", wording)
        wording = wording.replace(f"{{{slot}}}", text)
    return wording if is_value_first else wording[:1].upper() + wording[1:]


def _title(rng: random.Random, domains: Sequence[Table], subjects: Sequence[str]) -> str:
    if len({domain["name"] for domain in domains}) > 1:
        return expand(rng, rng.choice(read_content("facts")["generic"]["title"]))
    titles = [title for title in domains[0]["title"] if ("{s}" in title) == (len(subjects) == 1)]
    return fill(rng.choice(titles), s=subjects[0])


def _compose(rng: random.Random, facts: Sequence[Fact]) -> str:
    """Join the statements into a list, or into paragraphs that end at a new subject or at random."""
    if rng.random() < P_LIST:
        return "\n".join(f"- {fact.statement}" for fact in facts)
    text = facts[0].statement
    p_break_same, p_break_other = rng.choice([(0.0, 1.0), (0.15, 0.5), (0.2, 0.2), (0.0, 0.0)])
    for before, fact in itertools.pairwise(facts):
        p_break = p_break_same if fact.subject == before.subject else p_break_other
        text += ("\n\n" if rng.random() < p_break else " ") + fact.statement
    return text
