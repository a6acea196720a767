"""The text of adapters in the prompt: whole where it fits, without its middle where the window is full."""

from __future__ import annotations

import pytest

from loracast.documents import Document
from loracast.errors import AdapterError, BaseModelError
from loracast.serving.resolve import in_window

NOTE = "The kettle holds 1.7 litres. Its warranty is 24 months."
ASKED = [{"role": "system", "content": ""}, {"role": "user", "content": "How long is the warranty?"}]


def test_a_document_stands_whole_before_the_question(model):
    adapter = model.learn(Document.from_text(NOTE), "kettle")
    made = in_window(model.base, [adapter], ASKED, 16, 10_000)
    assert made.messages[0] == ASKED[0]
    content = made.messages[1]["content"]
    assert content.index(NOTE) < content.index("How long is the warranty?")
    assert made.n_tokens == made.n_shown == len(model.base.tokenizer(NOTE)["input_ids"])


def test_a_long_document_loses_its_middle_and_fits_with_the_answer(model):
    lines = [f"The lamp number {i} was made in the north." for i in range(200)]
    adapter = model.learn(Document.from_text("\n".join(lines)), "lamps")
    made = in_window(model.base, [adapter], ASKED, 32, 10_000)
    content = made.messages[1]["content"]
    assert made.n_shown < made.n_tokens
    assert lines[0] in content and lines[-1] in content and lines[100] not in content
    n_prompt = len(model.base.chat.conversation(made.messages))
    assert model.base.window - 64 < n_prompt + 32 <= model.base.window


def test_a_prompt_is_as_long_as_is_allowed(model):
    adapter = model.learn(Document.from_text("\n".join(f"The lamp {i} was made in the north." for i in range(99))), "l")
    made = in_window(model.base, [adapter], ASKED, 32, most=150)
    assert 110 < len(model.base.chat.conversation(made.messages)) <= 150
    with pytest.raises(BaseModelError, match=r"no room left for a text.*a prompt 20 at most"):
        in_window(model.base, [adapter], ASKED, 32, most=20)


def test_several_texts_stand_one_after_the_other(model):
    adapters = [model.learn(Document.from_text(f"The {name} is {i} metres long."), name) for i, name in enumerate("ab")]
    content = in_window(model.base, adapters, ASKED, 16, 10_000).messages[1]["content"]
    assert content.index("The a is 0") < content.index("The b is 1")


def test_a_full_window_and_what_has_no_text_are_refused(model, tmp_path):
    from loracast.library.save import save_lora

    adapter = model.learn(Document.from_text(NOTE), "kettle")
    with pytest.raises(BaseModelError, match="no room"):
        in_window(model.base, [adapter], ASKED, model.base.window, 10_000)
    fingerprint = adapter.manifest.made_for
    imported = save_lora(
        adapter.lora(), model.library, "foreign", kind="imported", title="", made_for=fingerprint, source=None
    )
    with pytest.raises(AdapterError, match="no text"):
        in_window(model.base, [imported], ASKED, 16, 10_000)
