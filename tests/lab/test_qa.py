"""Evaluations on real documents: metrics, baselines, the window LoRA, continuations, interference, whole runs."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from loracast.base.chat import without_middle
from loracast.base.load import Base
from loracast.cli import app
from loracast.errors import AdapterError, ConfigError
from loracast.lab.data.answer_metrics import best, exact_match, rouge_l, squad_normalise, token_f1
from loracast.lab.data.rows import read_questioned
from loracast.lab.evaluation.documents import DocumentSetup, RoutedConfig, static_lora
from loracast.lab.evaluation.interference import InterferenceConfig, evaluate_interference
from loracast.lab.evaluation.qa import BASELINES, QaConfig, cases_of, choose, evaluate_qa, passages
from loracast.lab.training.loop import TrainConfig
from loracast.lab.training.loras import (
    PeftConfig,
    WindowDataConfig,
    WindowRecipe,
    WindowSource,
    read_window_lora,
    train_window,
)
from loracast.lora.algebra import LoRA
from loracast.lora.peft_format import read_peft
from questions import ROWS, write_documents

# ---- metrics ----


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "f1", "rouge"),
    [
        ("The Denver Broncos.", "denver broncos", 1, 1, 1),
        ("Denver Broncos won", "Denver Broncos", 0, 0.8, 0.8),  # precision 2/3, recall 1
        ("Broncos Denver", "Denver Broncos", 0, 1, 0.5),  # words in another order
        ("in 1876, in Paris", "Paris, 1876", 0, 2 / 3, 1 / 3),
        ("U.S.A.", "usa", 1, 1, 1),
        ("", "usa", 0, 0, 0),
        ("the", "a", 1, 0, 0),  # nothing is left of either
        ("red red blue", "red blue blue", 0, 2 / 3, 2 / 3),
    ],
)
def test_answers_are_scored_as_squad_does(answer, gold, exact, f1, rouge):
    assert exact_match(answer, gold) == exact
    assert token_f1(answer, gold) == pytest.approx(f1)
    assert rouge_l(answer, gold) == pytest.approx(rouge)
    assert best(token_f1, answer, ("something else", gold)) == pytest.approx(f1)


def test_the_official_normalisation():
    assert squad_normalise("  The  Cat's pyjamas, an A-team!\n") == "cats pyjamas ateam"


# ---- the run ----


@pytest.fixture(autouse=True)
def wide_window(monkeypatch):
    """The tiny tokenizer makes long prompts; the tiny base's rotary positions have no end."""
    monkeypatch.setattr(Base, "window", 4096)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """Random answers seldom end by themselves."""
    monkeypatch.setattr("loracast.lab.evaluation.qa.MAX_NEW_TOKENS", 12)


@pytest.fixture
def documents(tmp_path):
    return write_documents(tmp_path / "qa.jsonl")


