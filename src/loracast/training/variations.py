"""Tasks made from tasks: the same examples under a description that asks for something else, so that descriptions have to be read.

With a hundred tasks, a description need only tell which of them is meant; its words do not matter. A variation changes the
description and, as the description then says, the outputs: labels are called other words, the answer takes another form, or there are several
inputs of which one is meant. What is said is content (`content/variations.toml`). Nothing here knows tensors, tokens or models.
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

from loracast.tasks import Example, Task

MAX_LABELS = 6  # more are too many to call by other names in a sentence
MAX_CHARACTERS_TOGETHER = 240  # of inputs that are asked about together
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


@dataclass(frozen=True)
class Variation:
    """What a draw of a task was made into."""

    description: str
    change: Change


@cache
def _content() -> dict[str, Any]:
    text = files("loracast.training").joinpath("content/variations.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def vary(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Variation:
    """Another task from this one, under a description made from one of its own.

    Args:
        words: what labels may be called, beside their synonyms.
        rng: decides everything; the same state makes the same variation in every process.
    """
    makers: list[Callable[[Task, str, random.Random], Variation | None]] = [_placed, _chosen, _formed, _formed]
    if 2 <= len(task.labels) <= MAX_LABELS:
        renaming = [_with_synonyms, lambda t, d, r: _renamed(t, d, words, r)]
        makers = renaming * 3 + makers
    rng.shuffle(makers)
    return next(v for maker in [*makers, _formed] if (v := maker(task, description, rng)) is not None)


def _renamed(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Variation | None:
    """Labels get arbitrary names, which are listed."""
    free = [word for word in words if word not in task.labels]
    if len(free) < len(task.labels):
        return None
    names = dict(zip(task.labels, rng.sample(free, len(task.labels)), strict=True))
    content = _content()["renamed"]
    form, between = _wording(rng.choice(content["one"]), rng), rng.choice(content["between"])
    said = [form.format(word=names[label], label=label) for label in rng.sample(task.labels, len(task.labels))]
    return Variation(_joined(description, between.join(said) + ".", rng), _renaming(names))


def _with_synonyms(task: Task, description: str, rng: random.Random) -> Variation | None:
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


def _formed(task: Task, description: str, rng: random.Random) -> Variation:
    """The answer takes another form."""
    longest = max(len(example.outputs[0]) for example in task.train[:50])
    forms = [name for name in FORMS if longest <= _MOST_CHARACTERS or name not in _FOR_SHORT]
    name = rng.choice(forms)

    def change(examples: Sequence[Example]) -> list[Example]:
        return [Example(e.input, (FORMS[name](e.input, e.outputs[0]),)) for e in examples]

    return Variation(_joined(description, _wording(rng.choice(_content()["forms"][name]), rng), rng), change)


def _chosen(task: Task, description: str, rng: random.Random) -> Variation | None:
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


def _placed(task: Task, description: str, rng: random.Random) -> Variation | None:
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
