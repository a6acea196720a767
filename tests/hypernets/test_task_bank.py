"""What a training has learned of its own tasks, found again by their descriptions."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from loracast.errors import ConfigError
from loracast.hypernets.attention_delta import AttentionDeltaToLoRA
from loracast.hypernets.descriptions import TaskBank
from loracast.lab.data.tasks import read_tasks
from loracast.lab.training.checkpoint import with_config
from loracast.lab.training.loop import TrainConfig
from loracast.lab.training.task_source import TaskDataConfig, TaskSource
from loracast.lab.training.task_start import fit_keys, hide_keys, set_keys, start_task_bank, take_directions
from loracast.lab.training.text import CachedEncoder, TextRecipe, train_text
from loracast.lora.target import Target, TargetModule
from suites import write_suite
from tiny import ATTENTION_DELTA, DESCRIPTIONS, for_base, make_attention_delta

TARGET = Target(
    (TargetModule("blocks.0.o_proj", 0, "o_proj", 6, 5), TargetModule("blocks.1.o_proj", 1, "o_proj", 6, 5))
)
N_DESCRIPTIONS = (20, 20, 20, 1)


def scattered(n_each: int, seed: int) -> torch.Tensor:
    """Descriptions of four tasks [4 * n_each, 100]; wordings of one task differ by more than tasks do."""
    means = torch.zeros(4, 100)
    means[range(4), range(4)] = 1.2
    noise = torch.randn(4 * n_each, 100, generator=torch.Generator().manual_seed(seed))
    return means.repeat_interleave(n_each, 0) + 0.3 * noise + 5


def learned() -> TaskBank:
    torch.manual_seed(0)
    recall = TaskBank(TARGET, 100, 3, 8, N_DESCRIPTIONS)
    fit_keys(recall, scattered(20, 0)[: sum(N_DESCRIPTIONS)])
    recall.cores.data.normal_()
    return recall.eval().requires_grad_(False)


def nearest(x: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    tasks = torch.arange(4).repeat_interleave(torch.tensor(N_DESCRIPTIONS))
    return tasks[(x @ entries.T).argmax(1)]


def test_new_wordings_are_found_where_plain_cosines_are_lost():
    recall, new, known = learned(), scattered(50, 1)[:150], scattered(20, 0)[: sum(N_DESCRIPTIONS)]
    truth = torch.arange(3).repeat_interleave(50)
    centred = [torch.nn.functional.normalize(x - known.mean(0), dim=-1) for x in (new, known)]
    assert (nearest(*centred) == truth).float().mean() < 0.93
    assert (nearest(recall.coordinates(new), recall.keys) == truth).float().mean() > 0.98


def test_a_known_description_gets_the_core_of_its_task():
    recall = learned()
    recall.gate[-1].bias.fill_(20.0)  # open
    known = scattered(20, 0)[: sum(N_DESCRIPTIONS)]
    cores = recall(known)
    assert cores.shape == (61, 2, 3, 3)
    torch.testing.assert_close(cores[[0, 27, 60]], recall.cores[[0, 1, 3]], rtol=0, atol=1e-3)
    recall.gate[-1].bias.fill_(-20.0)
    assert recall(known).abs().max() < 1e-6


def test_in_training_descriptions_do_without_their_entry_or_their_task():
    recall = learned().train()
    known = scattered(20, 0)[: sum(N_DESCRIPTIONS)]
    cosines = recall.coordinates(known) @ recall.keys.T
    torch.manual_seed(0)
    entries = without = 0
    for _ in range(200):
        left, is_new = hide_keys(cosines, recall.task_of_key())
        hidden = left < -1.5
        assert torch.equal(hidden[:60].sum(1) == 20, is_new[:60])  # of the last task, one is all
        assert not hidden[60].any() or is_new[60]
        entries += int((hidden[:60].sum(1) == 1).sum())
        without += int(is_new[:60].sum())
    assert entries / 12000 == pytest.approx(0.4, abs=0.03) and without / 12000 == pytest.approx(0.15, abs=0.03)
    far = cosines.clone().clamp_max(0.9)  # descriptions that are no entries
    assert torch.equal(hide_keys(far, recall.task_of_key())[0], far)


def test_its_factors_span_what_others_span():
    recall, other = learned(), learned()
    other.factors["o_proj"].a.normal_()
    other.factors["o_proj"].b.zero_()  # as if never trained
    own = recall.factors["o_proj"].b.clone()
    take_directions(recall, other.factors)
    taken = recall.factors["o_proj"]
    assert torch.nn.functional.cosine_similarity(taken.a, other.factors["o_proj"].a, dim=-1).min() > 0.9999
    assert torch.nn.functional.cosine_similarity(taken.b, own, dim=-1).min() > 0.9999
    assert {round(length, 4) for part in (taken.a, taken.b) for length in part.norm(dim=-1).flatten().tolist()} == {3.0}


def test_another_number_of_descriptions_is_refused():
    with pytest.raises(ConfigError, match="60 descriptions were given, and the stored tasks have 61"):
        fit_keys(learned(), scattered(20, 0)[:60])


def test_it_is_silent_at_the_start_and_kept(base, tmp_path):
    plain = make_attention_delta(base)
    read = plain.text_encoder(base)(DESCRIPTIONS)
    recalling = with_config(plain, {"task_bank_rank": 2, "task_bank_width": 3})
    start_task_bank(recalling, read, (2, 1))
    recalling.eval().requires_grad_(False)
    one, other = plain(read), recalling(read)
    for name in one.factors:
        assert other.factors[name].rank == one.factors[name].rank + 2
        torch.testing.assert_close(other.row(1).delta(name), one.row(1).delta(name))
    assert max(recalling.config.ranks.values()) == max(plain.config.ranks.values()) + 2
    assert recalling.task_bank is not None
    recalling.task_bank.cores.data.normal_()
    (name, *_) = (name for name in one.factors if name.endswith("o_proj"))
    assert not torch.allclose(recalling(read).row(1).delta(name), one.row(1).delta(name))
    for_base(recalling, base.fingerprint).save_pretrained(tmp_path, storage="float32")
    again = AttentionDeltaToLoRA.from_pretrained(tmp_path)
    assert again.config == recalling.config
    for name, factors in recalling(read).factors.items():
        assert torch.equal(factors.b, again(read).factors[name].b)


def test_what_is_recalled_is_found_by_how_it_is_read_now(base):
    hypernet = make_attention_delta(base)
    recalling = with_config(hypernet, {"task_bank_rank": 2, "task_bank_width": 3})
    start_task_bank(recalling, hypernet.text_encoder(base)(DESCRIPTIONS), (2, 1))
    assert recalling.task_bank is not None
    recalling.task_bank.cores.data.normal_()
    other = with_config(recalling, {"dummy_input": "dog"}).requires_grad_(False)
    assert other.task_bank is not None and torch.equal(other.task_bank.cores, recalling.task_bank.cores)
    read = other.text_encoder(base)(DESCRIPTIONS)
    assert (other.task_bank.coordinates(other.task_bank_input(read)) - other.task_bank.keys).abs().max() > 1e-3
    set_keys(other.task_bank, other.task_bank_input(read))
    torch.testing.assert_close(other.task_bank.coordinates(other.task_bank_input(read)), other.task_bank.keys)
    with pytest.raises(ConfigError, match="2 descriptions were given, and the stored tasks have 3"):
        set_keys(other.task_bank, other.task_bank_input(read[:2]))


def test_less_deep_with_the_same_weights(base):
    deep = make_attention_delta(base)
    n_layers = len(deep.config.layers)
    shallow = with_config(deep, {"depth": n_layers - 1})
    reads = [hypernet.text_encoder(base)(DESCRIPTIONS) for hypernet in (deep, shallow)]
    by_layer = [h.by_position(read) for h, read in zip((deep, shallow), reads, strict=True)]
    torch.testing.assert_close(by_layer[1], by_layer[0][:, :, :-1])
    torch.testing.assert_close(shallow._columns(reads[1]), deep._columns(reads[0])[:, :-1])
    with pytest.raises(ConfigError, match=r"were not trained; depth can only be made smaller"):
        with_config(shallow, {"depth": n_layers})
    with pytest.raises(ConfigError, match="map_rank: the weights that there are do not fit"):
        with_config(deep, {"map_rank": 3})


def test_what_was_read_once_is_not_read_again():
    class Encoder:
        name, d_text, seen = "lengths", 1, []

        def __call__(self, texts):
            self.seen += texts
            return torch.tensor([[float(len(text))] for text in texts])

    encoder = Encoder()
    remembering = CachedEncoder(encoder, ("one", "three"), torch.tensor([[30.0], [50.0]]))
    assert remembering(["three", "four", "one", "seventeen"]).flatten().tolist() == [50, 4, 30, 9]
    assert remembering(["one"]).tolist() == [[30]] and encoder.seen == ["four", "seventeen"]


def recipe(**options) -> TextRecipe:
    settings = {"task_bank_only": True, "hypernetwork": {"task_bank_rank": 2, "task_bank_width": 3}, **options}
    training = TrainConfig(steps=25, lr=1e-2, log_every=5, warmup_steps=2, bf16=False)
    return TextRecipe(data=TaskDataConfig(tasks_per_step=2, examples_per_task=5), training=training, **settings)


def test_it_learns_tasks_and_nothing_else_changes(base, tmp_path):
    tasks = read_tasks(write_suite(tmp_path))
    source = TaskSource(TaskDataConfig(), tasks, base.chat)
    assert sum(source.n_descriptions) == len(source.descriptions) and len(source.n_descriptions) == len(source.tasks)
    first = TextRecipe(
        kinds=("o_proj", "down_proj"), hypernetwork=ATTENTION_DELTA, data=TaskDataConfig(tasks_per_step=2),
        training=TrainConfig(steps=2, warmup_steps=1, lr=1e-3, bf16=False),
    )  # fmt: skip
    train_text(base, first, tasks, tmp_path / "first")
    rows: list[dict[str, float]] = []
    train_text(base, recipe(), tasks, tmp_path / "run", init_from=tmp_path / "first", on_metrics=rows.append)
    assert rows[-1]["answer_loss"] < 0.8 * rows[0]["answer_loss"]
    before, after = (AttentionDeltaToLoRA.from_pretrained(tmp_path / run) for run in ("first", "run"))
    weights = after.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in before.state_dict().items())
    assert after.config.bank_sizes == source.n_descriptions and after.task_bank is not None
    # Stopped and gone on with, it is the same.
    half = dataclasses.replace(recipe(), training=dataclasses.replace(recipe().training, budget_s=0.0))
    for settings in (half, recipe()):
        train_text(base, settings, tasks, tmp_path / "again", init_from=tmp_path / "first")
    other = AttentionDeltaToLoRA.from_pretrained(tmp_path / "again")
    assert torch.equal(other.task_bank.cores, after.task_bank.cores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hypernetwork": {}}, "give the variant 'attention_delta' a hypernetwork.task_bank_rank"),
        ({"task_bank_only": False, "encoder_lora_is_trained": True}, "leave objective.encoder_lora_is_trained"),
        ({"hypernetwork": {"rank": 7}}, "leave rank out of"),
    ],
)
def test_what_does_not_go_together(base, tmp_path, options, message):
    for_base(make_attention_delta(base, kinds=("o_proj", "down_proj")), base.fingerprint).save_pretrained(
        tmp_path / "first"
    )
    with pytest.raises(ConfigError, match=message):
        train_text(
            base, recipe(**options), read_tasks(write_suite(tmp_path)), tmp_path / "run", init_from=tmp_path / "first"
        )
