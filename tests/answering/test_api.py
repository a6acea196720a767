"""The public Python API, compared with PEFT's forward, transformers' own generate, and one question after the other."""

from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import loracast
from loracast.base.chat import encode_text
from loracast.base.generate import Answer
from loracast.errors import AdapterError, BaseModelError, ConfigError, DocumentError, LoracastError
from loracast.lora.merge import Merging
from tiny import PROSE, drained, make_model, make_tokenizer

NOTE = "# Lantern\n\nThe access number of the amber lantern is 5283. Nobody knew who had built the old bridge.\n"
QUESTIONS = [
    "What is the access number of the amber lantern?", "How long is the warranty?", "Who built the old bridge?",
    "When does the museum open?",
]  # fmt: skip
ALWAYS = {"sampling": loracast.Sampling(max_new_tokens=8), "always": True}  # also where a question is about no document
IDS = torch.randint(3, 600, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def note() -> loracast.Document:
    return loracast.Document.from_text(NOTE)


@pytest.fixture
def learned(model):
    """The model with three documents in its library."""
    texts = {"note": NOTE, "manual": "# Manual\n\n" + PROSE * 2, "house": "# House\n\nThe museum opens at nine. " * 3}
    model.learn([loracast.Document.from_text(text) for text in texts.values()], list(texts), max_chunk_tokens=60)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def generated(base, prompt: list[int], **options) -> str:
    """What transformers' own generate says, without loracast's generation."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = base.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, eos_token_id=list(base.end_ids),
            **{"do_sample": False, "max_new_tokens": 8, **options},
        )  # fmt: skip
    return base.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip()


# ---- loading


def test_a_model_of_transformers_is_used_as_it_is(tiny_hypernet_folder, tmp_path, note):
    mine = make_model().train().requires_grad_(True)
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    model = loracast.load(model=mine, tokenizer=make_tokenizer(), hypernetwork=tiny_hypernet_folder, library=tmp_path)
    assert model.base.model is mine and not mine.training and not any(p.requires_grad for p in mine.parameters())
    adapter = model.learn(note, "note", storage="bf16")
    said = model.ask(QUESTIONS[0], adapter, **ALWAYS, route=None)
    with adapter.lora().applied(mine):
        assert said == generated(model.base, model.base.chat.prompt(QUESTIONS[0], ""))
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())


def test_options_that_a_loaded_model_cannot_take_are_refused(tiny_folder):
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        loracast.load(model=make_model())
    with pytest.raises(ConfigError, match="dtype, revision: the model is loaded already"):
        loracast.load(model=make_model(), tokenizer=make_tokenizer(), dtype="float32", revision="main")
    with pytest.raises(ConfigError, match="give one of them"):
        loracast.load(tiny_folder, device="cpu", device_map="cpu")
    with pytest.raises(ConfigError, match="no revision 'v1'"):
        loracast.load(tiny_folder, revision="v1")
    with pytest.raises(ConfigError, match="'int8' is no type"):
        loracast.load_base(tiny_folder, dtype="int8")


def test_device_map_and_dtype_reach_transformers(tiny_folder):
    for device_map in ("cpu", {"model": "cpu", "lm_head": "cpu"}):
        base = loracast.load_base(tiny_folder, device_map=device_map, dtype=torch.float16)
        assert base.model.dtype == torch.float16
        torch.testing.assert_close(base.model.lm_head.weight, make_model().lm_head.weight.half())
    with pytest.raises(BaseModelError, match="offloaded"):
        loracast.load_base(tiny_folder, device_map={"model": "cpu", "lm_head": "meta"})


def test_a_base_whose_parts_are_on_disk_is_refused(tiny_folder):
    mine = make_model()
    mine.model.layers[1].to("meta")
    with pytest.raises(BaseModelError, match="offloaded"):
        loracast.load_base(mine, tokenizer=make_tokenizer())


# ---- casting and learning


def test_cast_gives_what_learn_keeps_and_keeps_nothing(model, note, tmp_path):
    lora = model.cast(note)
    assert not model.library.folder.exists()
    kept = model.learn(note, storage="bf16")
    assert kept.name == "lantern" and kept.manifest.title == "Lantern"
    for name in kept.lora().names:
        assert torch.equal(lora.delta(name), kept.lora().delta(name))
    (tmp_path / "note.md").write_text(NOTE)
    for same in (tmp_path / "note.md", str(tmp_path / "note.md"), io.BytesIO(NOTE.encode())):
        assert torch.equal(model.cast(same).delta(name), lora.delta(name))


def test_a_long_document_is_cast_into_the_sum_of_its_chunks(model):
    """The tiny hypernetwork has no memory, so the LoRA is the plain sum of what it casts of each chunk."""
    from loracast.cast.document import split_document

    document = loracast.Document.from_text(PROSE * 2)
    lora, caster = model.cast(document, max_chunk_tokens=40), model.documents
    assert caster.hypernetwork.merging == Merging()
    chunks = split_document(model.base, document, 40)
    ids = [model.base.tokenizer(chunk.prompt, add_special_tokens=False)["input_ids"] for chunk in chunks]
    with torch.no_grad():
        each = [caster.hypernetwork.loras(caster.hypernetwork.cast(caster.encode([row])).rows).row(0) for row in ids]
    assert len(each) > 3
    for name in lora.names:
        expected = sum(one.delta(name) for one in each)
        torch.testing.assert_close(lora.delta(name).float(), expected, atol=0.02 * expected.abs().max(), rtol=0.02)


def test_lists_of_documents(model, tmp_path):
    (tmp_path / "b.txt").write_text(PROSE)
    sources = [loracast.Document.from_text(NOTE), tmp_path / "b.txt"]
    assert [adapter.name for adapter in model.learn(sources)] == ["lantern", "b"]
    assert [adapter.name for adapter in model.learn(sources, ["x", "y"])] == ["x", "y"]
    for lora, one in zip(model.cast(sources), sources, strict=True):
        alone = model.cast(one)
        assert all(torch.equal(lora.delta(name), alone.delta(name)) for name in alone.names)
    with pytest.raises(AdapterError, match="1 names for 2 documents"):
        model.learn(sources, ["one"])
    with pytest.raises(DocumentError, match="does not exist"):
        model.learn([loracast.Document.from_text("A new one."), tmp_path / "gone.txt"], ["new", "gone"])
    with pytest.raises(AdapterError, match="no adapter is called 'new'"):
        model.adapter("new")


def test_a_text_is_not_taken_for_a_path(model):
    with pytest.raises(DocumentError, match=r"Document\.from_text"):
        model.cast(NOTE)
    with pytest.raises(DocumentError, match=r"Document\.from_text"):
        model.cast("One long line. " * 20)
    with pytest.raises(DocumentError, match="only white space"):
        loracast.Document.from_text(" \n")


# ---- LoRAs and PEFT


def test_a_lora_in_peft_gives_the_logits_of_merged_weights(model, note, tmp_path):
    lora = model.cast(note).to(dtype=torch.float32)
    merged = make_model()
    for name in lora.names:
        merged.get_submodule(name).weight.data += lora.delta(name)
    expected, plain = logits(merged), logits(make_model())
    assert (expected - plain).abs().max() > 0.1

    mine = make_model()
    with lora.applied(mine) as same:
        torch.testing.assert_close(logits(same), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(mine), plain)

    wrapped = lora.to_peft(make_model(), "note")
    assert type(wrapped).__name__ == "PeftModel" and wrapped.active_adapter == "note"
    torch.testing.assert_close(logits(wrapped), expected, atol=1e-4, rtol=1e-4)
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits(wrapped), plain)
    assert lora.scale(2).to_peft(wrapped, "twice") is wrapped
    torch.testing.assert_close(logits(wrapped), expected, atol=1e-4, rtol=1e-4)
    wrapped.set_adapter("twice")
    assert (logits(wrapped) - expected).abs().max() > 0.1
    torch.testing.assert_close(logits(wrapped.unload()), plain)

    from peft import PeftModel

    assert lora.save_pretrained(tmp_path / "peft", "tiny") == tmp_path / "peft"
    loaded = PeftModel.from_pretrained(make_model(), str(tmp_path / "peft"))
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)
    again = loracast.LoRA.from_pretrained(tmp_path / "peft")
    for name in lora.names:
        torch.testing.assert_close(again.delta(name), lora.delta(name))


def test_what_peft_trained_is_read(tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    wrapped = get_peft_model(make_model(), LoraConfig(r=3, lora_alpha=7, target_modules=["v_proj", "up_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    wrapped.save_pretrained(str(tmp_path))
    mine = make_model()
    with loracast.LoRA.from_pretrained(tmp_path).applied(mine):
        torch.testing.assert_close(logits(mine), logits(wrapped), atol=1e-4, rtol=1e-4)


def test_a_lora_that_does_not_fit_leaves_the_model_alone(model, note, tmp_path):
    other = make_model("qwen3")
    other.model.layers[1].mlp.down_proj = torch.nn.Linear(96, 40, bias=False)
    with pytest.raises(AdapterError, match="does not fit this base"):
        model.cast(note).to_peft(other)
    assert not any("lora" in name for name, _ in other.named_modules())
    with pytest.raises(AdapterError, match="no adapter in PEFT's format at"):
        loracast.LoRA.from_pretrained("nobody/nothing")
    with pytest.raises(AdapterError, match="cannot be read"):
        loracast.LoRA.from_pretrained(tmp_path)


# ---- asking


def test_a_batch_answers_as_one_question_after_the_other(learned, note):
    chosen = ["note", ["manual", "house"], learned.cast(note), ()]
    assert learned.ask(QUESTIONS, chosen, **ALWAYS) == [
        learned.ask(*pair, **ALWAYS) for pair in zip(QUESTIONS, chosen, strict=True)
    ]
    answers = learned.answer(QUESTIONS, "manual", **ALWAYS)
    for one, question in zip(answers, QUESTIONS, strict=True):
        alone = learned.answer(question, "manual", **ALWAYS)
        assert (one.text, one.sources, one.n_prompt_tokens, one.n_tokens, one.finished) == (
            alone.text, alone.sources, alone.n_prompt_tokens, alone.n_tokens, alone.finished
        )  # fmt: skip
        assert 0 < one.first_token_s <= one.total_s
    assert len({one.text for one in learned.answer([QUESTIONS[0]] * 3, ["note", "manual", ()], **ALWAYS)}) == 3
    assert learned.ask([]) == []
    with pytest.raises(AdapterError, match="2 adapters for 4 questions"):
        learned.ask(QUESTIONS, ["note", "manual"])
    with pytest.raises(AdapterError, match="a LoRA answers alone"):
        learned.ask(QUESTIONS[0], [learned.cast(note), "manual"])


def test_an_answer_names_the_chunks_that_were_used(learned):
    answer = learned.answer("What is the access number of the amber lantern?", "note", **ALWAYS)
    (source,) = answer.sources
    assert (source.adapter, source.heading) == ("note", "Lantern") and "5283" in NOTE[source.start : source.end]


def test_a_stream_gives_the_pieces_of_the_answer(learned):
    long = loracast.Sampling(max_new_tokens=30, min_new_tokens=30)
    pieces, answer = drained(learned.stream(QUESTIONS[0], "note", sampling=long))
    assert len(pieces) > 5 and "".join(pieces).strip() == answer.text == learned.ask(
        QUESTIONS[0], "note", sampling=long
    )
    assert isinstance(answer, Answer) and answer.sources[0].adapter == "note"
    with pytest.raises(BaseModelError, match="window"):
        list(learned.stream(QUESTIONS[0], sampling=loracast.Sampling(max_new_tokens=10_000)))
    applied = learned.cast(loracast.Document.from_text(NOTE)).applied(learned.base.model)
    with applied, pytest.raises(LoracastError, match="applies a LoRA"):
        list(learned.stream(QUESTIONS[0]))


def test_leaving_a_stream_stops_the_generation(learned, monkeypatch):
    n_forwards, forward, n_threads = 0, learned.base.model.forward, threading.active_count()
    before = _hooks(learned.base.model)  # transformers' own stay, once hidden states were asked for

    def counting(*args, **options):
        nonlocal n_forwards
        n_forwards += 1
        return forward(*args, **options)

    monkeypatch.setattr(learned.base.model, "forward", counting)
    for _ in learned.stream(QUESTIONS[0], "note", sampling=loracast.Sampling(max_new_tokens=400, min_new_tokens=400)):
        break
    assert 0 < n_forwards < 300 and threading.active_count() <= n_threads + 1
    assert _hooks(learned.base.model) == before


def _hooks(model) -> list[list[int]]:
    return [list(module._forward_hooks) for module in model.modules()]


@pytest.mark.usefixtures("no_copying")
def test_messages_of_a_chat(learned):
    """The prompt is the template's, and a short question is routed with the ones before it."""
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is made in the north?"},
        {"role": "assistant", "content": "The lamp."},
        {"role": "user", "content": "And what else?"},
    ]
    answer = learned.answer(chat, "manual", **ALWAYS)
    theirs = learned.base.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert answer.n_prompt_tokens == len(theirs)
    lora, _ = learned.lora_for("What is made in the north? And what else?", "manual", always=True)
    with lora.applied(learned.base.model):
        assert answer.text == generated(learned.base, theirs)
    assert learned.ask([chat, chat[:2]], "manual", **ALWAYS) == [
        answer.text, learned.ask(chat[:2], "manual", **ALWAYS)
    ]  # fmt: skip
    assert learned.ask(chat[1:2], "note", **ALWAYS) == learned.ask(chat[1]["content"], "note", **ALWAYS)
    with pytest.raises(ConfigError, match="must be the user's"):
        learned.ask(chat[:3], "manual")


