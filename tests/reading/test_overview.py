"""Questions about a document as a whole, and the outline that answers them."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from adapters import some_chunks, write
from loracast.cli import app
from loracast.documents import Document
from loracast.library.adapter import Adapter
from loracast.reading.outline import Outline, central, overview, read_outline, wanted_of
from loracast.text import stem_words

FORMAT_1 = Path(__file__).parents[1] / "files" / "adapter-format-1" / "bf16"
GUIDE = """\
# Halden kiln

## Firing

The Halden kiln fires clay at 1,060 degrees, and a firing takes nine hours. Close the door of the kiln before each
firing. A violinist in Oslo once played for eleven people.

## Cleaning

- brush
- vacuum

Clean the kiln with a dry brush after the clay has cooled down. The kiln must be cold before anyone cleans it.
"""

# The rules were written for the first lists, and only measured on the second.
WRITTEN_FOR = {
    "about": """
        What is this document about?
        What's this about?
        what is this text about
        Summarize this document.
        Can you summarise the manual for me?
        Give me a summary of this file.
        Please give me a short overview of the document.
        What does this document cover?
        What does the document deal with?
        What is the topic of this document?
        What is the main topic of this paper?
        Tell me what this document is about.
        Could you tell me what this report is about, please?
        tl;dr
        Describe this document.
        I'd like to know what the article is about.
        What topics does this document cover?
        Summarise the text in three sentences.
        What is the main idea of the passage?
        What is in this file?
        What does this document contain?
        Give me the gist of this article.
    """,
    "sections": """
        List its sections.
        What sections does this document have?
        What are the chapters of this book?
        Show me the table of contents.
        Which headings are in this document?
        List all headings.
        How is this document structured?
        How many sections does it have?
        Give me the outline of this document.
        What are its chapters?
        What parts does the manual have?
        List the contents of this document.
        How many parts are there in the handbook?
    """,
    "title": """
        What is the title of this document?
        What is this document called?
        What's its title?
    """,
    None: """
        What is the warranty about?
        What does this document say about the warranty?
        What does section 3 of this document cover?
        Summarize the section on cleaning.
        What is the title of the king?
        How many sections does the pipe have?
        Who wrote this document?
        What is the main topic of the fourth chapter?
        What is the book about?
        What is the film about?
        Summarize the plot of the novel that she wrote.
        What does the warranty cover?
        What does this cover?
        What is this?
        How is the company structured?
        What are the parts of the machine?
        What are the parts?
        List all parts.
        How many parts are there?
        What are its contents?
        How many parts does it have?
        What is the paper for?
        What is the contract for?
        List its members.
        What is it about?
        What is the document that the king signed?
        What is the title of the first chapter?
        When was this document written?
        How long is this document?
        What is the topic of the meeting?
        What sections of the law does this document quote?
        What is this document's number?
        Describe this machine.
        Give me the summary of section 4.
        Which headings must the pilot fly?
    """,
}

MEASURED_ON = {
    "about": """
        What is the document about?
        Whats this document about
        Hi, what is this pdf about?
        Please summarize the article.
        Can you give me a brief summary of this report?
        I want a summary of the text.
        Briefly summarize this manual.
        Can you tell me what this file is about?
        What is the subject of this document?
        What does this article talk about?
        What is this paper mainly about?
        Could you describe the document for me?
        What's in the document?
        What's the gist of the text?
        Sum up this document in one sentence.
        Give an overview of this guide.
        What are the main topics of this document?
        What is this handbook for?
        TL;DR please
        In a nutshell, what is this document about?
        Which topics are covered in this document?
        What would I find in this document?
    """,
    "sections": """
        Which sections are there?
        List the sections of this document.
        What are the section headings?
        Can you list the chapters?
        Show the outline.
        What chapters does this guide have?
        What is the structure of this document?
        How is the report organised?
        How many chapters are there in this book?
        Please give me the table of contents of this manual.
    """,
    "title": """
        What is the document's title?
        What's the name of this document?
        Tell me the title of this article.
    """,
    None: """
        What is chapter two about?
        What is the dispute about?
        Summarize the user's rights.
        What does the guarantee cover?
        What does this document mention about refunds?
        Who is the author of this document?
        Does this document cover repairs?
        What is the song about?
        What is the subject of the painting?
        What is the title of his second album?
        How many chapters did the author rewrite?
        List the members of the board.
        What are the sections of the bridge made of?
        How is the army organised?
        What is the structure of the atom?
        What is the name of this river?
        Describe the route to the summit.
        What topics does the course cover?
        What was the main idea of Whitehead's book?
        What is the purpose of the treaty?
        Give a summary of the trial.
        What is the report that was published in 1998 about?
        Which file format does the device read?
        What is the file called in which the settings are kept?
        What does the letter from the bank say?
        In which document are the rules written down?
        Where can I find this document?
        What is this symbol for?
        How do I open the document?
    """,
}


@pytest.mark.parametrize("questions", [WRITTEN_FOR, MEASURED_ON])
@pytest.mark.parametrize("wanted", ["about", "sections", "title", None])
def test_questions_about_a_document_as_a_whole_are_told_apart(questions, wanted):
    asked = [line.strip() for line in questions[wanted].splitlines() if line.strip()]
    assert len(asked) >= 3 and {question: wanted_of(question) for question in asked} == dict.fromkeys(asked, wanted)


def test_a_long_question_takes_no_long_time():
    began = time.process_time()
    assert wanted_of("x" + " please" * 40_000 + " y") is None
    assert wanted_of("Please " * 10 + "summarize this document" + " please" * 10) == "about"
    assert time.process_time() - began < 0.5


def plainly(sentences: list[str], n: int) -> list[int]:
    """The rule of `central` with dense matrices."""
    words = [re.findall(r"[^\W_]+", sentence.lower()) for sentence in sentences]
    stemmed = [Counter(stem_words(of_sentence)) for of_sentence in words]
    stems = sorted(set().union(*stemmed))
    n_with = np.array([sum(stem in counts for counts in stemmed) for stem in stems])
    rarity = np.log(len(sentences) / n_with)
    matrix = np.array([[counts[stem] for stem in stems] for counts in stemmed]) * rarity
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    matrix = np.divide(matrix, lengths, out=np.zeros_like(matrix), where=lengths > 0)
    centroid = matrix.mean(0) / np.linalg.norm(matrix.mean(0))
    picked: list[int] = []
    for _ in range(n):
        penalty = (matrix @ matrix[picked].T).max(1).clip(0) if picked else 0
        gain = matrix @ centroid - 0.5 * penalty
        gain[picked] = -np.inf
        picked.append(int(gain.argmax()))
    return sorted(picked)


def test_the_summary_is_nearest_to_the_centroid_by_dense_matrices_too():
    texts = [path.read_text() for path in (Path(__file__).parents[2] / "docs").glob("*.md")]
    for text in texts:
        sentences = [one for one in re.split(r"(?<=[.!?])\s+", text) if len(one.split()) > 5][:60]
        if len(sentences) > 3:
            assert central(sentences, 3) == plainly(sentences, 3)


def test_the_summary_leaves_out_what_is_beside_the_point_and_what_is_said_twice():
    about_kilns = [
        "The kiln fires clay at a thousand degrees.",
        "Clay cools slowly inside the kiln after it has been fired.",
        "A firing of the kiln takes nine hours.",
    ]
    beside = ["A violinist in Oslo played for eleven people.", "It was the one that they had."]
    repeated = [*about_kilns[:1] * 4, *beside, *about_kilns[1:]]
    assert central([*beside, *about_kilns], 3) == [2, 3, 4]
    assert central(repeated, 3) == [0, 6, 7]
    assert central(about_kilns[:2], 3) == [0, 1] and central([], 3) == [] and central(beside[1:], 1) == [0]


def test_an_outline_is_kept_when_a_document_is_learned(model):
    adapter = model.learn(Document.from_text(GUIDE), "kiln", max_chunk_tokens=64)
    outline = read_outline(adapter.index)
    assert outline.headings == ((2, "Firing"), (2, "Cleaning"))
    sentences = [text for _, text in outline.summary]
    assert len(sentences) == 3 and all(text in " ".join(GUIDE.split()) for text in sentences)
    assert not any("violinist" in text or "brush -" in text for text in sentences)
    texts = [" ".join(chunk.split()) for (chunk,) in _texts(adapter)]
    assert all(text in texts[chunk] for chunk, text in outline.summary)


def _texts(adapter: Adapter) -> list[tuple[str]]:
    with sqlite3.connect(adapter.index) as database:
        return database.execute("SELECT text FROM chunks ORDER BY rowid").fetchall()


def test_long_outlines_show_the_higher_levels():
    headings = ((1, "one"), (2, "two"), (3, "three"), (1, "four"))
    outline = Outline(headings, ())
    assert outline.top_headings() == ["one", "two", "three", "four"]
    assert outline.top_headings(3) == ["one", "two", "four"]
    assert outline.top_headings(2) == ["one", "four"] and outline.top_headings(1) == ["one"]
    assert Outline((), ()).top_headings() == []


def test_answers_about_the_whole_come_from_the_outline(model):
    model.learn(Document.from_text(GUIDE), "kiln")
    outlined = model.answer("What is this document about?", "kiln")
    assert outlined.n_tokens == outlined.n_prompt_tokens == 0  # no model was asked
    (source,) = outlined.sources
    assert (source.adapter, source.title, source.chunk) == ("kiln", "Halden kiln", None)
    assert str(source) == "kiln: Halden kiln" and (source.start, source.end) == (0, len(GUIDE.strip()))
    assert outlined.text.startswith("Halden kiln\nSections: Firing; Cleaning.\nIn its own words: ")
    assert "Close the door of the kiln before each firing." in outlined.text and outlined.text.endswith(
        "no model was asked.)"
    )
    assert model.ask("List its sections.", "kiln") == (
        "Halden kiln\nSections: Firing; Cleaning.\n"
        "(The headings of kiln, stored when it was learned; no model was asked.)"
    )
    assert model.ask("What is the title of this document?", "kiln").startswith("Halden kiln\n(The title of kiln")
    assert "".join(model.stream("What is this document about?", ["kiln"])) == outlined.text
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello."}]
    assert model.ask([*turns, {"role": "user", "content": "tl;dr"}], "kiln") == outlined.text


def test_other_questions_of_a_batch_are_for_the_model(model):
    model.learn(Document.from_text(GUIDE), "kiln")
    questions = ["How long does a firing of clay take?", "List its sections.", "At how many degrees is clay fired?"]
    first, outlined, last = model.answer(questions, "kiln")
    assert outlined.n_tokens == 0 and "Firing; Cleaning" in outlined.text
    assert first.n_tokens > 0 and last.n_tokens > 0
    assert [first.text, last.text] == model.ask([questions[0], questions[2]], "kiln")


def test_only_named_documents_have_an_outline(model, tmp_path):
    kiln = model.learn(Document.from_text(GUIDE), "kiln")
    task = write(model.library, 1, name="task", kind="task", chunks=some_chunks(1))
    assert overview("What is this document about?", [], model.adapter) is None
    assert overview("What is this document about?", ["*", task], model.adapter) is None
    assert overview("What is it that fires clay?", [kiln], model.adapter) is None
    both = overview("What is this document about?", [kiln, "kiln"], model.adapter)
    assert both.text.count("Halden kiln\n") == 2


def test_an_adapter_of_an_older_version_says_that_it_has_no_outline(tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(FORMAT_1, folder)
    old = Adapter(folder)
    assert read_outline(old.index) is None
    outlined = overview("What is this document about?", [old], lambda name: old)
    assert outlined.text.startswith(f"{old.name} keeps no outline, since an older version") and outlined.sources == ()


def test_the_command_line_answers_from_the_outline(model, tiny_folder, tmp_path):
    model.learn(Document.from_text(GUIDE), "kiln")
    at = ("--library", str(model.library))
    to_ask = ("-a", "kiln", *at, "--base", str(tiny_folder), "--device", "cpu")

    def run(*arguments: str, **options) -> str:
        result = CliRunner().invoke(app, [*arguments], **options)
        assert result.exit_code == 0, result.output
        return result.stdout

    sections = model.ask("List its sections.", "kiln")
    assert run("ask", "List its sections.", *to_ask) == f"{sections}\n"
    facts = json.loads(run("ask", "List its sections.", "--json", *to_ask))
    assert facts["answer"] == sections and [one["adapter"] for one in facts["sources"]] == ["kiln"]
    asked = json.loads(run("ask", "How hot is the kiln?", "--json", "--max-tokens", "2", *to_ask))
    assert facts.keys() == asked.keys() and facts["finished"] and facts["n_tokens"] == 0
    assert run("chat", *to_ask, input="List its sections.\n") == f"{sections}\n"
    shown = run("show", "kiln", *at)
    assert re.search(r"title +Halden kiln *\n", shown) and re.search(r"sections +Firing; Cleaning *\n", shown)
    summary = read_outline(model.adapter("kiln").index).summary
    assert all(text[:40] in " ".join(shown.split()) for _, text in summary)
    assert json.loads(run("show", "kiln", "--json", *at))["outline"]["headings"] == [[2, "Firing"], [2, "Cleaning"]]


def test_show_says_that_an_older_adapter_has_no_outline(tmp_path):
    library = tmp_path / "library"
    shutil.copytree(FORMAT_1, library / "old")
    name = Adapter(library / "old").name
    assert (
        "none: an older version made the adapter"
        in CliRunner().invoke(app, ["show", name, "--library", str(library)]).stdout
    )
