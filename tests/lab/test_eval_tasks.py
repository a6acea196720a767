"""`loracast eval tasks`: what each baseline is given, the figures it is given for, and what is written."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from loracast.base.chat import encode_text
from loracast.base.generate import Answer
from loracast.cast.load import load_caster
from loracast.cast.task import TaskCaster
from loracast.cli import app
from loracast.documents.task_spec import Example, TaskSpec
from loracast.errors import ConfigError
from loracast.lab.data.answer_metrics import is_right, last_number
from loracast.lab.data.tasks import read_benchmark, read_tasks
from loracast.lab.evaluation import runner
from loracast.lab.evaluation import tasks as evaluation
from loracast.lab.evaluation.likelihood import Choice, likeliest
from loracast.lab.evaluation.report import paired_bootstrap
from loracast.lab.evaluation.tasks import BASELINES, SHOTS, TaskCase, TasksConfig, TaskSetup, evaluate_tasks
from loracast.lab.training.loop import TrainConfig
from loracast.lab.training.loras import OracleRecipe, train_multitask, train_oracles
from loracast.lora.algebra import LoRA, inject
from loracast.lora.factors import Factors
from suites import DATA, SEVEN_OPPOSITES, WordCounts, write_rows


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """Random answers seldom end by themselves."""
    for metric in evaluation.LONGEST:
        monkeypatch.setitem(evaluation.LONGEST, metric, 8)


def test_what_each_baseline_is_given(base, suite):
    tasks = [task for task in read_tasks(suite) if task.is_heldout]
    drawn = evaluation.draw(tasks, 1, 0)
    assert drawn == evaluation.draw(tasks, 1, 0) and drawn.task.name == "opposite"
    assert drawn.description in drawn.task.descriptions["heldout"] and "opposite" not in drawn.other_description
    assert not set(drawn.shots) & set(drawn.task.test)

    def prompt(name: str) -> str:
        setup = TaskSetup(base, Caster(), multitask=LoRA(), multitask_described=LoRA(), oracles=suite)
        return base.tokenizer.decode(
            BASELINES[name].request(setup, TaskCase(drawn, Example("up", ("down",)))).prepared.prompt
        )

    plain = base.tokenizer.decode(base.chat.prompt("up", ""))
    for name in ("none", "adapter", "other", "gibberish"):
        assert prompt(name) == plain
    assert prompt("described") == plain.replace("up<", f"{drawn.description}\n\nup<")
    for n in (3, 5):
        shots = drawn.shots[:n]
        turns = "".join(
            f"user\n{e.input}<|im_end|>\n<|im_start|>assistant\n{e.outputs[0]}<|im_end|>\n<|im_start|>" for e in shots
        )
        assert prompt(f"shots{n}") == plain.replace("user\n", f"{turns}user\n")
        assert prompt(f"described_shots{n}") == prompt(f"shots{n}").replace(
            "user\n", f"user\n{drawn.description}\n\n", 1
        )
    assert prompt("multitask_described") == prompt("described")
    assert prompt("multitask") == prompt("oracle") == plain


class Caster:
    """Says what it was asked to cast."""

    class caster:
        id = "none"

    def loras(self, descriptions):
        return list(descriptions)


def test_which_lora_each_baseline_answers_with(base, suite):
    tasks = [task for task in read_tasks(suite) if task.is_heldout]
    drawn = evaluation.draw(tasks, 1, 0)
    setup = TaskSetup(base, Caster(), None, "multitask", "described")
    case = TaskCase(drawn, drawn.task.test[0])
    others = ("oracle", "nearest5")
    sources = {name: b.request(setup, case).lora for name, b in BASELINES.items() if name not in others}
    loras = {name: source and source.make() for name, source in sources.items()}
    assert loras["adapter"] == drawn.description and loras["other"] == drawn.other_description
    assert loras["gibberish"] == drawn.gibberish and "please" not in drawn.gibberish
    again = evaluation.draw(tasks, 1, 1)
    assert again.gibberish != drawn.gibberish
    assert [loras[name] for name in ("multitask", "multitask_described")] == ["multitask", "described"]
    without = ["none", "described", *(f"{prompt_text}shots{n}" for prompt_text in ("", "described_") for n in SHOTS)]
    assert all(loras[name] is None for name in without)
    for n in SHOTS:
        assert loras[f"adapter_shots{n}"] == TaskSpec(drawn.description, drawn.shots[:n])
    (other,) = (task for task in tasks if drawn.other_description in task.descriptions["heldout"])
    assert loras["other_shots5"] == TaskSpec(drawn.other_description, drawn.other_shots)
    assert len(drawn.other_shots) == 5 and set(drawn.other_shots) <= set(other.train)


def test_the_reader_is_reported_as_in_training_and_the_nearest_examples_stand_last(base, suite):
    tasks = [task for task in read_tasks(suite) if task.is_heldout]
    drawn = evaluation.draw(tasks, 1, 0)
    asked = Example("up", ("down",))
    setup = TaskSetup(base, Caster(), multitask_described="reader")
    reader = BASELINES["multitask_described_shots3"].request(setup, TaskCase(drawn, asked))
    prompt_text = TaskSpec(drawn.description, drawn.shots[:3]).text()
    assert reader.prepared.prompt == base.chat.prompt(f"{prompt_text}\n\nup", "") and reader.lora.make() == "reader"
    setup.nearest.__dict__["_encoder"] = WordCounts()
    words = [Example(text, (text.upper(),)) for text in ("red lamp", "old bridge", "red bridge", "tea")]
    assert [e.input for e in setup.nearest("red lamp", words, 2)] == ["red bridge", "red lamp"]


def asked_word(base, prompt) -> str:
    return base.tokenizer.decode(prompt).split("user\n")[-1].split("<")[0].split("\n")[-1]


def answer_with(monkeypatch, answer_batch):
    """Let evaluations ask a stand-in, which gives the texts of the answers."""

    def answers(base, prompts, loras, sampling, copy_biases, on_text):
        assert not any(copy_biases)  # a task has no text to copy
        return [Answer(text, 0, 0, 0.0, 0.0, True) for text in answer_batch(base, prompts, loras, sampling)]

    monkeypatch.setattr("loracast.answering.model.answers", answers)


def test_the_figures_come_from_the_answers(base, suite, hypernetwork, tmp_path, monkeypatch):
    """Answers by a stand-in: with a LoRA the right ones for two tasks, without one the right ones for "shout" alone."""
    right = {("shout", word): word.upper() for word in SEVEN_OPPOSITES} | {
        ("opposite", word): other for word, other in SEVEN_OPPOSITES.items()
    }
    asked: list[tuple[str, bool]] = []

    def answer_batch(base, prompts, loras, sampling):
        name = current[0]
        asked.append((name, loras[0] is not None))
        words = [asked_word(base, prompt) for prompt in prompts]
        knows = name == "shout" or (name == "opposite" and loras[0] is not None)
        return [f"{right[name, word]}." if knows else "?" for word in words]

    current = [""]

    ask_runner = runner.ask

    def ask(setup, baselines, cases, sampling):
        (some,) = cases.values()
        current[0] = some[0].drawn.task.name
        return ask_runner(setup, baselines, cases, sampling)

    answer_with(monkeypatch, answer_batch)
    monkeypatch.setattr(runner, "ask", ask)
    caster = TaskCaster(load_caster(hypernetwork, "task", base))
    config = TasksConfig(str(suite), seeds=(0, 1), baselines=("none", "shots3", "adapter"))
    seen: list[tuple[int, int]] = []
    report = evaluate_tasks(TaskSetup(base, caster), config, tmp_path, lambda done, total: seen.append((done, total)))
    rows = {row["baseline"]: row for row in report.rows}
    assert rows["none"]["by_task"] == {"first": 0, "opposite": 0, "shout": 1} and rows["none"][
        "exact"
    ] == pytest.approx(1 / 3)
    assert (
        rows["adapter"]["exact"] == pytest.approx(2 / 3)
        and rows["adapter"]["near"] == 0
        and rows["adapter"]["far"] == 1
    )
    assert rows["none"]["difference"] == pytest.approx(1 / 3) and "difference" not in rows["adapter"]
    assert (
        rows["none"]["difference_low"] == 0 and rows["none"]["difference_high"] == 1
    )  # of three tasks none, or all, may be "opposite"
    assert rows["none"]["n"] == 3 * 2 and seen[-1] == (36, 36)
    assert {name for name, has_lora in asked if has_lora} == {"first", "opposite", "shout"}
    assert rows["shots3"]["prompt_tokens"] > rows["none"]["prompt_tokens"] == rows["adapter"]["prompt_tokens"]
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["is_complete"] and stored["hypernetwork"] == caster.caster.id and len(stored["rows"]) == 3
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 30 and sum(a["exact"] for a in answers) == 8 + 4 + 2  # the base is asked with one seed only
    assert {a["seed"] for a in answers if a["baseline"] == "none"} == {0}


def test_a_budget_ends_it_between_tasks_and_says_so(base, suite, tmp_path):
    config = TasksConfig(str(suite), baselines=("none",), rows=1, seeds=(0,), budget_s=0.0, max_new_tokens=1)
    report = evaluate_tasks(TaskSetup(base), config, tmp_path)
    assert not report.is_complete and report.rows[0]["n_tasks"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baselines": ("none", "magic")}, "unknown baselines: magic"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"heldout": False, "baselines": ("other",)}, "'other' needs for every task another one"),
        ({"descriptions": "train"}, "no held-out task"),
        ({"benchmarks": ("x",)}, "either tasks"),
        ({"tasks": None, "benchmarks": ("x",), "heldout": False}, "leave --trained"),
        ({"baselines": ("adapter", "none")}, "'adapter' needs a text-to-LoRA hypernetwork"),
        ({"baselines": ("oracle",)}, "'oracle' needs a library of trained LoRAs"),
    ],
)
def test_bad_settings_are_refused(change, message, base, suite, tmp_path):
    with pytest.raises(ConfigError, match=message):
        evaluate_tasks(TaskSetup(base), TasksConfig(**{"tasks": str(suite), **change}), tmp_path / "out")


def test_the_paired_interval_against_one_by_hand():
    """Where all tasks have one row, drawing tasks is the whole of it: the interval of a mean of paired differences."""
    rng = random.Random(2)
    one = [[rng.random() < 0.8] for _ in range(200)]
    other = [[rng.random() < 0.5] for _ in range(200)]
    mean, low, high = paired_bootstrap(one, other)
    gains = np.array([a[0] - b[0] for a, b in zip(one, other, strict=True)], dtype=float)
    half = 1.96 * gains.std() / 200**0.5
    assert mean == pytest.approx(gains.mean()) and low == pytest.approx(mean - half, abs=0.02)
    assert high == pytest.approx(mean + half, abs=0.02)
    assert paired_bootstrap(one, one) == (0, 0, 0)
    wide = paired_bootstrap([[True] * 50, [False] * 50], [[False] * 50, [False] * 50])
    assert wide == (0.5, 0.0, 1.0)  # many rows of few tasks say little about other tasks


def test_more_seeds_do_not_make_an_interval_narrower(base, suite, tmp_path, monkeypatch):
    """A baseline that gives the same answers with every seed was asked no more rows by more seeds."""

    def answer_batch(base, prompts, loras, sampling):  # with a LoRA right for some rows of the task "shout"
        words = [asked_word(base, prompt) for prompt in prompts]
        return [word.upper() if lora and word > "h" else "?" for word, lora in zip(words, loras, strict=True)]

    answer_with(monkeypatch, answer_batch)
    intervals = []
    for seeds in ((0,), (0, 1, 2, 3)):
        config = TasksConfig(str(suite), seeds=seeds, baselines=("none", "adapter"))
        rows = evaluate_tasks(TaskSetup(base, Nothing()), config, tmp_path).rows
        intervals.append([rows[0][key] for key in ("n", "difference", "difference_low", "difference_high")])
    assert intervals[0] == intervals[1]
    _, difference, low, high = intervals[0]
    assert low < difference < high


class Nothing(Caster):
    """Casts LoRAs that do nothing."""

    def loras(self, descriptions):
        return [LoRA() for _ in descriptions]


def test_the_command(suite, hypernetwork, tiny_folder, tmp_path, home):
    arguments = [
        "eval", "tasks", "--tasks", suite, "--hypernetwork", hypernetwork, "--base", tiny_folder, "--out", tmp_path / "out",
        "--device", "cpu", "--rows", "2", "--seeds", "0", "--baselines", "none,described,adapter,other,gibberish", "--json",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["baseline"] for row in rows] == ["none", "described", "adapter", "other", "gibberish"]
    assert (tmp_path / "out" / "table.md").read_text().count("\n") >= 9
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    by_system = {row["baseline"]: [a["answer"] for a in answers if a["baseline"] == row["baseline"]] for row in rows}
    assert by_system["adapter"] != by_system["none"] != by_system["gibberish"]


def test_the_likeliest_answer_is_that_of_a_plain_forward(base):
    """Each answer in a row of its own, against all of them as branches of one row."""
    prompts = [base.chat.prompt(text, "") for text in ("The lamp on the desk", "Stop. " * 30, "a")]
    answers = [
        ("north", "The museum opens at nine", "it"),
        ("kettle", "no"),
        ("b", "c", "d", "the warranty is 24 months"),
    ]
    torch.manual_seed(3)
    module = "model.layers.1.self_attn.q_proj"
    lora = LoRA({module: Factors(torch.randn(2, 48), torch.randn(64, 2))})
    found = likeliest(base, prompts, answers, [lora] * 3)
    for prompt, texts, choice in zip(prompts, answers, found, strict=True):
        sums = []
        for text in texts:
            forms = []
            for answer in (base.chat.answer(text), [*encode_text(base.tokenizer, text), base.chat.end_of_turn]):
                with torch.no_grad(), inject(base.model, lora):
                    logits = base.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
                places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
                forms.append(sum(logits[i, token].item() for i, token in zip(places, answer, strict=True)))
            sums.append(max(forms))
        per_byte = [total / len(text) for total, text in zip(sums, texts, strict=True)]
        assert (choice.by_sum, choice.by_byte) == (int(np.argmax(sums)), int(np.argmax(per_byte)))
    assert any(choice.by_sum != choice.by_byte for choice in found)


def test_choices_are_scored_where_there_are_some(base, suite, tmp_path, monkeypatch):
    """A stand-in that always takes the first by its sum and the last for each byte."""
    rows = [
        {"task": "first", "split": "test", "input": "hot", "output": "h"},
        {"task": "first", "split": "test", "input": "big", "output": "b"},
        {"task": "pick", "split": "test", "input": "?", "output": "no", "choices": ["yes", "maybe", "no"]},
        {"task": "free", "split": "test", "input": "?", "output": "no"},
    ]
    write_rows(tmp_path / "tasks.jsonl", [{**row, "task_split": "heldout"} for row in rows])
    names = ("first", "pick", "free")
    write_rows(
        tmp_path / "task_descriptions.jsonl", [{"task": n, "kind": "heldout", "description": f"do {n}"} for n in names]
    )
    write_rows(tmp_path / "tasks_meta.jsonl", [{"task": "first", "labels": ["h", "b"]}])
    monkeypatch.setattr(
        evaluation,
        "likeliest",
        lambda base, prompts, answers, lora: [Choice(0, len(texts) - 1) for texts in answers],
    )
    config = TasksConfig(str(tmp_path), baselines=("none",), max_new_tokens=1)
    (row,) = evaluate_tasks(TaskSetup(base), config, tmp_path / "out").rows
    assert row["choice"] == pytest.approx((0.5 + 0) / 2) and row["choice_by_byte"] == pytest.approx((0.5 + 1) / 2)
    assert row["n"] == 4
    write_rows(tmp_path / "tasks.jsonl", [{**rows[2], "output": "never", "task_split": "heldout"}])
    with pytest.raises(ConfigError, match="'never' is not among the choices"):
        read_tasks(tmp_path)


def test_oracles_join_in(base, suite, hypernetwork, tiny_folder, tmp_path):
    tasks = read_tasks(suite)
    recipe = OracleRecipe(training=TrainConfig(steps=2, warmup_steps=1, bf16=False))
    train_oracles(base, recipe, [t for t in tasks if t.name != "shout"], tmp_path / "library")
    train_multitask(
        base, recipe, [dataclasses.replace(t, descriptions={"train": ("x",)}) for t in tasks], tmp_path / "all"
    )
    setup = TaskSetup(base, oracles=tmp_path / "library")
    config = TasksConfig(str(suite), rows=1, seeds=(0,), max_new_tokens=2)
    with pytest.raises(ConfigError, match="no oracle of shout"):
        evaluate_tasks(setup, config, tmp_path / "out")
    arguments = [
        "eval", "tasks", "--tasks", suite, "--base", tiny_folder, "--out", tmp_path / "out", "--device", "cpu", "--rows", "1",
        "--seeds", "0", "--oracles", tmp_path / "library", "--only-oracles", "--multitask", tmp_path / "all", "--json",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    rows = {row["baseline"]: row for row in json.loads(done.stdout)["rows"]}
    assert list(rows) == [
        name
        for name in BASELINES
        if set(BASELINES[name].needs) <= {"oracles", "multitask", "3 examples", "5 examples"}
        and not BASELINES[name].is_optional
    ]
    assert list(rows["oracle"]["by_task"]) == ["first", "opposite"]


def test_benchmarks_are_tasks(base, tmp_path, monkeypatch):
    """Choices are listed and scored by likelihood; the examples for the prompt come from the training file."""
    asked = [{"question": f"Which is {i}?", "choices": ["no", str(i), "maybe"], "answer": 1} for i in range(4)]
    write_rows(tmp_path / "bench_arc_easy_test.jsonl.gz", asked)
    write_rows(tmp_path / "bench_arc_easy_train.jsonl.gz", [{**row, "question": "Shown"} for row in asked[:3]])
    sums = [{"question": f"{i} + 1?", "rationale": "one more", "answer": f"{i + 1}"} for i in range(110)]
    write_rows(tmp_path / "bench_gsm8k_sample.jsonl", sums)
    arc = read_benchmark(tmp_path / "bench_arc_easy_test.jsonl.gz")
    assert (arc.name, arc.metric, len(arc.train), len(arc.test)) == ("arc_easy", "exact", 3, 4)
    assert arc.test[2].input == "Which is 2?\n- no\n- 2\n- maybe" and arc.test[2].outputs == ("2",)
    gsm = read_benchmark(tmp_path / "bench_gsm8k_sample.jsonl")
    assert (gsm.name, gsm.metric, len(gsm.train), len(gsm.test)) == ("gsm8k", "number", 100, 10)
    assert gsm.test[0].outputs == ("one more\n101",)
    answer_with(monkeypatch, lambda base, prompts, *rest: ["so it is 1,01 or 105."] * len(prompts))
    config = TasksConfig(benchmarks=(str(tmp_path / "bench_gsm8k_sample.jsonl"),), seeds=(0,))
    rows = {row["baseline"]: row for row in evaluate_tasks(TaskSetup(base), config, tmp_path / "out").rows}
    assert rows["none"]["exact"] == 0.1 and rows["none"]["choice"] is None and "other" not in rows
    write_rows(tmp_path / "bench_copa.jsonl", asked)
    with pytest.raises(ConfigError, match="no more than 100 rows"):
        read_benchmark(tmp_path / "bench_copa.jsonl")
    config = dataclasses.replace(config, benchmarks=(str(tmp_path / "bench_arc_easy_test.jsonl.gz"),))
    rows = evaluate_tasks(TaskSetup(base), config, tmp_path / "out").rows
    assert all(row["n"] == 4 and row["exact"] == 0 and row["choice"] is not None for row in rows)
    with pytest.raises(ConfigError, match=r"nothing is known of a benchmark 'mmlu'.*Known: arc_challenge"):
        read_benchmark(tmp_path / "bench_mmlu_test.jsonl")


def test_a_benchmark_has_an_oracle_too(tiny_folder, tmp_path):
    rows = [{"question": f"Which is {i}?", "choices": ["no", str(i)], "answer": 1} for i in range(4)]
    for part in ("train", "test"):
        write_rows(tmp_path / f"bench_arc_easy_{part}.jsonl.gz", rows)

    def run(*arguments):
        common = [
            "--benchmark", tmp_path / "bench_arc_easy_test.jsonl.gz", "--base", tiny_folder, "--device", "cpu", "--json",
        ]  # fmt: skip
        done = CliRunner().invoke(app, [str(a) for a in (*arguments, *common)])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    made = run(
        "train",
        "oracle",
        "--out",
        tmp_path / "library",
        "--set",
        "training.steps=2",
        "--set",
        "training.warmup_steps=1",
    )
    assert made["done"] == ["arc_easy"]
    report = run(
        "eval", "tasks", "--oracles", tmp_path / "library", "--baselines", "none,oracle", "--out", tmp_path / "out"
    )
    assert [(row["baseline"], row["n"]) for row in report["rows"]] == [("none", 4), ("oracle", 4)]


@pytest.mark.parametrize(("name", "n_shown", "n_asked"), [("gsm8k_test", 20, 20), ("commonsenseqa", 100, 20)])
def test_public_benchmarks_are_read(name, n_shown, n_asked):
    task = read_benchmark(DATA / f"bench_{name}.jsonl.gz")
    assert (len(task.train), len(task.test)) == (n_shown, n_asked) and len(task.descriptions["heldout"]) == 3
    assert not set(task.train) & set(task.test)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 1,200", 1200), ("It is $18.", 18), ("3,4 or 5", 5), ("-4", -4), ("10-4", 4), ("3.50 dollars", 3.5),
        ("1,234,567.25", 1234567.25), ("-$5", -5), ("about .5", 0.5), ("none", None), ("a1", None), ("12 apples and 1,2000", 2000),
    ],
)  # fmt: skip
def test_the_last_number(text, number):
    assert last_number(text) == number


def test_a_number_counts_whatever_is_said_before_it():
    assert is_right("First 3, then 1,200.", ("because\n1200",), "number") and is_right("1200.0", ("1,200",), "number")
    assert not is_right("200", ("1,200",), "number") and not is_right("many", ("12",), "number")
    assert is_right("Cold.", ("warm", "cold"), "exact") and not is_right("so cold", ("cold",), "exact")
