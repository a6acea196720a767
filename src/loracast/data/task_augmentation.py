"""Tasks made from tasks: the same examples under a description that asks for something else, so that descriptions have to be read.

With a hundred tasks, a description need only tell which of them is meant; its words do not matter. A variation changes the
description and, as the description then says, the outputs: labels are called other words, the answer takes another form, there are several
inputs of which one is meant, or several answers of which one is right; or a rule is asked of the task's inputs, and what the task was is
forgotten. What is said is content (`content/variations.toml`). Nothing here knows tensors, tokens or models.
"""

from __future__ import annotations

import itertools
import random
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from loracast.data.string_tasks import CONDITIONS, RULES
from loracast.data.tasks import Example, Task

MAX_LABELS = 6  # more are too many to call by other names in a sentence
MAX_CHARACTERS_TOGETHER = 240  # of inputs that are asked about together
MAX_CHARACTERS_RULED = 60  # of what a rule has the base write
EXAMPLES_TO_VARY = 4
"""As many of a task there must be, and as many become one where several inputs stand together."""
_PLACES = ("first", "second", "third", "fourth")
_JOINTS = (", ", "\n", "; ", " / ")
_ALTERNATIVES = re.compile(r"\[([^\]]*)\]")

Change = Callable[[Sequence[Example]], list[Example]]
"""Examples of a task, at least four -> examples of the task that the variation makes of it: as many, or fewer where it takes several for one."""

FORMS: dict[str, Callable[[str, str], str]] = {
    "upper": lambda given, answer: answer.upper(),
    "lower": lambda given, answer: answer.lower(),
    "title": lambda given, answer: " ".join(word[:1].upper() + word[1:] for word in answer.split(" ")),
    "full_stop": lambda given, answer: f"{answer}.",
    "exclamation": lambda given, answer: f"{answer}!",
    "quotes": lambda given, answer: f'"{answer}"',
    "brackets": lambda given, answer: f"({answer})",
    "square_brackets": lambda given, answer: f"[{answer}]",
    "prefix": lambda given, answer: f"Answer: {answer}",
    "twice": lambda given, answer: f"{answer} {answer}",
    "spaced": lambda given, answer: " ".join(answer.replace(" ", "")),
    "hyphens": lambda given, answer: answer.replace(" ", "-"),
    "reversed": lambda given, answer: answer[::-1],
    "echo": lambda given, answer: f"{given}: {answer}",
}
"""By name: (input, answer) -> the answer in another form."""
_FOR_SHORT = {"echo", "twice", "spaced", "reversed"}  # of what is longer, a small base learns little
_MOST_CHARACTERS = 24
_LONGEST_NAME = 12  # of a label, in characters
_MOST_CHARACTERS_OFFERED = 40  # of an answer that is offered beside others

STYLES: dict[str, Callable[[str, int], str]] = {
    "upper": lambda word, i: word.upper(),
    "title": lambda word, i: word.capitalize(),
    "two_letters": lambda word, i: word[:2].lower(),
    "three_letters": lambda word, i: word[:3].lower(),
    "four_letters": lambda word, i: word[:4].lower(),
    "brackets": lambda word, i: f"({word})",
    "letter": lambda word, i: "ABCDEFGH"[i],
    "letter_in_brackets": lambda word, i: f"({'ABCDEFGH'[i]})",
    "number": lambda word, i: str(i + 1),
    "number_in_brackets": lambda word, i: f"[{i + 1}]",
}
"""By name: (word, which of the labels) -> how a label is written. Cut words do not end where the base would end them."""
_STYLED_SHARE = 0.6
_OPTION_STYLES = ("letter", "letter_in_brackets", "number", "number_in_brackets")


@dataclass(frozen=True)
class Variation:
    """What a draw of a task was made into."""

    description: str
    change: Change


