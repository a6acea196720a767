"""Tasks made from tasks: what a variation says is what its examples do."""

from __future__ import annotations

import random
import re

from loracast.documents.task_spec import Example
from loracast.lab.data.rows import read_content
from loracast.lab.data.task_augmentation import CONDITIONS, FORMS, RULES, STYLES, augment, names_for, words_of
from loracast.lab.data.tasks import Task, read_tasks
from loracast.lab.training.task_source import TaskDataConfig, TaskSource
from suites import DATA

WORDS = ("apple", "lamp", "river", "stone", "cloud")
FEELING = Task(
    "feeling",
    {"train": ('Is the mood "positive" or "negative"?',)},
    tuple(Example(f"word{i}", ("positive" if i % 2 else "negative",)) for i in range(20)),
    (),
    labels=("negative", "positive"),
)
SHOUT = Task("shout", {"train": ("Shout it.",)}, tuple(Example(w * 2, (w.upper(),)) for w in WORDS), ())


def variations(task: Task, n: int = 200):
    """Many variations of a task, with examples that they made and those that they made them from."""
    for seed in range(n):
        examples = random.Random(seed).sample(task.train, len(task.train))
        variation = augment(task, task.descriptions["train"][0], WORDS, random.Random(seed))
        yield variation.description, variation.change(examples), examples


def test_labels_are_called_as_the_description_says():
    seen = 0
    for description, made, examples in variations(FEELING):
        outputs = {e.outputs[0] for e in made}
        if (
            [e.input for e in made] != [e.input for e in examples]
            or len(outputs) != 2
            or outputs & {"positive", "negative"}
        ):
            continue
        names = {before.outputs[0]: after.outputs[0] for before, after in zip(examples, made, strict=True)}
        if set(names.values()) <= set(WORDS):  # a list of names: each beside its label
            parts = re.split(r"; |, | and ", description.replace(FEELING.descriptions["train"][0], ""))
            said = {label: part for part in parts for label in names if label in part and any(w in part for w in WORDS)}
            assert all(names[label] in said[label] for label in names), description
        elif not any(name.strip('".!()[]').lower() in ("positive", "negative") for name in names.values()):
            synonyms = read_content("task_augmentation")["synonyms"]
            if all(names[label] in synonyms[label] for label in names):  # or else it is another form
                assert all(names[label] in description for label in names)
                assert "positive" not in description and "negative" not in description
                assert synonyms["positive"].index(names["positive"]) == synonyms["negative"].index(names["negative"])
            else:
                continue
        else:
            continue
        seen += 1
    assert seen > 50


def test_one_of_several_inputs_is_meant():
    answers = {e.input: e.outputs[0] for e in SHOUT.train}
    places = {"first": 0, "second": 1, "third": 2, "fourth": 3, "last": -1}
    counts = {"one": 0, "all": 0, "chosen": 0}
    for task, known in ((SHOUT, answers), (FEELING, {e.input: e.outputs[0] for e in FEELING.train})):
        for description, made, _ in variations(task):
            inputs = [re.findall("|".join(sorted(known, key=len, reverse=True)), e.input) for e in made]
            if not made or len(inputs[0]) < 2:
                continue
            place = next((places[word] for word in places if word in description), None)
            for several, example in zip(inputs, made, strict=True):
                if example.outputs[0] in several:  # chosen by its answer
                    counts["chosen"] += 1
                    having = [i for i in several if known[i] in re.findall(r"\w+", description.split("?")[-1])]
                    assert example.outputs[0] in having or known[example.outputs[0]] in description
                    assert len([i for i in several if known[i] == known[example.outputs[0]]]) == 1
                elif place is None:
                    counts["all"] += 1
                    assert example.outputs[0] == ", ".join(known[i] for i in several)
                else:
                    counts["one"] += 1
                    assert example.outputs[0] == known[several[place]]
    assert min(counts.values()) > 10, counts