@pytest.fixture(scope="module")
def window_folder(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("window")
    data = WindowDataConfig(documents=(write_documents(folder / "qa.jsonl"),), questions_per_step=6)
    recipe = WindowRecipe(
        data, PeftConfig(("v_proj", "down_proj"), rank=4), TrainConfig(steps=40, lr=1e-2, warmup_steps=2, bf16=False)
    )
    losses = []
    assert train_window(base, recipe, folder / "lora", on_metrics=lambda m: losses.append(m["loss"]))
    assert losses[-1] < losses[0] / 2
    return folder / "lora"


def test_a_window_lora_sees_each_document_once_with_all_its_questions(base, documents):
    source = WindowSource(WindowDataConfig(documents=(documents,), questions_per_step=6), base)
    rows = source.episodes(3)
    assert sum(len(row.questions) for row in rows) >= 6 and rows == source.episodes(3)
    for row in rows:
        prompts = [base.tokenizer.decode(question.prompt) for question in row.questions]
        own = next(r for r in ROWS if r["title"] in prompts[0])
        for prompt, question in zip(prompts, row.questions, strict=True):
            assert own["document"] in prompt
            asked = next(q for q in own["questions"] if q["question"] in prompt)
            assert base.tokenizer.decode(question.answer[:-1]).strip() == asked["answers"][0]
    with pytest.raises(ConfigError, match="--documents"):
        WindowSource(WindowDataConfig(), base)


def test_a_window_lora_reads_everyday_documents_and_sheets_too(base, documents):
    config = WindowDataConfig(documents=(documents,), everyday_share=0.5, facts_share=0.25, questions_per_step=24)
    rows = WindowSource(config, base).episodes(1)
    shown = [base.tokenizer.decode(row.questions[0].prompt) for row in rows]
    of_people = [any(r["document"] in prompt for r in ROWS) for prompt in shown]
    assert any(of_people) and not all(of_people) and rows == WindowSource(config, base).episodes(1)
    n_people = sum(len(row.questions) for row, is_one in zip(rows, of_people, strict=True) if is_one)
    assert n_people >= 6 and sum(len(row.questions) for row in rows) - n_people >= 18
    with pytest.raises(ConfigError, match="more than 1"):
        WindowDataConfig(everyday_share=0.6, facts_share=0.5)


def cases(setup, first, second):
    """The questions about the first document, beside the second."""
    other = setup.keep(second.text, second.title)
    return [dataclasses.replace(case, other=other) for case in cases_of(setup, first)]


def test_what_is_left_without_parts_of_the_adapter(reading, documents):
    setup = DocumentSetup(reading, RoutedConfig(chunk_tokens=64))
    first, second = read_questioned([documents])[:2]
    asked = cases(setup, first, second)[0]
    whole = BASELINES["adapter"].request(setup, asked)
    parts = {name: BASELINES[name].request(setup, asked) for name in ("place", "copying", "static", "lora", "merged")}
    candidates, place = whole.prepared.candidates, parts["place"].prepared.answer
    assert (place.text, place.answered_by) == (candidates[0].text, "text")
    assert parts["copying"].key == dataclasses.replace(whole, lora=None).key
    assert parts["static"].prepared.candidates == candidates and parts["static"].lora == setup.static
    assert parts["lora"].lora == whole.lora and parts["lora"].prepared.candidates == ()
    assert parts["merged"].prepared.routed[0][1].chunks is None and parts["merged"].prepared.candidates == ()


def test_a_window_lora_is_told_from_other_loras(base, window_folder, tmp_path):
    lora = read_window_lora(window_folder, base.fingerprint)
    assert lora.rank == 4 and lora.names == LoRA(read_peft(window_folder)).names
    about = json.loads((window_folder / "loracast.json").read_text())
    assert "/" not in about["settings"]["data"]["documents"][0]
    about["settings"]["is_window"] = False
    other = shutil.copytree(window_folder, tmp_path / "other")
    (other / "loracast.json").write_text(json.dumps(about))
    with pytest.raises(AdapterError, match="train window"):
        read_window_lora(other, base.fingerprint)


def test_every_baseline_answers_every_question(model, documents, window_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("loracast.lab.evaluation.qa._N_STEPS", 4)  # that more of them help has a test of its own
    config = QaConfig(
        documents=(documents,), baselines=tuple(BASELINES), max_documents=1, max_questions=2, spans_only=True, chunk_tokens=64,
        window_lora=str(window_folder),
    )  # fmt: skip
    report = evaluate_qa(model, config, tmp_path / "out")
    assert report.is_complete
    by_source = [row for row in report.rows if row["kind"] == "source"]
    assert {row["part"] for row in by_source} == {"letters", "tales", "all"}
    assert [row["baseline"] for row in by_source if row["part"] == "all"] == list(BASELINES)
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    for row in by_source:
        mine = [a for a in lines if a["baseline"] == row["baseline"] and row["part"] in (a["source"], "all")]
        assert row["n"] == len(mine) == (4 if row["part"] == "all" else 2)
        assert row["documents"] == len({a["doc_id"] for a in mine})
        assert row["f1"] == pytest.approx(sum(a["f1"] for a in mine) / len(mine), abs=1e-4)
        assert 0 <= row["f1_low"] <= row["f1"] <= row["f1_high"] <= 1
        if row["baseline"] != "adapter":
            adapter = next(r for r in by_source if r["part"] == row["part"] and r["baseline"] == "adapter")
            assert row["difference"] == pytest.approx(adapter["f1"] - row["f1"])
            assert row["difference_low"] - 1e-9 <= row["difference"] <= row["difference_high"] + 1e-9
    at = {row["baseline"]: row for row in by_source if row["part"] == "all"}
    assert (
        at["none"]["prompt_tokens"]
        == at["adapter"]["prompt_tokens"]
        < at["bm25"]["prompt_tokens"]
        < at["window"]["prompt_tokens"]
    )
    assert at["adapter"]["update_s"] > at["none"]["update_s"] and at["adapter"]["answer_s"] > 0
    assert at["window_lora"]["f1"] > at["none"]["f1"]  # trained on these very questions
    assert "| all | adapter |" in (tmp_path / "out" / "table.md").read_text()


def test_a_run_cut_by_the_clock_says_so(model, documents, tmp_path, monkeypatch):
    from loracast.lab.evaluation import qa

    monkeypatch.setattr(qa, "_DOCUMENTS_PER_GROUP", 2)
    config = QaConfig(documents=(documents,), baselines=("none",), budget_s=0.0)
    report = evaluate_qa(model, config, tmp_path / "out")
    assert not report.is_complete and report.rows[0]["documents"] == 2


def test_the_same_documents_are_drawn_whatever_the_baselines(documents):
    config = QaConfig(documents=(documents,), max_documents=2, max_questions=2)
    chosen = choose(config)
    assert [d.source for d in chosen] == ["letters", "letters", "tales", "tales"]
    assert all(len(d.questions) == 2 for d in chosen) and chosen == choose(config)
    with pytest.raises(ConfigError, match="no document"):
        choose(dataclasses.replace(config, sources=("nobody",)))


def test_baselines_that_lack_something_are_refused_or_left_out(model, documents, tmp_path):
    with pytest.raises(ConfigError, match="--window-lora"):
        evaluate_qa(model, QaConfig(documents=(documents,), baselines=("window_lora",)), tmp_path)
    with pytest.raises(ConfigError, match="unknown baselines: magic"):
        evaluate_qa(model, QaConfig(documents=(documents,), baselines=("magic",)), tmp_path)
    config = QaConfig(documents=(documents,), max_documents=1, max_questions=1)
    ran = {row["baseline"] for row in evaluate_qa(model, config, tmp_path / "out").rows}
    assert ran == {name for name, baseline in BASELINES.items() if not baseline.is_optional and not baseline.needs}


def test_what_baselines_show_the_base(model, documents):
    setup = DocumentSetup(model, RoutedConfig(chunk_tokens=64))
    first, second = read_questioned([documents])[:2]
    asked = cases(setup, first, second)[1]
    shown = {
        name: model.base.tokenizer.decode(baseline.request(setup, asked).prepared.prompt)
        for name, baseline in BASELINES.items()
        if name not in ("adapter", "other", "beside", "place", "window_lora", "bm25_lora", "distilled")
    }
    for name, prompt in shown.items():
        assert asked.question in prompt
        assert (first.text in prompt) == (name.startswith("window")), name
    assert "Osla Brandt" in shown["bm25"] and "the wheel" not in shown["bm25"]
    assert passages(setup, asked, 100).replace("\n\n", " ") == first.text
    cut = without_middle(model.base.tokenizer, first.text, 12)
    assert cut.startswith("The mill") and cut.endswith("wheel.") and len(cut) < len(first.text)
    assert without_middle(model.base.tokenizer, first.text, 10_000) == first.text


def test_two_documents_at_once_are_what_asking_with_two_adapters_gives(model, documents, tmp_path):
    """Against adapters of the library, which add up what they share once."""
    first, second = read_questioned([documents])[:2]
    setup = DocumentSetup(model, RoutedConfig(chunk_tokens=64), storage="bf16")
    case = cases(setup, first, second)[0]
    BASELINES["beside"].learn(setup, case)
    found = BASELINES["beside"].request(setup, case).lora.make()
    kept = []
    for d in (first, second):
        (path := tmp_path / f"{d.title}.txt").write_text(d.text, encoding="utf-8")
        kept.append(model.learn(path, max_chunk_tokens=64, storage="bf16"))
    wanted, _ = model.lora_for(first.questions[0].question, kept, 2)
    assert found.names == wanted.names
    for name in wanted.names:
        torch.testing.assert_close(found.delta(name).float(), wanted.delta(name).float(), rtol=0.02, atol=0.02)


def test_nothing_is_distilled_of_a_document_without_a_sentence_to_ask_about(model, documents):
    from loracast.lab.evaluation import qa as distilled

    setup, (document, *_) = DocumentSetup(model, RoutedConfig(chunk_tokens=64)), read_questioned([documents])
    short = dataclasses.replace(document, text="Yes.")
    case = cases_of(setup, short)[0]
    assert not distilled._questions(setup, case) and not distilled.distil(setup, case).names


def test_distillation_comes_closer_to_the_teacher(model, documents, monkeypatch):
    """The base itself sees the document; what it then finds likely is likelier with the LoRA than without."""
    from loracast.lab.evaluation import qa as distilled
    from loracast.lora.algebra import inject

    monkeypatch.setattr(distilled, "_N_STEPS", 15)
    monkeypatch.setattr(distilled, "_LR", 1e-2)
    setup, (document, *_) = DocumentSetup(model, RoutedConfig(chunk_tokens=64)), read_questioned([documents])
    case = cases_of(setup, document)[0]
    questions = distilled._questions(setup, case)
    assert 2 <= len(questions) <= distilled.N_QUESTIONS
    lora = distilled.distil(setup, case)
    assert not model.base.model._forward_hooks and {name.split(".")[-1] for name in lora.names} == set(distilled._KINDS)
    losses = []
    for made in (None, lora):
        total = 0.0
        for question in questions:
            ids = torch.tensor([[*question.window_prompt, *question.answer]])
            shown = model.base.model(input_ids=ids).logits[0, len(question.window_prompt) - 1 : -1].softmax(-1)
            ids = torch.tensor([[*question.prompt, *question.answer]])
            with inject(model.base.model, made):
                said = model.base.model(input_ids=ids).logits[0, len(question.prompt) - 1 : -1].log_softmax(-1)
            total -= (shown * said).sum(-1).mean().item()
        losses.append(total / len(questions))
    assert losses[1] < losses[0] - 0.05


def test_the_shared_part_is_what_all_documents_have(base, tiny_folder, tmp_path):
    from loracast.answering.model import Model
    from loracast.lora.target import target_from_config
    from tiny import make_hypernet

    modules = target_from_config(base.model.config, ("q_proj",), (0, 2)).rows
    hypernet = make_hypernet(base, static_rank=2, static_modules=modules, static_modules_rank=3)
    for kind in ("down_proj", "q_proj"):
        torch.nn.init.normal_(hypernet.static[kind].b)
    model = Model(base, tmp_path, hypernet)
    lora = static_lora(model)
    assert len(lora.names) == 2 + 4
    one = hypernet.static["q_proj"]
    torch.testing.assert_close(
        lora.delta(modules[1][0]).float(), (one.b[1].T @ one.a[1]).detach(), rtol=0.05, atol=0.05
    )


# ---- harm ----


def write_benchmark(folder) -> str:
    rows = [
        {"question": f"Which is number {i}?", "choices": ["one", "two words", "three"], "answer": i % 3}
        for i in range(8)
    ]
    for split in ("test", "train"):
        (folder / f"bench_arc_easy_{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "bench_arc_easy_test.jsonl")


def test_harm_is_measured_against_the_plain_base(model, documents, tmp_path):
    config = InterferenceConfig(
        benchmarks=(write_benchmark(tmp_path),), documents=(documents,), counts=(1, 3), questions=8, chunk_tokens=64
    )
    report = evaluate_interference(model, config, tmp_path / "out")
    assert [row["n_documents"] for row in report.rows] == [0, 1, 3]
    before, *after = report.rows
    assert "change" not in before
    for row in after:
        assert row["change"] == pytest.approx(row["accuracy"] - before["accuracy"]) and 0 <= row["same"] <= 1
        assert row["change_low"] <= row["change"] <= row["change_high"]
    with pytest.raises(ConfigError, match="99 documents"):
        evaluate_interference(model, dataclasses.replace(config, counts=(99,)), tmp_path)


def test_a_hypernetwork_that_does_nothing_does_no_harm(base, documents, tmp_path):
    from loracast.answering.model import Model
    from tiny import make_hypernet

    hypernet = make_hypernet(base)
    for head in hypernet.heads.values():
        head.scaler_b.data.zero_()
    config = InterferenceConfig(
        benchmarks=(write_benchmark(tmp_path),), documents=(documents,), counts=(4,), questions=8
    )
    rows = evaluate_interference(Model(base, tmp_path, hypernet), config, tmp_path / "out").rows
    assert (rows[1]["change"], rows[1]["same"]) == (0, 1)


def test_the_commands(documents, tiny_folder, tiny_hypernet_folder, tmp_path, home):
    where = [
        "--base",
        str(tiny_folder),
        "--hypernetwork",
        str(tiny_hypernet_folder),
        "--json",
        "--documents",
        documents,
    ]
    small = {
        "qa": ["--max-documents", "1", "--baselines", "none,adapter", "--sources", "tales"],
        "interference": ["--benchmark", write_benchmark(tmp_path), "--questions", "2", "--counts", "1"],
    }
    for command, options in small.items():
        done = CliRunner().invoke(app, ["eval", command, "--out", str(tmp_path / command), *where, *options])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["rows"] and (tmp_path / command / "results.json").is_file()
    recipe = ["--set", "training.steps=2", "--set", "training.warmup_steps=1", "--set", "training.bf16=false"]
    train = [
        "train",
        "window",
        "--out",
        str(tmp_path / "window"),
        "--documents",
        documents,
        "--base",
        str(tiny_folder),
        "--json",
    ]
    done = CliRunner().invoke(app, [*train, *recipe])
    assert done.exit_code == 0 and json.loads(done.stdout)["done"], done.output
