"""Asking the whole library: which documents a question finds, and what it is answered with."""

from __future__ import annotations

import json
import shutil
import sqlite3
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import loracast
from loracast.cli import app
from loracast.cli.client import Client
from loracast.cli.options import Answering
from loracast.documents import Document
from loracast.errors import AdapterError, ConfigError
from loracast.library.index import read_chunks
from loracast.library.library import Library
from loracast.library.register import Match
from loracast.library.save import save_lora
from loracast.lora.algebra import LoRA, concat
from loracast.reading.matching import Candidate, Route
from loracast.reading.routing import route_adapter, routing_key, share_out, sources, weigh_documents
from loracast.reading.search import phrases

TEXTS = {
    "manual-kettle": (
        "# The kettle\n\nIt holds 1.7 litres of water and weighs 900 grams.\n\n"
        "## Warranty\n\nThe warranty of the kettle is 24 months. Scale is removed with vinegar."
    ),
    "manual-lamp": (
        "# The lamp\n\nThe lamp on the desk was made in the north. Its bulb has 40 watts.\n\n"
        "## Warranty\n\nThe warranty of the lamp is 36 months. The shade is washed by hand."
    ),
    "museum": "# The museum\n\nThe museum opens at nine on Tuesday mornings. Nobody knew who had built the old bridge.",
}


def make_library(base: Path, hypernetwork: Path, folder: Path):
    """A model with a library of three documents, two of them manuals, one tagged, and a task."""
    model = loracast.load(base, hypernetwork, library=folder, device="cpu")
    model.base.model.generation_config.eos_token_id = [2, *range(20, 600, 20)]  # or random answers seldom end
    for name, text in TEXTS.items():
        write(model, name, text)
    Library(folder).describe("museum", tags=["town"])
    lora = model.adapter("museum").lora()
    save_lora(
        lora, Library(folder), "shout", kind="task", title="Shout of the museum.", made_for=model.base.fingerprint
    )
    return model


def write(model, name, text, **options):
    (path := model.library.folder.parent / f"{name}.md").write_text(text)
    return model.learn(path, name, max_chunk_tokens=40, **options)


@pytest.fixture(scope="module")
def asked(tiny_folder, tiny_hypernet_folder, tmp_path_factory):
    """A library that no test changes."""
    return make_library(tiny_folder, tiny_hypernet_folder, tmp_path_factory.mktemp("asked") / "library")


@pytest.fixture
def changing(tiny_folder, tiny_hypernet_folder, tmp_path):
    return make_library(tiny_folder, tiny_hypernet_folder, tmp_path / "library")


def found(model, question, chosen="*", **options):
    """What a question gets of each adapter, by name."""
    return {adapter.name: route for adapter, route in model.lora_for(question, chosen, **options)[1]}


def assert_same(one, other):
    assert one.names == other.names
    for name in other.names:
        torch.testing.assert_close(one.delta(name), other.delta(name), rtol=0, atol=0)


# ---- which documents


@pytest.mark.parametrize(
    ("question", "name"),
    [
        ("How bright is the bulb?", "manual-lamp"),
        ("How much water does it hold?", "manual-kettle"),
        ("When does the museum open?", "museum"),
        ("Who built the bridges?", "museum"),
    ],
)
def test_where_only_one_document_matches_the_answer_is_that_of_naming_it(asked, question, name):
    wide, routed = asked.lora_for(question, "*")
    assert [adapter.name for adapter, _ in routed] == [name]
    assert routed[0][1] == route_adapter(asked.adapter(name), question)
    assert_same(wide, asked.lora_for(question, name)[0])


def test_documents_share_the_places_of_one_route(asked):
    question = "Is the warranty 24 months, is scale removed with vinegar, and is the shade washed by hand?"
    first, second = found(asked, question).items()
    assert [name for name, _ in (first, second)] == ["manual-kettle", "manual-lamp"]
    assert [len(route.chunks) for _, route in (first, second)] == [1, 1]
    assert first[1].weights == (1.0,) and 0 < second[1].weights[0] < 1
    lora, routed = asked.lora_for(question, "*")
    parts = [adapter.lora(route.chunk_weights, static=i == 0) for i, (adapter, route) in enumerate(routed)]
    assert_same(lora, concat(parts))


