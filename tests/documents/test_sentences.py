"""Routing by sentence: how texts are split, which sentence a memory's rows belong to, and what a question gets of them."""

import re
import sqlite3
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from loracast.answering.model import Model
from loracast.base.chat import encode_with_offsets
from loracast.cast.compact import compact
from loracast.cast.document import CachedRecast, split_document
from loracast.documents import Chunk, Document, read_document, split_text
from loracast.documents.pdf import Line, join_lines
from loracast.documents.tables import ROW, rows_to_lines, take_marks
from loracast.documents.units import find_headings, sentence_spans, token_sentences
from loracast.errors import AdapterError
from loracast.export.adapter import export_adapter
from loracast.lab.evaluation.documents import DocumentSetup, RoutedConfig
from loracast.lab.training.doc import answer_questions
from loracast.lab.training.losses import sentence_gates, sentence_weights, weights_of
from loracast.lab.training.scoring import Episode, Question, pack, score_answers
from loracast.library.adapter import SENTENCE
from loracast.library.index import read_chunks, read_sentences, write_index
from loracast.lora.algebra import LoRA
from loracast.lora.inject import linear_shapes
from loracast.lora.peft_format import read_peft
from loracast.lora.target import target_from_config
from loracast.reading.routing import route_adapter, route_document, route_set
from loracast.reading.search import sentence_scores
from tiny import make_hypernet

RANK = 12
MANUAL = """# Velmo kettle

The kettle weighs 3 kg. Dr. Smith likes it; it costs 40 euros.
A line that is wrapped because it is much longer than a row of a table
goes on here.

- The blue bin is emptied on Mondays.
- The green bin is emptied on Thursdays.
Colour: red
"""


@pytest.fixture
def model(base, tmp_path):
    modules = target_from_config(base.model.config, ("o_proj",), (1, 3)).rows
    memory = {"d_values": 48, "memory_modules": modules, "memory_rank": RANK, "memory_blocks": 1}
    hypernet = make_hypernet(base, static_rank=1, key_decorrelation=3.0, **memory)
    hypernet.memory.scale.data.copy_(torch.tensor([0.01, -0.02]))
    return Model(base, tmp_path, hypernet)


def test_a_text_is_split_where_a_reader_would():
    assert [MANUAL[start:end] for start, end in sentence_spans(MANUAL)] == [
        "# Velmo kettle",
        "The kettle weighs 3 kg.",
        "Dr. Smith likes it;",
        "it costs 40 euros.",
        "A line that is wrapped because it is much longer than a row of a table\ngoes on here.",
        "- The blue bin is emptied on Mondays.",
        "- The green bin is emptied on Thursdays.",
        "Colour: red",
    ]


@pytest.mark.parametrize("text", ["", "  \n ", "One", "a\nb\n\nc", "Ende。次の文。最後", "x" * 5000, "A. B. C. " * 400])
def test_sentences_cover_all_but_blanks_in_order(text):
    spans = sentence_spans(text)
    kept = "".join(text[start:end] for start, end in spans)
    assert "".join(kept.split()) == "".join(text.split())
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


@pytest.mark.parametrize(("piece", "n"), [(MANUAL, 100), (" ", 2000), (".", 2000), ('."', 2000), ("; ", 2000)])
def test_splitting_takes_time_in_proportion_to_the_text(piece, n):
    def seconds(n):
        started = time.perf_counter()
        sentence_spans(f"a{piece * n}b")
        return time.perf_counter() - started

    seconds(10)
    few, many = (min(seconds(length) for _ in range(3)) for length in (n, 16 * n))
    assert many < 100 * few


def test_every_token_has_the_sentence_that_holds_it(base):
    _, offsets = encode_with_offsets(base.tokenizer, MANUAL)
    spans = sentence_spans(MANUAL)
    for owner, (start, end) in zip(token_sentences(spans, offsets), offsets, strict=True):
        if MANUAL[start:end].strip():
            low, high = spans[owner]
            assert low < end and start < high


