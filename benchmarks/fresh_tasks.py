"""Write twenty fresh held-out tasks: rules over texts that no training task and no measure of harm was made from.

    python benchmarks/fresh_tasks.py DATA fresh

DATA is the folder with docqa_train.jsonl.gz, docqa_test.jsonl.gz, bench_commonsenseqa.jsonl.gz and
bench_social_iqa_test.jsonl.gz. Descriptions, groups and which tasks are near are in fresh_tasks.toml. The tasks were
fixed, with this seed, before any model had done them; they are for one measurement at the end, never for choosing.
Documents of docqa_test give the test rows, those of docqa_train the examples.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from data_files import write

from loracast.documents.units import sentence_spans
from loracast.lab.data.rows import read_rows

SEED = "fresh tasks 1"
N_TRAIN, N_TEST = 200, 100
MAX_CHARACTERS = 420
"""Longest input."""
_LINE = re.compile(r"([A-Z][a-z]+ [A-Z][A-Za-z-]+): (.{3,120})")
_SIGNATURE = re.compile(r"\((@\w{3,})\) ([A-Z][a-z]+) \d{1,2}, \d{4}\s*$")
_SCENE = re.compile(r"\[Scene: ([^,.\]]{3,40}), (.{10,160})\]")
_AMOUNT = re.compile(r"\(?\$? ?\d{1,3}(?:,\d{3})*(?:\.\d+)?\)?")
_QUESTION_WORDS = ("who", "what", "where", "when", "why", "how")
_DOMAINS = {
    "tripadvisor": "hotel", "grocery": "groceries", "restaurants": "restaurant", "electronics": "electronics",
    "books": "book", "movies": "movie",
}  # fmt: skip

Rows = Iterator[tuple[str, str]]
"""Inputs with their outputs."""
Rule = Callable[[dict[str, Any], random.Random], Rows]
"""One row of a data file, a document with its questions or a question with choices -> rows of a task."""


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, each on one line."""
    found = (" ".join(text[start:end].split()) for start, end in sentence_spans(text))
    return [sentence for sentence in found if len(sentence) > 12]


def dialogues(document: dict[str, Any]) -> Iterator[list[tuple[str, str]]]:
    """Pieces of three to five successive lines of a script, as (speaker, what is said)."""
    lines = [_LINE.fullmatch(line.strip()) for line in document["document"].split("\n")]
    start = 0
    while start + 5 <= len(lines):
        n = 3 + start % 3
        some = lines[start : start + n]
        if all(some):
            yield [(line[1], line[2]) for line in some if line]
        start += n


def script(lines: list[tuple[str, str]]) -> str:
    """Lines as they stand in a script."""
    return "\n".join(f"{name}: {said}" for name, said in lines)


def last_speaker(document: dict[str, Any], rng: random.Random) -> Rows:
    """A dialogue -> who speaks last."""
    for lines in dialogues(document):
        if lines[0][0] != lines[-1][0]:
            yield script(lines), lines[-1][0]


def who_asks(document: dict[str, Any], rng: random.Random) -> Rows:
    """A dialogue in which one line has a question mark -> who says it."""
    for lines in dialogues(document):
        asking = [name for name, said in lines if "?" in said]
        if len(asking) == 1 and len({name for name, _ in lines}) > 1:
            yield script(lines), asking[0]


def count_speakers(document: dict[str, Any], rng: random.Random) -> Rows:
    """A dialogue -> the number of people in it."""
    for lines in dialogues(document):
        yield script(lines), str(len({name for name, _ in lines}))


def scene_place(document: dict[str, Any], rng: random.Random) -> Rows:
    """A stage direction -> the place that it begins with."""
    for place, rest in _SCENE.findall(document["document"]):
        yield f"[Scene: {place}, {rest}]", place


def reported_speech(document: dict[str, Any], rng: random.Random) -> Rows:
    """A line of a script -> a sentence that says who says it."""
    for lines in dialogues(document):
        name, said = lines[0]
        if len(said) < 50 and '"' not in said:
            yield f"{name}: {said}", f'{name.split()[0]} says: "{said}"'


def question_word(document: dict[str, Any], rng: random.Random) -> Rows:
    """A question without its first word -> the word."""
    for asked in document["questions"]:
        first, _, rest = asked["question"].partition(" ")
        if first.lower() in _QUESTION_WORDS and rest:
            yield f"___ {rest}", first.lower()


def opening_sentence(document: dict[str, Any], rng: random.Random) -> Rows:
    """The first sentence of a story and another of it -> which is the first."""
    sentences = sentences_of(document["document"])
    if len(sentences) > 6:
        is_first = rng.random() < 0.5
        pair = (sentences[0], rng.choice(sentences[3:]))
        yield "A: {}\nB: {}".format(*(pair if is_first else pair[::-1])), "A" if is_first else "B"