def test_forms_of_an_answer():
    expected = {
        "upper": "NEW YORK", "lower": "new york", "title": "New York", "full_stop": "New york.", "exclamation": "New york!",
        "quotes": '"New york"', "brackets": "(New york)", "square_brackets": "[New york]", "prefix": "Answer: New york",
        "twice": "New york New york", "spaced": "N e w y o r k", "hyphens": "New-york", "reversed": "kroy weN", "echo": "where: New york",
    }  # fmt: skip
    assert {name: form("where", "New york") for name, form in FORMS.items()} == expected
    assert set(read_content("task_augmentation")["forms"]) == set(FORMS)  # each has its wordings


def test_rules_answer_what_they_ask():
    expected = {
        "copy": "Ask a very old friend", "first_word": "Ask", "second_word": "a", "last_word": "friend", "longest_word": "friend",
        "shortest_word": "a", "initials": "AAVOF", "without_first_word": "a very old friend", "without_last_word": "Ask a very old",
        "words_backwards": "friend old very a Ask", "hyphens": "Ask-a-very-old-friend", "first_word_replaced": "river a very old friend",
        "word_before": "river Ask a very old friend", "word_after": "Ask a very old friend river", "always": "river",
    }  # fmt: skip
    of_a_word = {
        "copy": "table", "ending_added": "tableer", "without_first_letter": "able", "without_last_letter": "tabl", "last_two_letters": "le",
        "first_three_letters": "tab", "first_letter_doubled": "ttable", "word_before": "river table", "word_after": "table river", "always": "river",
    }  # fmt: skip
    for text, answers in (("Ask a very old friend", expected), ("table", of_a_word)):
        given = {name: rule(text, "river") for name, rule in RULES.items()}
        assert {name: answer for name, answer in given.items() if answer is not None} == answers
    assert RULES["longest_word"]("five nine a", "river") is None  # two are as long
    assert set(read_content("task_augmentation")["rules"]) == set(RULES)


def test_conditions_hold_where_they_say():
    texts = {
        "has_letter": ("a year", "a day"), "longer": ("stones", "stone"), "ends_with": ("water", "stone"), "several_words": ("a day", "day"),
        "more_than_five_words": ("it was a day in May", "it was a day there"), "capital": ("Day", "day"), "number": ("day 3", "day three"),
    }  # fmt: skip
    assert set(texts) == set(CONDITIONS) == set(read_content("task_augmentation")["conditions"]) - {"asked"}
    for name, (yes, no) in texts.items():
        assert CONDITIONS[name](yes, "river") and not CONDITIONS[name](no, "river"), name


def test_a_rule_or_a_condition_takes_the_place_of_the_task():
    """The description says nothing of the task, and the words in it are those of the answers."""
    seen = {"rule": 0, "condition": 0}
    for description, made, examples in variations(SHOUT, 400):
        if "Shout it." in description:
            continue
        assert {e.input for e in made} <= {e.input for e in examples}
        outputs = {e.outputs[0] for e in made}
        if len(outputs) == 2 and all(name in description for name in outputs):
            seen["condition"] += 1
        else:
            seen["rule"] += 1
            assert all(any(rule(e.input, w) == e.outputs[0] for rule in RULES.values() for w in WORDS) for e in made)
    assert min(seen.values()) > 10, seen


def test_the_right_answer_among_others():
    answers = {e.input: e.outputs[0] for e in SHOUT.train}
    seen = {"sign": 0, "repeated": 0}
    for description, made, _ in variations(SHOUT, 400):
        if not made or "\n" not in made[0].input or not re.match(r"\W?(A|1)\W? ", made[0].input.split("\n")[1]):
            continue
        for example in made:
            text, *options = example.input.split("\n")
            by_sign = dict(option.split(" ", 1) for option in options)
            assert len(set(by_sign.values())) == len(by_sign) >= 2
            kind = "sign" if example.outputs[0] in by_sign else "repeated"
            seen[kind] += 1
            assert by_sign.get(example.outputs[0], example.outputs[0]) == answers[text], description
    assert min(seen.values()) > 10, seen


