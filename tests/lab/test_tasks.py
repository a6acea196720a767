"""Tasks: their files, the steps that training draws from them, and Text-to-LoRA trained on the tiny base."""

from __future__ import annotations

import dataclasses
import json
import random
import signal

import pytest
import torch
from typer.testing import CliRunner

from loracast.cli import app
from loracast.documents.task_spec import Example, TaskSpec
from loracast.errors import ConfigError, TrainingError
from loracast.hypernets.text_to_lora import TextToLoRA
from loracast.lab.data.tasks import Task, read_tasks
from loracast.lab.training.loop import TrainConfig
from loracast.lab.training.recipe import read_recipe
from loracast.lab.training.task_source import DEFAULT_STYLE, DrawnTask, TaskDataConfig, TaskSource
from loracast.lab.training.text import TextRecipe, gibberish, train_text
from suites import DATA, OPPOSITES, WordCounts, answer_loss, write_rows, write_suite
from tiny import make_sentence_encoder


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_rows_become_tasks(ending, tmp_path):
    path = write_suite(tmp_path, ending)
    first, opposite, shout = tasks = read_tasks(path)
    assert [task.name for task in tasks] == ["first", "opposite", "shout"] and read_tasks(tmp_path) == tasks
    assert opposite.train[0] == Example("hot", ("cold", "chilly")) and opposite.test == (Example("in", ("out",)),)
    assert opposite.seen_descriptions() == ("train words for opposite", "paraphrase words for opposite")
    assert opposite.descriptions["heldout"] == ("heldout words for opposite",)
    assert first.is_heldout and first.is_near and first.labels == ("h", "b")
    assert first.group == "letters" and not shout.is_heldout and shout.labels == ()


def test_a_file_for_each_task(tmp_path):
    examples = [{"input": word, "output": other} for word, other in OPPOSITES.items()]
    (tmp_path / "opposite.json").write_text(json.dumps({"descriptions": ["Say the opposite."], "examples": examples}))
    natural = {
        "Definition": ["Answer with the capital."], "Categories": ["Geography"],
        "Instances": [{"id": "x-1", "input": "Norway", "output": ["Oslo", "oslo"]}, {"id": "x-2", "input": "Peru", "output": ["Lima"]}],
    }  # fmt: skip
    (tmp_path / "task1146_country_capital.json").write_text(json.dumps(natural))
    opposite, capital = read_tasks(tmp_path)
    assert len(opposite.train) == 5 and opposite.test == (Example("up", ("down",)),)  # every fifth is kept for testing
    assert capital.name == "task1146_country_capital" and capital.group == "Geography"
    assert capital.train[0] == Example("Norway", ("Oslo", "oslo")) and capital.seen_descriptions() == (
        "Answer with the capital.",
    )
    assert read_tasks(tmp_path / "opposite.json") == (opposite,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "bad.json is not a task file"),
        ('{"examples": []}', "it needs 'descriptions'"),
        ('{"descriptions": [], "examples": [{"input": "a", "output": "b"}]}', "bad: no description"),
        ('{"descriptions": ["x"], "examples": []}', "bad: no example"),
        ('{"descriptions": ["x"], "examples": [{"input": "a", "output": "b"}], "metric": "bleu"}', "'bleu' is none of exact, number"),
            ('{"descriptions": ["x"], "examples": [{"input": "a", "output": "b"}], "scorer": "bleu"}', "unknown keys scorer"),
        ('{"descriptions": ["x"], "examples": [{"input": "a", "output": []}]}', "needs an input and an output"),
        ('{"descriptions": ["x"], "examples": [{"input": "a", "output": "b", "split": "dev"}]}', "'dev' is none of train, test"),
        (
            '{"descriptions": ["x"], "examples": [{"input": "a", "output": "b", "split": "test"}, {"input": "c", "output": "d"}]}',
            'example 2 has no "split"',
        ),
        ('{"descriptions": {"unseen": ["x"]}, "examples": [{"input": "a", "output": "b"}]}', "'unseen' is none of train"),
    ],
)  # fmt: skip
def test_a_bad_task_file_is_one_clear_error(content, message, tmp_path):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_tasks(tmp_path)


