"""Labels of a user's own for images, and the measurement of what a base says with images' LoRAs."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel
from typer.testing import CliRunner

import loracast
from loracast.cast.vision import load_vision
from loracast.cli import app
from loracast.documents.labels import Labels
from loracast.errors import ConfigError, EncoderError
from loracast.lab.data.labelled import read_images
from loracast.lab.evaluation.images import LABELS, ImagesConfig, evaluate_images
from loracast.lab.training.labels import train_labels

COLOURS = {"red ball": (220, 30, 30), "blue box": (30, 30, 220), "green hat": (30, 200, 30)}


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Path:
    """A tiny random ViT that knows the colours' names, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        id2label=dict(enumerate([*COLOURS, "grey cat"])),
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    model.classifier.weight.data.normal_()
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def write_images(root: Path, n: int, names=tuple(COLOURS)) -> Path:
    rng = np.random.default_rng(0)
    for i, name in enumerate(names):
        folder = root / f"{i}_{name.replace(' ', '_')}"
        folder.mkdir(parents=True)
        for j in range(n):
            pixels = np.clip(np.array(COLOURS[name]) + rng.normal(0, 90, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{j}.png")
    return root


@pytest.mark.parametrize("n_names", [2, 3])
def test_fitted_labels_give_the_probabilities_of_scikit_learn(vision, tmp_path, n_names):
    images = read_images(write_images(tmp_path / "set", 12, tuple(COLOURS)[:n_names]))
    right = train_labels(images, tmp_path / "mine.safetensors", str(vision))
    pixels = ViTImageProcessor.from_pretrained(vision)(
        [images.load(i) for i in range(len(images))], return_tensors="pt"
    )
    with torch.no_grad():
        features = ViTModel.from_pretrained(vision, add_pooling_layer=False).eval()(**pixels).last_hidden_state.mean(1)
    scaled = StandardScaler().fit_transform(features.numpy())
    found = load_vision(labels=tmp_path / "mine.safetensors").probabilities(
        [images.load(i) for i in range(len(images))]
    )
    fits = [LogisticRegression(C=c, max_iter=1000).fit(scaled, images.labels) for c in (0.001, 0.01, 0.1, 1.0)]
    assert any(np.allclose(found, one.predict_proba(scaled), atol=1e-3) for one in fits)
    assert set(images.names) == set(list(COLOURS)[:n_names]) and right > 0.5


def test_labels_are_for_their_own_encoder(vision, tmp_path):
    images = read_images(write_images(tmp_path / "set", 4))
    train_labels(images, tmp_path / "mine.safetensors", str(vision))
    other = ViTModel(ViTConfig.from_pretrained(vision))
    other.save_pretrained(tmp_path / "other")
    ViTImageProcessor.from_pretrained(vision).save_pretrained(tmp_path / "other")
    with pytest.raises(EncoderError, match="were fitted on"):
        load_vision(str(tmp_path / "other"), tmp_path / "mine.safetensors")
    with pytest.raises(ConfigError, match=r"end in \.safetensors"):
        train_labels(images, tmp_path / "mine.bin", str(vision))
    with pytest.raises(ConfigError, match="two images each"):
        train_labels(read_images(write_images(tmp_path / "few", 1)), tmp_path / "few.safetensors", str(vision))


def test_the_command_fits_labels_that_learn_takes(vision, tiny_folder, tiny_hypernet_folder, home, tmp_path):
    write_images(tmp_path / "set", 6)
    arguments = ["train", "labels", tmp_path / "set", "--out", tmp_path / "mine.safetensors", "--encoder", vision]
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0 and "3 names in" in done.output, done.output
    arguments = [
        "learn", tmp_path / "set" / "0_red_ball" / "0.png", "--labels", tmp_path / "mine.safetensors", "--name", "ball",
        "--base", tiny_folder, "--hypernetwork", tiny_hypernet_folder, "--library", tmp_path / "library",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0 and "The picture shows" in done.output, done.output


def test_what_is_measured_is_what_merged_weights_and_the_classifier_say(base, tiny_hypernet_folder, vision, tmp_path):
    """The likeliest name from the loss of the base with the LoRA added to its weights, one image at a time."""
    images = read_images(write_images(tmp_path / "set", 3))
    model = loracast.Model(base, tmp_path / "library", tiny_hypernet_folder, image_encoder=str(vision))
    report = evaluate_images(model, images, ImagesConfig(), tmp_path / "out")
    said = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    processor, classifier = ViTImageProcessor.from_pretrained(vision), ViTForImageClassification.from_pretrained(vision)
    prompt, knows = base.chat.prompt("What does the picture show?", ""), classifier.config.id2label
    right, seen_right = [], []
    for one in said:
        path = next(tmp_path.glob(f"set/*{one['name'].replace(' ', '_')}/{one['file']}"))
        with torch.no_grad():
            seen = classifier(**processor(Image.open(path), return_tensors="pt")).logits[0].softmax(-1)
        assert one["seen"] == knows[int(seen.argmax())]
        merged = copy.deepcopy(base.model)
        for name, pair in model.cast(Labels(dict(zip(knows.values(), seen.tolist(), strict=True)))).factors.items():
            merged.get_submodule(name).weight.data += pair.b.float() @ pair.a.float()
        losses = []
        for name in images.names:
            of_forms = []
            for answer in (base.chat.answer(name), base.chat.reply(name)):
                logits = merged(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                of_forms.append(-logits.gather(1, torch.tensor(answer)[:, None]).sum().item())
            losses.append(min(of_forms))
        assert one["adapter"] == images.names[int(np.argmin(losses))]
        right.append(one["adapter"] == one["name"])
        seen_right.append(knows[int(seen[:3].argmax())] == one["name"])
    by = {row["baseline"]: row for row in report.rows}
    assert by.keys() == LABELS.keys() and len(said) == 9
    assert by["adapter"]["accuracy"] == pytest.approx(np.mean(right))
    assert by["classifier"]["accuracy"] == pytest.approx(np.mean(seen_right))
    assert (by["none"]["chance"], by["first"]["chance"]) == (1 / 3, 1 / 4)
    of_two = evaluate_images(
        model, images, ImagesConfig(classes=("red ball", "blue box"), per_class=2), tmp_path / "out"
    )
    assert [row["n"] for row in of_two.rows] == [4] * len(LABELS)
    with pytest.raises(ConfigError, match="no labels old lamp"):
        evaluate_images(model, images, ImagesConfig(classes=("red ball", "old lamp")), tmp_path / "out")
