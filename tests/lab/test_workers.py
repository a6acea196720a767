"""What several processes make is the same as what one makes: training, killed and resumed too, and generated data."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from loracast.errors import ConfigError
from loracast.hypernets.doc_to_lora import DocToLoRA
from loracast.lab.data.everyday import make_document
from loracast.lab.data.facts import make_sheet
from loracast.lab.training.loop import TrainConfig, Workers, train
from other_processes import Forked
from tiny import DOC_TO_LORA

FOR_EVER = 10**6


def metrics_of(out: Path) -> list[dict[str, float]]:
    if not (out / "metrics.jsonl").exists():
        return []
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def start(folder: Path, monkeypatch, n: int, function, *arguments: object) -> list[Forked]:
    """A module's function in as many workers, which find each other as those of torchrun do."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = []
    with monkeypatch.context() as patch:
        for rank in range(n):
            of_torchrun = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": n,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            for name, value in {**of_torchrun, "GLOO_SOCKET_IFNAME": "lo"}.items():
                patch.setenv(name, str(value))
            started.append(Forked(folder, function, *map(str, arguments)))
    return started


def train_tiny(base_folder: str, out: str, steps: str) -> None:
    """Doc-to-LoRA with a memory on the tiny base: two batches a step, a checkpoint after each."""
    from loracast.base.load import load_base
    from loracast.lab.training import doc
    from loracast.lab.training.doc import DocRecipe, train_doc
    from loracast.lab.training.document_source import DataConfig

    doc.CALIBRATION_ROWS = 2
    recipe = DocRecipe(
        hypernetwork={**DOC_TO_LORA, "d_values": 48},
        memory_layers=(3,),
        calibration_questions=8,
        data=DataConfig(needle_share=0.0, questions_per_step=4, max_facts=2, max_chunk_tokens=128),
        training=TrainConfig(
            steps=int(steps), accumulate=2, warmup_steps=2, schedule="constant", lr=1e-2, bf16=False, log_every=1,
            save_every_s=0.0,
        ),
    )  # fmt: skip
    train_doc(load_base(base_folder, device="cpu", dtype="float32"), recipe, Path(out))


def test_two_processes_train_as_one_does_and_go_on_after_a_kill(tiny_folder, tmp_path, monkeypatch):
    """Two processes, one of them killed; then two again; then one. All the while the steps are those of one process."""
    first, second = start(tmp_path, monkeypatch, 2, train_tiny, tiny_folder, tmp_path / "run", FOR_EVER)
    until = time.monotonic() + 60
    while len(metrics_of(tmp_path / "run")) < 2:
        assert time.monotonic() < until and first.has_not_ended, first.err
        time.sleep(0.01)
    second.send_signal(signal.SIGKILL)
    assert first.wait() == 1 and "another process of this training has ended" in first.err
    done = json.loads((tmp_path / "run" / "state.json").read_text())["step"]
    assert done >= 1
    for n in (2, 1):
        done += 2
        workers = start(tmp_path, monkeypatch, n, train_tiny, tiny_folder, tmp_path / "run", done)
        assert [one.wait() for one in workers] == [0] * n, workers[0].err
    train_tiny(str(tiny_folder), str(tmp_path / "whole"), str(done))
    parts, whole = metrics_of(tmp_path / "run"), metrics_of(tmp_path / "whole")
    assert [row["step"] for row in parts] == list(range(1, done + 1))
    for row, expected in zip(parts, whole, strict=True):
        del row["elapsed_s"], expected["elapsed_s"]
        assert row == pytest.approx(expected, rel=1e-5)
    resumed, expected = (DocToLoRA.from_pretrained(tmp_path / name).state_dict() for name in ("run", "whole"))
    for name, value in expected.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-6)
    assert expected["heads.down_proj.scaler_b"].abs().max() > 0  # it has learned something


class Partly(nn.Module):
    """Weights that every batch needs, that only odd batches need, and that none needs; with noise."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.odd, self.never = (nn.Parameter(torch.ones(3)) for _ in range(3))
        self.register_buffer("turned", torch.arange(4.0).view(2, 2).T)  # not contiguous

    def forward(self, number: int) -> torch.Tensor:
        x = torch.randn(3) * self.turned.mean()
        return ((self.always + (self.odd if number % 2 else 0.0)) * x - 1).square().sum()


def train_partly(out: str) -> None:
    model = Partly()
    if int(os.environ.get("RANK", "0")):
        for value in model.state_dict().values():
            value.zero_()  # the first worker's weights are taken
    options = TrainConfig(steps=3, accumulate=4, warmup_steps=1, lr=0.1, log_every=2)
    save = lambda folder: torch.save(model.state_dict(), folder / "weights.pt")  # noqa: E731
    train(
        model, lambda number: (model(number), {f"of {number % 2}": float(number)}), options, Path(out), save_model=save
    )


def test_what_only_one_worker_has_a_gradient_for_is_trained_too(tmp_path, monkeypatch):
    train_partly(str(tmp_path / "one"))
    for worker in start(tmp_path, monkeypatch, 2, train_partly, tmp_path / "two"):
        assert worker.wait() == 0, worker.err
    one, two = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=0)
    assert one["never"].tolist() == [1, 1, 1] and one["odd"].tolist() != [1, 1, 1]
    rows, expected = metrics_of(tmp_path / "two"), metrics_of(tmp_path / "one")
    assert [(row["of 0"], row["of 1"]) for row in rows] == [(3.0, 4.0), (9.0, 10.0)]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected])


def test_batches_that_cannot_be_shared_evenly_are_refused():
    workers = [Workers(rank, 3, torch.device("cpu")) for rank in range(3)]
    assert [list(one.batches(2, 6)) for one in workers] == [[12, 13], [14, 15], [16, 17]]
    with pytest.raises(ConfigError, match=r"training\.accumulate to a multiple of 3"):
        workers[0].batches(0, 4)


# ---- generated data


def print_digests() -> None:
    """Hashes of generated documents and sheets."""
    splits = ("train", "dev", "test")
    rng = random.Random(5)
    documents = [make_document(random.Random(i), split=split) for i in range(40) for split in splits]
    sheets = [make_sheet(rng, n, split=split) for n in (1, 7, 30) for split in ("train", "test") for _ in range(10)]
    print(*(hashlib.sha256(repr(made).encode()).hexdigest() for made in (documents, sheets)))


def test_generated_documents_are_the_same_in_every_process(tmp_path, capsys) -> None:
    other = Forked(tmp_path, print_digests)  # which has another hash seed
    print_digests()
    assert other.wait() == 0 and other.out == capsys.readouterr().out