def test_missing_files_and_rows_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no tasks at"):
        read_tasks(tmp_path)
    write_rows(tmp_path / "tasks.jsonl", [{"task": "a", "input": "x", "output": "y"}])
    with pytest.raises(ConfigError, match=r"task_descriptions\.jsonl"):
        read_tasks(tmp_path)
    described = {"task": "a", "description": "x"}
    for rows, message in (
        ([described, {"description": "x"}], r"task_descriptions\.jsonl, line 2: the row needs 'task'"),
        (
            [described, {**described, "kind": "held-out"}],
            r"task_descriptions\.jsonl, line 2: .*none of train, paraphrase, heldout",
        ),
        ([described, {"task": "b", "description": "x"}], "no examples of tasks that are described beside it: b"),
    ):
        write_rows(tmp_path / "task_descriptions.jsonl", rows)
        with pytest.raises(ConfigError, match=message):
            read_tasks(tmp_path)
    write_rows(tmp_path / "task_descriptions.jsonl", [described])
    for row, message in (
        ({"task": "a", "output": "y"}, r"tasks\.jsonl, line 1: the row needs 'input'"),
        ({"task": "a", "input": "x", "output": "y", "task_split": "held-out"}, "'held-out' is none of train, heldout"),
    ):
        write_rows(tmp_path / "tasks.jsonl", [row])
        with pytest.raises(ConfigError, match=message):
            read_tasks(tmp_path)


def test_tasks_of_public_sets():
    tasks = read_tasks(DATA / "tasks.jsonl.gz")
    held_out = [task for task in tasks if task.is_heldout]
    assert len(tasks) == 18 and len(held_out) == 7 and sum(task.is_near for task in held_out) == 2
    assert not {task.group for task in held_out} & {task.group for task in tasks if not task.is_heldout}
    for task in tasks:
        assert len(task.descriptions["heldout"]) == 3 and len(task.seen_descriptions()) >= 5
        assert not task.labels or all(e.outputs[0] in task.labels for e in task.train + task.test), task.name


# ------------------------------------------------------------------------------------------------------- training


def test_a_step_holds_no_held_out_task_description_or_example(base, tmp_path):
    tasks = read_tasks(write_suite(tmp_path))
    source = TaskSource(TaskDataConfig(tasks_per_step=2, examples_per_task=4), tasks, base.chat)
    assert source.descriptions == tuple(
        f"{kind} words for {name}" for name in ("opposite", "shout") for kind in ("train", "paraphrase")
    )
    seen = set()
    for number in range(20):
        drawn, again = source.draw(number), source.draw(number)
        episodes = source.episodes(drawn)
        assert drawn == again and episodes == source.episodes(again)
        descriptions = [one.text for one in drawn]
        assert set(descriptions) <= set(source.descriptions)
        for description, episode in zip(descriptions, episodes, strict=True):
            assert len({question.prompt for question in episode.questions}) == 4
            for question in episode.questions:
                prompt, answer = (base.tokenizer.decode(ids) for ids in (question.prompt, question.answer))
                assert description not in prompt and "words for" not in prompt
                seen.add((description.split()[-1], answer.removesuffix("<|im_end|>").strip()))
    change = {"opposite": OPPOSITES.get, "shout": str.upper}
    assert seen == {(name, change[name](word)) for name in change for word in list(OPPOSITES)[:5]}
    with pytest.raises(TrainingError, match="all are held out"):
        TaskSource(TaskDataConfig(), [task for task in tasks if task.is_heldout], base.chat)
    with pytest.raises(TrainingError, match=r"raise data\.max_tokens"):
        TaskSource(TaskDataConfig(max_tokens=2), tasks, base.chat)


