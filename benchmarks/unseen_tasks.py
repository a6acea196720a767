"""Write 28 tasks to choose by: none is a training task, so they judge a hypernetwork that has seen all of those.

    python benchmarks/unseen_tasks.py DATA unseen

DATA is the folder with bench_copa.jsonl.gz, bench_gsm8k_train.jsonl.gz and docqa_train.jsonl.gz. Nine tasks are lists
in unseen_tasks.toml, the others rules below; their descriptions are in that file. Unlike the held-out and the fresh
tasks, they are there to be looked at: whatever was chosen by them is measured on those.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from fresh_tasks import sentences_of, write_suite

from loracast.lab.data.rows import read_rows

SEED = "unseen tasks 1"
N_TRAIN, N_TEST = 60, 30
MAX_CHARACTERS = 420
_FIRST = "Anna Ben Clara David Emma Frank Grace Henry Iris Jack Karen Liam Maria Noah Olivia Peter Rosa Sam Tina Victor"
_LAST = "Adams Brown Clark Dixon Evans Foster Green Hughes Irving Jones King Lewis Moore Nolan Owens Price Reed Scott"
_MONTHS = "January February March April May June July August September October November December"
_DOMAINS = "gmail.com yahoo.com example.org outlook.com city.gov uni.edu shop.net mail.de museum.org startup.io"
_EXTENSIONS = "pdf txt jpg png docx xlsx mp3 zip html csv py mp4"
_WORDS = """
    apple river garden stone window summer bridge letter music silver orange planet candle forest mirror basket winter
    pepper rocket island button camera dragon engine flower guitar hammer insect jacket kettle ladder market needle
    office pencil queen rabbit saddle ticket umbrella valley wagon yellow zebra sun ice map oak fog bell kite lamp nest
"""
_FIELDS = "World National European American Global Royal International Central"
_ABOUT = "Health Trade Space Science Food Energy Sports Music Weather Housing Fishing Railway"
_BODIES = "Organization Agency Association Institute Council Fund Union Board"
_ANSWERS_OF_SPEAKERS = {"M": "man", "W": "woman"}

Rows = Iterator[tuple[str, str]]
"""Inputs with their outputs."""


def one_of(words: str, rng: random.Random) -> str:
    """One of some words."""
    return rng.choice(words.split())


def names(rng: random.Random) -> tuple[str, str]:
    """A first and a last name."""
    return one_of(_FIRST, rng), one_of(_LAST, rng)


def initials(rng: random.Random) -> tuple[str, str]:
    """A name -> its initials."""
    first, last = names(rng)
    return f"{first} {last}", f"{first[0]}.{last[0]}."


def last_name_first(rng: random.Random) -> tuple[str, str]:
    """A name -> the name as in an index."""
    first, last = names(rng)
    return f"{first} {last}", f"{last}, {first}"


def user_name(rng: random.Random) -> tuple[str, str]:
    """A name -> a user name."""
    first, last = names(rng)
    return f"{first} {last}", f"{first[0]}{last}".lower()


def email_domain(rng: random.Random) -> tuple[str, str]:
    """An e-mail address -> its domain."""
    first, last = names(rng)
    domain = one_of(_DOMAINS, rng)
    return f"{first}.{last}@{domain}".lower(), domain


def file_extension(rng: random.Random) -> tuple[str, str]:
    """A file's name -> its extension."""
    extension = one_of(_EXTENSIONS, rng)
    return f"{one_of(_WORDS, rng)}_{one_of(_WORDS, rng)}.{extension}", extension


def iso_date(rng: random.Random) -> tuple[str, str]:
    """A date in words -> the date in numbers."""
    year, month, day = rng.randint(1900, 2030), rng.randint(1, 12), rng.randint(1, 28)
    return f"{_MONTHS.split()[month - 1]} {day}, {year}", f"{year}-{month:02}-{day:02}"


def century(rng: random.Random) -> tuple[str, str]:
    """A year -> its century."""
    year = rng.choice([y for y in range(1101, 2000) if y % 100])
    number = year // 100 + 1
    return str(year), f"{number}{'th' if number < 21 else 'st'}"


def twelve_hour(rng: random.Random) -> tuple[str, str]:
    """A time of the 24-hour clock -> that of the 12-hour clock."""
    hour, minute = rng.randrange(24), rng.randrange(0, 60, 5)
    return f"{hour:02}:{minute:02}", f"{(hour - 1) % 12 + 1}:{minute:02} {'am' if hour < 12 else 'pm'}"


def round_to_ten(rng: random.Random) -> tuple[str, str]:
    """A number -> the nearest multiple of ten."""
    number = rng.choice([n for n in range(11, 1000) if n % 5])
    return str(number), str(round(number, -1))


def longer_word(rng: random.Random) -> tuple[str, str]:
    """Two words -> the longer one."""
    one, other = rng.sample(_WORDS.split(), 2)
    while len(one) == len(other):
        one, other = rng.sample(_WORDS.split(), 2)
    return f"{one}, {other}", max(one, other, key=len)


def same_beginning(rng: random.Random) -> tuple[str, str]:
    """Two words -> whether they begin with the same letter."""
    is_same = rng.random() < 0.5
    one, other = rng.sample(_WORDS.split(), 2)
    while (one[0] == other[0]) is not is_same:
        one, other = rng.sample(_WORDS.split(), 2)
    return f"{one}, {other}", "yes" if is_same else "no"


