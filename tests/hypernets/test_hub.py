"""Hub repositories, by the hub's own client: those that lie in its cache, and those of a server in the hub's place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import close_session

import loracast
from fake_hub import running
from loracast.errors import AdapterError, BaseModelError, HypernetworkError
from loracast.hypernets.store import GENERATED
from tiny import make_hypernet, make_model, make_tokenizer

DATA = {"texts": ["prose.jsonl.gz"], "text_sources": ["squad"], "needle_kinds": ["code"], "seed": 3}
STEP = {"command": "loracast train doc recipe.toml", "data": DATA}
OTHER = {"command": "loracast train doc next.toml --init-from run", "data": {}}


def test_a_revision_of_a_base(hub, tmp_path):
    for seed, revision in enumerate(("main", "v2")):
        make_model(seed=seed).save_pretrained(tmp_path / revision)
        make_tokenizer().save_pretrained(tmp_path / revision)
        hub(tmp_path / revision, "me/tiny", revision)
    for seed, revision in ((0, None), (0, "main"), (1, "v2")):
        base = loracast.load_base("me/tiny", revision=revision, dtype="float32", device="cpu")
        assert base.name == "me/tiny" and torch.equal(base.model.lm_head.weight, make_model(seed=seed).lm_head.weight)
    with pytest.raises(BaseModelError, match="cannot load the base 'me/tiny'"):
        loracast.load_base("me/tiny", revision="v3", device="cpu")


def test_a_revision_of_a_lora_and_of_a_hypernetwork(hub, base, tmp_path):
    lora = make_hypernet(base).bind(base)
    one = lora.loras_of(lora.encode([[5, 6, 7]])).row(0)
    for strength, revision in ((1, "main"), (3, "strong")):
        one.scale(strength).save_pretrained(tmp_path / revision)
        hub(tmp_path / revision, "me/lora", revision)
        make_hypernet(base, seed=strength).save_pretrained(tmp_path / f"h-{revision}", storage="float32")
        hub(tmp_path / f"h-{revision}", "me/hypernetwork", revision)
    name = one.names[0]
    torch.testing.assert_close(loracast.LoRA.from_pretrained("me/lora").delta(name), one.delta(name))
    strong = loracast.LoRA.from_pretrained("me/lora", revision="strong")
    torch.testing.assert_close(strong.delta(name), 3 * one.delta(name))
    for seed, revision in ((1, None), (3, "strong")):
        read = loracast.Hypernetwork.from_pretrained("me/hypernetwork", revision=revision)
        assert read.id == make_hypernet(base, seed=seed).id
    with pytest.raises(AdapterError, match="no adapter in PEFT's format at 'me/lora'"):
        loracast.LoRA.from_pretrained("me/lora", revision="gone")
    with pytest.raises(HypernetworkError, match="no hypernetwork at 'me/hypernetwork'"):
        loracast.Hypernetwork.from_pretrained("me/hypernetwork", revision="gone")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server in the hub's place, with a cache of its own."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    close_session()  # it remembers proxies
    with running() as hub:
        for name, value in {
            "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
            "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "cache"),
        }.items():  # fmt: skip
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        # transformers keeps a client of the address that it saw first, and would ask a server that is gone for 45 s
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        yield hub
    close_session()


def test_a_hypernetwork_is_pushed_and_loaded_from_the_hub(server, base, tiny_folder, tmp_path):
    made = make_hypernet(base)
    made.provenance = {"history": [STEP]}
    address = made.push_to_hub("hyper", storage="float32", private=True)
    assert address == f"{server.url}/me/hyper/commit/{server.commit('me/hyper', 'main')}"
    (asked,) = server.made
    assert asked["name"] == "hyper" and (asked.get("private") or asked["visibility"] == "private")
    files = server.branches["me/hyper", "main"]
    assert files.keys() == {"README.md", "config.json", "model.safetensors"}
    files["README.md"] = b"Mine."
    other = make_hypernet(base, seed=1)
    other.push_to_hub("hyper", storage="float32", revision="v2")
    assert server.branches["me/hyper", "v2"]["README.md"] == b"Mine."  # a card that is there stays
    read = loracast.Hypernetwork.from_pretrained("me/hyper")
    assert (read.id, read.provenance) == (made.id, made.provenance)
    assert loracast.Hypernetwork.from_pretrained("me/hyper", revision="v2").id == other.id
    model = loracast.load(tiny_folder, read, library=tmp_path / "library", device="cpu")
    note = loracast.Document.from_text("The lamp was made in the north.")
    assert model.learn(note, "note").manifest.hypernetwork == made.id
    by_name = loracast.load(tiny_folder, "me/hyper", library=tmp_path / "library", device="cpu")
    assert by_name.cast(note).delta(read.config.target.names[0]).any()
    with pytest.raises(HypernetworkError, match="the hypernetwork casts documents, and tasks are wanted"):
        loracast.load(tiny_folder, read, task_hypernetwork=read, device="cpu").task("Do it.")


def test_a_refusal_of_the_hub_is_said_plainly(server, base, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HypernetworkError, match=r"did not take .*'hyper'.*hf auth login.*401"):
        make_hypernet(base).push_to_hub("hyper")


def test_the_model_card_says_what_is_known(base, hypernetwork, tmp_path):
    made = make_hypernet(base)
    about = {
        "average_of": [{"history": [STEP, OTHER]}, {"history": [STEP]}], "licence": "apache-2.0",
        "figures": {"exact match on 400 needles": "100 %"},
    }  # fmt: skip
    made.save_pretrained(tmp_path / "h", provenance=about)
    card = ModelCard.load(tmp_path / "h" / "README.md")  # the hub's own reader
    assert (card.data.license, card.data.library_name, card.data.base_model) == ("apache-2.0", "loracast", None)
    assert "hypernetwork" in card.data.tags and "document-to-lora" in card.data.tags
    text = (tmp_path / "h" / "README.md").read_text()
    assert base.name not in text and Path(base.name).name in text  # not where the base lies
    for said in (
        "- prose.jsonl.gz\n- squad\n",
        "- exact match on 400 needles: 100 %",
        "rank 2 in down_proj",
        made.made_for.norms,
    ):
        assert said in text
    assert text.count(STEP["command"]) == text.count(OTHER["command"]) == 1 and "\n- code" not in text
    assert json.loads((tmp_path / "h" / "config.json").read_text())["provenance"] == about
    loracast.Hypernetwork.from_pretrained(tmp_path / "h").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == text
    plain = make_hypernet(base)
    plain.save_pretrained(tmp_path / "h")  # another one: the card is written anew
    changed = (tmp_path / "h" / "README.md").read_text()
    assert changed.count("Not recorded") == 4 and "license: other" in changed
    (tmp_path / "h" / "README.md").write_text(changed.replace(GENERATED, "Mine."))
    made.save_pretrained(tmp_path / "h")
    assert "Mine." in (tmp_path / "h" / "README.md").read_text()
    named = make_hypernet(base)
    named.made_for = type(named.made_for)("me/base", *("0" * 16,) * 3)
    named.save_pretrained(tmp_path / "named")
    assert ModelCard.load(tmp_path / "named" / "README.md").data.base_model == "me/base"
    task = loracast.Hypernetwork.from_pretrained(hypernetwork)
    task.save_pretrained(tmp_path / "task")
    assert "task_hypernetwork=" in (tmp_path / "task" / "README.md").read_text()


def test_another_class_of_hypernetwork_is_refused(tiny_hypernet_folder, hypernetwork):
    from loracast.hypernets.doc_to_lora import DocToLoRA

    assert type(DocToLoRA.from_pretrained(tiny_hypernet_folder)) is DocToLoRA
    with pytest.raises(HypernetworkError, match="holds a TextToLoRA; this takes a DocToLoRA"):
        DocToLoRA.from_pretrained(hypernetwork)


@pytest.mark.parametrize("code", [401, 403])
def test_a_gated_repository_is_one_sentence(server, tiny_folder, tiny_hypernet_folder, code):
    from loracast.lab.training.plan import read_base_config

    server.gated["meta/gated"] = code
    page = f"accept its terms at {server.url}/meta/gated, and set HF_TOKEN"
    for refused, error in (
        (lambda: loracast.load_base("meta/gated", device="cpu"), BaseModelError),
        (lambda: loracast.load(tiny_folder, "meta/gated", device="cpu"), HypernetworkError),
        (lambda: read_base_config("meta/gated"), BaseModelError),
    ):
        with pytest.raises(error) as caught:
            refused()
        assert page in str(caught.value) and "\n" not in str(caught.value)
        assert str(caught.value).startswith("the hub does not give 'meta/gated' to this user")


def publish(server, repository, *folders):
    """Let the server have the files of folders as a repository."""
    files = {path.name: path.read_bytes() for folder in folders for path in folder.iterdir() if path.is_file()}
    server.branches[repository, "main"] = files


def test_nothing_is_asked_of_the_hub_offline(server, tiny_folder, monkeypatch):
    publish(server, "me/tiny", tiny_folder)
    loracast.load_base("me/tiny", device="cpu")
    assert server.n_gets["me/tiny"]
    server.n_gets.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    assert loracast.load_base("me/tiny", device="cpu").name == "me/tiny"  # what was fetched before
    with pytest.raises(BaseModelError, match="cannot load the base 'me/other'"):
        loracast.load_base("me/other", device="cpu")
    assert not server.n_gets


def test_a_hypernetwork_is_looked_up_once(server, tiny_folder, tiny_hypernet_folder):
    publish(server, "me/hyper", tiny_hypernet_folder)
    loracast.Hypernetwork.from_pretrained("me/hyper")
    once = server.n_gets["me/hyper"]
    server.n_gets.clear()
    loracast.load(tiny_folder, "me/hyper", device="cpu")
    assert 0 < server.n_gets["me/hyper"] <= once
