"""Vision models with labels: classifiers of transformers and timm, CLIP and SigLIP with names, probes; images learned."""

from __future__ import annotations

import json
from pathlib import Path

import docx
import fpdf
import numpy as np
import pytest
import torch
from transformers import pipeline
from typer.testing import CliRunner

import loracast
from loracast.answering.model import load
from loracast.base import embedded
from loracast.cast.vision import load_vision
from loracast.cli import app
from loracast.documents.images import read_image_file
from loracast.documents.labels import Labels
from loracast.errors import EncoderError
from loracast.library.index import read_chunks
from tiny import gradient, make_tokenizer

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "vocab_size": 600,
}
IMAGES = [gradient(40, 40), gradient(20, 30)]


def make_classifier(folder: Path, seed: int = 0) -> Path:
    """A tiny random ViT with labels, as a Hugging Face folder."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(seed)
    names = {0: "lion, king of beasts", 1: "crane", 2: "crane", 3: "sports car, sport car"}
    model = ViTForImageClassification(ViTConfig(**VIT, id2label=names)).eval()
    model.classifier.weight.data.normal_()
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("classifier"))


def test_a_classifier_says_what_transformers_says(classifier):
    sees = load_vision(str(classifier), device="cpu")
    ours = sees.probabilities(IMAGES)
    for image, row in zip(IMAGES, ours, strict=True):
        theirs = pipeline("image-classification", str(classifier), top_k=None)(image)
        by_label = {"crane": 0.0}
        for one in theirs:
            name = one["label"].split(", ")[0]
            by_label[name] = by_label.get(name, 0) + one["score"]
        assert sees.named(row) == pytest.approx(by_label, abs=1e-6)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_names_of_a_file_are_told_apart_as_transformers_does(kind, tmp_path):
    import transformers as t

    torch.manual_seed(0)
    text = TEXT | (
        {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0} if kind == "clip" else {"projection_size": 16}
    )
    sides = {"text_config": text, "vision_config": VIT}
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 64
    if kind == "clip":
        model = t.CLIPModel(t.CLIPConfig(**sides, projection_dim=8))
        processor = t.CLIPProcessor(
            t.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), tokenizer
        )
    else:
        model = t.SiglipModel(t.SiglipConfig(**sides))
        processor = t.SiglipProcessor(t.SiglipImageProcessor(size={"height": 16, "width": 16}), tokenizer)
    model.eval().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "names.txt").write_text("a red lamp\nmuseum\n\nmuseum\nkettle\n")
    sees = load_vision(str(tmp_path / "model"), tmp_path / "names.txt", "cpu")
    assert sees.labels == ("a red lamp", "museum", "kettle")
    asks = pipeline("zero-shot-image-classification", str(tmp_path / "model"))
    for image, row in zip(IMAGES, sees.probabilities(IMAGES), strict=True):
        theirs = {one["label"]: one["score"] for one in asks(image, candidate_labels=list(sees.labels))}
        assert sees.named(row) == pytest.approx(theirs, abs=1e-5)


def test_the_packaged_weights_become_timms_model_with_its_names(tmp_path):
    """The package names its layers otherwise: the same numbers must give the same probabilities."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    model.classifier.weight.data.normal_()
    state = model.state_dict()
    renamed = {
        f"_fc.{k[11:]}" if k.startswith("classifier.") else f"_layer.{i}": v for i, (k, v) in enumerate(state.items())
    }
    (tmp_path / "unpacked").mkdir()
    torch.save(renamed, tmp_path / "unpacked" / "efficientnet-lite0-57934424.pth", _use_new_zipfile_serialization=False)
    embedded.EMBEDDED["efficientnet-lite0"].convert(tmp_path / "unpacked", tmp_path / "built")
    sees, image = load_vision(str(tmp_path / "built"), device="cpu"), gradient(224, 224)
    pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() - 127) / 128
    with torch.no_grad():
        torch.testing.assert_close(sees.probabilities([image]), model(pixels).softmax(-1), atol=1e-4, rtol=1e-2)
    names = timm.data.ImageNetInfo()
    assert sees.labels == tuple(names.index_to_description(i) for i in range(1000))