def test_only_so_many_examples_are_read_as_fit():
    spec = TaskSpec("Name it", tuple(Example(word, (word,)) for word in ("one", "two", "three")))
    drawn = DrawnTask(Task("it", {}, (), ()), spec, DEFAULT_STYLE, (), None)
    for n in (0, 1, 3):
        whole = dataclasses.replace(spec, examples=spec.examples[:n]).text()
        fitting = drawn.within(lambda text, most=len(whole): len(text) <= most)
        assert fitting.text == whole and fitting.rows == drawn.rows


def test_tasks_with_long_examples_have_fewer_of_them(base):
    """However long the examples, a step has an end: attention and memory grow with the square of a row."""
    examples = tuple(Example(f"{i} " + "the lamp on the desk " * 5, (str(i),)) for i in range(12))
    task = Task("long", {"train": ("one two",)}, examples, ())
    sizes = {}
    for budget in (1, 200, 10_000):
        source = TaskSource(TaskDataConfig(examples_per_task=9, tokens_per_task=budget), [task], base.chat)
        spec = TaskSource(
            TaskDataConfig(examples_per_task=9, tokens_per_task=budget), [task], base.chat, described=True
        )
        for number in range(5):
            (episode,), (other,) = (s.episodes(s.draw(number)) for s in (source, spec))
            assert len(episode.questions) == len(other.questions)
            n_tokens = sum(len(q.prompt) + len(q.answer) for q in episode.questions)
            assert n_tokens <= budget or len(episode.questions) == 1
        sizes[budget] = len(episode.questions)
    assert sizes[1] == 1 < sizes[200] < sizes[10_000] == 9


def test_gibberish_describes_nothing():
    texts = gibberish(random.Random(0), 50)
    assert len(set(texts)) == 50 and all(3 <= len(text.split()) <= 14 for text in texts)


def test_an_unknown_key_of_the_recipe_fails(tmp_path):
    (tmp_path / "r.toml").write_text(
        "[hypernetwork]\nvariant = 'M'\nkinds = ['q_proj']\nwidht = 3\n[data]\nfacts = 3\n[extra]\n"
    )
    with pytest.raises(
        ConfigError, match=r"unknown table \[extra\]; unknown key hypernetwork.widht; unknown key data.facts"
    ):
        read_recipe(TextRecipe(), tmp_path / "r.toml")
    recipe = read_recipe(
        TextRecipe(),
        None,
        ["hypernetwork.variant=S", "hypernetwork.layers=[1, 2]", "objective.null_condition_weight=0.5"],
    )
    assert recipe.hypernetwork == {"variant": "S"} and recipe.layers == (1, 2) and recipe.null_condition_weight == 0.5


TINY = {"rank": 2, "width": 16, "head_width": 16, "dropout": 0.1}


