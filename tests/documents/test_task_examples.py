"""Examples of a task: files of them, what is read of a task, how training draws them, and adapters cast from them."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch

from loracast.cast.load import load_caster
from loracast.cast.task import TaskCaster
from loracast.documents.task_spec import Example, TaskSpec, as_examples, read_examples
from loracast.errors import AdapterError, ConfigError, EncoderError
from loracast.hypernets.attention_delta import AttentionDeltaToLoRA
from loracast.lab.data.tasks import Task, read_tasks
from loracast.lab.training.loop import TrainConfig
from loracast.lab.training.loras import OracleRecipe, PeftConfig, train_multitask
from loracast.lab.training.scoring import pack, score_answers
from loracast.lab.training.task_source import STYLES, TaskDataConfig, TaskSource
from loracast.lab.training.text import TextRecipe, train_text
from loracast.library.library import Library
from loracast.library.manifest import Manifest
from loracast.lora.algebra import inject
from suites import OPPOSITES, write_suite
from tiny import ATTENTION_DELTA, for_base, make_attention_delta

EXAMPLES = as_examples(list(OPPOSITES.items()))
SENTENCE = "Answer with the opposite word."


# ---------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("e.jsonl", '{"input": "hot", "output": "cold"}\n\n{"input": "a, b", "output": ["c", "d"], "split": "train"}\n'),
        ("e.csv", 'output,note,input\ncold,x,hot\n"c",,"a, b"\n'),
        ("e.csv", '\ufeffhot,cold\r\n"a, b",c\r\n'),
        ("e.tsv", "Input\tOutput\nhot\tcold\na, b\tc\n"),
        ("e.txt", "hot => cold\n  a, b=>c\n"),
        ("e", "input,output\nhot,cold\n\"a, b\",c\n"),
        ("e.csv", "input;output\nhot;cold\na, b;c\n"),
        ("e.csv", "Hot;Cold\r\na, b;c\r\n".lower()),
        ("e.csv", "input,output,,\nhot,cold,,\n\"a, b\",c\n"),
        ("e.json", '[\n  {"input": "hot", "output": "cold"},\n  {"input": "a, b", "output": "c"}\n]\n'),
        ("e", '\ufeff[["hot", "cold"], ["a, b", "c"]]'),
        ("e", '["hot", "cold"]\n["a, b", "c"]\n'),
        ("e", '\ufeff{"input": "hot", "output": "cold"}\r\n{"input": "a, b", "output": "c"}'),
    ],
)  # fmt: skip
def test_examples_are_read_from_files_and_standard_input(name, text, tmp_path, monkeypatch):
    (tmp_path / name).write_text(text, encoding="utf-8")
    read = read_examples(tmp_path / name)
    assert [(e.input, e.outputs[0]) for e in read] == [("hot", "cold"), ("a, b", "c")]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert read_examples("-") == read


def test_what_stands_within_an_example_separates_no_lines(tmp_path):
    """U+2028 and U+0085 stand in scraped text; an input may have an arrow's brackets, an output further arrows."""
    rows = [{"input": "a\u2028b", "output": "c\x85d"}, {"input": "e", "output": "f"}]
    (tmp_path / "e.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    assert [(e.input, e.outputs[0]) for e in read_examples(tmp_path / "e.jsonl")] == [
        ("a\u2028b", "c\x85d"),
        ("e", "f"),
    ]
    (tmp_path / "e.txt").write_text("{name}\x85 => greeting => hello\n[date] => day\n", "utf-8")
    read = [(e.input, e.outputs[0]) for e in read_examples(tmp_path / "e.txt")]
    assert read == [("{name}", "greeting => hello"), ("[date]", "day")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("e.jsonl", '{"input": "hot", "output": "cold"}\n{"input": "big"}\n', "line 2: there is no 'output'; a line is"),
        ("e.jsonl", '{"input": "hot", "output": "cold"}\n{"input"\n', "line 2: .*; a line is"),
        ("e.jsonl", '{"input": "hot", "output": 3}\n', "line 1: 3 is not text"),
        ("e.jsonl", '{"input": "hot", "output": {"label": "cold"}}\n', "line 1: {'label': 'cold'} is not text"),
        ("e.jsonl", '{"input": "\\ud83d", "output": "cold"}\n', "line 1: it is not valid Unicode"),
        ("e.jsonl", "hot,cold\n", "line 1: .*; a line is"),
        ("e.json", '[{"input": "hot", "output": "cold"}, {"input": "big"}]', "item 2: there is no 'output'"),
        ("e.txt", "a film -> good\nI like it, a lot -> bad\n", "write => in place of ->"),
        ("e.csv", "input,output\nhot,cold\nbig, really big,small\n", "line 3: it has 3 columns, the first row has 2: put"),
        ("e.csv", "text,label\nhot,cold\n", "the columns are called text and label: call them input and output"),
        ("e.jsonl", '{"input": "hot", "output": " "}\n', "line 1: its input or output is empty"),
        ("e.txt", "hot => cold\nbig -> small\n", "line 2: there is no =>"),
        ("e.csv", "hot,cold\nbig\n", "line 2: it has 1 columns"),
        ("e.csv", "a,b,c\n1,2,3\n", "line 1: there are 3 columns and none are called input and output"),
        ("e.csv", "input,output\n", "a header and no row below it"),
        ("e.csv", 'hot,"cold\nbig,small\n', "a quotation mark never closed"),
        ("e.txt", "\n \n", "there is no example in"),
        ("e.txt", "only words", "line 1: there are 1 columns"),
    ],
)  # fmt: skip
def test_a_bad_file_names_its_line_and_what_a_line_shall_be(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_examples(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot read the examples in"):
        read_examples(tmp_path / "nowhere")


def test_python_takes_pairs_rows_and_examples():
    given = ("hot", "cold"), {"input": "hot", "output": "cold"}, Example("hot", ("cold",))
    assert as_examples(given) == (Example("hot", ("cold",)),) * 3
    for bad in (("hot",), "hi", {"input": "hot"}, ("hot", ""), ("hot", 3), ("hot", "\ud83d"), 3):
        with pytest.raises(ConfigError, match="example 2 is"):
            as_examples([given[0], bad])
    with pytest.raises(ConfigError, match="example 1 is 'hi': it is one text"):
        as_examples(("hi", "no"))
    with pytest.raises(ConfigError, match="the examples are a dict: give a list"):
        as_examples({"hi": "no"})
    with pytest.raises(ConfigError, match="not valid Unicode"):
        TaskSpec("caf\udce9")


def test_the_text_has_the_description_first_and_the_examples_behind_it():
    assert TaskSpec(SENTENCE, EXAMPLES[:2]).text() == (
        f"{SENTENCE}\n\nInput: hot\nOutput: cold\nInput: big\nOutput: small"
    )
    assert TaskSpec("", EXAMPLES[:1]).text() == "Input: hot\nOutput: cold" and TaskSpec(SENTENCE).text() == SENTENCE
    texts = {TaskSpec(SENTENCE, EXAMPLES[:2]).text(style) for style in STYLES.values()}
    assert len(texts) == len(STYLES) and all("hot" in text and "small" in text for text in texts)


# ------------------------------------------------------------------------------------------------------- training


def source_of(base, tasks, **options) -> TaskSource:
    config = {"tasks_per_step": 2, "examples_per_task": 4, "examples_read": 6, "description_only_share": 0.25}
    return TaskSource(TaskDataConfig(**{**config, **options}), tasks, base.chat)


WORDS = [
    f"{a}{b}" for a in ("lam", "riv", "sto", "kit", "bru") for b in ("p", "er", "ne", "chen", "sh", "ma", "lo", "ti")
]
SHOUT = Task("shout", {"train": ("Say it louder.",)}, tuple(Example(w, (w.upper(),)) for w in WORDS), ())
SIDE = Task(
    "side", {"train": ("Is it left or right?",)},
    tuple(Example(w, ("left" if i % 2 else "right",)) for i, w in enumerate(WORDS)), (), labels=("left", "right"),
)  # fmt: skip


@pytest.mark.parametrize("augmented_share", [0.0, 1.0])
def test_a_row_to_answer_is_never_among_the_examples_that_are_read(base, augmented_share):
    source = source_of(base, [SHOUT, SIDE], augmented_share=augmented_share, undescribed_share=0.5)
    n_read, n_alone, n_undescribed, styles = [], 0, 0, set()
    for number in range(150):
        drawn = source.draw(number)
        assert drawn == source.draw(number) or augmented_share  # augmentations hold functions, which are never equal
        for one in drawn:
            assert one.rows and len(one.rows) <= 4
            assert not {e.input for e in one.spec.examples} & {e.input for e in one.rows}
            assert len({e.input for e in one.spec.examples}) == len(one.spec.examples)
            n_read.append(len(one.spec.examples))
            n_alone += not one.spec.examples
            n_undescribed += not one.spec.description
            styles |= {one.style} if one.spec.examples else set()
            for example in one.spec.examples:
                assert STYLES[one.style].format(input=example.input, output=example.outputs[0]) in one.text
            if one.augmentation is None:
                known = {e.input: e.outputs for e in one.task.train}
                assert all(known[e.input] == e.outputs for e in (*one.spec.examples, *one.rows))
                assert one.spec.description in (*one.task.seen_descriptions(), "")
            if len(one.spec.examples) < 3:
                assert one.spec.description
        again = [episode.questions for episode in source.episodes(source.draw(number))]
        assert again == [episode.questions for episode in source.episodes(drawn)]
    assert set(n_read) == set(range(7)) and styles == set(STYLES)
    assert 0.15 < n_alone / len(n_read) < 0.5 and n_undescribed > 20


def test_renamed_labels_without_a_description_stand_in_the_examples_only(base):
    source = source_of(base, [SIDE, SHOUT], augmented_share=1.0, undescribed_share=1.0, description_only_share=0.0)
    n_renamed = 0
    for number in range(200):
        for one in source.draw(number):
            outputs = {e.outputs[0] for e in (*one.spec.examples, *one.rows)}
            is_renamed = one.task is SIDE and len(outputs) == 2 and not outputs & {"left", "right"}
            if is_renamed and len(one.spec.examples) >= 3 and one.spec.description == "Is it left or right?":
                n_renamed += 1
                assert not outputs & set(one.spec.description.lower().rstrip("?").split())
    assert n_renamed > 3


def test_the_examples_that_are_read_have_a_bound_of_tokens(base):
    source = source_of(base, [SHOUT], tasks_per_step=1, tokens_read=30, description_only_share=0.0)
    lengths = []
    for number in range(40):
        (one,) = source.draw(number)
        lengths.append(sum(len(base.chat.reply(TaskSpec("", (e,)).text(one.style))) for e in one.spec.examples))
    assert 0 < max(lengths) <= 30


def test_without_examples_to_read_everything_is_drawn_as_before(base):
    some, none = (source_of(base, [SHOUT, SIDE], examples_read=n) for n in (6, 0))
    unspecified = TaskSource(some.config, [SHOUT, SIDE], base.chat, is_specified=False)
    n_same = 0
    for number in range(30):
        assert none.draw(number) == unspecified.draw(number)
        for one, other in zip(some.draw(number), none.draw(number), strict=True):
            assert one.task is other.task and one.system == other.system and not other.spec.examples
            n_same += one == other
    assert 5 < n_same < 40


def test_the_prompts_of_the_reader_hold_the_specification_once_and_the_same_rows(base):
    described, plain = (
        TaskSource(source_of(base, [SHOUT]).config, [SHOUT, SIDE], base.chat, described=described)
        for described in (True, False)
    )
    for number in range(10):
        drawn = described.draw(number)
        for one, with_text, without in zip(drawn, described.episodes(drawn), plain.episodes(drawn), strict=True):
            for question, bare in zip(with_text.questions, without.questions, strict=True):
                text = base.tokenizer.decode(question.prompt)
                assert text.count(one.text) == 1 and question.answer == bare.answer
                assert base.tokenizer.decode(bare.prompt) == text.replace(f"{one.text}\n\n", "")


def test_shares_are_checked():
    with pytest.raises(ConfigError, match="undescribed_share is a share"):
        TaskDataConfig(undescribed_share=1.5)
    with pytest.raises(ConfigError, match="examples_read must not be negative"):
        TaskDataConfig(examples_read=-1)


def test_gradients_reach_the_encoder_lora_through_examples(base):
    """Of a task whose description is left out, so that they come through the examples."""
    hypernet = make_attention_delta(base, fresh=True)
    hypernet.train().requires_grad_(True)
    reader = hypernet.text_encoder(base)
    for part in hypernet.encoder_lora.values():
        part.b.data.normal_(std=0.1)
    source = source_of(base, [SHOUT, SIDE], description_only_share=0.0, undescribed_share=1.0)
    drawn = next(d for d in map(source.draw, range(50)) if all(not one.spec.description for one in d))
    loras = hypernet(reader([one.text for one in drawn]))
    score_answers(base.model, loras, pack(source.episodes(drawn), base.pad_id)).loss.backward()
    for part in hypernet.encoder_lora.values():
        assert part.a.grad.abs().max() > 0 and part.b.grad.abs().max() > 0


def test_training_goes_on_from_a_hypernetwork_without_its_task_bank(base, tmp_path):
    tasks = read_tasks(write_suite(tmp_path))
    data = TaskDataConfig(tasks_per_step=2, examples_per_task=2)
    training = TrainConfig(steps=2, warmup_steps=1, lr=1e-3, bf16=False)
    first = TextRecipe(kinds=("o_proj", "down_proj"), hypernetwork=ATTENTION_DELTA, data=data, training=training)
    train_text(base, first, tasks, tmp_path / "first")
    bank = TextRecipe(data=data, training=training, task_bank_only=True, hypernetwork={"task_bank_rank": 2})
    train_text(base, bank, tasks, tmp_path / "bank", init_from=tmp_path / "first")
    assert AttentionDeltaToLoRA.from_pretrained(tmp_path / "bank").config.bank_sizes
    examples = TextRecipe(
        data=dataclasses.replace(data, examples_read=3), training=training, encoder_lora_is_trained=True,
        hypernetwork={"task_bank_rank": 0, "examples_at_once": 3},
    )  # fmt: skip
    train_text(base, examples, tasks, tmp_path / "examples", init_from=tmp_path / "bank")
    hypernet = AttentionDeltaToLoRA.from_pretrained(tmp_path / "examples")
    assert hypernet.task_bank is None and not hypernet.config.bank_sizes and hypernet.config.examples_at_once == 3
    before = AttentionDeltaToLoRA.from_pretrained(tmp_path / "bank").encoder_lora_batch().row(0)
    after = hypernet.encoder_lora_batch().row(0)
    assert any(not torch.equal(before.delta(name), after.delta(name)) for name in before.names)


def test_the_reader_learns_from_examples_in_its_prompt(base, tmp_path):
    recipe = OracleRecipe(
        PeftConfig(kinds=("o_proj", "down_proj"), rank=3),
        TaskDataConfig(tasks_per_step=2, examples_per_task=3, examples_read=2, description_only_share=0.2),
        TrainConfig(steps=3, warmup_steps=1, bf16=False),
    )
    assert train_multitask(base, recipe, read_tasks(write_suite(tmp_path)), tmp_path / "reader", described=True)
    about = json.loads((tmp_path / "reader" / "loracast.json").read_text())
    assert about["settings"]["data"]["examples_read"] == 2 and about["settings"]["described"]


# -------------------------------------------------------------------------------------------------------- casting


@pytest.fixture
def caster(base, tmp_path) -> TaskCaster:
    hypernet = make_attention_delta(base, examples_at_once=3)
    for_base(hypernet, base.fingerprint).save_pretrained(tmp_path / "hypernetwork", storage="float32")
    return TaskCaster(load_caster(tmp_path / "hypernetwork", "task", lambda: base), Library(tmp_path / "library"))


def deltas_of(caster: TaskCaster, base, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return caster.hypernetwork.text_encoder(base)(texts)


def test_up_to_so_many_examples_are_read_in_one_text_and_more_in_even_groups(caster, base):
    read = caster.caster.encode
    for n, groups in ((1, [1]), (3, [3]), (4, [2, 2]), (6, [3, 3])):
        texts, start = [], 0
        for size in groups:
            texts.append(TaskSpec(SENTENCE, EXAMPLES[start : start + size]).text())
            start += size
        (found,) = read([TaskSpec(SENTENCE, EXAMPLES[:n])]).states[:, 0]
        torch.testing.assert_close(found, deltas_of(caster, base, texts).mean(0), atol=1e-5, rtol=1e-4)


def test_a_group_that_does_not_fit_is_halved_and_an_example_that_never_fits_is_named(caster):
    long = tuple(Example("the lamp on the desk " * 12 + str(i), ("x",)) for i in range(3))
    reader = caster.caster
    assert reader.encode([TaskSpec(SENTENCE, long)]).states.isfinite().all()
    mixed = TaskSpec(SENTENCE, (*EXAMPLES[:5], long[0], long[1]))
    sizes = [len(group.examples) for group in reader.encoder.groups(mixed)]
    assert sizes[:2] == [2, 2] and sum(sizes) == 7  # the short ones stay together
    assert tuple(e for group in reader.encoder.groups(mixed) for e in group.examples) == mixed.examples
    endless = (*EXAMPLES[:1], Example("the lamp on the desk " * 200, ("x",)))
    with pytest.raises(EncoderError, match="example 2 is too long behind the description"):
        reader.encode([TaskSpec(SENTENCE, endless)])
    with pytest.raises(EncoderError, match="the description is too long to be read with examples"):
        reader.encode([TaskSpec("the lamp on the desk " * 200, EXAMPLES[:2])])


def test_an_adapter_of_examples_says_how_many_there_were_and_is_known_by_them(caster, base):
    adapter = caster.task(SENTENCE, "opposite", examples=list(OPPOSITES.items()), storage="bf16")
    manifest = adapter.manifest
    assert (manifest.kind, manifest.title, manifest.n_examples, manifest.warnings) == ("task", SENTENCE, 6, ())
    assert manifest.source_sha256 == TaskSpec(SENTENCE, EXAMPLES).sha256
    assert Manifest.read(adapter.folder / "adapter.json") == manifest
    alone = caster.task(SENTENCE, "alone")
    assert alone.manifest.n_examples == 0 and "n_examples" not in (alone.folder / "adapter.json").read_text()
    again = caster.task(SENTENCE, "opposite", examples=EXAMPLES, storage="bf16")
    assert again.version == adapter.version
    with pytest.raises(AdapterError, match="already"):
        caster.task(SENTENCE, "opposite", examples=EXAMPLES[:2])
    ids = torch.tensor([base.chat.prompt("hot", "")])
    with torch.no_grad():
        logits = []
        for lora in (adapter.lora(), alone.lora(), caster.loras([TaskSpec(SENTENCE, EXAMPLES)])[0]):
            with inject(base.model, lora):
                logits.append(base.model(input_ids=ids).logits)
    assert (logits[0] - logits[2]).norm() < 0.02 * (logits[0] - logits[1]).norm()  # but for bf16


def test_examples_alone_make_an_adapter_and_nothing_at_all_is_refused(caster):
    adapter = caster.task(examples=[("hot", "cold")])
    assert adapter.name == "hot-cold" and adapter.manifest.title == "hot => cold"
    named = [caster.task(title).name for title in ("翻译成英文", "Переведи на английский", "日本語に訳す 2")]
    assert len(set(named)) == 3 and all(name.startswith("task-") for name in named)
    assert caster.distances([TaskSpec("", EXAMPLES), SENTENCE])[0] is None
    with pytest.raises(AdapterError, match="or give examples"):
        caster.task(" ")