def test_what_has_no_labels_is_refused(classifier, tmp_path):
    from transformers import ViTConfig, ViTModel

    with pytest.raises(EncoderError, match="cannot load the vision model 'no/such'"):
        load_vision("no/such")
    ViTModel(ViTConfig(**VIT)).save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").write_text((classifier / "preprocessor_config.json").read_text())
    with pytest.raises(EncoderError, match="no labels of its own"):
        load_vision(str(tmp_path / "bare"))
    (tmp_path / "names.txt").write_text("lamp\n")
    with pytest.raises(EncoderError, match="are for CLIP, SigLIP"):
        load_vision(str(classifier), tmp_path / "names.txt")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name, says in (
        ("empty.txt", "at least one"),
        ("gone.txt", "holds no labels"),
        ("broken.safetensors", "holds no labels"),
    ):
        with pytest.raises(EncoderError, match=says):
            load_vision(str(classifier), tmp_path / name)


@pytest.fixture
def photo(tmp_path) -> Path:
    gradient(40, 40).save(tmp_path / "our-red-lamp.jpg")
    return tmp_path / "our-red-lamp.jpg"


def test_a_photo_is_learned_as_its_labels(tiny_folder, tiny_hypernet_folder, classifier, photo, tmp_path):
    model = load(
        tiny_folder, tiny_hypernet_folder, image_encoder=str(classifier), library=tmp_path / "library", device="cpu"
    )
    adapter = model.learn(photo)
    m = adapter.manifest
    assert (adapter.name, m.kind, m.source, m.title) == ("our-red-lamp", "image", "our-red-lamp.jpg", "our red lamp")
    assert m.source_sha256 == read_image_file(photo).sha256
    (row,) = load_vision(str(classifier)).probabilities([read_image_file(photo).image])
    named = load_vision(str(classifier)).named(row)
    by_hand = model.learn(Labels(named, title="our red lamp"), "by-hand")
    for name in adapter.lora().names:
        torch.testing.assert_close(adapter.lora().delta(name), by_hand.lora().delta(name))
    assert model.ask("What does the picture show?", "our-red-lamp") != model.ask("What does the picture show?")
    assert model.learn(photo).manifest.version == adapter.manifest.version


def test_the_commands_learn_and_show_a_photo(home, tiny_folder, tiny_hypernet_folder, classifier, photo, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, [*map(str, arguments)])

    where = ("--library", tmp_path / "library")
    models = ("--base", tiny_folder, "--hypernetwork", tiny_hypernet_folder, "--encoder", classifier, "--device", "cpu")
    done = run("learn", photo, *models, *where)
    assert done.exit_code == 0, done.output
    assert "learned our-red-lamp" in done.output and "The picture shows a" in done.output
    received = json.loads(run("learn", photo, *models, *where, "--replace", "--json").stdout)
    assert received["name"] == "our-red-lamp" and received["n_bytes"] > 0
    assert "%)" in run("show", "our-red-lamp", *where).output


@pytest.mark.parametrize("kind", ["pdf", "docx"])
def test_what_the_pictures_of_a_document_show_is_learned_with_it(
    kind, tiny_folder, tiny_hypernet_folder, classifier, tmp_path
):
    path, photo = tmp_path / f"report.{kind}", tmp_path / "photo.png"
    gradient(40, 40).save(photo)
    if kind == "pdf":
        pdf = fpdf.FPDF()
        pdf.add_page()
        pdf.set_font("helvetica", size=12)
        pdf.cell(text="The lamp on the desk was made in the north.")
        pdf.image(photo, y=40, w=60)
        pdf.output(str(path))
    else:
        word = docx.Document()
        word.add_paragraph("The lamp on the desk was made in the north.")
        word.add_picture(str(photo))
        word.save(str(path))
    seen = pipeline("image-classification", str(classifier), top_k=1)(gradient(40, 40))[0]
    assert seen["score"] > 0.5
    model = load(
        tiny_folder, tiny_hypernet_folder, image_encoder=str(classifier), library=tmp_path / "library", device="cpu"
    )
    plain, both = model.learn(path, "plain"), model.learn(loracast.read_document(path, photos=True), "both")
    texts = ["\n".join(chunk.text for chunk in read_chunks(one.index)) for one in (plain, both)]
    assert texts[1] == f"{texts[0]}\n\nThe picture shows a {seen['label'].split(', ')[0]}."
    assert plain.manifest.source_sha256 != both.manifest.source_sha256
    done = CliRunner().invoke(
        app,
        ["learn", str(path), "--photos", "--encoder", str(classifier), "--base", str(tiny_folder), "--hypernetwork",
         str(tiny_hypernet_folder), "--library", str(tmp_path / "library"), "--name", "third"],
    )  # fmt: skip
    assert done.exit_code == 0 and model.library.open("third").manifest.source_sha256 == both.manifest.source_sha256