@pytest.mark.parametrize(
    ("sampling", "options"),
    [
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 1}),
        (
            {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "seed": 4},
            {"do_sample": True, "temperature": 1.5, "top_k": 5, "top_p": 0.9},
        ),
    ],
)
def test_sampling_is_that_of_generate(learned, sampling, options):
    said = learned.ask(QUESTIONS[0], sampling=loracast.Sampling(max_new_tokens=20, **sampling))
    torch.manual_seed(4)
    assert said == generated(learned.base, learned.base.chat.prompt(QUESTIONS[0], ""), max_new_tokens=20, **options)
    assert said != learned.ask(QUESTIONS[0], sampling=loracast.Sampling(max_new_tokens=20))


def test_unknown_options_are_refused(learned):
    with pytest.raises(TypeError, match="temprature"):
        learned.ask(QUESTIONS[0], temprature=1)
    with pytest.raises(TypeError, match="chunk_tokens"):
        learned.learn(loracast.Document.from_text(NOTE), "x", chunk_tokens=3)


# ---- threads


def test_threads_get_the_answers_that_they_would_get_alone(learned, tiny_hypernet_folder):
    """Two models on one base, each with two threads that ask, cast and learn at the same time."""
    beside = loracast.load(
        learned.base.model, tiny_hypernet_folder, tokenizer=learned.base.tokenizer, library=learned.library
    )
    chosen = ["note", "manual", "house", ()]
    expected = [learned.ask(QUESTIONS[0], one, **ALWAYS) for one in chosen]
    assert len(set(expected)) == 4
    document = loracast.Document.from_text(PROSE * 2)
    lora = learned.cast(document, max_chunk_tokens=40)
    start = threading.Barrier(4)

    def ask(number: int) -> list[str]:
        model = (learned, beside)[number % 2]
        start.wait(30)
        said = [model.ask(QUESTIONS[0], chosen[number], **ALWAYS) for _ in range(4)]
        return [*said, "".join(model.stream(QUESTIONS[0], chosen[number], **ALWAYS)).strip()]

    def cast(number: int):
        start.wait(30)
        loras = [(learned, beside)[number % 2].cast(document, max_chunk_tokens=40) for _ in range(3)]
        return loras, learned.learn(document, f"again-{number}", max_chunk_tokens=40, storage="bf16").lora()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [[text] * 5 for text in expected]
        asked, casts = [pool.submit(ask, i) for i in (0, 1)], [pool.submit(cast, i) for i in (0, 1)]
        assert [one.result() for one in asked] == [[text] * 5 for text in expected[:2]]
        for loras, kept in (one.result() for one in casts):
            for name in lora.names:
                assert all(torch.equal(one.delta(name), lora.delta(name)) for one in (*loras, kept))


def test_threads_encode_as_one_after_the_other(base):
    """A tokenizer keeps as state whether control tokens are split; a template and a text want it in other ways."""
    text = "The lamp <|im_end|> was made in the north. " * 3
    expected = base.chat.prompt("Who?"), encode_text(base.tokenizer, text)

    def encode(number: int) -> bool:
        made = base.chat.prompt("Who?") if number % 2 == 0 else encode_text(base.tokenizer, text)
        return made == expected[number % 2]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(encode, range(2000)))


def test_the_package_says_that_it_is_typed():
    """What its types say is in typed_api.py, for mypy."""
    assert (Path(loracast.__file__).parent / "py.typed").is_file()