def test_a_pattern_and_a_tag_leave_other_documents_out(asked):
    question = "How many months of warranty has the museum?"
    assert found(asked, question).keys() & {"museum"}
    assert found(asked, question, "manual-*").keys() == {"manual-kettle", "manual-lamp"}
    assert found(asked, question, "m*-lamp").keys() == {"manual-lamp"}
    assert found(asked, question, ["*-lamp", "*-kettle"]).keys() == {"manual-kettle", "manual-lamp"}
    assert found(asked, question, (), tag="town").keys() == {"museum"}
    assert found(asked, "How many months of warranty?", "*", tag="town") == {}
    for chosen, tag, message in (("nothing-*", "", "nothing-*"), ((), "village", "'village'")):
        with pytest.raises(AdapterError, match=message.replace("*", r"\*")):
            asked.lora_for(question, chosen, tag=tag)
    with pytest.raises(AdapterError, match="--route 2"):
        asked.lora_for(question, "*", None)


def test_an_adapter_that_is_named_too_comes_in_once(asked):
    routed = asked.lora_for("When does the museum open, and how long is the warranty?", ["museum", "shout", "*"])[1]
    assert [adapter.name for adapter, _ in routed][:2] == ["museum", "shout"]
    assert len({adapter.version for adapter, _ in routed}) == len(routed)


def test_named_documents_take_no_place_of_the_others(asked, tiny_folder):
    question = "How many watts has the bulb of the lamp, and how long is its warranty?"
    assert [len(found(asked, question, names)) for names in ("*", ["manual-lamp", "*"])] == [1, 2]
    first, second = found(asked, question, ["manual-lamp", "*"], k=1)
    assert (first, second) == ("manual-lamp", "manual-kettle")
    shown = run(asked, tiny_folder, "ask", "How bright is the bulb?", "-a", "manual-lamp", "--all")
    assert "no document" not in shown.stderr


def test_names_and_titles_count(changing):
    """Two documents of one text: a question finds the one that it names."""
    text = "The hinge is oiled every spring.\n\n" + "Nothing else is said here. " * 12
    for name in ("door-trask", "door-quillmere"):
        write(changing, name, text + name.title()[:1])  # another letter, so that the two are not one adapter
    assert next(iter(found(changing, "When is the hinge of the Quillmere oiled?"))) == "door-quillmere"
    assert next(iter(found(changing, "When is the hinge of the Trask oiled?"))) == "door-trask"
    changing.library.rename("door-trask", "gate-osla")
    assert next(iter(found(changing, "When is the hinge of the Osla oiled?"))) == "gate-osla"
    assert found(changing, "What did the Osla's president say about Brazil?") == {}  # a name alone is not enough
    ((name, route),) = found(changing, "Osla?", always=True).items()
    assert name == "gate-osla" and route.chunks == (0, 1) and "beginning" in route.reason


def test_a_name_in_all_chunks_of_one_document_is_rare_among_documents(model):
    """BM25 over chunks would take the name for common, and "designed", which both documents have, for rare."""
    parts = (f"## Part {i}\n\nThe Trask has a part with the number {i}. Every spring it is oiled." for i in range(8))
    write(model, "drill", "# Trask\n\nThe Trask was designed by Osla.\n\n" + "\n\n".join(parts))
    write(model, "juicer", "# Halvorsen\n\nIt was designed by Mina, who also designed its box.")
    with model.library.reading() as register:
        for question, name in (("Who designed the Trask?", "drill"), ("Who designed the Halvorsen?", "juicer")):
            assert {match.name for match in register.best_chunks(phrases(question), 2)} == {name}


def test_where_nothing_matches_the_plain_base_answers(asked):
    assert asked.lora_for("Zebra crossings?", "*") == (None, [])
    assert asked.ask("Zebra crossings?", "*") == asked.ask("Zebra crossings?")


# ---- a library that changes