def test_the_index_finds_sentences_by_their_stems_and_pairs_of_words():
    index = sqlite3.connect(":memory:")
    prompts = [MANUAL, "The Trask drill weighs 7 kg. It is yellow."]
    write_index(index, [Chunk(prompt, 0, len(prompt), heading="", n_tokens=0) for prompt in prompts])
    places = read_sentences(index)
    texts = [prompts[chunk][start:end] for chunk, start, end in places]

    def best(question):
        scores = sentence_scores(index, question)
        return texts[scores.index(max(scores))]

    assert len(sentence_scores(index, "kettle")) == len(texts)
    assert best("How much did the drills weigh?") == "The Trask drill weighs 7 kg."
    assert best("When is the green bin emptied?") == "- The green bin is emptied on Thursdays."
    assert max(sentence_weights(index, "Which colour?")) == 1
    assert sentence_scores(index, "Who wrote Hamlet?") is None


def test_the_answer_to_a_question_in_the_text_is_found_by_the_question_s_words():
    index = sqlite3.connect(":memory:")
    prompts = ["How much is a ticket?\nIt costs 12 euros.\nDogs travel free.", "Who is free?", "Ada."]
    write_index(index, [Chunk(prompt, 0, len(prompt), heading="", n_tokens=0) for prompt in prompts])
    question, answer, *others = sentence_scores(index, "What is the price of a ticket?")
    assert question >= answer > 0.7 * question and max(others) <= 0.5 * answer
    *_, before, other_chunk = sentence_scores(index, "Who is free?")
    assert other_chunk == 0.35 * before


TABLES = {
    "t.csv": 'Name,Notes,Phone\nDr. A. Bo,"early; not on Mondays. Call first",4711\nCy,-,4712\n',
    "t.md": "Staff\n\n| Name | Notes | Phone |\n|:--|---|--:|\n"
            "| Dr. A. Bo | early; not on Mondays. Call first | 4711 |\n| Cy | - | 4712 |\n",
    "t.html": "<p>Staff<table><tr><th>Name<th>Notes<th>Phone<tr><td>Dr. A. Bo<td>early; not on Mondays. Call first"
              "<td>4711<tr><td>Cy<td>-<td>4712</table>",
}  # fmt: skip


def written(tmp_path, name):
    """A file with the table of staff, by the extension of its name."""
    path = tmp_path / name
    if name.endswith("docx"):
        import docx

        file = docx.Document()
        table = file.add_table(rows=3, cols=3)
        rows = (
            ("Name", "Notes", "Phone"),
            ("Dr. A. Bo", "early; not on Mondays. Call first", "4711"),
            ("Cy", "-", "4712"),
        )
        for row, texts in zip(table.rows, rows, strict=True):
            for cell, text in zip(row.cells, texts, strict=True):
                cell.text = text
        file.save(str(path))
    else:
        path.write_text(TABLES[name])
    return read_document(path)


@pytest.mark.parametrize("name", [*TABLES, "t.docx"])
def test_a_row_of_a_table_is_one_unit_whatever_stands_in_it(name, tmp_path, model):
    document = written(tmp_path, name)
    rows = [
        "Name Dr. A. Bo, Notes: early; not on Mondays. Call first. Name Dr. A. Bo, Phone: 4711.",
        "Name Cy, Notes: -. Name Cy, Phone: 4712.",
    ]
    assert [document.text[at:].split("\n")[0] for at in document.rows] == rows
    chunks = split_document(model.base, document, 256)
    units = [chunk.prompt[start:end] for chunk in chunks for start, end in chunk.units]
    assert [unit for unit in units if "Name" in unit] == rows
    adapter = model.learn(document, "staff")
    places = read_sentences(adapter.index)
    assert [chunks[place.chunk].prompt[place.start : place.end] for place in places] == units
    setup = DocumentSetup(model, RoutedConfig(chunk_tokens=256))
    in_evaluation = setup.keep(document).adapter
    (owners,) = adapter.rows([0])[f"o_proj{SENTENCE}"]
    torch.testing.assert_close(in_evaluation.rows([0])[f"o_proj{SENTENCE}"][0], owners)
    (expected,) = CachedRecast(model.documents, model.base)([chunks[0].prompt], [chunks[0].units])[f"o_proj{SENTENCE}"]
    torch.testing.assert_close(owners, expected)
    assert len(set(owners.tolist())) > 1
    smaller = compact(model.library, "staff", "text")
    assert read_sentences(smaller.index) == places


