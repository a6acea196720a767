"""Training and evaluation of the reader: what is drawn, where answers are, the loss, and a run that learns."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from operator import add

import pytest
import torch
from torch.nn import functional

from loracast.answering.model import Model
from loracast.documents import Document
from loracast.hypernets.reader import READER_FILE, Reader, ReaderConfig
from loracast.lab.data import asked
from loracast.lab.data.asked import AskedDocument, AskedQuestion
from loracast.lab.data.rows import DocumentQuestion, QuestionedDocument
from loracast.lab.evaluation.reader import ReaderEvalConfig, evaluate_reader
from loracast.lab.training.loop import TrainConfig
from loracast.lab.training.reader import (
    Asking,
    AskingConfig,
    Episode,
    ReaderData,
    ReaderObjective,
    ReaderRecipe,
    train_reader,
    without_answer,
)
from loracast.lab.training.states import FOREIGN, NOWHERE, ReadFile
from loracast.lora.algebra import inject

TEXT = "The kettle holds two litres.\n\nIt was built in Riga by Ana Tull. The lamp needs an amber bulb."
PEOPLE = QuestionedDocument(
    "1",
    TEXT,
    (
        DocumentQuestion("How much does the kettle hold?", ("two litres",), True),
        DocumentQuestion("Who built it?", ("Ana Tull",), True),
        DocumentQuestion("Is it good?", ("Yes",), False),
    ),
    "Kettle",
    "people",
)


STAFF = QuestionedDocument(
    "2", "Ada has the room B2.\n\nBo has the room C3, and his phone is 4712.",
    (DocumentQuestion("Which room has Bo?", ("C3",), True),), "Staff", "others",
)  # fmt: skip


def read(tmp_path, base, documents, hypernetwork, foreign=("Hello!",)) -> ReadFile:
    config = ReaderConfig(base.model.config.hidden_size, base.model.config.vocab_size, 1, (2,))
    return ReadFile(tmp_path / "states.f16", base, hypernetwork, config, documents, foreign)


@pytest.fixture
def hypernetwork(model):
    return model.documents.hypernetwork


def test_answers_of_people_are_found_in_the_text():
    (text,) = asked.draw_people([PEOPLE], 0)
    assert {text.document.text[slice(*q.place)] for q in text.questions} == {"two litres", "Ana Tull"}


@pytest.mark.parametrize("kind", [*asked.KINDS, "near misses"])
def test_generated_documents_say_their_answers(kind):
    draw = partial(asked.draw_made, kind) if kind in asked.KINDS else asked.draw_near_misses
    drawn = list(draw(4, 0, "dev"))
    questions = [(one.document.text, question) for one in drawn for question in one.questions]
    assert drawn and all(len(one.questions) <= asked.MAX_QUESTIONS for one in drawn)
    assert all(text[slice(*question.place)].strip() for text, question in questions if question.place)
    assert [q.text for one in draw(4, 0, "dev") for q in one.questions] == [question.text for _, question in questions]


def test_a_swapped_name_stands_nowhere_in_the_document():
    names = ["What did Zork Bell say about 1999?"]
    other = AskedDocument("s", "1", Document.from_text("Zork Bell spoke."), (AskedQuestion(names[0], (0, 9)),))
    own = AskedDocument("s", "2", Document.from_text(TEXT), tuple(
        AskedQuestion(f"When did the town meet Ana Tull, in {year}?", (0, 3)) for year in range(1900, 1930)
    ))  # fmt: skip
    _, made = asked.with_near_misses([other, own], 0)
    swapped = [question.text for question in made.questions if question.place is None]
    assert 3 < len(swapped) < 25
    assert all("Zork Bell" in text.title() or "1999" in text for text in swapped)


def test_states_are_those_of_the_base_and_of_the_encoder(tmp_path, base, hypernetwork):
    """Of a question without the encoder LoRA, of a document with it; each read alone."""
    file = read(tmp_path, base, list(asked.draw_people([PEOPLE], 0)), hypernetwork)
    (document,) = file.documents
    for one, lora in ((document.questions[0], None), (document.chunks[0], hypernetwork.encoder_lora_batch())):
        states, embedded = file.tokens([one]).chunk(2, -1)
        ids = torch.tensor([[2, *one.ids]])
        with torch.no_grad(), inject(base.model, lora) if lora is not None else nullcontext():
            expected = base.model(ids, output_hidden_states=True).hidden_states[1][0, 1:]
        assert torch.allclose(states, expected, atol=2e-2)
        assert torch.equal(embedded, base.model.get_input_embeddings().weight[list(one.ids)])
    again = read(tmp_path, base, list(asked.draw_people([PEOPLE], 0)), hypernetwork)
    assert again.documents == file.documents


def test_the_right_unit_and_token_are_those_of_the_answer(tmp_path, base, hypernetwork):
    file = read(tmp_path, base, list(asked.draw_people([PEOPLE, STAFF], 0)), hypernetwork)
    for one in file.documents:
        for first in (0, 2):
            chunks = [*file.documents[0].chunks * first, *one.chunks]
            episode = Episode(chunks, one.questions, len(chunks) - len(one.chunks))
            tokens = [(c, i) for c in chunks for i in range(len(c.ids))]
            for question, right, token in zip(one.questions, episode.rights, episode.tokens, strict=True):
                chunk = one.chunks[question.chunk].chunk
                start, end = chunk.units[question.unit]
                assert question.answer in chunk.prompt[start:end]
                assert episode.units[token] == right
                chunk_of, at = tokens[token]
                said = base.tokenizer.decode(chunk_of.ids[at : at + 4]).strip()
                assert said.startswith(question.answer[:1])
            assert [bm25.max().item() for bm25, _ in episode.words] == [1.0] * len(one.questions)


def test_a_question_of_another_document_is_asked_only_where_its_answer_is_missing(tmp_path, base, hypernetwork):
    file = read(tmp_path, base, list(asked.draw_people([PEOPLE, STAFF], 0)), hypernetwork)
    text, staff = file.documents
    (room,) = staff.questions
    assert without_answer(room, staff.chunks) is None
    moved = without_answer(room, text.chunks)
    assert moved is not None and (moved.unit, moved.token, moved.ids) == (NOWHERE, -1, room.ids)
    of_one_source = [replace(one, source="both") for one in file.documents]
    asking = Asking(of_one_source, file.foreign, AskingConfig(p_foreign=1.0, p_group=0.0, extra=0))
    drawn = [asking.draw(random.Random(i)) for i in range(20)]
    assert all(episode.rights[-1] == FOREIGN for episode in drawn)
    assert {right for episode in drawn for right in episode.rights} >= {NOWHERE, FOREIGN}


def test_the_loss_is_the_cross_entropy_of_both_steps(tmp_path, base, hypernetwork):
    """Against each question alone, unpadded, by the calls that answer in use."""
    file = read(tmp_path, base, list(asked.draw_people([PEOPLE], 0)), hypernetwork)
    torch.manual_seed(0)
    reader = Reader(
        ReaderConfig(base.model.config.hidden_size, base.model.config.vocab_size, 1, (2,), inner=24, n_heads=2)
    ).eval()
    (document,) = file.documents
    questions = [*document.questions, *file.foreign]
    episode = Episode(document.chunks, questions)
    objective = ReaderObjective(reader, file, Asking(file.documents, [], AskingConfig()), TrainConfig())
    loss, figures = objective.loss([episode])
    text = reader.vectors(reader.standard(file.tokens(document.chunks)))
    first, second, words = [], [], []
    for i, (question, right, token) in enumerate(zip(questions, episode.rights, episode.tokens, strict=True)):
        found = reader.find(
            reader.standard(file.tokens([question])),
            torch.tensor(question.ids),
            text,
            episode.units,
            *episode.words[i],
        )
        of_words = reader.matched(
            torch.tensor(question.ids), torch.zeros(len(question.ids), 2), episode.words[i][1], torch.tensor([0])
        )
        absent = sum(reader.evidence(one[-4:]) for one in of_words)
        words.append(functional.softplus(-absent if right < 0 else absent).item())
        if right >= 0:
            asked_one = reader.question(reader.standard(file.tokens([question]))[None])
            logits = reader.first(
                reader.late(asked_one, text, episode.units, episode.n_units)[0][0], episode.words[i][0]
            )
            first.append(functional.cross_entropy(logits, torch.tensor(right)).item())
            second.append(-torch.tensor(dict(found.begins)[token]).log().item())
        else:
            second.append(-torch.tensor(found.foreign).log().item())
    assert loss.item() == pytest.approx(sum(first) / len(first) + sum(map(add, second, words)) / len(words), rel=1e-3)
    assert set(figures) == {"unit", "foreign"}


RECIPE = ReaderRecipe(
    ReaderData(made={"everyday": 4}, near_misses=0, held_out=0.3),
    AskingConfig(documents=4, questions=3, extra=1, refused=0.5),
    TrainConfig(steps=25, lr=3e-3, warmup_steps=2, log_every=5),
)


def test_a_run_learns_resumes_and_is_calibrated(tmp_path, base, hypernetwork):
    first = replace(RECIPE, training=replace(RECIPE.training, steps=25, budget_s=0.01))
    train_reader(base, first, hypernetwork, [PEOPLE], tmp_path / "out")
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    reader = train_reader(base, RECIPE, hypernetwork, [PEOPLE], tmp_path / "out", command="loracast train reader")
    figures = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(figures) > len(lines) and figures[-1]["step"] == 25
    assert figures[-1]["loss"] < 0.8 * figures[0]["loss"]
    read_again = Reader.read(tmp_path / "out" / READER_FILE)
    assert read_again.refusing == pytest.approx(reader.refusing.item(), abs=1e-2) and reader.refusing != 0


def test_the_evaluation_has_a_row_for_each_kind_of_question(tmp_path, base, model):
    torch.manual_seed(0)
    reader = Reader(
        ReaderConfig(base.model.config.hidden_size, base.model.config.vocab_size, 1, (2,), inner=24, n_heads=2)
    )
    reader.refusing.fill_(-1e9)  # all is refused that is not left to the base
    reader.save(tmp_path / READER_FILE, {})
    people = tmp_path / "people.jsonl"
    question = {"question": "How much does the kettle hold?", "answers": ["two litres"], "span": True}
    people.write_text(json.dumps({"document": TEXT, "title": "Kettle", "source": "people", "questions": [question]}))
    config = ReaderEvalConfig((str(people),), n=2, reader=str(tmp_path))
    rows = evaluate_reader(Model(base, tmp_path / "library", model.documents.hypernetwork), config, tmp_path).rows
    kinds = {(row["source"], row["kind"]): row for row in rows}
    assert {kind for _, kind in kinds} >= {"said", "not said", "small talk"}
    assert kinds["people", "said"]["bm25"] == 1.0
    for row in rows:
        assert row["refused"] + row["base"] == 1.0
        assert (row["reader"] is None) == (row["kind"] != "said")
