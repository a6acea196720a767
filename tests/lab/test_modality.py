"""Images: encoders that plug into the document hypernetwork, its training and evaluation, images as adapters."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from loracast.answering.model import load
from loracast.base import embedded
from loracast.cast.load import load_caster
from loracast.cli import app
from loracast.documents.images import read_image_file
from loracast.errors import BaseModelError, ConfigError, EncoderError, HypernetworkError
from loracast.hypernets.doc_to_lora import DocToLoRA
from loracast.hypernets.encoders import Encoder, Features, ImageEncoder, load_image_encoder
from loracast.hypernets.protocol import Caster, Hypernetwork
from loracast.lab.data.labelled import Labelled
from loracast.lab.evaluation.modality import ALL, HELD_OUT, TRAINED, ModalityEvalConfig, evaluate_modality
from loracast.lab.training.doc import cast_documents
from loracast.lab.training.modality import (
    ModalityDataConfig,
    ModalityRecipe,
    ModalitySource,
    answer_about,
    encoded,
    train_modality,
    wordings,
)
from loracast.lab.training.recipe import read_recipe
from tiny import for_base, gradient, make_hypernet
from waves import WaveEncoder, make_waves

FREE = torch.Generator().manual_seed(0)


def make_vision(folder: Path, seed: int = 0) -> Path:
    """A tiny random ViT as a Hugging Face folder."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).eval().save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Path:
    return make_vision(tmp_path_factory.mktemp("vision"))


@pytest.fixture(autouse=True)
def cache(home):
    """Features of a test's own."""


def recipe(*overrides: str):
    small = ["width=16", "n_heads=2", "n_kv_heads=2", "head_dim=8", "n_decoder_blocks=1", "rank=4"]
    settings = [*(f"hypernetwork.{s}" for s in small), "training.bf16=false", "training.lr=3e-3"]
    return read_recipe(
        ModalityRecipe(), None, [*settings, "training.log_every=1", "data.examples_per_step=12", *overrides]
    )


def test_encoders_of_all_modalities_have_one_interface(base, vision):
    words = make_hypernet(base).hidden_states_encoder(base)
    sees, hears = ImageEncoder("tiny", vision), WaveEncoder()
    mask = torch.tensor([[True, True, False]])
    for encoder, features in (
        (words, words(torch.tensor([[5, 6, 0]]), mask)),
        (sees, sees([gradient()])),
        (hears, hears(torch.randn(1, 1, 64, generator=FREE))),
    ):
        fits: Encoder = encoder
        assert fits.name and fits.fingerprint
        assert features.states.shape[::2] == (1, fits.d_features)
    assert words(torch.tensor([[5, 6, 0]]), mask).mask is mask