def test_a_suggested_answer_is_right_or_wrong():
    answers = {e.input: e.outputs[0] for e in SHOUT.train}
    named = {True: 0, False: 0}
    for description, made, _ in variations(SHOUT, 400):
        parts = [re.split(r" -> | = |\nAnswer: | : ", e.input) for e in made]
        if not parts or any(len(part) != 2 for part in parts):
            continue
        names: dict[bool, set[str]] = {True: set(), False: set()}
        for (text, suggested), example in zip(parts, made, strict=True):
            names[answers[text] == suggested].add(example.outputs[0])
        assert all(len(some) <= 1 for some in names.values()) and not names[True] & names[False]
        for is_right, some in names.items():
            named[is_right] += len(some)
            assert all(name in description for name in some)
    assert min(named.values()) > 10


def test_labels_are_named_in_one_style():
    seen = set()
    for seed in range(300):
        names = names_for(3, WORDS, random.Random(seed))
        assert names is not None and len(set(names)) == 3
        styles = [
            style
            for style, write in STYLES.items()
            if set(names) <= {write(word, i) for word in WORDS for i in range(3)}
        ]
        assert styles or set(names) <= set(WORDS)
        seen.update(styles)
    assert seen == set(STYLES)
    assert names_for(6, WORDS, random.Random(0)) is None


def test_the_same_state_makes_the_same_variation():
    for seed in range(40):
        one, two = (augment(FEELING, "Is it positive or negative?", WORDS, random.Random(seed)) for _ in range(2))
        assert one.description == two.description and one.change(FEELING.train) == two.change(FEELING.train)


def test_words_for_labels_are_words_of_several_tasks():
    other = Task("other", {}, (Example("lamp", ("zzz",)), Example("mayor", ("applepp",))), (), labels=("a b",))
    again = Task("again", {}, (Example("lamp", ("mayor",)),), ())
    assert words_of([other, again]) == ("a b", "lamp", "mayor")


def test_a_share_of_the_draws_is_varied_and_all_else_is_drawn_the_same(base):
    tasks = [FEELING, SHOUT]
    config = {"tasks_per_step": 2, "examples_per_task": 3}
    plain, varied = (
        TaskSource(TaskDataConfig(**config, augmented_share=share), tasks, base.chat) for share in (0, 0.5)
    )
    unspecified = TaskSource(TaskDataConfig(**config, augmented_share=0.5), tasks, base.chat, is_specified=False)
    n_varied = 0
    for number in range(60):
        one, two, three = (source.draw(number) for source in (plain, varied, unspecified))
        assert [a.task for a in one] == [b.task for b in two] and one == three
        episodes = [source.episodes(drawn) for source, drawn in ((plain, one), (varied, two), (unspecified, three))]
        assert episodes[0] == episodes[2]
        for i, (whole, changed) in enumerate(zip(one, two, strict=True)):
            n_varied += changed.augmentation is not None
            if changed.augmentation is None:
                assert episodes[0][i] == episodes[1][i] and whole == changed
            else:
                assert whole.text != changed.text
    assert 40 < n_varied < 80
    assert varied.episodes(varied.draw(3)) == varied.episodes(varied.draw(3))


def test_real_tasks_vary_and_no_synonym_is_a_label_of_a_held_out_task():
    tasks = read_tasks(DATA / "tasks.jsonl.gz")
    training = [task for task in tasks if not task.is_heldout]
    words, rng = words_of(training), random.Random(0)
    for task in training:
        for description in task.seen_descriptions():
            variation = augment(task, description, words, rng)
            assert variation.description != description and variation.change(task.train[:12])
    held_out = {label.lower() for task in tasks if task.is_heldout for label in task.labels if not label.isdigit()}
    held_out -= {label.lower() for task in training for label in task.labels}
    synonyms = {name.lower() for names in read_content("task_augmentation")["synonyms"].values() for name in names}
    assert not synonyms & held_out
