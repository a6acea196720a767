"""Task augmentation: turn a task into another one, with a changed description and outputs that follow it.

String tasks: rules and conditions that apply to any text, such as its longest word or whether it has a digit.

The questions for them are content (`content/task_augmentation.toml`, `[rules]` and `[conditions]`).

With a hundred tasks, a description need only tell which of them is meant; its words do not matter. An augmentation
changes the description and the outputs together: labels get other names, the answer takes another form, one of several
inputs is meant, one of several answers is right, or a string task replaces the task. Its wordings are content
(`content/task_augmentation.toml`).
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loracast.documents.task_spec import Example
from loracast.lab.data.facts import pick_alternatives
from loracast.lab.data.rows import read_content
from loracast.lab.data.tasks import Task

_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")


def words_in(text: str) -> list[str]:
    return _WORD.findall(text)


def _extreme(text: str, sign: int) -> str | None:
    """The longest (sign 1) or shortest word; None if two words tie."""
    ordered = sorted(words_in(text), key=lambda word: -sign * len(word))
    return ordered[0] if len(ordered) > 1 and len(ordered[0]) != len(ordered[1]) else None


def _nth(text: str, n: int) -> str | None:
    words = words_in(text)
    return words[n] if len(words) > max(n, 1) else None


def _of_one_word(rule: Callable[[str], str]) -> Callable[[str, str], str | None]:
    """A rule for texts of a single word with more than three letters."""
    return lambda text, word: rule(text) if len(text) > 3 and _WORD.fullmatch(text) else None


def _of_words(rule: Callable[[list[str]], str | None]) -> Callable[[str, str], str | None]:
    """A rule for texts of two to eight words."""
    return lambda text, word: rule(text.split()) if 1 < len(text.split()) <= 8 else None


RULES: dict[str, Callable[[str, str], str | None]] = {
    "copy": lambda text, word: text,
    "first_word": lambda text, word: _nth(text, 0),
    "second_word": lambda text, word: _nth(text, 1),
    "last_word": lambda text, word: _nth(text, -1),
    "longest_word": lambda text, word: _extreme(text, 1),
    "shortest_word": lambda text, word: _extreme(text, -1),
    "initials": lambda text, word: _of_words(lambda words: "".join(w[0] for w in words).upper())(text, word),
    "without_first_word": _of_words(lambda words: " ".join(words[1:])),
    "without_last_word": _of_words(lambda words: " ".join(words[:-1])),
    "words_backwards": _of_words(lambda words: " ".join(reversed(words))),
    "hyphens": _of_words("-".join),
    "first_word_replaced": lambda text, word: _of_words(lambda words: " ".join([word, *words[1:]]))(text, word),
    "word_before": lambda text, word: f"{word} {text}" if len(text.split()) <= 6 else None,
    "word_after": lambda text, word: f"{text} {word}" if len(text.split()) <= 6 else None,
    "ending_added": lambda text, word: f"{text}{word[-2:]}" if _WORD.fullmatch(text) else None,
    "without_first_letter": _of_one_word(lambda text: text[1:]),
    "without_last_letter": _of_one_word(lambda text: text[:-1]),
    "last_two_letters": _of_one_word(lambda text: text[-2:]),
    "first_three_letters": _of_one_word(lambda text: text[:3]),
    "first_letter_doubled": _of_one_word(lambda text: text[0] + text),
    "always": lambda text, word: word,
}
"""By name: (text, a word given to the rule) -> the answer; None if the rule does not apply to the text."""

CONDITIONS: dict[str, Callable[[str, str], bool]] = {
    "has_letter": lambda text, word: word[0].lower() in text.lower(),
    "longer": lambda text, word: len(text) > len(word),
    "ends_with": lambda text, word: text.lower().endswith(word[-1].lower()),
    "several_words": lambda text, word: len(text.split()) > 1,
    "more_than_five_words": lambda text, word: len(text.split()) > 5,
    "capital": lambda text, word: text[:1].isupper(),
    "number": lambda text, word: any(c.isdigit() for c in text),
}
"""By name: (text, a word given to the condition) -> whether it holds."""


MAX_LABELS = 6  # more would be too many to rename in a sentence
MAX_CHARACTERS_TOGETHER = 240  # of inputs that are joined into one
MAX_CHARACTERS_RULED = 60  # of an answer of a string task
EXAMPLES_TO_AUGMENT = 4  # fewest examples of a task that is augmented, and most that are joined into one
_PLACES = ("first", "second", "third", "fourth")
_SEPARATORS = (", ", "\n", "; ", " / ")

Change = Callable[[Sequence[Example]], list[Example]]
"""At least four examples of a task -> examples of the augmented task, fewer if several are joined into one."""

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
_FOR_SHORT = {"echo", "twice", "spaced", "reversed"}  # a small base learns little from longer ones
_MAX_CHARACTERS = 24
_MAX_NAME_CHARACTERS = 12  # of a label, in characters
_MAX_CHARACTERS_OFFERED = 40  # of an answer that is offered among others

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
"""By name: (word, index of the label) -> how the label is written. Cut words end where the base would not end them."""
_STYLED_SHARE = 0.6
_OPTION_STYLES = ("letter", "letter_in_brackets", "number", "number_in_brackets")


@dataclass(frozen=True)
class Augmentation:
    """An augmented task: its description, and how examples change."""

    description: str
    change: Change


def augment(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Augmentation:
    """Draw another task from this one, with a description made from one of its own.

    `words` are new names for labels, besides their synonyms. The same rng state gives the same in every process.
    """
    makers = [_placed, _chosen, _offered, _checked, _conditioned, _ruled, _ruled, _formed, _formed]
    if 2 <= len(task.labels) <= MAX_LABELS:
        makers += [_with_synonyms, _renamed] * 4
    rng.shuffle(makers)
    drawn = (maker(task, description, words, rng) for maker in [*makers, _formed])
    return next(augmentation for augmentation in drawn if augmentation is not None)


def names_for(n: int, words: Sequence[str], rng: random.Random) -> tuple[str, ...] | None:
    """Draw n different names for labels, all written in one style; None if there are too few words."""
    if len(words) < n:
        return None
    some = rng.sample(words, n)
    if rng.random() < _STYLED_SHARE:
        style = STYLES[rng.choice(list(STYLES))]
        styled = [style(word, i) for i, word in enumerate(some)]
        some = styled if len(set(styled)) == n else some
        rng.shuffle(some)  # "A" does not always go to the first label
    return tuple(some)


def _renamed(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Augmentation | None:
    """Labels get arbitrary names, which the description lists."""
    chosen = names_for(len(task.labels), [word for word in words if word not in task.labels], rng)
    if chosen is None:
        return None
    names = dict(zip(task.labels, chosen, strict=True))
    form, between = _wording(rng, "renamed", "one"), rng.choice(read_content("task_augmentation")["renamed"]["between"])
    sentence = [form.format(word=names[label], label=label) for label in rng.sample(task.labels, len(task.labels))]
    return Augmentation(_joined(description, between.join(sentence) + ".", rng), _renaming(names))


def _with_synonyms(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Augmentation | None:
    """Labels are replaced by synonyms in the description; None unless it mentions all of them."""
    synonyms = read_content("task_augmentation")["synonyms"]
    if not all(label in synonyms and _mention(label).search(description) for label in task.labels):
        return None
    i = rng.randrange(min(len(synonyms[label]) for label in task.labels))
    names = {label: synonyms[label][i] for label in task.labels}
    for label in sorted(task.labels, key=len, reverse=True):  # "not the same" before "same"
        description = _mention(label).sub(f"\0{task.labels.index(label)}\0", description)
    for k, label in enumerate(task.labels):
        description = description.replace(f"\0{k}\0", names[label])
    return Augmentation(description, _renaming(names))


def _formed(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Augmentation:
    """The answer takes another form."""
    longest = max(len(example.outputs[0]) for example in task.train[:50])
    forms = [name for name in FORMS if longest <= _MAX_CHARACTERS or name not in _FOR_SHORT]
    name = rng.choice(forms)

    def change(examples: Sequence[Example]) -> list[Example]:
        return [Example(e.input, (FORMS[name](e.input, e.outputs[0]),)) for e in examples]

    return Augmentation(_joined(description, _wording(rng, "forms", name), rng), change)


def _chosen(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Augmentation | None:
    """Several inputs: copy the one that has a given answer."""
    answer = rng.choice(task.train).outputs[0]
    having = [e for e in task.train if e.outputs[0] == answer]
    others = [e for e in task.train if answer not in e.outputs]
    n = rng.randint(2, len(_PLACES))
    if len(having) < 4 or len(others) < n or not _short(task):
        return None
    separator = _separator(task, rng)
    seed = rng.random()

    def change(_: Example, own: random.Random) -> Example:
        right = own.choice(having)
        some = [right, *own.sample(others, n - 1)]
        own.shuffle(some)
        return Example(separator.join(e.input for e in some), (right.input,))

    sentence = _wording(rng, "chosen", "one").format(n=n, answer=answer)
    return Augmentation(f"{description} {sentence}", _each(change, seed, len(having)))


def _placed(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Augmentation | None:
    """Several inputs: answer the one at a given place, or all of them."""
    if not _short(task) or len(task.train) < len(_PLACES):
        return None
    n, separator = rng.randint(2, len(_PLACES)), _separator(task, rng)
    place = rng.randrange(-1, n)  # -1: all of them

    def change(examples: Sequence[Example]) -> list[Example]:
        made = []
        for start in range(0, len(examples) - n + 1, n):
            some = examples[start : start + n]
            answers = [e.outputs[0] for e in some] if place < 0 else [some[place].outputs[0]]
            made.append(Example(separator.join(e.input for e in some), (", ".join(answers),)))
        return made

    where = "last" if place == n - 1 and rng.random() < 0.5 else _PLACES[place]
    sentence = _wording(rng, "placed", "all" if place < 0 else "one").format(n=n, place=where)
    return Augmentation(_joined(description, sentence, rng), change)


def _offered(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Augmentation | None:
    """The right answer stands among others: give its sign, or repeat it."""
    answers = _short_answers(task)
    n = rng.randint(2, 4)
    if len(answers) <= n or "Options:" in task.train[0].input:  # more than n: an example may have two right answers
        return None
    sign = STYLES[rng.choice(_OPTION_STYLES)]
    signs = [sign("", i) for i in range(n)]
    repeated = rng.random() < 0.3
    seed = rng.random()

    def change(e: Example, own: random.Random) -> Example:
        right, wrong = e.outputs[0], [answer for answer in answers if answer not in e.outputs]
        options = [right, *own.sample(wrong, min(n - 1, len(wrong)))]
        own.shuffle(options)
        listed = "\n".join(f"{s} {option}" for s, option in zip(signs, options, strict=False))
        return Example(f"{e.input}\n{listed}", (right if repeated else signs[options.index(right)],))

    sentence = _wording(rng, "offered", "repeated" if repeated else "sign").format(n=n, sign=rng.choice(signs))
    return Augmentation(_joined(description, sentence, rng), _each(change, seed))


def _checked(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Augmentation | None:
    """An answer is suggested: say whether it is right."""
    answers = _short_answers(task)
    names = names_for(2, words, rng)
    if len(answers) < 2 or names is None:
        return None
    seed, separator = rng.random(), rng.choice((" -> ", " = ", "\nAnswer: ", " : "))

    def change(e: Example, own: random.Random) -> Example:
        right, wrong = e.outputs[0], [answer for answer in answers if answer not in e.outputs]
        is_right = not wrong or own.random() < 0.5
        suggested = right if is_right else own.choice(wrong)
        return Example(f"{e.input}{separator}{suggested}", (names[not is_right],))

    sentence = _wording(rng, "checked", "one").format(right=names[0], wrong=names[1], joint=separator.strip())
    return Augmentation(f"{description} {sentence}", _each(change, seed))


def _ruled(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Augmentation | None:
    """A string task on the inputs replaces the task and its description."""
    inputs = [e.input for e in task.train]
    for name in rng.sample(list(RULES), len(RULES)):
        word, rule = rng.choice(words), RULES[name]
        answers = [answer for text in inputs if (answer := rule(text, word)) is not None]
        if len(answers) < max(EXAMPLES_TO_AUGMENT, len(inputs) // 2) or max(map(len, answers)) > MAX_CHARACTERS_RULED:
            continue

        def change(examples: Sequence[Example], rule=rule, word=word) -> list[Example]:
            return [Example(e.input, (answer,)) for e in examples if (answer := rule(e.input, word)) is not None]

        return Augmentation(_about(_wording(rng, "rules", name), word), change)
    return None


def _conditioned(task: Task, description: str, words: Sequence[str], rng: random.Random) -> Augmentation | None:
    """A condition on the inputs replaces the task and its description; two labels say whether it holds."""
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

        condition = _about(_wording(rng, "conditions", name), word)
        asked = _wording(rng, "conditions", "asked").format(condition=condition, yes=names[0], no=names[1])
        return Augmentation(asked, change)
    return None


def _about(wording: str, word: str) -> str:
    """Fill a wording with a word and its parts."""
    return wording.format(word=word, ending=word[-2:], letter=word[0].lower(), last=word[-1].lower(), length=len(word))


def _short_answers(task: Task) -> list[str]:
    """The task's different answers in a fixed order; none if its inputs or answers are long."""
    some = task.train[:50]
    longest = max(len(e.input) for e in some), max(len(e.outputs[0]) for e in some)
    is_short = longest[0] <= MAX_CHARACTERS_TOGETHER and longest[1] <= _MAX_CHARACTERS_OFFERED
    return list(dict.fromkeys(e.outputs[0] for e in task.train)) if is_short else []