def test_a_document_that_was_learned_anew_is_found_by_its_new_text_alone(changing):
    write(changing, "manual-lamp", TEXTS["manual-lamp"].replace("bulb has 40", "filament has 60"), replace=True)
    assert found(changing, "How bright is the bulb?") == {}
    (name,) = found(changing, "How bright is the filament?")
    answer = changing.answer("How many watts has the filament?", "*")
    texts = [chunk.text for chunk in read_chunks(changing.adapter(name).index, [s.chunk for s in answer.sources])]
    assert "60 watts" in texts[0] and not any("40 watts" in text for text in texts)


def test_old_versions_make_a_document_no_harder_to_find(changing):
    """A name in the manual's own old versions is as rare as it was."""
    question = "How many months is the warranty of the kettle?"

    def scores() -> dict[str, float]:
        with changing.library.reading() as register:
            return {match.name: match.score for match in register.best_chunks(phrases(question), 6)}

    before = scores()
    for number in range(3):
        write(changing, "manual-kettle", f"{TEXTS['manual-kettle']} Edition {number}.", replace=True)
    write(changing, "manual-kettle", TEXTS["manual-kettle"], replace=True)
    assert scores() == pytest.approx(before, rel=0.1)
    assert max(before, key=before.get) == max(scores(), key=scores().get) == "manual-kettle"


def test_learning_a_damaged_document_again_says_how_it_is_mended(changing):
    path, folder = changing.library.folder.parent / "museum.md", changing.adapter("museum").folder
    for break_it in (lambda: (folder / "factors.safetensors").write_bytes(b"\0" * 99), lambda: shutil.rmtree(folder)):
        break_it()
        with pytest.raises(AdapterError, match=r"files are damaged: .*delete it \(`loracast rm`\), and learn"):
            changing.learn(path, "museum", max_chunk_tokens=40, replace=True)
    changing.library.remove("museum")
    again = changing.learn(path, "museum", max_chunk_tokens=40)
    assert not again.problems() and changing.answer("When does the museum open?", "museum").sources


def test_two_names_of_one_document_count_once(changing):
    changing.learn(changing.library.folder.parent / "manual-kettle.md", "manual-kettle-2", max_chunk_tokens=40)
    question = "How long is the warranty of the kettle?"
    both, routed = changing.lora_for(question, ["manual-kettle", "manual-kettle-2"])
    assert [adapter.name for adapter, _ in routed] == ["manual-kettle"]
    assert_same(both, changing.lora_for(question, "manual-kettle")[0])


def test_a_source_is_the_section_of_the_sentence_that_matches(changing):
    text = (
        "# The press\n\nIt bakes waffles.\n\n## Cleaning\n\nWipe the plates with oil.\n\n## Warranty\n\n"
        "The guarantee lasts seven years.\n\n## Spare parts\n\nKnives have the number 4417."
    )
    adapter = changing.learn(Document.from_text(text), "press", max_chunk_tokens=200)
    assert adapter.manifest.n_chunks == 1
    for question, heading in (
        ("How long is the guarantee?", "The press / Warranty"), ("Which number have knives?", "The press / Spare parts"),
        ("What are the plates wiped with?", "The press / Cleaning"), ("What does it bake?", "The press"),
    ):  # fmt: skip
        assert sources([(adapter, route_adapter(adapter, question))])[0].heading == heading


def test_a_document_that_was_removed_is_not_found_any_more(changing):
    assert found(changing, "When does the museum open?").keys() == {"museum"}
    changing.library.remove("museum")
    assert found(changing, "When does the museum open?") == {}
    assert changing.library.names() == ["manual-kettle", "manual-lamp", "shout"]
    with sqlite3.connect(changing.library.folder / "register.sqlite") as database:
        words = database.execute("SELECT name FROM name_words ORDER BY name").fetchall()
    assert words == [("manual-kettle",), ("manual-lamp",), ("shout",)]
    database.close()


def test_a_document_of_before_sentences_were_kept_takes_part_by_chunk(changing):
    index = changing.adapter("museum").index
    with sqlite3.connect(index) as database:
        for table in ("sentences", "sentence_places"):
            database.execute(f"DROP TABLE {table}")
    database.close()
    question = "When does the museum open?"
    assert found(changing, question)["museum"].sentences is None
    assert_same(changing.lora_for(question, "*")[0], changing.lora_for(question, "museum")[0])