def test_rows_of_a_pdf_table_are_units():
    lines = [Line(text, 10.0, 700 - 12.0 * i, 1) for i, text in enumerate(("Ann Lee; B2. 471", "Bo Ek; C3. 472"))]
    prose = [Line("The staff of the museum works; it is open. " * 3, 10.0, 760.0 - 12 * i, 1) for i in range(3)]
    text, rows = take_marks(join_lines([*prose, *lines]))
    assert [text[at:].split("\n")[0] for at in rows] == ["Ann Lee; B2. 471", "Bo Ek; C3. 472"]


def test_a_row_that_is_longer_than_a_chunk_stays_a_row_in_each():
    row = "Name Bo, Notes: " + "; ".join(f"stop {i}" for i in range(60)) + "."
    text = f"Staff; all.\n{row}\nAnn; Bo."
    chunks = split_text(text, lambda part: ([0] * len(part.split()), [m.span() for m in re.finditer(r"\S+", part)]),
                        max_tokens=40, rows=(12,))  # fmt: skip
    assert len(chunks) > 2
    for chunk in chunks:
        inside = [chunk.prompt[start:end] for start, end in chunk.units if "stop" in chunk.prompt[start:end]]
        assert len(inside) <= 1
    assert [unit for chunk in chunks for a, b in chunk.units if "Ann" in (unit := chunk.prompt[a:b])] == ["Ann;"]


def test_a_table_of_markdown_is_told_from_code_and_from_prose():
    text = (
        "a | b\nc | d\n\n```\n| x | y |\n|---|---|\n| 1 | 2 |\n```\n| n | w \\| v |\n| --- | --- |\n| Ada | 3 \\| 4 |"
    )
    document = Document.from_text(text)
    assert document.text == text.rpartition("```\n")[0] + "```\nn Ada, w | v: 3 | 4."
    assert document.text[document.rows[0] :] == "n Ada, w | v: 3 | 4." and len(document.rows) == 1
    header_alone = "| n | w |\n|---|---|"
    assert Document.from_text(header_alone).text == header_alone


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("| | |\n|---|---|\n| Coffee | 2 |\n| Tea | 3 |", "Coffee: 2.\nTea: 3."),
        ("| Prices | |\n|---|---|\n| Coffee | 2 |\n| | |", "Prices Coffee: 2."),
        ("| # | Name |\n|---|---|\n| 1 | Ada |", "1, Name: Ada."),
        ("a | b\n--|--\nx | y\nno row", "a x, b: y.\nno row"),
        ("```code```\n| a | b |\n|---|---|\n| x | y |", "```code```\na x, b: y."),
    ],
)
def test_tables_of_markdown_with_odd_headers(table, text):
    document = Document.from_text(table)
    assert document.text == text and not find_headings(document.text)


def test_a_long_first_cell_is_repeated_in_part():
    rows = rows_to_lines([["Note", "A", "B"], ["long " * 100, "1", "2"]], has_header=True)
    assert rows[0].count("long") < 40 and rows[0].endswith("B: 2.")


@pytest.mark.parametrize("line", [" " * 20_000 + "-|x", "-" * 20_000 + "|x", "|" + " -|" * 7_000 + "x"])
def test_looking_for_tables_takes_time_in_proportion_to_the_text(line):
    started = time.perf_counter()
    Document.from_text(f"a|b\n{line}\nc|d")
    assert time.perf_counter() - started < 1.0