def acronym(rng: random.Random) -> tuple[str, str]:
    """The name of an organization -> its acronym."""
    words = [one_of(_FIELDS, rng), one_of(_ABOUT, rng), one_of(_BODIES, rng)]
    return " ".join(words), "".join(word[0] for word in words)


def hashtag(rng: random.Random) -> tuple[str, str]:
    """Words -> a hashtag."""
    words = rng.sample(_WORDS.split(), rng.randint(2, 3))
    return " ".join(words), "#" + "".join(word.capitalize() for word in words)


def slug(rng: random.Random) -> tuple[str, str]:
    """A title -> the last part of a web address."""
    words = rng.sample(_WORDS.split(), rng.randint(2, 4))
    return " ".join(word.capitalize() for word in words), "-".join(words)


DRAWN: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    initials, last_name_first, user_name, email_domain, file_extension, iso_date, century, twelve_hour, round_to_ten,
    longer_word, same_beginning, acronym, hashtag, slug,
)  # fmt: skip
"""Rules that draw an input with its output."""


def cause_or_effect(question: dict[str, Any], rng: random.Random) -> Rows:
    """A statement and two alternatives -> the letter of the right one."""
    a, b = question["choices"]
    yield f"{question['question']}\nA: {a}\nB: {b}", "AB"[question["answer"]]


def who_speaks_first(document: dict[str, Any], rng: random.Random) -> Rows:
    """The beginning of a dialogue -> whether a man or a woman speaks first."""
    lines = document["document"].split("\n")[:2]
    if document["source"] == "dream" and [*sorted(line[:2] for line in lines)] == ["M:", "W:"]:
        yield "\n".join(lines), _ANSWERS_OF_SPEAKERS[lines[0][0]]


def cell_of_table(document: dict[str, Any], rng: random.Random) -> Rows:
    """A row of a table with the head of the table -> the cell of the column that is asked for."""
    if document["source"] != "wikitablequestions":
        return
    head, *rows = ([cell.strip() for cell in line.split("|")] for line in document["document"].split("\n")[1:])
    row = rng.choice(rows) if rows else []
    if (
        2 < len(row) == len(head) < 7
        and all(row)
        and all(head)
        and len({*row}) == len(row)
        and len({*head}) == len(head)
    ):
        i = rng.randrange(len(row))
        if len(row[i]) < 24:
            yield f"{' | '.join(head)}\n{' | '.join(row)}\n{head[i]}?", row[i]


def person_of_problem(question: dict[str, Any], rng: random.Random) -> Rows:
    """A word problem that begins with a name -> the name."""
    first = next(iter(sentences_of(question["question"])), "")
    found = re.match(r"[A-Z][a-z]{2,}(?= (?:has|had|bought|is|was|needs|wants|made|sold|goes|went|read|ate))", first)
    if found and found[0] not in ("There", "She", "They", "Each", "One", "Two", "Three", "The", "This", "That"):
        yield first, found[0]


def numbers_in_problem(question: dict[str, Any], rng: random.Random) -> Rows:
    """A sentence of a word problem -> how many numbers in digits are in it."""
    sentence = rng.choice(sentences_of(question["question"]) or [""])
    n = len(re.findall(r"\d[\d,.]*", sentence))
    if 0 < n < 5:
        yield sentence, str(n)


FOUND: dict[str, tuple[Callable[[dict[str, Any], random.Random], Rows], ...]] = {
    "bench_copa": (cause_or_effect,),
    "docqa_train": (who_speaks_first, cell_of_table),
    "bench_gsm8k_train": (person_of_problem, numbers_in_problem),
}
"""By file, rules that find rows in its rows."""


def listed(pairs: str) -> Iterator[tuple[str, str]]:
    """Rows "input = output", between semicolons or line ends."""
    for row in re.split(r"[;\n]", pairs.strip()):
        given, _, answer = row.partition("=")
        yield given.strip(), answer.strip()


def split(rows: list[tuple[str, str]], rng: random.Random) -> list[dict[str, str]]:
    """Rows with different inputs in a random order: at most 30, at most a quarter of them, to test, up to 60 others."""
    different = list({given: (given, answer) for given, answer in rows if len(given) <= MAX_CHARACTERS}.values())
    rng.shuffle(different)
    n_test = min(N_TEST, len(different) // 4)
    return [
        {"input": given, "output": answer, "split": "test" if i < n_test else "train"}
        for i, (given, answer) in enumerate(different[: n_test + N_TRAIN])
    ]


def write_tasks(data: Path, out: Path) -> None:
    """Write the tasks, their descriptions and their metadata."""
    about = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    rows = {name: list(listed(task["pairs"])) for name, task in about.items() if "pairs" in task}
    for draw in DRAWN:
        rng = random.Random(f"{SEED}/{draw.__name__}")
        rows[draw.__name__] = [draw(rng) for _ in range(3 * (N_TRAIN + N_TEST))]
    for file, rules in FOUND.items():
        sources = read_rows(data / f"{file}.jsonl.gz")
        for rule in rules:
            rng = random.Random(f"{SEED}/{rule.__name__}")
            rows[rule.__name__] = [row for source in sources for row in rule(source, rng)]
    examples = {name: split(rows[name], random.Random(f"{SEED}/{name}/split")) for name in about}
    write_suite(
        out, about, [{"task": name, "task_split": "heldout", **row} for name, some in examples.items() for row in some]
    )


if __name__ == "__main__":
    typer.run(write_tasks)