def test_an_image_encoder_gives_the_vision_models_own_patches(vision):
    from transformers import ViTImageProcessor, ViTModel

    images = [gradient(40, 40), gradient(20, 30)]
    found = ImageEncoder("tiny", vision)(images).states
    model = ViTModel.from_pretrained(vision, add_pooling_layer=False).eval()
    pixels = ViTImageProcessor.from_pretrained(vision)(images, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(found, model(**pixels).last_hidden_state)
    assert found.shape == (2, 5, 16) and not found.requires_grad


def test_an_image_encoder_is_known_by_its_weights(vision, tmp_path):
    first, other = ImageEncoder("a", vision), ImageEncoder("a", make_vision(tmp_path / "other", seed=1))
    assert first.fingerprint == ImageEncoder("elsewhere", vision).fingerprint != other.fingerprint
    with pytest.raises(EncoderError, match="cannot load the image encoder 'no/such'"):
        load_image_encoder("no/such")


def test_the_packaged_weights_become_timms_model(tmp_path):
    """The package names its layers otherwise: the same numbers must give the same features."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    state = model.state_dict()
    renamed = {
        f"_fc.{k[11:]}" if k.startswith("classifier.") else f"_layer.{i}": v for i, (k, v) in enumerate(state.items())
    }
    (tmp_path / "unpacked").mkdir()
    torch.save(renamed, tmp_path / "unpacked" / "efficientnet-lite0-57934424.pth", _use_new_zipfile_serialization=False)
    embedded.EMBEDDED["efficientnet-lite0"].convert(tmp_path / "unpacked", tmp_path / "built")
    encoder = ImageEncoder("efficientnet-lite0", tmp_path / "built")
    image = gradient(224, 224)
    pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() - 127) / 128
    with torch.no_grad():
        expected = model.forward_features(pixels).flatten(2).transpose(1, 2)
    found = encoder([image]).states
    assert found.shape == (1, 49, 1280)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_features_are_computed_once(home):
    waves, calls = make_waves(2, 5), []

    class Counting(WaveEncoder):
        def __call__(self, inputs):
            calls.append(len(inputs))
            return super().__call__(inputs)

    received: list[tuple[int, int]] = []
    first = encoded(waves, [0, 3, 4], Counting(), lambda done, total: received.append((done, total)))
    again = encoded(waves, [0, 3, 4], Counting())
    assert calls == [3] and received == [(3, 3)] and torch.equal(first, again)
    torch.testing.assert_close(
        first.float(), WaveEncoder()(torch.stack([waves.load(i) for i in (0, 3, 4)])).states, atol=0.02, rtol=0.01
    )
    encoded(waves, [0, 3], Counting())
    assert calls == [3, 2]


def test_a_step_depends_on_its_number_and_asks_what_is_true(base):
    table = wordings("image")
    names = ("goldfish", "teapot", "lion")
    images = Labelled(
        "image",
        names,
        (False, False, True),
        (0, 1, 2) * 4,
        tuple("abcdefghijkl"),
        lambda i: torch.full((1, 64), float(i)),
        "x",
    )

    class Fake(WaveEncoder):
        def __call__(self, inputs):
            return Features(inputs.expand(-1, 3, -1))

    source = ModalitySource(ModalityDataConfig(examples_per_step=6, questions_per_example=3), images, Fake(), base.chat)
    features, episodes = source.step(7)
    same, _ = source.step(7)
    assert torch.equal(features.states, same.states) and not torch.equal(features.states, source.step(8)[0].states)
    assert len(episodes) == 6 and "lion" not in source.names
    kinds = table["attributes"]
    for i, (row, episode) in enumerate(zip(features.states, episodes, strict=True)):
        name = names[int(row[0, 0]) % 3]
        asked = {
            base.tokenizer.decode(list(q.prompt)): base.tokenizer.decode(list(q.answer)) for q in episode.questions
        }
        assert len(asked) == 3, i
        for prompt, answer in asked.items():
            found = [a for a in kinds.values() if any(wording in prompt for wording in a["train"])]
            wanted = answer_about(found[0], name) if found else name
            assert wanted in answer
    with pytest.raises(ConfigError, match="attribute_share"):
        ModalityDataConfig(attribute_share=2)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory, request):
    """A tiny hypernetwork that tells three kinds of waves apart."""

    folder = tmp_path_factory.mktemp("waves")
    before = os.environ.get("LORACAST_HOME")
    os.environ["LORACAST_HOME"] = str(folder / "home")
    try:
        seen: list[dict] = []
        train_modality(
            base,
            recipe("training.steps=60", "training.lr=1e-2", "training.warmup_steps=5"),
            make_waves(4, 24, n_held_out=1),
            WaveEncoder(),
            folder / "run",
            on_metrics=seen.append,
        )
    finally:
        os.environ.pop("LORACAST_HOME") if before is None else os.environ.update(LORACAST_HOME=before)
    return folder / "run", seen


def test_a_fresh_hypernetwork_does_nothing_and_training_makes_it_see(base, trained):
    run, seen = trained
    assert seen[0]["exact"] < 0.2 and np.mean([m["exact"] for m in seen[-10:]]) > 0.7
    hypernet = DocToLoRA.from_pretrained(run)
    assert hypernet.config.encoder == hypernet.config.encoder_fingerprint == WaveEncoder().fingerprint
    fresh = DocToLoRA(hypernet.config)
    features = WaveEncoder()(torch.randn(2, 1, 64, generator=FREE))
    assert not cast_documents(fresh, features).loras.squared_norms().any()


def test_a_probe_without_enough_images_is_refused_before_anything_is_scored(base, trained, tmp_path):
    caster, test = Caster(Hypernetwork.from_pretrained(trained[0]), WaveEncoder()), make_waves(4, 6, seed=9)
    with pytest.raises(ConfigError, match="two images of each class"):
        evaluate_modality(base, caster, make_waves(4, 1), test, ModalityEvalConfig(), tmp_path)
    report = evaluate_modality(base, caster, make_waves(4, 3), test, ModalityEvalConfig(), tmp_path)
    assert any(row["baseline"] == "probe" for row in report.rows)


def test_what_is_measured_is_what_merged_weights_say(base, trained, tmp_path):
    """The likeliest name from the loss of the base with the LoRA added to its weights, one example at a time."""
    caster = Caster(Hypernetwork.from_pretrained(trained[0]), WaveEncoder())
    known, test = make_waves(4, 24, n_held_out=1), make_waves(4, 6, seed=9, n_held_out=1)
    report = evaluate_modality(base, caster, known, test, ModalityEvalConfig(), tmp_path)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    answered = [SimpleNamespace(**json.loads(line)) for line in lines]
    seen_names = test.names[:3]
    prompt = base.chat.prompt(wordings("image")["test"], "")
    for one in answered[:8]:
        merged = copy.deepcopy(base.model)
        for name, pair in caster.loras_of(caster.encode(test.load(one.place)[None])).row(0).factors.items():
            merged.get_submodule(name).weight.data += (pair.b @ pair.a).detach()
        losses = []
        for name in seen_names:
            of_forms = []
            for answer in (base.chat.answer(name), base.chat.reply(name)):
                ids = torch.tensor([[*prompt, *answer]])
                logits = merged(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                of_forms.append(-logits.gather(1, torch.tensor(answer)[:, None]).sum().item())
            losses.append(min(of_forms))
        assert one.chosen == seen_names[int(np.argmin(losses))]
    by = {(row["part"], row["baseline"]): row for row in report.rows}
    right = [one.chosen == one.name for one in answered if not one.is_held_out]
    assert by[TRAINED, "adapter"]["accuracy"] == pytest.approx(np.mean(right)) and by[TRAINED, "adapter"]["n"] == 18
    assert by[TRAINED, "adapter"]["accuracy"] > 0.6 > by[TRAINED, "shuffled"]["accuracy"]
    assert by[TRAINED, "probe"]["accuracy"] > 0.6
    assert by[HELD_OUT, "adapter"]["chance"] == 1 and by[ALL, "adapter"]["chance"] == 0.25
    assert len(answered) == len(test)


def test_a_run_goes_on_where_it_stopped(base, tmp_path):
    waves = make_waves(2, 8)
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    options = ("training.schedule='constant'", "training.warmup_steps=0")
    train_modality(base, recipe("training.steps=4", *options), waves, WaveEncoder(), straight)
    for steps in (2, 4):
        train_modality(base, recipe(f"training.steps={steps}", *options), waves, WaveEncoder(), halves)
    one, other = (DocToLoRA.from_pretrained(folder).state_dict() for folder in (straight, halves))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], msg=name)
    started = train_modality(
        base,
        read_recipe(ModalityRecipe(), None, ["training.steps=1", "training.bf16=false"]),
        waves,
        WaveEncoder(),
        tmp_path / "on",
        init_from=straight,
    )
    assert started["step"] == 1
    with pytest.raises(HypernetworkError, match="give the encoder that it was trained with"):
        train_modality(
            base,
            read_recipe(ModalityRecipe(), None, ["training.steps=1"]),
            waves,
            WaveEncoder(patch=32),
            tmp_path / "other",
            init_from=straight,
        )
    with pytest.raises(ConfigError, match=r"unknown key hypernetwork\.memory_rank"):
        recipe("hypernetwork.memory_rank=3")


def test_unrelated_questions_are_held_to_the_base(base, tmp_path):
    file = tmp_path / "unrelated.jsonl"
    file.write_text('{"question": "How many legs has a spider?", "answer": "eight"}\n')
    seen: list[dict] = []
    train_modality(
        base,
        recipe("training.steps=8", f"data.unrelated=['{file}']"),
        make_waves(2, 8),
        WaveEncoder(),
        tmp_path / "run",
        on_metrics=seen.append,
    )
    assert any("kl_to_base" in metrics for metrics in seen) and any("kl_to_base" not in metrics for metrics in seen)


@pytest.fixture(scope="module")
def seeing(base, vision, tmp_path_factory) -> Path:
    """A tiny random hypernetwork for images."""
    encoder = ImageEncoder(str(vision), vision)
    folder = tmp_path_factory.mktemp("seeing")
    like = make_hypernet(base, static_rank=1).config
    config = dataclasses.replace(
        like, d_features=16, encoder=encoder.name, encoder_fingerprint=encoder.fingerprint, reader_layers=(0,)
    )
    torch.manual_seed(0)
    hypernet = DocToLoRA(config)
    for side in (hypernet.head("down_proj").scaler_b, hypernet.static["down_proj"].b):
        side.data.fill_(0.5)
    for_base(hypernet, base.fingerprint).save_pretrained(folder, storage="float32")
    return folder


@pytest.fixture
def photo(tmp_path) -> Path:
    gradient(40, 40).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def test_a_photo_is_learned_like_a_document(tiny_folder, tiny_hypernet_folder, seeing, photo, tmp_path):
    model = load(
        tiny_folder, tiny_hypernet_folder, image_hypernetwork=seeing, library=tmp_path / "library", device="cpu"
    )
    adapter = model.learn(photo)
    assert (adapter.name, adapter.manifest.kind, adapter.manifest.source) == ("photo", "image", "photo.jpg")
    assert adapter.manifest.source_sha256 == read_image_file(photo).sha256
    caster = load_caster(seeing, "image")
    made = caster.loras_of(caster.encode([read_image_file(photo).image])).row(0)
    kept = adapter.lora()
    for name, pair in made.factors.items():
        torch.testing.assert_close(
            kept.factors[name].b.float() @ kept.factors[name].a.float(),
            (pair.b @ pair.a).detach(),
            atol=2e-2,
            rtol=2e-2,
        )
    assert model.ask("What does the picture show?", "photo") != model.ask("What does the picture show?")
    assert model.learn(photo).manifest.version == adapter.manifest.version


def test_the_command_learns_a_photo_without_the_base(seeing, photo, tmp_path):
    arguments = [
        "learn",
        str(photo),
        "--hypernetwork",
        str(seeing),
        "--library",
        str(tmp_path / "library"),
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(app, [*arguments, "--base", "no/such/base"])
    assert done.exit_code == 0, done.output
    assert "learned photo" in done.output and "What does the picture show?" in done.output
    received = json.loads(CliRunner().invoke(app, [*arguments, "--replace", "--json"]).stdout)
    assert received["name"] == "photo" and received["n_bytes"] > 0
    refused = CliRunner().invoke(app, [*arguments, "--name", "b", "--storage", "int8"])
    assert refused.exit_code == 2


def test_each_hypernetwork_keeps_to_its_modality(base, tiny_folder, tiny_hypernet_folder, seeing, vision, tmp_path):
    with pytest.raises(HypernetworkError, match="casts documents, and images are wanted"):
        load_caster(tiny_hypernet_folder, "image")
    with pytest.raises(HypernetworkError, match="casts images, and documents are wanted"):
        load(tiny_folder, seeing, device="cpu")
    with pytest.raises(HypernetworkError, match="give the encoder that it was trained with"):
        load_caster(seeing, "image", encoder=str(make_vision(tmp_path / "other", seed=1)))
    other = dataclasses.replace(base.fingerprint, norms="0" * 16)
    hypernet = DocToLoRA.from_pretrained(seeing)
    for_base(hypernet, other).save_pretrained(tmp_path / "foreign", storage="float32")
    model = load(
        tiny_folder,
        tiny_hypernet_folder,
        image_hypernetwork=tmp_path / "foreign",
        library=tmp_path / "l",
        device="cpu",
    )
    gradient().save(tmp_path / "a.png")
    with pytest.raises(BaseModelError, match="hypernetwork for images"):
        model.learn(tmp_path / "a.png")