# ---- weights


def test_a_worse_document_weighs_less_in_chunks_and_sentences(monkeypatch):
    """By BM25 to the fourth power, times the root of the odds that it answers."""
    monkeypatch.setattr("loracast.reading.routing.route_adapter", lambda one, *_: one.route)

    def document(n_chunks, *route, **about):
        return SimpleNamespace(route=Route(*route, **about), manifest=SimpleNamespace(n_chunks=n_chunks))

    copied = Candidate("two", 0.3, 2), Candidate("four", 0.2, 4)
    one = document(9, (4, 2), (1.0, 0.1), ((0.5, 1.0), (0.1, 0.0)), about=0.9, candidates=copied)
    two = document(1, None, (), ((1.0, 0.0),), about=0.5)
    three, refusing = document(5, (3,), (1.0,), about=0.001), document(3, (), about=0.1)
    matches = [Match("a", "va", 9, 4, 8.0), Match("a", "va", 9, 2, 7.5), Match("d", "vd", 3, 0, 7.5),
               Match("b", "vb", 1, 0, 7.0), Match("c", "vc", 5, 3, 4.0)]  # fmt: skip
    documents = {"a@va": one, "b@vb": two, "c@vc": three, "d@vd": refusing}
    weighed = weigh_documents(matches, "?", 3, documents.__getitem__)
    assert [found for _, found, _ in weighed] == [one, two, three]
    first, second = share_out(weighed, 3)  # c weighs less than a's second chunk, and d does not answer
    assert first == (one, one.route)
    weight = (7 / 8) ** 4 / 3
    assert second[1].chunk_weights == pytest.approx({0: weight})
    assert second[1].sentence_weights[0] == pytest.approx((weight, 0.0))
    first, second = share_out(weighed, 2)
    assert first[1].chunks == (4,) and first[1].candidates == copied[1:] and second[0] == two
    documents["b@vb"] = better = document(1, (0,), (1.0,), about=0.99)
    assert share_out(weigh_documents(matches, "?", 1, documents.__getitem__), 1) == [(better, better.route)]


# ---- where an answer comes from


def test_sources_are_the_places_in_the_text(asked):
    question = "How long is the warranty of the lamp?"
    given = asked.answer(question, "*")
    assert given.text == asked.ask(question, "*") and given.sources
    first = given.sources[0]
    assert (first.adapter, first.title, first.weight) == ("manual-lamp", "The lamp", 1.0)
    assert "36 months" in TEXTS["manual-lamp"][first.start : first.end] and "Warranty" in first.heading
    assert sources([(asked.adapter("shout"), Route()), (asked.adapter("manual-lamp"), Route())]) == ()


def run(model, base, *arguments, **options):
    where = ("--base", str(base), "--library", str(model.library), "--device", "cpu", "--max-tokens", "4")
    done = CliRunner().invoke(app, [*arguments, *where], **options)
    assert done.exit_code == 0, done.output
    return done


def test_ask_says_where_the_answer_comes_from(asked, tiny_folder):
    question = "How long is the warranty of the lamp?"
    for chosen in (["--all"], ["-a", "manual-*"], ["-a", "*"]):
        shown = run(asked, tiny_folder, "ask", question, *chosen)
        assert "(from manual-lamp, chunk 1: The lamp / Warranty)" in shown.stderr
        message = json.loads(run(asked, tiny_folder, "ask", question, *chosen, "--json").stdout)
        source = message["sources"][0]
        assert (source["adapter"], source["heading"], source["chunk"]) == ("manual-lamp", "The lamp / Warranty", 1)
        assert "36 months" in TEXTS["manual-lamp"][source["start"] : source["end"]]
        assert message["adapters"].keys() == {source["adapter"] for source in message["sources"]}
    message = json.loads(run(asked, tiny_folder, "ask", question, "--tag", "town", "--json").stdout)
    assert message["sources"] == [] and message["adapters"] == {}
    shown = run(asked, tiny_folder, "ask", "Zebra crossings?", "--all")
    assert "no document of the library matches" in shown.stderr
    assert "no document" not in run(asked, tiny_folder, "ask", question, "-a", "manual-lamp").stderr