def test_a_mark_that_stands_in_a_stranger_s_text_is_taken_out():
    document = Document.from_text(f"One; two.\n{ROW}Three; four.\nFi{ROW}ve.")
    assert document.text == "One; two.\nThree; four.\nFive." and document.rows == (10,)


def test_a_semicolon_in_parentheses_ends_no_sentence():
    text = (
        "* Chess (Mondays, 9:30 am; £105)\n* Tennis (Fridays; £90); bring a racket\n\n(an open one; it\n\ngoes on; here"
    )
    assert [text[start:end] for start, end in sentence_spans(text)] == [
        "* Chess (Mondays, 9:30 am; £105)", "* Tennis (Fridays; £90);", "bring a racket",
        "(an open one; it", "goes on;", "here",
    ]  # fmt: skip


def test_a_question_gets_the_weights_of_the_sentences_in_its_chunks(model):
    adapter = model.learn(Document.from_text(MANUAL * 3), "manual", max_chunk_tokens=64)
    chunks = read_chunks(adapter.index)
    assert len(chunks) > 3
    route = route_adapter(adapter, "How heavy is the kettle of Dr. Smith?", 2)
    spans = [sentence_spans(chunks[i].prompt) for i in route.chunks]
    assert [len(weights) for weights in route.sentences] == [len(of_chunk) for of_chunk in spans]
    assert max(max(weights) for weights in route.sentences) == 1
    for chunk, of_chunk, weights in zip(route.chunks, spans, route.sentences, strict=True):
        texts = [chunks[chunk].prompt[start:end].lower() for start, end in of_chunk]
        matches = [any(word in text for word in ("kettle", "smith", "dr.")) for text in texts]
        inner = zip(matches[:-2], matches[1:-1], matches[2:], weights[1:-1], strict=True)
        for before, match, after, weight in inner:  # the first and last have neighbours in other chunks
            if not (before or match or after):
                assert weight == 0
            elif match:
                assert weight > 0.3**2
            else:
                assert 0 < weight < 0.5 + 1e-6
    assert route_adapter(adapter, "How heavy is the kettle?", None).sentences is None


def test_an_index_without_sentences_is_routed_by_chunk(model):
    adapter = model.learn(Document.from_text(MANUAL), "manual")
    with sqlite3.connect(adapter.index) as database:
        for table in ("sentences", "sentence_places"):
            database.execute(f"DROP TABLE {table}")
    database.close()
    assert read_sentences(adapter.index) == []
    route = route_document(adapter.index, "How heavy is the kettle?", 2)
    assert route.sentences is None and route.sentence_weights is None


@pytest.mark.parametrize("storage", ["bf16", "int8", "text"])
def test_a_lora_holds_the_rows_that_count(model, storage):
    """By the formula: the sum over the rows of a memory, each times the weight of the sentence its token stands in."""
    document = Document.from_text(MANUAL)
    adapter = model.adapter(model.learn(document, "manual", max_chunk_tokens=64, storage=storage).name)
    prompts = [chunk.prompt for chunk in read_chunks(adapter.index)]
    chunks = range(len(prompts))
    weights = {i: [0.25 * (s % 3) for s in range(len(sentence_spans(prompts[i])))] for i in chunks}
    found = adapter.lora(None, weights, dense=False)
    rows = adapter.rows(list(chunks))
    a, b, owners = (rows[f"o_proj{suffix}"] for suffix in (".a", ".b", SENTENCE))
    assert b.shape[1] == 1 and a.shape[1] == 2
    row_weights = torch.tensor([[weights[i][s] if s >= 0 else 0.0 for s in owners[i].tolist()] for i in chunks])
    assert 0 < (row_weights > 0).sum() < row_weights.numel()
    weighed = b[:, 0] * row_weights[..., None].to(b)
    for module, name in enumerate(m.name for m in adapter.manifest.target.of_kind("o_proj")):
        keys = a[:, module]
        expected = torch.einsum("cro,cri->oi", weighed.float(), keys.float())
        torch.testing.assert_close(found.delta(name).float(), expected, atol=2e-2 * expected.abs().max().item(), rtol=0)
        assert found.factors[name].rank == min(64, row_weights.numel())
    setup = DocumentSetup(model, RoutedConfig(chunk_tokens=64), storage=storage)
    in_evaluation = setup.keep(document).adapter.lora(None, weights)
    for name in found.names:
        torch.testing.assert_close(in_evaluation.delta(name), found.delta(name), rtol=2e-2, atol=2e-2)