@cache
def _content() -> dict[str, Any]:
    text = files("loracast.data").joinpath("content/variations.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def vary(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Variation:
    """Another task from this one, under a description made from one of its own.

    Args:
        words: what labels may be called, beside their synonyms.
        rng: decides everything; the same state makes the same variation in every process.
    """
    makers = [_placed, _chosen, _offered, _checked, _told_apart, _ruled, _ruled, _formed, _formed]
    if 2 <= len(task.labels) <= MAX_LABELS:
        makers += [_with_synonyms, _renamed] * 4
    rng.shuffle(makers)
    return next(v for maker in [*makers, _formed] if (v := maker(task, description, words, rng)) is not None)


def names_for(n: int, words: Sequence[str], rng: random.Random) -> tuple[str, ...] | None:
    """n different names for labels, all written in one style; None where there are too few words."""
    if len(words) < n:
        return None
    some = rng.sample(words, n)
    if rng.random() < _STYLED_SHARE:
        style = STYLES[rng.choice(list(STYLES))]
        styled = [style(word, i) for i, word in enumerate(some)]
        some = styled if len(set(styled)) == n else some
        rng.shuffle(some)  # "A" is not always the first
    return tuple(some)


def _renamed(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Variation | None:
    """Labels get arbitrary names, which are listed."""
    chosen = names_for(len(task.labels), [word for word in words if word not in task.labels], rng)
    if chosen is None:
        return None
    names = dict(zip(task.labels, chosen, strict=True))
    content = _content()["renamed"]
    form, between = _wording(rng.choice(content["one"]), rng), rng.choice(content["between"])
    said = [form.format(word=names[label], label=label) for label in rng.sample(task.labels, len(task.labels))]
    return Variation(_joined(description, between.join(said) + ".", rng), _renaming(names))


def _with_synonyms(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Variation | None:
    """Labels that the description mentions are called by synonyms in it; None where it does not mention all of them."""
    synonyms = _content()["synonyms"]
    if not all(label in synonyms and _mention(label).search(description) for label in task.labels):
        return None
    i = rng.randrange(min(len(synonyms[label]) for label in task.labels))
    names = {label: synonyms[label][i] for label in task.labels}
    for label in sorted(task.labels, key=len, reverse=True):  # "not the same" before "same"
        description = _mention(label).sub(f"\0{task.labels.index(label)}\0", description)
    for k, label in enumerate(task.labels):
        description = description.replace(f"\0{k}\0", names[label])
    return Variation(description, _renaming(names))


def _formed(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Variation:
    """The answer takes another form."""
    longest = max(len(example.outputs[0]) for example in task.train[:50])
    forms = [name for name in FORMS if longest <= _MOST_CHARACTERS or name not in _FOR_SHORT]
    name = rng.choice(forms)

    def change(examples: Sequence[Example]) -> list[Example]:
        return [Example(e.input, (FORMS[name](e.input, e.outputs[0]),)) for e in examples]

    return Variation(_joined(description, _wording(rng.choice(_content()["forms"][name]), rng), rng), change)


def _chosen(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Variation | None:
    """Several inputs with different answers: the one that has a given answer is to be copied."""
    answer = rng.choice(task.train).outputs[0]
    having = [e for e in task.train if e.outputs[0] == answer]
    others = [e for e in task.train if answer not in e.outputs]
    n = rng.randint(2, len(_PLACES))
    if len(having) < 4 or len(others) < n or not _short(task):
        return None
    joint = _joint(task, rng)
    seed = rng.random()

    def change(examples: Sequence[Example]) -> list[Example]:
        own = random.Random(seed)
        made = []
        for _ in range(min(len(examples), len(having))):
            right = own.choice(having)
            some = [right, *own.sample(others, n - 1)]
            own.shuffle(some)
            made.append(Example(joint.join(e.input for e in some), (right.input,)))
        return made

    said = _wording(rng.choice(_content()["chosen"]["one"]), rng).format(n=n, answer=answer)
    return Variation(f"{description} {said}", change)


def _placed(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Variation | None:
    """Several inputs: one of them is meant by its place, or all are."""
    if not _short(task) or len(task.train) < len(_PLACES):
        return None
    n, joint = rng.randint(2, len(_PLACES)), _joint(task, rng)
    place = rng.randrange(-1, n)  # -1: all of them

    def change(examples: Sequence[Example]) -> list[Example]:
        made = []
        for start in range(0, len(examples) - n + 1, n):
            some = examples[start : start + n]
            answers = [e.outputs[0] for e in some] if place < 0 else [some[place].outputs[0]]
            made.append(Example(joint.join(e.input for e in some), (", ".join(answers),)))
        return made

    wordings = _content()["placed"]["all" if place < 0 else "one"]
    where = "last" if place == n - 1 and rng.random() < 0.5 else _PLACES[place]
    said = _wording(rng.choice(wordings), rng).format(n=n, place=where)
    return Variation(_joined(description, said, rng), change)


def _offered(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Variation | None:
    """The right answer stands among others: its sign is to be said, or it is to be repeated."""
    answers = _short_answers(task)
    n = rng.randint(2, 4)
    if len(answers) <= n or "Options:" in task.train[0].input:  # more than n: an example may have two right ones
        return None
    sign = STYLES[rng.choice(_OPTION_STYLES)]
    signs = [sign("", i) for i in range(n)]
    repeated = rng.random() < 0.3
    seed = rng.random()

    def change(examples: Sequence[Example]) -> list[Example]:
        own = random.Random(seed)
        made = []
        for e in examples:
            right, wrong = e.outputs[0], [answer for answer in answers if answer not in e.outputs]
            options = [right, *own.sample(wrong, min(n - 1, len(wrong)))]
            own.shuffle(options)
            listed = "\n".join(f"{s} {option}" for s, option in zip(signs, options, strict=False))
            answer = right if repeated else signs[options.index(right)]
            made.append(Example(f"{e.input}\n{listed}", (answer,)))
        return made

    wordings = _content()["offered"]["repeated" if repeated else "sign"]
    said = _wording(rng.choice(wordings), rng).format(n=n, sign=rng.choice(signs))
    return Variation(_joined(description, said, rng), change)


def _checked(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Variation | None:
    """An answer is suggested: is it right?"""
    answers = _short_answers(task)
    names = names_for(2, words, rng)
    if len(answers) < 2 or names is None:
        return None
    seed, joint = rng.random(), rng.choice((" -> ", " = ", "\nAnswer: ", " : "))

    def change(examples: Sequence[Example]) -> list[Example]:
        own = random.Random(seed)
        made = []
        for e in examples:
            right, wrong = e.outputs[0], [answer for answer in answers if answer not in e.outputs]
            is_right = not wrong or own.random() < 0.5
            suggested = right if is_right else own.choice(wrong)
            made.append(Example(f"{e.input}{joint}{suggested}", (names[not is_right],)))
        return made

    wording = _wording(rng.choice(_content()["checked"]["one"]), rng)
    said = wording.format(right=names[0], wrong=names[1], joint=joint.strip())
    return Variation(f"{description} {said}", change)


def _ruled(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Variation | None:
    """A rule is asked of the inputs; the task's own description is left out."""
    inputs = [e.input for e in task.train]
    for name in rng.sample(list(RULES), len(RULES)):
        word, rule = rng.choice(words), RULES[name]
        answers = [answer for text in inputs if (answer := rule(text, word)) is not None]
        if len(answers) < max(EXAMPLES_TO_VARY, len(inputs) // 2) or max(map(len, answers)) > MAX_CHARACTERS_RULED:
            continue

        def change(examples: Sequence[Example], rule=rule, word=word) -> list[Example]:
            return [Example(e.input, (answer,)) for e in examples if (answer := rule(e.input, word)) is not None]

        return Variation(_about(_wording(rng.choice(_content()["rules"][name]), rng), word), change)
    return None


def _told_apart(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Variation | None:
    """Inputs are told apart by whether a condition holds; the task's own description is left out."""
    names = names_for(2, words, rng)
    if names is None:
        return None
    for name in rng.sample(list(CONDITIONS), len(CONDITIONS)):
        word, holds = rng.choice(words), CONDITIONS[name]
        n_held = sum(holds(e.input, word) for e in task.train)
        if min(n_held, len(task.train) - n_held) < len(task.train) / 5:
            continue

        def change(examples: Sequence[Example], holds=holds, word=word) -> list[Example]:
            sides = [[e.input for e in examples if holds(e.input, word) is side] for side in (True, False)]
            in_turn = itertools.chain.from_iterable(itertools.zip_longest(*sides))
            named = {text: name for side, name in zip(sides, names, strict=True) for text in side}
            return [Example(text, (named[text],)) for text in in_turn if text is not None]

        content = _content()["conditions"]
        condition = _about(_wording(rng.choice(content[name]), rng), word)
        form = _wording(rng.choice(content["asked"]), rng)
        return Variation(form.format(condition=condition, yes=names[0], no=names[1]), change)
    return None


def _about(wording: str, word: str) -> str:
    """A wording about a word that the rule is told."""
    return wording.format(word=word, ending=word[-2:], letter=word[0].lower(), last=word[-1].lower(), length=len(word))


def _short_answers(task: Task) -> list[str]:
    """Different answers that may stand beside others, in a fixed order; none where the task's inputs or answers are long."""
    some = task.train[:50]
    if (
        max(len(e.input) for e in some) > MAX_CHARACTERS_TOGETHER
        or max(len(e.outputs[0]) for e in some) > _MOST_CHARACTERS_OFFERED
    ):
        return []
    return list(dict.fromkeys(e.outputs[0] for e in task.train))


def words_of(tasks: Sequence[Task]) -> tuple[str, ...]:
    """Words that labels may be called, in a fixed order: labels, and words that are an input or output of two tasks at least (so are no nonsense)."""
    labels = {label for task in tasks for label in task.labels if len(label) <= _LONGEST_NAME}
    count: Counter[str] = Counter()
    for task in tasks:
        said = {text for e in task.train for text in (e.input, e.outputs[0])}
        count.update(text for text in said if re.fullmatch(rf"[A-Za-z]{{3,{_LONGEST_NAME}}}", text))
    return tuple(sorted(labels.union(text for text, n in count.items() if n > 1)))


def _renaming(names: dict[str, str]) -> Change:
    return lambda examples: [Example(e.input, (names.get(e.outputs[0], e.outputs[0]),)) for e in examples]


def _joint(task: Task, rng: random.Random) -> str:
    """What stands between several inputs: something that none of them has in it."""
    free = [joint for joint in _JOINTS if not any(joint in example.input for example in task.train[:50])]
    return rng.choice(free or ["\n\n"])


def _short(task: Task) -> bool:
    """Whether four inputs go together in one."""
    return 4 * max(len(example.input) for example in task.train[:50]) <= MAX_CHARACTERS_TOGETHER


def _mention(label: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(label)}(?!\w)")


def _joined(description: str, said: str, rng: random.Random) -> str:
    return f"{description} {said}" if rng.random() < 0.8 else f"{said} {description}"


def _wording(text: str, rng: random.Random) -> str:
    """One of what a text's alternatives spell out."""
    parts = _ALTERNATIVES.split(text)
    return "".join(rng.choice(part.split("|")) if i % 2 else part for i, part in enumerate(parts))


def placeholders(text: str) -> set[str]:
    """The slots of a wording."""
    return set(itertools.chain.from_iterable(re.findall(r"\{(\w+)\}", text)))