def test_ask_refuses_a_pattern_without_documents_before_a_model_is_loaded(asked, monkeypatch):
    monkeypatch.setattr("loracast.answering.model.load", None)
    for chosen in (["-a", "x-*"], ["--tag", "x"], ["-a", "shou*"]):
        done = CliRunner().invoke(app, ["ask", "Why?", *chosen, "--library", str(asked.library)])
        assert done.exit_code == 1 and "no document" in done.stderr


def test_chat_asks_the_library_too(asked, tiny_folder):
    said = (
        "How long is the warranty of the lamp?\n/drop *\n/use museum*\nWhen does the museum open tomorrow or today?\n"
    )
    message = run(asked, tiny_folder, "chat", "--all", input=said).stderr
    assert (
        message.index("(from manual-lamp, chunk 1")
        < message.index("(using museum*)")
        < message.index("(from museum, chunk 0")
    )


def test_a_running_chat_answers_from_what_was_learned_anew(changing, tiny_folder):
    local = Client(Answering(base=str(tiny_folder), device="cpu", library=changing.library))
    before = local.open("manual-kettle")
    assert local.open("manual-kettle") is before
    after = write(changing, "manual-kettle", "# The kettle\n\nIts warranty is 60 months.", replace=True)
    assert local.open("manual-kettle").version == after.version != before.version


def test_all_documents_may_be_asked_beside_a_pattern(asked, tiny_folder):
    question = "When does the museum open tomorrow or today?"
    assert "(from museum" in run(asked, tiny_folder, "ask", question, "-a", "manual-*", "--all").stderr


# ---- questions that are about no document


def test_a_question_about_something_else_gets_nothing_of_a_document(asked):
    question = "Who wrote the play about the prince of Denmark?"
    lora, ((adapter, route),) = asked.lora_for(question, "manual-lamp")
    assert lora is None and adapter.name == "manual-lamp" and route.is_empty
    assert asked.ask(question, "manual-lamp") == asked.ask(question)
    lora, ((_, route),) = asked.lora_for(question, "manual-lamp", always=True)
    assert lora is not None and not route.is_empty and route.about is None
    both, routed = asked.lora_for("How long is the warranty of the lamp?", ["museum", "manual-lamp"])
    assert [route.is_empty for _, route in routed] == [True, False]
    assert_same(both, asked.lora_for("How long is the warranty of the lamp?", "manual-lamp")[0])
    assert {source.adapter for source in sources(routed)} == {"manual-lamp"}
    lora, _ = asked.lora_for(question, ["shout", "manual-lamp"])  # a task is always whole
    assert_same(lora, asked.lora_for(question, "shout")[0])


def test_ask_says_that_a_document_does_not_speak_of_it(asked, tiny_folder):
    question = "Who wrote the play about the prince of Denmark?"
    done = run(asked, tiny_folder, "ask", question, "-a", "manual-lamp")
    assert done.exit_code == 0 and "manual-lamp is not about this" in done.stderr and "--always" in done.stderr
    done = run(asked, tiny_folder, "ask", question, "-a", "manual-lamp", "--always")
    assert done.exit_code == 0 and "is not about this" not in done.stderr
    done = run(asked, tiny_folder, "chat", "-a", "manual-lamp", input=f"{question}\n")
    assert "manual-lamp is not about this" in done.stderr


def test_a_strict_answer_comes_from_the_documents_or_says_that_they_do_not_say(asked):
    question, about = "Who wrote the play about the prince of Denmark?", "How long is the warranty of the lamp?"
    for chosen in ("manual-lamp", ["museum", "manual-lamp"], ["shout", "manual-lamp"], "*"):
        given = asked.answer(question, chosen, strict=True)
        assert given.text == "The document does not say." and given.n_prompt_tokens == 0 and not given.sources
        assert "".join(asked.stream(question, chosen, strict=True)) == given.text
        assert asked.ask(about, chosen, strict=True) == asked.ask(about, chosen)
    assert asked.ask([question, about], "manual-lamp", strict=True) == [given.text, asked.ask(about, "manual-lamp")]
    with pytest.raises(ConfigError, match="give one of them"):
        asked.ask(about, "manual-lamp", strict=True, always=True)
    for chosen in ((), "shout", asked.lora_for(about, "manual-lamp")[0]):
        with pytest.raises(ConfigError, match="strict answer comes from documents"):
            asked.ask(about, chosen, strict=True)


