"""The scripts that write sets of tasks: the development sets, and the fresh held-out tasks."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import tomllib
from datetime import datetime
from pathlib import Path

import pytest

from loracast.lab.data.tasks import read_tasks
from suites import DATA

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHIPPED = Path(__file__).parents[2] / "src" / "loracast" / "pretrained" / "text-smollm2-135m"
sys.path.insert(0, str(BENCHMARKS))
import fresh_tasks  # noqa: E402  (a script)
import unseen_tasks  # noqa: E402  (a script)

TABLE = {
    "document": "| 2019 | 2018\n| (in millions) |\nSales | $ 1,452.4 | $ 1,146.2\nLosses | (57) | (13)\nNotes | see 1 | 2"
}
SCRIPT = {
    "document": "[Scene: Central Perk, Ross is waiting for his coffee.]\nRoss Geller: Breathe in.\nCarol Willick: Why me?\nRoss Geller: Count.\nSusan Bunch: Faster now?\nCarol Willick: No.\nSusan Bunch: Your son.\nRoss Geller: Good."
}
STORY = {
    "document": "Todd is a small boy. He lives in Rocksville with his cat. The cat is called Whiskers. Todd likes the big rock. His dad can swim very well. Todd wants to learn it too. The lake is not deep at all. They go there on Friday.",
    "questions": [
        {"question": "What is the cat called?", "answers": ["Whiskers"], "span": True},
        {"question": "When do they go there?", "answers": ["on Friday"], "span": True},
        {"question": "Who can swim?", "answers": ["His dad"], "span": True},
    ],
}  # fmt: skip
TWEET = {"document": "Good luck, @chris, and thanks.— John Colapinto (@JohnColapinto) April 1, 2015"}


def rows(name: str, source: dict) -> list[tuple[str, str]]:
    found = list(getattr(fresh_tasks, name)(source, random.Random(1)))
    assert found
    return found


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("tweet_author", TWEET, "@JohnColapinto"),
        ("tweet_month", TWEET, "April"),
        ("count_mentions", TWEET, "2"),
        ("table_scale", TABLE, "millions"),
        ("scene_place", SCRIPT, "Central Perk"),
        ("commonsense_answer", {"question": "Where is milk?", "choices": ["desk", "fridge"], "answer": 1}, "fridge"),
        (
            "hide_name",
            {"question": "Kai ate the soup of his cat. What will Kai do next?"},
            "X ate the soup of his cat.",
        ),
        ("review_domain", {"doc_id": "subjqa/movies_12", "document": "I liked every minute of it."}, "movie"),
    ],
)
def test_rules_of_one_row(name, source, expected):
    assert [output for _, output in rows(name, source)] == [expected]


def test_rules_of_tables():
    assert rows("rose_or_fell", TABLE) == [
        ("| 2019 | 2018\nSales | $ 1,452.4 | $ 1,146.2", "rose"), ("| 2019 | 2018\nLosses | (57) | (13)", "fell"),
    ]  # fmt: skip
    assert set(rows("plain_number", TABLE)) <= {
        ("$ 1,452.4", "1452.4"), ("$ 1,146.2", "1146.2"), ("(57)", "-57"), ("(13)", "-13"),
    }  # fmt: skip
    for text, year in rows("year_of_value", TABLE):
        head, row, asked = text.split("\n")
        value = asked.removeprefix("When was it ").rstrip("?")
        assert row.split(" | ")[1:].index(value) == head.removeprefix("| ").split(" | ").index(year)


def test_rules_of_scripts():
    assert [rows(name, SCRIPT)[0][1] for name in ("last_speaker", "who_asks")] == ["Carol Willick", "Susan Bunch"]
    for name in ("last_speaker", "who_asks", "count_speakers"):
        for text, output in rows(name, SCRIPT):
            speakers = [line.split(":")[0] for line in text.split("\n")]
            if name == "count_speakers":
                assert output == str(len(set(speakers)))
            elif name == "last_speaker":
                assert output == speakers[-1]
            else:
                assert [line.split(":")[0] for line in text.split("\n") if "?" in line] == [output]
    assert all(
        f'{text.split()[0]} says: "{text.split(": ")[1]}"' == said for text, said in rows("reported_speech", SCRIPT)
    )


def test_rules_of_stories():
    assert rows("question_word", STORY) == [
        ("___ is the cat called?", "what"), ("___ do they go there?", "when"), ("___ can swim?", "who"),
    ]  # fmt: skip
    ((pair, letter),) = rows("opening_sentence", STORY)
    first = next(line for line in pair.split("\n") if line.startswith(letter))
    assert first == f"{letter}: Todd is a small boy."
    assert [answer for _, answer in rows("short_answer", STORY)] == ["Whiskers", "on Friday", "His dad"]
    for text, said in rows("does_it_say", STORY):
        sentence, _, answer = text.split("\n")
        assert (answer.removeprefix("Answer: ") in sentence) == (said == "yes")
    for text, number in rows("option_number", STORY):
        option = next(line for line in text.split("\n") if line.startswith(f"{number}. "))
        assert option[3:] in text.split("\n")[0]


def test_every_fresh_task_is_described_and_kept_apart_from_its_examples():
    about = tomllib.loads((BENCHMARKS / "fresh_tasks.toml").read_text(encoding="utf-8"))
    rules = [rule for some in fresh_tasks._SOURCES.values() for rule in some]
    assert len(rules) == 20 and {rule.__name__ for rule in rules} == about.keys()
    descriptions = [text for task in about.values() for text in task["descriptions"]]
    assert len(set(descriptions)) == 60
    taken: set[str] = set()
    stories = [{**STORY, "questions": [{"question": f"{w} is it {i}?", "answers": ["x"], "span": False}]}
               for i in range(40) for w in ("What", "Who", "Why")]  # fmt: skip
    test = fresh_tasks.made(fresh_tasks.question_word, stories, 9, "test", taken)
    assert test == fresh_tasks.made(fresh_tasks.question_word, stories, 9, "test", set())
    train = fresh_tasks.made(fresh_tasks.question_word, stories, 30, "train", taken)
    assert not {row["input"] for row in test} & {row["input"] for row in train} and len(test) == 9
    assert max([row["output"] for row in test].count(word) for word in ("what", "who", "why")) <= 4


def test_the_development_set_holds_whole_groups_of_training_tasks_and_no_held_out_one(tmp_path):
    script = BENCHMARKS / "dev_tasks.py"
    subprocess.run(
        [sys.executable, script, DATA / "tasks.jsonl.gz", "--out", tmp_path], check=True, capture_output=True
    )
    before, after = read_tasks(DATA / "tasks.jsonl.gz"), read_tasks(tmp_path)
    assert {t.name for t in after} == {t.name for t in before if not t.is_heldout}
    chosen = [task for task in after if task.is_heldout]
    assert 0 < len(chosen) <= 24
    assert not {t.group for t in chosen} & {t.group for t in after if not t.is_heldout}


def drawn(name: str) -> list[tuple[str, str]]:
    draw, rng = getattr(unseen_tasks, name), random.Random(3)
    return [draw(rng) for _ in range(40)]


def test_rules_of_unseen_tasks():
    for date, iso in drawn("iso_date"):
        assert datetime.strptime(date, "%B %d, %Y").strftime("%Y-%m-%d") == iso
    for time, said in drawn("twelve_hour"):
        assert datetime.strptime(said.upper(), "%I:%M %p").strftime("%H:%M") == time
    for year, century in drawn("century"):
        assert int(century[:2]) == -(-int(year) // 100)
    for number, ten in drawn("round_to_ten"):
        assert int(ten) % 10 == 0 and abs(int(ten) - int(number)) < 5
    for words, tag in drawn("hashtag"):
        assert tag.lower() == "#" + words.replace(" ", "")
    for words, said in drawn("same_beginning"):
        assert (len({word[0] for word in words.split(", ")}) == 1) is (said == "yes")
    assert [*unseen_tasks.listed("a b = c; d = e\nf = g")] == [("a b", "c"), ("d", "e"), ("f", "g")]


def test_rules_that_find_unseen_tasks():
    def found(name: str, source: dict) -> list[tuple[str, str]]:
        return list(getattr(unseen_tasks, name)(source, random.Random(1)))

    table = {"source": "wikitablequestions", "document": "Title\nYear | Club | Goals\n2001 | Ajax | 7"}
    ((text, cell),) = found("cell_of_table", table)
    head, row, asked = (line.split(" | ") for line in text.split("\n"))
    assert row[head.index(asked[0].rstrip("?"))] == cell
    talk = {"source": "dream", "document": "W: Hello.\nM: Hello to you.\nW: Bye."}
    assert found("who_speaks_first", talk) == [("W: Hello.\nM: Hello to you.", "woman")]
    assert found("person_of_problem", {"question": "Mindy has 3 apples and eats one."})[0][1] == "Mindy"
    assert not found("person_of_problem", {"question": "There is an apple on the table."})
    assert found("numbers_in_problem", {"question": "He puts away 10% of his $150,000 a year."})[0][1] == "2"
    alternatives = {"question": "It rained. What was the cause?", "choices": ["Clouds.", "Sun."], "answer": 0}
    assert found("cause_or_effect", alternatives)[0][1] == "A"


def test_no_unseen_task_is_one_that_what_ships_was_trained_on_or_a_fresh_one():
    about, fresh = (
        tomllib.loads((BENCHMARKS / f"{name}.toml").read_text(encoding="utf-8"))
        for name in ("unseen_tasks", "fresh_tasks")
    )
    runs = json.loads((SHIPPED / "config.json").read_text(encoding="utf-8"))["provenance"]["history"]
    trained = {name for run in runs for name in run["tasks"]}
    assert len(about) == 28 and len(trained) == 135 and not about.keys() & {*trained, *fresh}
    rules = [rule.__name__ for rule in (*unseen_tasks.DRAWN, *itertools.chain(*unseen_tasks.FOUND.values()))]
    assert sorted(rules) == sorted(name for name, task in about.items() if "pairs" not in task)
    assert len({text for task in about.values() for text in task["descriptions"]}) == 3 * 28


def test_a_list_is_split_into_examples_and_rows_to_test(tmp_path):
    about = tomllib.loads((BENCHMARKS / "unseen_tasks.toml").read_text(encoding="utf-8"))
    for task in about.values():
        if "pairs" in task:
            rows = unseen_tasks.split([*unseen_tasks.listed(task["pairs"])], random.Random(1))
            train, test = ({row["input"] for row in rows if row["split"] == split} for split in ("train", "test"))
            assert len(train) >= 32 and len(test) >= 10 and not train & test
            assert all(row["input"] and row["output"] for row in rows)