def words_of(tasks: Sequence[Task]) -> tuple[str, ...]:
    """New names for labels, sorted: labels, and words that are an input or output of at least two tasks."""
    labels = {label for task in tasks for label in task.labels if len(label) <= _MAX_NAME_CHARACTERS}
    count: Counter[str] = Counter()
    for task in tasks:
        texts = {text for e in task.train for text in (e.input, e.outputs[0])}
        count.update(text for text in texts if re.fullmatch(rf"[A-Za-z]{{3,{_MAX_NAME_CHARACTERS}}}", text))
    return tuple(sorted(labels.union(text for text, n in count.items() if n > 1)))


def _renaming(names: dict[str, str]) -> Change:
    return lambda examples: [Example(e.input, (names.get(e.outputs[0], e.outputs[0]),)) for e in examples]


def _each(change: Callable[[Example, random.Random], Example], seed: float, most: int | None = None) -> Change:
    """The change of each example, of at most so many, which draws the same whenever it is applied."""

    def of_all(examples: Sequence[Example]) -> list[Example]:
        own = random.Random(seed)
        return [change(example, own) for example in examples[:most]]

    return of_all


def _separator(task: Task, rng: random.Random) -> str:
    """A separator of several inputs that none of them contains."""
    return rng.choice([s for s in _SEPARATORS if not any(s in e.input for e in task.train[:50])] or ["\n\n"])


def _short(task: Task) -> bool:
    """Whether four inputs can be joined into one."""
    return 4 * max(len(example.input) for example in task.train[:50]) <= MAX_CHARACTERS_TOGETHER


def _mention(label: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(label)}(?!\w)")


def _joined(description: str, sentence: str, rng: random.Random) -> str:
    return f"{description} {sentence}" if rng.random() < 0.8 else f"{sentence} {description}"


def _wording(rng: random.Random, table: str, key: str) -> str:
    """Draw a wording of the content, and one of the variants that its alternatives spell out."""
    return pick_alternatives(rng, rng.choice(read_content("task_augmentation")[table][key]))
