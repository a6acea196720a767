"""Adapters from elsewhere that are wrong in every way that we know of: refused, with all their faults in one message."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from adapters import write
from loracast.cli import app
from loracast.errors import AdapterError
from loracast.library.adapter import Adapter
from loracast.lora.algebra import LoRA
from loracast.lora.inject import linear_shapes
from loracast.lora.peft_format import read_peft
from loracast.lora.tensor_file import read_header
from tiny import make_model

PREFIX = "base_model.model."
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def factor(module: str, side: str) -> str:
    return f"{PREFIX}{module}.lora_{side}.weight"


@pytest.fixture
def peft(tmp_path) -> Path:
    """A good adapter in PEFT's format, for the tiny base."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shapes = {Q: (64, 48), DOWN: (48, 96)}
    tensors = {}
    for module, (d_out, d_in) in shapes.items():
        tensors[factor(module, "A")] = torch.randn(4, d_in)
        tensors[factor(module, "B")] = torch.randn(d_out, 4)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    return folder


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_config(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite_header(path: Path, change) -> None:
    """Another header before the same numbers; `change` takes and gives JSON text."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(content[8 : 8 + length].decode().rstrip()).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def with_offsets(text: str) -> str:
    header = json.loads(text)
    entry = header[max(header)]
    entry["data_offsets"] = [offset + 10**6 for offset in entry["data_offsets"]]
    return json.dumps(header)


TENSORS = "adapter_model.safetensors"
FILES = {
    "cut short": (lambda p: p.write_bytes(p.read_bytes()[:-9]), "file not fully covered"),
    "empty": (lambda p: p.write_bytes(b""), "no whole safetensors file"),
    "a pickle": (lambda p: p.write_bytes(pickle.dumps({"x": [1] * 100})), "no whole safetensors file"),
    "a lying header length": (lambda p: p.write_bytes((2**62).to_bytes(8, "little") + p.read_bytes()[8:]), "no whole safetensors file"),
    "a header that is no JSON": (lambda p: rewrite_header(p, lambda text: text[:-3]), "invalid JSON in header"),
    "a header that is no object": (lambda p: rewrite_header(p, lambda text: "[1]"), "invalid JSON in header"),
    "a deep header": (lambda p: rewrite_header(p, lambda text: "[" * 50_000), "invalid JSON in header"),
    "an entry that is none": (lambda p: rewrite_header(p, lambda t: t[:-1] + ',"x":3}'), "invalid JSON in header"),
    "bad offsets": (lambda p: rewrite_header(p, with_offsets), "invalid offset for tensor"),
    "a key twice": (lambda p: rewrite_header(p, lambda t: t[:-1] + "," + t[1:]), "is in the header 2 times|duplicate field"),
    "an unknown type": (lambda p: rewrite_header(p, lambda t: t.replace("F32", "F8_E8M0").replace("BF16", "X")), "unknown type|unknown variant|invalid shape"),
    "missing": (lambda p: p.unlink(), "cannot be read: No such file"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "is not a file"),
    "a link to nothing": (lambda p: (p.unlink(), p.symlink_to("/nowhere")), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_none_of_the_format(kind, peft, tmp_path):
    damage, message = FILES[kind]
    damage(peft / TENSORS)
    with pytest.raises(AdapterError, match=message):
        read_peft(peft)
    adapter = write(tmp_path / "library")
    damage(adapter.folder / "factors.safetensors")
    opened = Adapter(adapter.folder)
    assert opened.faults()
    with pytest.raises(AdapterError, match=f"{message}|link|is missing"):
        opened.lora()


def swap(tensors, module=Q):
    a, b = factor(module, "A"), factor(module, "B")
    tensors[a], tensors[b] = tensors[b], tensors[a]


IN_PEFT = {
    "rank 0": (lambda t: t.update({factor(Q, "A"): torch.zeros(0, 48), factor(Q, "B"): torch.zeros(64, 0)}), "rank 0 is not from 1 to 512"),
    "rank 513": (lambda t: t.update({factor(Q, "A"): torch.zeros(513, 48), factor(Q, "B"): torch.zeros(64, 513)}), "rank 513"),
    "no B": (lambda t: t.pop(factor(Q, "B")), "q_proj.lora_B is missing"),
    "another key": (lambda t: t.update({"lm_head.weight": torch.zeros(2)}), "lm_head.weight: not a factor"),
    "A and B swapped": (swap, r"A \[64, 4\] and B \[4, 48\] are no factors"),
    "NaN": (lambda t: t[factor(Q, "B")][0].fill_(float("nan")), "not finite"),
    "infinity": (lambda t: t[factor(Q, "A")][0].fill_(-float("inf")), "not finite"),
    "1e30": (lambda t: t[factor(Q, "A")][0, 0].fill_(1e30), r"up to 1e\+30"),
    "float64": (lambda t: t.update({factor(Q, "A"): t[factor(Q, "A")].double()}), "factors of type F64"),
    "integers": (lambda t: t.update({factor(Q, "A"): t[factor(Q, "A")].int()}), "factors of type I32"),
    "three axes": (lambda t: t.update({factor(Q, "A"): t[factor(Q, "A")][None]}), "are no factors of one matrix"),
    "another base's shape": (lambda t: t.update({factor(Q, "A"): torch.zeros(4, 50)}), r"is for \[64, 50\], the base has \[64, 48\]"),
    "another base's module": (lambda t: t.update({factor("h.0.attn", s): t.pop(factor(Q, s)) for s in "AB"}), "no such linear module"),
}  # fmt: skip


@pytest.mark.parametrize("kind", IN_PEFT)
def test_factors_that_are_none(kind, peft, tiny_folder, tmp_path):
    damage, message = IN_PEFT[kind]
    change_tensors(peft / TENSORS, damage)
    with pytest.raises(AdapterError, match=message):
        read_peft(peft, linear_shapes(make_model()))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"use_dora": True}, "use_dora"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4', which changes the base's weights"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_alpha": float("nan")}, "alpha of 'lora_alpha' is nan"),
        ({"lora_alpha": None}, "alpha of 'lora_alpha' is None"),
        ({"alpha_pattern": {"q_proj": "16"}}, "alpha of 'q_proj' is '16'"),
        ({"alpha_pattern": {"(a+)+x": 16}}, r"pattern '\(a\+\)\+x' names no modules"),
        ({"alpha_pattern": {"[": 16}}, r"pattern '\[' names no modules"),
        ({"lora_alpha": 10**400}, "alpha of 'lora_alpha' is 1000"),
    ],
)
def test_configs_that_are_none(values, message, peft):
    change_config(peft / "adapter_config.json", **values)
    with pytest.raises(AdapterError, match=message):
        read_peft(peft)


def test_all_faults_are_told_at_once(peft, tiny_folder, tmp_path):
    change_config(peft / "adapter_config.json", use_dora=True)

    def damage(tensors):
        swap(tensors)
        tensors[factor(DOWN, "B")][0] = float("nan")
        tensors["lm_head.weight"] = torch.zeros(2)

    change_tensors(peft / TENSORS, damage)
    library = tmp_path / "library"
    done = CliRunner().invoke(app, ["import", str(peft), "--base", str(tiny_folder), "--library", str(library)])
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
    for fault in ("use_dora", "A [64, 4] and B [4, 48]", "lm_head.weight: not a factor", "not finite"):
        assert fault in done.stderr
    assert not library.exists() or not (library / "objects").exists()


def test_the_good_one_is_taken(peft):
    assert LoRA(read_peft(peft, linear_shapes(make_model()))).rank == 4


def sql(path: Path, *commands: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        for command in commands:
            database.execute(command)


def endless(index: Path) -> None:
    numbers = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n)"
    columns = ", ".join(f"i AS {name}" for name in ("chunk", "start", "stop", "n_tokens"))
    sql(index, "ALTER TABLE places RENAME TO gone", f"CREATE VIEW places AS {numbers} SELECT {columns} FROM n")


IN_OURS = {
    "another file": (lambda f: (f / "x.py").write_text(""), "x.py does not belong there"),
    "a file missing": (lambda f: (f / "chunks.sqlite").unlink(), "chunks.sqlite is missing"),
    "a link": (lambda f: (shutil.move(f / "factors.safetensors", f.parent / "x"), (f / "factors.safetensors").symlink_to(f.parent / "x")), "is a link"),
    "other bytes": (lambda f: (f / "chunks.sqlite").write_bytes(b"SQLite format 3\0" + bytes(4000)), "chunks.sqlite is damaged"),
    "a view that never ends": (lambda f: endless(f / "chunks.sqlite"), "'places' is neither a table nor a full-text index"),
    "a trigger": (lambda f: sql(f / "chunks.sqlite", "CREATE TRIGGER t AFTER DELETE ON places BEGIN SELECT 1; END"), "'t' is neither a table"),
    "text that is a number": (lambda f: sql(f / "chunks.sqlite", "UPDATE places SET start = 'x'"), "chunks that are none"),
    "sentences beyond the text": (lambda f: sql(f / "chunks.sqlite", "UPDATE sentence_places SET stop = 999"), "sentences that are none"),
    "1e30": (lambda f: change_tensors(f / "factors.safetensors", lambda t: t["q_proj.a"][0].fill_(1e30)), r"up to 1e\+30"),
    "float64": (lambda f: change_tensors(f / "factors.safetensors", lambda t: t.update({"q_proj.a": t["q_proj.a"].double()})), "is F64 .*, not BF16"),
    "no B": (lambda f: change_tensors(f / "factors.safetensors", lambda t: t.pop("q_proj.b")), "q_proj.b is missing"),
    "fewer chunks": (lambda f: change_config(f / "adapter.json", n_chunks=2), "has 3 chunks, and the manifest says 2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", IN_OURS)
def test_an_adapter_of_ours_from_elsewhere(kind, tmp_path):
    adapter = write(tmp_path)
    assert adapter.faults() == []
    damage, message = IN_OURS[kind]
    damage(adapter.folder)
    faults = Adapter(adapter.folder).faults()
    assert any(re.search(message, fault) for fault in faults), faults


def test_a_title_with_half_of_a_surrogate_pair_is_refused(tmp_path):
    """JSON can hold one, and no hash of the manifest could be made."""
    adapter = write(tmp_path)
    change_config(adapter.folder / "adapter.json", title="Lamp \ud800")
    with pytest.raises(AdapterError, match="damaged"):
        Adapter(adapter.folder)


def test_all_faults_of_ours_are_told_at_once(tmp_path):
    adapter = write(tmp_path)

    def damage(tensors):
        del tensors["q_proj.b"]
        tensors["down_proj.a"] = tensors["down_proj.a"].float()
        tensors["x"] = torch.zeros(1)

    change_tensors(adapter.folder / "factors.safetensors", damage)
    change_config(adapter.folder / "adapter.json", n_chunks=2)
    faults = "; ".join(Adapter(adapter.folder).faults())
    for fault in (
        "hash differs",
        "says 2",
        "q_proj.b is missing",
        "is F32 [",
        "x is unknown",
        "not BF16 [2, 2, 2, 48]",
    ):
        assert fault in faults


def test_a_header_is_read_without_its_tensors(tmp_path):
    path = tmp_path / "large.safetensors"
    n = 2**33
    header = json.dumps({"x": {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * n)
    found, faults = read_header(path)
    assert found["x"].shape == (n,) and faults == [] and path.stat().st_blocks * 512 < 10**6
