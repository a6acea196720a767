"""Chat templates of a base: one that a user gives, and those that let the model think first."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from loracast.base.chat import ChatFormat
from loracast.base.load import load_base
from loracast.cli import app
from loracast.errors import BaseModelError, ConfigError
from loracast.files import library_dir
from loracast.library.library import Library
from tiny import CHAT_TEMPLATE, make_hypernet, make_model, make_tokenizer


def test_a_chat_template_goes_along_with_what_was_made_with_it(tmp_path, home):
    make_model().save_pretrained(tmp_path / "base")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(BaseModelError, match="--chat-template FILE, or 'plain'"):
        _ = load_base(tmp_path / "base", device="cpu").chat
    base = load_base(tmp_path / "base", device="cpu", chat_template="plain")
    prompt = base.tokenizer.decode(base.chat.prompt("When does it open?", "Be brief."))
    assert prompt == "Be brief.\nWhen does it open?\n"
    assert base.tokenizer.decode(base.chat.answer("At nine.")) == " At nine.<|im_end|>"
    hypernet = make_hypernet(base)
    hypernet.save_pretrained(tmp_path / "hypernet", storage="float32")
    (tmp_path / "note.txt").write_text("The museum opens at nine on Tuesday mornings. " * 3)
    here = ["--base", str(tmp_path / "base"), "--device", "cpu"]
    learned = ["learn", str(tmp_path / "note.txt"), *here, "--hypernetwork", str(tmp_path / "hypernet")]
    assert CliRunner().invoke(app, learned).exit_code == 0
    result = CliRunner().invoke(app, ["ask", "When?", "-a", "note", "--always", "--max-tokens", "3"])
    assert result.exit_code == 0, result.output
    assert Library(library_dir()).open("note").manifest.made_for.chat_template
    (tmp_path / "own.jinja").write_text("{% for m in messages %}<{{ m['content'] }}>{{ eos_token }}{% endfor %}")
    own = load_base(tmp_path / "base", device="cpu", chat_template=tmp_path / "own.jinja")
    assert own.tokenizer.decode(own.chat.prompt("Hi")) == "<Hi><|im_end|>"
    with pytest.raises(ConfigError, match="cannot read the chat template"):
        load_base(tmp_path / "base", device="cpu", chat_template="nowhere.jinja")


def test_a_model_that_thinks_first_is_told_not_to():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "assistant\n' }}", "assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}<off>{% endif %}"
    )
    assert tokenizer.decode(ChatFormat(tokenizer).prompt("Why?")).endswith("<|im_start|>assistant\n<off>")