def test_an_answer_says_what_gave_it(asked, tiny_folder):
    about, unrelated = "How long is the warranty of the lamp?", "Who wrote Hamlet?"
    for question, chosen, options, by in (
        (about, "manual-lamp", {}, "adapter"),
        (about, "*", {}, "adapter"),
        (about, "shout", {}, "adapter"),
        (about, (), {}, "base"),
        (unrelated, "manual-lamp", {}, "base"),
        (unrelated, ["manual-lamp", "shout"], {}, "adapter"),
        (unrelated, "manual-lamp", {"always": True}, "adapter"),
        (unrelated, "manual-lamp", {"strict": True}, "refusal"),
        ("What is this document about?", "manual-lamp", {}, "outline"),
        (about, asked.lora_for(about, "manual-lamp")[0], {}, "adapter"),
    ):
        given = asked.answer(question, chosen, **options)
        assert given.answered_by == by, (question, chosen, options)
        (of_batch,) = asked.answer([question], chosen if isinstance(chosen, LoRA) else [chosen], **options)
        assert of_batch.answered_by == by
        stream = asked.stream(question, chosen, **options)
        with pytest.raises(StopIteration) as end:
            while True:
                next(stream)
        assert end.value.value.answered_by == by
    shown = asked.answer(about, "manual-lamp")
    assert shown.n_tokens > 0 and all(source.adapter == "manual-lamp" for source in shown.sources)
    done = run(asked, tiny_folder, "ask", unrelated, "-a", "manual-lamp", "--strict", "--json")
    assert json.loads(done.stdout)["answered_by"] == "refusal"


@pytest.mark.parametrize("question", ["Do you recall the warranty of the lamp?", "How many lamps are there?"])
def test_no_rule_over_words_answers_in_the_place_of_the_model(asked, question):
    given = asked.answer(question, "manual-lamp", always=True)
    assert given.answered_by == "adapter" and given.n_prompt_tokens > 0


def test_scales_multiply_what_adapters_add_and_zero_takes_one_out(asked):
    question = "How long is the warranty of the lamp?"
    prepare = partial(asked.prepare, question, ["manual-lamp", "shout"])
    whole = prepare()
    hashes = {adapter.name: adapter.manifest.version for adapter, _ in whole.routed}
    alone = {name: asked.lora_for(question, name, always=True)[0] for name in hashes}

    lora = asked.lora_of(prepare(scales={hashes["shout"]: -0.5}).routed)
    for name in lora.names:
        wanted = sum(
            scale * alone[key].delta(name)
            for key, scale in (("manual-lamp", 1), ("shout", -0.5))
            if name in alone[key].names
        )
        torch.testing.assert_close(lora.delta(name), wanted, rtol=1e-2, atol=1e-3)
    assert_same(asked.lora_of(prepare(scales={hashes["shout"]: 0}).routed), alone["manual-lamp"])


def test_the_key_of_a_routing_names_all_that_makes_its_lora(asked):
    question, other = "How long is the warranty of the lamp?", "Who made the lamp on the desk?"
    version = asked.adapter("manual-lamp").manifest.version
    given = [
        asked.prepare(question, "manual-lamp"),
        asked.prepare(other, "manual-lamp"),
        asked.prepare(question, ["manual-lamp", "shout"]),
        asked.prepare(question, "manual-lamp", scales={version: 2}),
    ]
    keys = [routing_key(one.routed) for one in given]
    assert len(set(keys)) == len(keys)
    assert routing_key(asked.prepare(question, "manual-lamp").routed) == keys[0]
    assert routing_key(asked.prepare("Zebra crossings?", "*").routed) is None
