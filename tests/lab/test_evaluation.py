"""Evaluation: metrics against known values, haystacks, documents in memory against adapters, whole runs."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest

from loracast.errors import ConfigError
from loracast.lab.data.answer_metrics import has_value, is_exact, normalise
from loracast.lab.evaluation.report import cluster_bootstrap, wilson
from loracast.reading.routing import route_adapter
from other_processes import Forked, run_module

NOUNS = [
    "river",
    "bridge",
    "garden",
    "mill",
    "lantern",
    "harbour",
    "meadow",
    "chapel",
    "orchard",
    "tower",
    "market",
    "stable",
    "kitchen",
    "library",
    "cellar",
]


def prose(n_sentences: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(
        f"The {rng.choice(NOUNS)} near the {rng.choice(NOUNS)} was older than anyone had said."
        for _ in range(n_sentences)
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "prose.jsonl"
    rows = [json.dumps({"text": prose(60, seed)}) for seed in range(4)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return (str(path),)


@pytest.fixture
def haystack(base, texts):
    from loracast.base.chat import encode_with_offsets
    from loracast.lab.data.needles import Haystack
    from loracast.lab.data.rows import read_texts

    return Haystack(read_texts(texts), lambda text: encode_with_offsets(base.tokenizer, text))


# ---- metrics ----


@pytest.mark.parametrize(
    ("answer", "value", "exact", "inside"),
    [
        ("4711", "4711", True, True),
        (' "4711." ', "4711", True, True),
        ("**4711**", "4711", True, True),
        ("The Amber  Lantern.", "amber lantern", True, True),
        ('The "amber lantern"', "amber lantern", True, True),
        ("4,711", "4711", False, False),
        ("-4711", "4711", False, True),
        ("47112", "4711", False, False),
        ("4711.5", "4711", False, False),
        ("The special number is 4711.", "4711", False, True),
        ("24 months", "24", False, True),
        ("45%", "45", False, True),
        ("vitamin a", "vitamin", False, True),
        ("", "4711", False, False),
    ],
)
def test_when_an_answer_counts(answer, value, exact, inside):
    assert is_exact(answer, value) is exact
    assert has_value(answer, value) is inside


def test_normalise_leaves_the_inside_alone():
    assert normalise("  An  A-B, (c) d.  ") == "a-b, (c) d"
    assert normalise("a") == "a"


def test_wilson_against_published_values():
    # R: prop.test(x, n, correct = FALSE)$conf.int
    assert wilson(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-5)
    assert wilson(10, 10) == pytest.approx((0.722467, 1.0), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-5)
    assert wilson(388, 400) == pytest.approx((0.948320, 0.982755), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_bootstrap_counts_clusters_not_questions():
    rng = random.Random(0)
    single = [[rng.random() < 0.5] for _ in range(400)]
    low, high = cluster_bootstrap(single)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 400**0.5, rel=0.15)
    whole = [[i % 2 == 0] * 20 for i in range(40)]  # 800 questions, but only 40 independent documents
    low, high = cluster_bootstrap(whole)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 40**0.5, rel=0.15)
    assert cluster_bootstrap([[True, False]] * 30) == (0.5, 0.5)


# ---- haystacks ----


@pytest.mark.parametrize("n_tokens", [150, 700, 3000])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_haystack_has_the_length_and_the_needle_where_asked(base, model, haystack, n_tokens, depth):
    from loracast.base.chat import encode_text
    from loracast.lab.data.needles import make_needles
    from loracast.lab.evaluation.documents import DocumentSetup, RoutedConfig

    rng = random.Random(n_tokens)
    needle = make_needles(rng, 1, split="test", kind="number4")[0]
    text = haystack.sample(rng, n_tokens, [needle], [depth])
    n = len(encode_text(base.tokenizer, text))
    assert n_tokens - 30 <= n <= n_tokens
    assert text.count(needle.statement) == 1
    place = text.index(needle.statement)
    prose_only = len(text) - len(needle.statement)
    assert place / prose_only == pytest.approx(depth, abs=45 / prose_only)  # to the nearest sentence's end
    document = DocumentSetup(model, RoutedConfig(chunk_tokens=128)).keep(text)
    chunk = document.chunks[document.chunk_of(needle.statement, needle.statement.index(needle.answer))]
    assert document.chunk_of("This stands nowhere.", 0) is None
    assert needle.answer in chunk.text
    assert all(needle.answer not in other.text for other in document.chunks if other is not chunk)


def test_a_haystack_of_a_chunks_length_is_one_chunk(model, haystack):
    from loracast.lab.data.needles import make_needles
    from loracast.lab.evaluation.documents import DocumentSetup, RoutedConfig

    setup = DocumentSetup(model, RoutedConfig(chunk_tokens=256))
    for seed in range(20):
        rng = random.Random(seed)
        text = haystack.sample(rng, 256, make_needles(rng, 1, split="test", kind="number4"), [rng.random()])
        assert len(setup.keep(text).chunks) == 1


def test_haystack_refuses_what_cannot_be(haystack):
    from loracast.lab.data.needles import make_needles
    from loracast.lab.data.rows import read_texts

    with pytest.raises(ConfigError, match="--texts"):
        read_texts(())
    with pytest.raises(ConfigError, match="no such file"):
        read_texts(("nowhere.jsonl",))
    with pytest.raises(ConfigError, match="do not fit"):
        haystack.sample(random.Random(0), 20, make_needles(random.Random(0), 3, split="test"), [0.1, 0.2, 0.3])


# ---- documents in a temporary library ----


@pytest.mark.parametrize("options", [{}, {"static_rank": 2, "kinds": ("q_proj", "down_proj")}])
@pytest.mark.parametrize("storage", ["bf16", "int4"])
def test_a_document_of_an_evaluation_gives_the_lora_of_its_adapter(base, tmp_path, options, storage):
    import torch

    from loracast.answering.model import Model
    from loracast.lab.evaluation.documents import DocumentSetup, RoutedConfig
    from loracast.lab.evaluation.runner import made
    from tiny import make_hypernet

    model = Model(base, tmp_path, make_hypernet(base, **options))
    text = prose(40, seed=9)
    setup = DocumentSetup(model, RoutedConfig(chunk_tokens=128), storage=storage)
    document, other = setup.keep(text, "The valley"), setup.keep(prose(5, seed=10))
    n = len(document.chunks)
    assert n > 4
    question = "Which chapel was old?"
    requests = [setup.request(question, one.adapter, always=True) for one in (other, document)]
    setup.cast_ahead(requests)
    adapter = model.learn(document.document, max_chunk_tokens=128, storage=storage)
    assert adapter.manifest.n_chunks == n
    for chunks in (None, (1, 3), {3: 1.0, 1: 0.5}, {i: 1 / (i + 1) for i in range(n)}):
        ours, theirs = document.adapter.lora(chunks), adapter.lora(chunks)
        assert ours.names == theirs.names
        for name in ours.names:
            torch.testing.assert_close(ours.delta(name), theirs.delta(name), rtol=2e-2, atol=2e-2)
    asked, (_, lora) = model.prepare(question, adapter, always=True), made(base, requests)
    assert [route for _, route in requests[1].prepared.routed] == [route_adapter(adapter, question, 2, always=True)]
    wanted = model.lora_of(asked.routed)
    for name in wanted.names:
        torch.testing.assert_close(lora.delta(name), wanted.delta(name), rtol=2e-2, atol=2e-2)


def test_only_what_is_wanted_is_cast(model):
    from loracast.lab.evaluation.documents import DocumentSetup, RoutedConfig

    setup = DocumentSetup(model, RoutedConfig(chunk_tokens=128))
    document = setup.keep(prose(40, seed=9))
    document.adapter.rows([2, 0])
    assert [place in setup._recast._rows for place in document.places[:4]] == [True, False, True, False]
    setup.free([document])
    assert not setup._recast._rows


def test_the_window_gets_the_document_and_loses_its_middle(model):
    from loracast.lab.evaluation.documents import DocumentCase, DocumentSetup, RoutedConfig
    from loracast.lab.evaluation.synthetic import BASELINES

    setup = DocumentSetup(model, RoutedConfig(chunk_tokens=128))
    in_window, passage = BASELINES["window"].request, BASELINES["bm25"].request
    short = setup.keep("First sentence here. The code is 4711. Last one.", "A title")
    whole = model.base.tokenizer.decode(in_window(setup, DocumentCase(short, "What is it?")).prepared.prompt)
    assert "A title" in whole and short.document.text in whole and "What is it?" in whole
    long = setup.keep(f"Beginning of all. {prose(80, seed=1)} Ending of all.")
    case = DocumentCase(long, "What is the ending?", chunk=len(long.chunks) - 1)
    prompt = in_window(setup, case).prepared.prompt
    assert model.base.window - 40 < len(prompt) + setup.max_new_tokens <= model.base.window
    cut = model.base.tokenizer.decode(prompt)
    assert "Beginning of all." in cut and "Ending of all." in cut
    picked = passage(setup, case)
    assert picked.found is True and "Ending of all." in model.base.tokenizer.decode(picked.prepared.prompt)


# ---- whole runs ----

ROW_KEYS = {"baseline", "label", "n", "exact", "exact_low", "exact_high", "has_value", "prompt_tokens", "answer_s"}


def short(monkeypatch) -> None:
    """Few and short answers in the evaluations of generated documents."""
    from loracast.lab.evaluation import synthetic

    monkeypatch.setattr(synthetic, "N_TIMED", 1)
    monkeypatch.setattr(synthetic, "MAX_NEW_TOKENS", 6)


def test_needle_writes_what_it_promises(model, texts, tmp_path, monkeypatch):
    from loracast.lab.evaluation import synthetic as needle

    short(monkeypatch)
    config = needle.NeedleConfig(texts, lengths=(256, 900), samples=3, chunk_tokens=128, route=2)
    seen = []
    report = needle.evaluate_needle(model, config, tmp_path, lambda done, total: seen.append((done, total)))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["is_complete"] and results["seed"] == 0 and results["settings"]["lengths"] == [256, 900]
    assert results["versions"].keys() == {"python", "loracast", "torch", "transformers"}
    assert results["machine"]["cpu"] and results["command"] and results["date"] and results["hypernetwork"]
    assert [(row["length"], row["baseline"]) for row in results["rows"]] == [
        (n, s) for n in (256, 900) for s in config.baselines
    ]
    for row in results["rows"]:
        assert (
            row.keys() >= ROW_KEYS and row["n"] == 3 and 0 <= row["exact_low"] <= row["exact"] <= row["exact_high"] <= 1
        )
        assert (
            sum(d["n"] for d in row["depths"]) == 3 and row["n_timed"] == 1 and row["first_token_s"] <= row["answer_s"]
        )
        assert (row["recall"] is None) == (row["baseline"] in ("merged", "none", "other", "window"))
    assert report.rows[-1]["chunks"] > report.rows[0]["chunks"]
    assert seen[-1] == (6, 6)
    table = (tmp_path / "table.md").read_text()
    assert "adapter, routed 2" in table and "another document's adapter" in table
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2 * 3 * len(config.baselines)


def test_a_short_run_is_the_beginning_of_a_long_one(model, texts, tmp_path, monkeypatch):
    from loracast.lab.evaluation import synthetic as needle

    short(monkeypatch)
    monkeypatch.setattr(needle, "_TOKENS_PER_GROUP", 400)  # two documents at a time
    shown = []
    for n in (3, 5):
        config = needle.NeedleConfig(texts, lengths=(200,), samples=n, baselines=("routed", "none"), depths=(0.5, 1.0))
        needle.evaluate_needle(model, config, tmp_path / str(n))
        rows = [json.loads(line) for line in (tmp_path / str(n) / "answers.jsonl").read_text().splitlines()]
        shown.append([(r["question"], r["depth"], r["answer"]) for r in rows if r["baseline"] == "routed"])
    assert len(shown[0]) == 3 and shown[1][:3] == shown[0]
    assert [depth for _, depth, _ in shown[1]] == [0.5, 1.0, 0.5, 1.0, 0.5]


def test_a_budget_stops_early_and_says_so(model, texts, tmp_path, monkeypatch):
    from loracast.lab.evaluation import synthetic as needle

    monkeypatch.setattr(needle, "_TOKENS_PER_GROUP", 400)
    config = needle.NeedleConfig(texts, lengths=(200,), samples=50, baselines=("none",), budget_s=0.0)
    report = needle.evaluate_needle(model, config, tmp_path)
    assert report.rows[0]["n"] == 2 and not report.is_complete
    whole = needle.evaluate_needle(model, dataclasses.replace(config, samples=2, budget_s=None), tmp_path / "whole")
    assert whole.rows[0]["n"] == 2 and whole.is_complete


def test_facts_writes_what_it_promises(model, tmp_path, monkeypatch):
    from loracast.lab.evaluation import synthetic as facts

    short(monkeypatch)
    config = facts.FactsConfig(facts=(2, 4), sheets=2, chunk_tokens=128)
    facts.evaluate_facts(model, config, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(row["facts"], row["baseline"]) for row in results["rows"]] == [
        (n, s) for n in (2, 4) for s in config.baselines
    ]
    for row in results["rows"]:
        assert row.keys() >= ROW_KEYS | {"cluster_low", "cluster_high", "chunks", "document_tokens"}
        assert row["n"] == 2 * row["facts"] and row["sheets"] == 2
    assert "95 % by sheet" in (tmp_path / "table.md").read_text()


def test_everyday_counts_right_answers_by_kind_of_question(model, tmp_path, monkeypatch):
    from loracast.lab.data.everyday import KINDS
    from loracast.lab.evaluation import synthetic as everyday

    short(monkeypatch)
    monkeypatch.setattr("loracast.answering.model.Model.copy_bias", lambda self, prepared: None)
    config = everyday.EverydayConfig(documents=4, questions=4, chunk_tokens=128, split="dev")
    everyday.evaluate_everyday(model, config, tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["baseline"] for row in rows] == [*config.baselines]
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    for row in rows:
        mine = [answer for answer in answers if answer["baseline"] == row["baseline"]]
        assert row["n"] == len(mine) == 16 and row["documents"] == 4
        assert row["right"] == pytest.approx(sum(answer["right"] for answer in mine) / 16)
        for kind in KINDS:
            assert row[f"n {kind}"] == sum(answer["kind"] == kind for answer in mine)
    assert "95 % by document" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("name", "kinds", "settings", "sizes"),
    [
        ("tables", {"span", "missing row", "missing column", "empty cell"}, {"rows": (5, 12), "tables": 2}, [5, 12]),
        ("corrections", {"span", "changed", "not said"}, {"documents": 4}, [4]),
        ("chats", {"said", "changed", "who", "when", "other said", "nobody said"}, {"documents": 4}, [4]),
        ("near_misses", {"span", "other name", "taken out", "other part", "not said"}, {"documents": 4}, [4]),
    ],
)
def test_generated_documents_count_right_answers_by_kind(model, tmp_path, monkeypatch, name, kinds, settings, sizes):
    from loracast.answering.answers import NOT_SAID
    from loracast.lab.evaluation import synthetic

    short(monkeypatch)
    monkeypatch.setattr("loracast.answering.model.Model.copy_bias", lambda self, prepared: None)
    config_class = getattr(synthetic, f"{name.title().replace('_', '')}Config")
    config = config_class(questions=3, chunk_tokens=128, split="dev", baselines=("routed",), **settings)
    getattr(synthetic, f"evaluate_{name}")(model, config, tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    size = "rows" if name == "tables" else "documents"
    assert [(row[size], row["baseline"]) for row in rows] == [(n, one) for n in sizes for one in config.baselines]
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {answer["kind"] for answer in answers} <= kinds
    for row in rows:
        mine = [a for a in answers if (a["baseline"], a[size]) == (row["baseline"], row[size])]
        assert row["n"] == len(mine) == 3 * row["documents"]
        assert row["right"] == pytest.approx(sum(answer["right"] for answer in mine) / len(mine))
        assert all(row[f"n {kind}"] == sum(answer["kind"] == kind for answer in mine) for kind in kinds)
        answerable = [
            answer["answer"] == NOT_SAID
            for answer in mine
            if answer["kind"] in ("span", "changed", "said", "who", "when")
        ]
        assert row["refused"] == pytest.approx(sum(answerable) / len(answerable))


def test_latency_compares_the_three(model, texts, tmp_path):
    from loracast.lab.evaluation.cost import LatencyConfig, evaluate_latency

    evaluate_latency(model, LatencyConfig(texts, tokens=1600, repetitions=3, route=2), tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["baseline"] for row in rows] == ["base", "adapter", "window"]
    assert all(row["n"] == 3 and row["fastest_s"] <= row["first_token_s"] <= row["slowest_s"] for row in rows)
    assert rows[0]["ratio"] == 1 and rows[2]["prompt_tokens"] > rows[0]["prompt_tokens"] == rows[1]["prompt_tokens"]


def test_memory_is_measured_in_a_process_of_its_own(
    model, tiny_folder, tiny_hypernet_folder, texts, tmp_path, monkeypatch
):
    from loracast.lab.evaluation import cost

    pids = set()  # forked, since a new Python would take five seconds to import torch

    def run_forked(command, **options):
        assert command[:2] == [sys.executable, "-m"] and options["capture_output"]
        other = Forked(tmp_path, run_module, *command[2:])
        pids.add(other.pid)
        return subprocess.CompletedProcess(command, other.wait(240), other.out, other.err)

    monkeypatch.setattr(cost, "subprocess", SimpleNamespace(run=run_forked))
    config = cost.MemoryConfig(texts, lengths=(300, 600))
    loaded = {"model": str(tiny_folder), "hypernetwork": str(tiny_hypernet_folder), "device": "cpu"}
    cost.evaluate_memory(model, loaded, config, tmp_path)
    shorter, row = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(pids) == 2
    assert shorter["n_tokens"] < 0.7 * row["n_tokens"] and abs(row["n_tokens"] - 600) < 60
    assert row["n_chunks"] >= 3 and row["base_mib"] > 50 and 0 <= row["above_base_mib"] < 500
    assert row["ratio"] == pytest.approx(row["cast_s"] / row["encode_s"]) and row["learn_s"] > 0
    assert row["kb_per_token"] == pytest.approx(row["adapter_mib"] * 1.048576 * 1000 / row["n_tokens"])


def test_settings_that_make_no_sense_are_refused_together(texts):
    from loracast.lab.evaluation.synthetic import NeedleConfig

    with pytest.raises(ConfigError, match="depth of 2") as caught:
        NeedleConfig(texts, lengths=(20,), depths=(2.0,), kind="colour")
    assert "20 tokens" in str(caught.value) and "'colour'" in str(caught.value)
    with pytest.raises(ConfigError, match="unknown baselines: magic"):
        NeedleConfig(texts, baselines=("magic",))


def test_the_command_line_reaches_the_evaluation(tiny_folder, tiny_hypernet_folder, tmp_path, home):
    from typer.testing import CliRunner

    from loracast.cli import app

    options = ["--facts", "2", "--sheets", "2", "--baselines", "routed,none", "--json"]
    where = ["--out", str(tmp_path), "--base", str(tiny_folder), "--hypernetwork", str(tiny_hypernet_folder)]
    done = CliRunner().invoke(app, ["eval", "facts", *where, *options])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"][0]["label"].startswith("adapter, routed")
    assert CliRunner().invoke(app, ["eval", "needle", "--out", str(tmp_path), "--lengths", "a,b"]).exit_code == 2
    assert CliRunner().invoke(app, ["eval", "facts", "--out", str(tmp_path), "--split", "train"]).exit_code == 2


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot reset the high-water mark")
def test_the_peak_is_what_was_touched_and_not_what_was_there():
    import mmap

    from loracast.lab.evaluation.runner import peak_memory

    def touch(mib: int) -> None:
        with mmap.mmap(-1, mib * 2**20) as memory:
            memory.write(b"x" * len(memory))

    touch(200)  # freed again: of no consequence
    with peak_memory() as peak:
        touch(60)
    assert 60 <= peak.above_mib < 190 and peak.before_mib > 20  # the bytes that are written are allocated too
    with peak_memory() as nothing:
        pass
    assert nothing.above_mib < 20