def test_rows_that_are_cast_anew_belong_to_the_sentences_of_the_index(model, monkeypatch):
    """Which an earlier version may have split otherwise."""

    def halves(text, rows=()):
        return [(0, len(text) // 2), (len(text) // 2, len(text))]

    monkeypatch.setattr("loracast.documents.chunks.sentence_spans", halves)
    document = Document.from_text(MANUAL)
    adapter = model.adapter(model.learn(document, "manual", max_chunk_tokens=64, storage="text").name)
    prompts = [chunk.prompt for chunk in read_chunks(adapter.index)]
    owners = adapter.rows(list(range(len(prompts))))[f"o_proj{SENTENCE}"]
    assert len(prompts) > 1 and set(owners[owners >= 0].tolist()) == {0, 1}
    expected = CachedRecast(model.documents, model.base)(prompts, [halves(prompt) for prompt in prompts])
    assert torch.equal(owners, expected[f"o_proj{SENTENCE}"])


def test_rows_belong_to_the_sentence_of_their_token(model):
    """Each row of B is the value of a token of its sentence."""
    gate = model.documents.hypernetwork.memory.gate
    gate.weight.data[1:], gate.bias.data[1:] = 0, -60  # a row is its token's value alone
    adapter = model.learn(Document.from_text(MANUAL), "manual", max_chunk_tokens=64, storage="bf16")
    base = model.base
    weight = base.model.lm_head.weight.float()
    values = torch.nn.functional.normalize((weight - weight.mean(0)) * base.model.model.norm.weight, dim=-1)
    prompts = [chunk.prompt for chunk in read_chunks(adapter.index)]
    rows = adapter.rows(list(range(len(prompts))))
    seen = 0
    for prompt, b, owners in zip(prompts, rows["o_proj.b"][:, 0], rows[f"o_proj{SENTENCE}"], strict=True):
        ids, offsets = encode_with_offsets(base.tokenizer, prompt)
        in_sentence = token_sentences(sentence_spans(prompt), offsets)
        for row, owner in zip(b.float(), owners.tolist(), strict=True):
            if owner >= 0 and row.norm() > 1e-3:
                directions = [values[i] for i, s in zip(ids, in_sentence, strict=True) if s == owner]
                assert torch.cosine_similarity(row, torch.stack(directions)).max() > 0.99
                seen += 1
    assert seen >= RANK


def test_training_weighs_rows_as_asking_does(model):
    """Questions that share one row of a batch are scored as each would be alone, with its own LoRA by sentence."""
    base, hypernet = model.base, model.documents.hypernetwork
    prompts = [MANUAL[:120], "The Trask drill weighs 7 kg. It is yellow and it is old. Mr. Brown has it."]
    encoded = [encode_with_offsets(base.tokenizer, prompt) for prompt in prompts]
    asked = ["How heavy is the drill?", "How heavy is the kettle?", "Who is Brown?", "What is it about?"]
    weights = weights_of(prompts, asked)
    assert [bool(some) for some in weights] == [True, True, True, False]
    questions = [
        Question(tuple(encode_with_offsets(base.tokenizer, text)[0]), tuple(range(5, 8)), sentence_weights=some)
        for text, some in zip(asked, weights, strict=True)
    ]
    owners, n = [], 0
    for prompt, (_, offsets) in zip(prompts, encoded, strict=True):
        spans = sentence_spans(prompt)
        owners.append(tuple(n + i for i in token_sentences(spans, offsets)))
        n += len(spans)
    episode = Episode(tuple(tuple(ids) for ids, _ in encoded), tuple(questions), token_sentences=tuple(owners))
    batch = pack([episode], base.pad_id)
    encoder = hypernet.hidden_states_encoder(base)
    # Of one chunk, since in training keys are decorrelated once for all questions.
    single = pack([Episode(episode.chunks[:1], episode.questions[1:2], token_sentences=episode.token_sentences[:1])], 0)
    with torch.no_grad():
        together, _, _ = answer_questions(base.model, encoder, hypernet, batch)
        merged, _, _ = answer_questions(base.model, encoder, hypernet, pack([episode.merged()], base.pad_id))
        alone, _, _ = answer_questions(base.model, encoder, hypernet, single)
        rows, tokens = hypernet.cast(encoder(single.chunk_ids, single.chunk_mask))
        of_rows = torch.tensor([weights[1][owners[0][token]] for token in tokens["o_proj"][0].tolist()])
        a, b = rows["o_proj"]
        rows["o_proj"] = a[:, :, : len(of_rows)], b[:, :, : len(of_rows)] * of_rows[:, None]
        expected = score_answers(base.model, hypernet.loras(rows), single)
    torch.testing.assert_close(alone.by_question, expected.by_question, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together.by_question[:3], merged.by_question[:3], atol=1e-4)
    torch.testing.assert_close(together.by_question[3], merged.by_question[3])


def test_one_lora_serves_a_fixed_set_of_questions(model, tmp_path):
    """Of one question it is what asking uses; of several, every row has its highest weight. Exported, it is the same."""
    adapter = model.learn(Document.from_text(MANUAL * 3), "manual", max_chunk_tokens=64, storage="bf16")
    index, n = adapter.index, adapter.manifest.n_chunks
    asked = ["How heavy is the kettle?", "When is the green bin emptied?"]
    routes = [route_document(index, question) for question in asked]
    alone = route_set(index, n, asked[:1])
    assert alone.chunk_weights == routes[0].chunk_weights and alone.sentence_weights == routes[0].sentence_weights
    together = route_set(index, n, asked)
    for chunk, weights in together.sentence_weights.items():
        given = [route.sentence_weights[chunk] for route in routes if chunk in route.chunk_weights]
        assert list(weights) == [max(column) for column in zip(*given, strict=True)]
    assert together.chunk_weights.keys() == routes[0].chunk_weights.keys() | routes[1].chunk_weights.keys()
    assert route_set(index, n, ["What is it about?", *asked]).chunks is None
    (made,) = export_adapter(adapter, "peft", tmp_path / "out", questions=asked)
    written = LoRA(read_peft(made.path, linear_shapes(model.base.model)))
    expected = adapter.lora(together.chunk_weights, together.sentence_weights, dense=False).to(dtype=torch.float32)
    for name in expected.names:
        torch.testing.assert_close(written.delta(name).float(), expected.delta(name), rtol=1e-2, atol=1e-2)
    with pytest.raises(AdapterError, match="leave out --questions"):
        export_adapter(adapter, "peft", tmp_path / "no", questions=asked, each_chunk=True)


def test_a_question_that_matches_nothing_may_have_more_sentences_than_any_that_is_weighed():
    """Two documents of two rows: the first's question weighs two sentences, the second's none of its five."""
    batch = SimpleNamespace(
        chunks_per_document=1,
        token_sentences=torch.tensor([[0, 1, 1], [0, 4, 3]]),
        is_routed=torch.tensor([True, False]),
        answer_question=torch.tensor([0, 1]),
        answer_rows=torch.tensor([0, 1]),
        sentence_weights=torch.tensor([[0.25, 1.0], [0.0, 0.0]]),
        token_question=torch.tensor([[-1, 0], [-1, 1]]),
    )
    gates = sentence_gates(torch.tensor([[0, 2], [1, 2]]), batch, 2)
    torch.testing.assert_close(gates, torch.tensor([[[0.25, 1.0]] * 2, [[1.0, 1.0]] * 2]))