def answered_in_a_sentence(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Questions whose answer stands in one sentence of the document alone, with that sentence."""
    for asked in document["questions"]:
        answer = asked["answers"][0]
        having = [text for text in sentences_of(document["document"]) if answer.lower() in text.lower()]
        if asked["span"] and 2 < len(answer) < 40 and len(having) == 1:
            yield having[0], asked


def does_it_say(document: dict[str, Any], rng: random.Random) -> Rows:
    """A sentence, a question and an answer, the right one or another question's -> yes or no."""
    answers = [asked["answers"][0] for asked in document["questions"]]
    for sentence, asked in answered_in_a_sentence(document):
        right = asked["answers"][0]
        wrong = [answer for answer in answers if answer.lower() not in sentence.lower()]
        if wrong:
            is_right = rng.random() < 0.5
            said = right if is_right else rng.choice(wrong)
            yield f"{sentence}\nQuestion: {asked['question']}\nAnswer: {said}", "yes" if is_right else "no"


def short_answer(document: dict[str, Any], rng: random.Random) -> Rows:
    """A sentence and a question -> the answer's words."""
    for sentence, asked in answered_in_a_sentence(document):
        at = sentence.lower().index(asked["answers"][0].lower())
        yield f"{sentence}\n{asked['question']}", sentence[at : at + len(asked["answers"][0])]


def option_number(document: dict[str, Any], rng: random.Random) -> Rows:
    """A sentence, a question and the answers of the document's questions -> the number of the right one."""
    answers = list(dict.fromkeys(asked["answers"][0] for asked in document["questions"]))
    for sentence, asked in answered_in_a_sentence(document):
        right = asked["answers"][0]
        wrong = [answer for answer in answers if answer.lower() not in sentence.lower()]
        if len(wrong) >= 2:
            options = [right, *rng.sample(wrong, min(3, len(wrong)))]
            rng.shuffle(options)
            listed = "\n".join(f"{i}. {option}" for i, option in enumerate(options, 1))
            yield f"{sentence}\n{asked['question']}\n{listed}", str(options.index(right) + 1)


def tweet_author(document: dict[str, Any], rng: random.Random) -> Rows:
    """A tweet -> the account in its signature."""
    if found := _SIGNATURE.search(document["document"]):
        yield document["document"].strip(), found[1]


def tweet_month(document: dict[str, Any], rng: random.Random) -> Rows:
    """A tweet -> the month of its date."""
    if found := _SIGNATURE.search(document["document"]):
        yield document["document"].strip(), found[2]


def count_mentions(document: dict[str, Any], rng: random.Random) -> Rows:
    """A tweet -> how many accounts are named in it."""
    yield document["document"].strip(), str(len(re.findall(r"@\w", document["document"])))


def table_rows(document: dict[str, Any]) -> Iterator[tuple[list[str], list[str]]]:
    """Rows of a financial table with the years above them: (years, [label, amounts ...])."""
    years: list[str] = []
    for line in document["document"].split("\n"):
        cells = [cell.strip() for cell in line.split("|")]
        numbers = [cell for cell in cells if cell]
        if 2 <= len(numbers) <= 3 and all(re.fullmatch(r"20\d\d", cell) for cell in numbers):
            years = numbers
        elif years and len(cells) == len(years) + 1 and cells[0] and all(map(_AMOUNT.fullmatch, cells[1:])):
            yield years, cells


def amount(cell: str) -> float:
    """The number in an accountant's notation."""
    number = float(re.sub(r"[^\d.]", "", cell))
    return -number if cell.startswith("(") else number


def plain_number(document: dict[str, Any], rng: random.Random) -> Rows:
    """An amount in an accountant's notation -> the plain number."""
    for _, cells in table_rows(document):
        cell = rng.choice(cells[1:])
        if "," in cell or "(" in cell or "$" in cell:
            yield cell, ("-" if cell.startswith("(") else "") + re.sub(r"[^\d.]", "", cell)


def table_scale(document: dict[str, Any], rng: random.Random) -> Rows:
    """The head of a table -> the unit of its amounts."""
    head = "\n".join(document["document"].split("\n")[:5])
    found = set(re.findall(r"thousands|millions", head.lower()))
    if len(found) == 1:
        yield head, found.pop()


def rose_or_fell(document: dict[str, Any], rng: random.Random) -> Rows:
    """A row of a table with two years -> whether the amount rose or fell."""
    for years, cells in table_rows(document):
        values = {year: amount(cell) for year, cell in zip(years, cells[1:], strict=True)}
        if len(values) == 2 and len(set(values.values())) == 2:
            rose = values[max(values)] > values[min(values)]
            yield f"| {' | '.join(years)}\n{' | '.join(cells)}", "rose" if rose else "fell"


def year_of_value(document: dict[str, Any], rng: random.Random) -> Rows:
    """A row of a table and one of its amounts -> the year above it."""
    for years, cells in table_rows(document):
        if len(set(cells)) == len(cells):
            i = rng.randrange(len(years))
            yield f"| {' | '.join(years)}\n{' | '.join(cells)}\nWhen was it {cells[i + 1]}?", years[i]


def review_domain(document: dict[str, Any], rng: random.Random) -> Rows:
    """The beginning of a review -> what is reviewed."""
    domain = _DOMAINS[re.split(r"[/_]", document["doc_id"])[1]]
    yield " ".join(sentences_of(document["document"])[:3]), domain


def commonsense_answer(question: dict[str, Any], rng: random.Random) -> Rows:
    """A question with choices -> the right one."""
    yield f"{question['question']}\nOptions: {', '.join(question['choices'])}", question["choices"][question["answer"]]


def hide_name(question: dict[str, Any], rng: random.Random) -> Rows:
    """A short statement that begins with a name, which is asked about later -> the same with X for the name."""
    first, *others = sentences_of(question["question"])
    name = first.split()[0]
    is_name = name.isalpha() and re.search(rf"\b{name}\b", " ".join(others))
    if is_name and len(first) < 90 and len(re.findall(r"\b[A-Z][a-z]+", first)) == 1:
        yield first, re.sub(rf"\b{name}\b", "X", first)


_SOURCES: dict[str, tuple[Rule, ...]] = {
    "friendsqa": (last_speaker, who_asks, count_speakers, scene_place, reported_speech),
    "mctest": (question_word, opening_sentence, does_it_say, short_answer, option_number),
    "tweetqa": (tweet_author, tweet_month, count_mentions),
    "tatqa": (plain_number, table_scale, rose_or_fell, year_of_value),
    "subjqa": (review_domain,),
    "bench_commonsenseqa": (commonsense_answer,),
    "bench_social_iqa_test": (hide_name,),
}
"""By source: a source of documents, or a file of questions."""


def made(rule: Rule, sources: list[dict[str, Any]], n: int, split: str, taken: set[str]) -> list[dict[str, str]]:
    """Up to n rows of a task with different inputs, none of them taken, and no output much commoner than the others."""
    rng = random.Random(f"{SEED}/{rule.__name__}/{split}")
    order = rng.sample(sources, len(sources))
    candidates = [(text, output) for source in order for text, output in rule(source, rng)]
    rng.shuffle(candidates)
    counts: dict[str, int] = {}
    outputs = {output for _, output in candidates}
    most = n if len(outputs) > 12 else -(-n * 5 // (4 * len(outputs)))
    rows = []
    for text, output in candidates:
        if len(rows) == n:
            break
        if len(text) <= MAX_CHARACTERS and text not in taken and counts.get(output, 0) < most:
            taken.add(text)
            counts[output] = counts.get(output, 0) + 1
            rows.append(
                {"task": rule.__name__, "task_split": "heldout", "split": split, "input": text, "output": output}
            )
    return rows


def write_tasks(data: Path, out: Path) -> None:
    """Write the tasks, their descriptions and their metadata."""
    about = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    documents = {split: read_rows(data / f"docqa_{split}.jsonl.gz") for split in ("train", "test")}
    rows: list[dict[str, str]] = []
    for source, rules in _SOURCES.items():
        if source.startswith("bench_"):
            questions = read_rows(data / f"{source}.jsonl.gz")
            by_split = {"train": questions[::2], "test": questions[1::2]}
        else:
            by_split = {split: [d for d in some if d["source"] == source] for split, some in documents.items()}
        for rule in rules:
            taken: set[str] = set()
            rows += made(rule, by_split["test"], N_TEST, "test", taken)
            rows += made(rule, by_split["train"], N_TRAIN, "train", taken)
    write_suite(out, about, rows)


def write_suite(out: Path, about: dict[str, Any], rows: list[dict[str, str]]) -> None:
    """Write the rows of held-out tasks, with descriptions and metadata by what is known about each."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    meta, descriptions = [], []
    for name in names:
        outputs = {row["output"] for row in rows if row["task"] == name}
        kind = "near" if about[name].get("near") else "far"
        labels = sorted(outputs) if len(outputs) <= 12 else []
        meta.append({"task": name, "group": about[name].get("group", name), "heldout_kind": kind, "labels": labels})
        descriptions += [{"task": name, "kind": "heldout", "description": d} for d in about[name]["descriptions"]]
    out.mkdir(parents=True, exist_ok=True)
    for file, some in (("tasks", rows), ("task_descriptions", descriptions), ("tasks_meta", meta)):
        write(out / f"{file}.jsonl.gz", some)
    print(f"{len(names)} tasks with {len(rows)} rows in {out}")


if __name__ == "__main__":
    typer.run(write_tasks)