@pytest.mark.parametrize("variant", ["L", "M", "S"])
def test_resumed_text_to_lora_equals_uninterrupted(variant, base, word_encoder, tmp_path):
    """The whole chain on the tiny base: tasks, encoder, hypernetwork, injection, optimizer; dropout included."""
    tasks = read_tasks(write_suite(tmp_path))
    recipe = TextRecipe(
        hypernetwork={**TINY, "variant": variant},
        data=TaskDataConfig(tasks_per_step=2, examples_per_task=3),
        training=TrainConfig(steps=6, log_every=1, warmup_steps=2, bf16=False),
    )

    def stop(metrics: dict[str, float]) -> None:
        if metrics["step"] == 3:
            signal.raise_signal(signal.SIGTERM)

    train_text(base, recipe, tasks, tmp_path / "whole")
    train_text(base, recipe, tasks, tmp_path / "parts", on_metrics=stop)
    torch.manual_seed(7)
    train_text(base, recipe, tasks, tmp_path / "parts")
    whole, parts = (TextToLoRA.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert whole.made_for == base.fingerprint
    for (name, one), other in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert whole.heads["q_proj"].scaler_b.abs().max() > 0  # it has learned something
    assert whole.config.n_seen == 4 and whole.config.encoder == "words"
    seen = WordCounts()(["train words for shout", "nothing of the kind"])
    assert whole.distances(seen)[0] < 1e-5 < whole.distances(seen)[1]


def train_on_two(base, out, **options) -> tuple[TextToLoRA, list[dict[str, float]]]:
    """A hypernetwork that has learned the suite's two tasks well."""
    recipe = TextRecipe(
        kinds=("q_proj", "v_proj", "down_proj"),
        hypernetwork={**TINY, "rank": 4, "dropout": 0.0},
        data=TaskDataConfig(tasks_per_step=2, examples_per_task=5),
        training=TrainConfig(steps=26, lr=8e-3, log_every=10, warmup_steps=3, bf16=False),
        **options,
    )
    rows: list[dict[str, float]] = []
    train_text(base, recipe, read_tasks(write_suite(out)), out / "run", on_metrics=rows.append)
    return TextToLoRA.from_pretrained(out / "run"), rows


def test_a_task_is_learned_from_its_own_description_and_gibberish_stays_calm(base, word_encoder, tmp_path):
    folders = [tmp_path / name for name in ("calm", "wild", "small")]
    for folder in folders:
        folder.mkdir()
    calm, _ = train_on_two(base, folders[0], null_condition_weight=0.3)
    wild, _ = train_on_two(base, folders[1], null_condition_weight=0.0)
    small, _ = train_on_two(base, folders[2], null_condition_weight=0.0, l1_weight=30.0)
    texts, names = ["train words for shout", "train words for opposite"], ["shout", "opposite"]
    right = answer_loss(base, wild, texts, names, tmp_path / "wild")
    swapped = answer_loss(base, wild, texts[::-1], names, tmp_path / "wild")
    assert right < 0.7 * swapped
    strings = gibberish(random.Random(9), 40)  # not among those of the training

    def squares(hypernet: TextToLoRA, texts: list[str]) -> float:
        with torch.no_grad():
            return hypernet(WordCounts()(texts)).squared_norms().mean().item()

    of_gibberish = [squares(hypernet, strings) / squares(hypernet, texts) for hypernet in (calm, wild)]
    assert of_gibberish[0] < 0.7 * of_gibberish[1]
    assert squares(small, texts) < 0.5 * squares(wild, texts)


def test_what_training_does_not_see_does_not_matter_to_a_resumed_run(base, tmp_path):
    tasks = read_tasks(write_suite(tmp_path))
    whole = TaskSource(TaskDataConfig(), tasks, base.chat).about
    blind = [
        dataclasses.replace(t, test=(), labels=("x",), descriptions={**t.descriptions, "heldout": ("other",)})
        for t in tasks
    ]
    assert TaskSource(TaskDataConfig(), blind, base.chat).about == whole
    fewer = [dataclasses.replace(t, train=t.train[1:]) for t in tasks]
    assert TaskSource(TaskDataConfig(), fewer, base.chat).about != whole


def test_negative_weights_are_refused():
    with pytest.raises(ConfigError, match="not be negative"):
        TextRecipe(null_condition_weight=-1.0)


def test_training_an_encoder_lora_needs_the_base_as_the_encoder(base, tmp_path, word_encoder):
    recipe = read_recipe(TextRecipe(), None, ["objective.encoder_lora_is_trained=true", "hypernetwork.width=16"])
    with pytest.raises(ConfigError, match="only the variant 'attention_delta'"):
        train_text(base, recipe, read_tasks(write_suite(tmp_path)), tmp_path / "run")


def test_init_from_takes_the_architecture(base, word_encoder, tmp_path):
    tasks = read_tasks(write_suite(tmp_path))
    training = TrainConfig(steps=1, warmup_steps=1, lr=1e-3, bf16=False)
    first = TextRecipe(hypernetwork=TINY, training=dataclasses.replace(training, seed=5))
    train_text(base, first, tasks, tmp_path / "first")
    train_text(
        base, TextRecipe(training=training), tasks, tmp_path / "second", init_from=tmp_path / "first", command="second"
    )
    one, other = (TextToLoRA.from_pretrained(tmp_path / name).state_dict() for name in ("first", "second"))
    for name, value in one.items():  # one step further
        torch.testing.assert_close(other[name], value, atol=2e-3, rtol=0)
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["config"]["width"] == 16 and [run["command"] for run in config["provenance"]["history"]] == [
        "",
        "second",
    ]
    with pytest.raises(ConfigError, match=r"leave dropout, head_width, rank, width out of \[hypernetwork\]"):
        train_text(
            base, dataclasses.replace(first, training=training), tasks, tmp_path / "third", init_from=tmp_path / "first"
        )


def test_another_objective_or_other_tasks_do_not_go_on_in_the_same_folder(base, word_encoder, tmp_path):
    training = TrainConfig(steps=1, warmup_steps=1, bf16=False)
    task = Task("only", {"train": ("one two",)}, (Example("a", ("b",)),), ())
    recipe = TextRecipe(hypernetwork=TINY, training=training)
    train_text(base, recipe, [task], tmp_path / "out")
    for changed, tasks in (
        (dataclasses.replace(recipe, null_condition_weight=0.7), [task]),
        (recipe, [dataclasses.replace(task, descriptions={"train": ("two three",)})]),
    ):
        with pytest.raises(TrainingError, match="other settings"):
            train_text(base, changed, tasks, tmp_path / "out")


def test_the_command_trains_and_exports(tiny_folder, tmp_path, home):
    encoder = make_sentence_encoder(tmp_path / "encoder")
    write_suite(tmp_path)
    (tmp_path / "r.toml").write_text(f"[hypernetwork]\nrank = 2\nwidth = 16\nhead_width = 16\nencoder = '{encoder}'\n")
    arguments = [
        "train",
        "text",
        tmp_path / "r.toml",
        "--tasks",
        tmp_path,
        "--out",
        tmp_path / "run",
        "--base",
        tiny_folder,
    ]
    done = CliRunner().invoke(
        app, [str(a) for a in [*arguments, "--set", "training.steps=2", "--device", "cpu", "--json"]]
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 2
    short = [str(tmp_path / "short") if a == tmp_path / "run" else str(a) for a in arguments]
    done = CliRunner().invoke(app, [*short, "--budget", "0s", "--device", "cpu"])
    assert (
        done.exit_code == 0 and f"hypernetwork: in {tmp_path / 'short'}" in done.output
    )  # no curve was drawn, none is promised
    assert not (tmp_path / "short" / "curve.png").exists() and (tmp_path / "short" / "model.safetensors").exists()
    exported = CliRunner().invoke(
        app, ["train", "export", str(tmp_path / "run"), "--out", str(tmp_path / "small"), "--json"]
    )
    assert json.loads(exported.stdout)["storage"] == "int8"
    assert TextToLoRA.from_pretrained(tmp_path / "small").config.rank == 2
    both = ["--average-with", str(tmp_path / "small"), "--out", str(tmp_path / "mean")]
    assert CliRunner().invoke(app, ["train", "export", str(tmp_path / "run"), *both]).exit_code == 0
    assert len(json.loads((tmp_path / "mean" / "config.json").read_text())["provenance"]["average_of"]) == 2


def test_a_task_needs_no_code(base, word_encoder, tmp_path):
    task = Task("only", {"train": ("one two",)}, (Example("a", ("b",)),), ())
    training = TrainConfig(steps=1, warmup_steps=1, bf16=False)
    last = train_text(base, TextRecipe(hypernetwork=TINY, training=training), [task], tmp_path / "out")
    assert last["questions"] == 1
