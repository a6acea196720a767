"""What is fuzzed besides the server: adapters, hypernetworks, published checkpoints and documents.

A target makes an input from random numbers and reads it as the package does. An input is the files of a folder.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoConfig

from adapters import write
from fuzz import mutate
from fuzz.guard import OutOfTime, at_most
from loracast.base.fingerprint import Fingerprint
from loracast.base.load import Base
from loracast.cast.load import BaseFacts, convert
from loracast.documents import images, read, read_document, worker
from loracast.documents.chunks import split_text
from loracast.documents.file_types import Limits, Parsed
from loracast.errors import DocumentError, LoracastError
from loracast.hypernets.protocol import Hypernetwork
from loracast.library.adapter import Adapter
from loracast.library.index import read_chunks
from loracast.lora.algebra import LoRA, uniform
from loracast.lora.inject import linear_shapes
from loracast.lora.peft_format import read_peft, write_peft_folder
from loracast.reading.outline import read_outline
from loracast.reading.routing import route_adapter
from tiny import (
    gradient,
    make_attention_delta,
    make_hypernet,
    make_model,
    make_sentence_encoder,
    make_task_hypernet,
    make_tokenizer,
)

Files = dict[str, bytes]
HERE = Path(__file__).parent
FILES = HERE.parent / "files"
CHILD_S = 2.0
"""Time after which a parser is stopped here, as its child process is after minutes."""
FEW_CHARACTERS = 20_000
"""Longest text that is also cut into chunks."""


class Target(Protocol):
    """One kind of input."""

    def make(self, rng: random.Random) -> Files:
        """An input: a valid one with some damage."""

    def read(self, folder: Path) -> None:
        """Read the input in a folder. Raises LoracastError where it is refused, and nothing else."""


def files_in(folder: Path) -> Files:
    """The files of a folder that lie in it directly."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def tiny_base(folder: Path) -> Base:
    """The tiny base with its tokenizer and fingerprint, which encoders of tiny hypernetworks need."""
    from loracast.base.load import load_base

    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return load_base(folder, device="cpu", dtype="float32")


class Adapters:
    """Adapters from elsewhere: in PEFT's format, and in ours."""

    def __init__(self, folder: Path):
        ours = write(folder / "library")
        torch.manual_seed(0)
        static = {kind: (torch.randn(2, 1, 48), torch.randn(2, 1, 64)) for kind in ("q_proj",)}
        shared = {
            f"{kind}.shared.{side}": rows
            for kind, pair in static.items()
            for side, rows in zip("ab", pair, strict=True)
        }
        kinds = [ours, *(write(folder / f"library-{s}", 2, storage=s) for s in ("int8", "int4"))]
        self.ours = [files_in(adapter.folder) for adapter in [*kinds, write(folder / "library-static", shared=shared)]]
        self.ours += [files_in(FILES / "adapter-format-1" / storage) for storage in ("bf16", "int8", "text")]
        self.shapes = linear_shapes(make_model())
        self.peft = files_in(write_peft_folder(uniform(ours.lora()).lora.factors, folder / "peft"))
        self.folder = folder

    def make(self, rng: random.Random) -> Files:
        if rng.random() < 0.5:
            return _with_changes(rng, self.peft, self._change)
        files = _with_changes(rng, rng.choice(self.ours), self._change)
        if rng.random() < 0.7:  # so that what is behind the hashes is read too
            _fit_hashes(files)
        return files

    def _change(self, rng: random.Random, name: str, content: bytes) -> bytes:
        if name.endswith(".json"):
            return mutate.json_file(rng, content)
        return (
            mutate.sqlite_file(rng, content, self.folder)
            if name.endswith(".sqlite")
            else mutate.safetensors_file(rng, content)
        )

    def read(self, folder: Path) -> None:
        if any((folder / name).exists() for name in self.peft):
            lora = LoRA(read_peft(folder, self.shapes))
            for name, (a, b) in lora.factors.items():
                assert (b.shape[0], a.shape[1]) == self.shapes[name] and a.shape[0] == b.shape[1], "a shape is wrong"
                assert torch.isfinite(a).all() and torch.isfinite(b.float()).all(), "a number is not finite"
            return
        adapter = Adapter(folder)
        question = "What does the second chunk say?"
        uses: list[Callable[[], object]] = [
            adapter.faults, lambda: adapter.lora([0]), adapter.lora, lambda: route_adapter(adapter, question),
            lambda: read_outline(adapter.index), lambda: [chunk.prompt for chunk in read_chunks(adapter.index)],
        ]  # fmt: skip
        refusals = []
        for use in uses:
            try:
                found = use()
            except LoracastError as error:
                refusals.append(error)
                continue
            if use is adapter.faults and found:
                refusals.append(LoracastError("; ".join(found)))
        if refusals:
            raise refusals[0]
        for pair in adapter.lora().factors.values():
            assert all(torch.isfinite(side.float()).all() for side in pair), "a number is not finite"


def _fit_hashes(files: Files) -> None:
    """Write the hashes of the other files into adapter.json, if it can be read."""
    import hashlib
    import json

    try:
        manifest = json.loads(files["adapter.json"])
        names = {"factors_sha256": "factors.safetensors", "chunks_sha256": "chunks.sqlite"}
        if "static.safetensors" in files:
            names["static_sha256"] = "static.safetensors"
        for key, name in names.items():
            manifest[key] = hashlib.sha256(files[name]).hexdigest()
        files["adapter.json"] = json.dumps(manifest).encode()
    except (KeyError, ValueError, TypeError, RecursionError):
        return


def _with_changes(rng: random.Random, valid: Files, change: Callable[[random.Random, str, bytes], bytes]) -> Files:
    """The files with one or two of them changed, and rarely one missing, empty or exchanged."""
    files = dict(valid)
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice(list(valid))
        match rng.randrange(40):
            case 0:
                files.pop(name, None)
            case 1:
                files[name] = b""
            case 2:
                files[name] = rng.choice(list(valid.values()))
            case _:
                files[name] = change(rng, name, valid[name])
    return files


class Hypernetworks:
    """Hypernetworks of loracast's own: a folder with config.json and model.safetensors."""

    def __init__(self, folder: Path):
        base = tiny_base(folder / "base")
        encoder = make_sentence_encoder(folder / "encoder")
        made = [make_hypernet(base), make_hypernet(base, published=True), make_task_hypernet(base, encoder, 6, 2.0)]
        self.valid = []
        for i, hypernet in enumerate([*made, make_attention_delta(base)]):
            for storage in ("float32", "bfloat16"):
                hypernet.save_pretrained(folder / f"{i}-{storage}", storage=storage)
                files = files_in(folder / f"{i}-{storage}")
                files.pop("README.md")
                self.valid.append(files)

    def make(self, rng: random.Random) -> Files:
        return _with_changes(
            rng, rng.choice(self.valid),
            lambda rng, name, content: (mutate.json_file if name.endswith(".json") else mutate.safetensors_file)(rng, content),
        )  # fmt: skip

    def read(self, folder: Path) -> None:
        hypernet = Hypernetwork.from_pretrained(folder)
        assert len(hypernet.id) > 8 and hypernet.config.target.modules, "a hypernetwork without an id or a target"


class Checkpoints:
    """Published checkpoints, which are pickles in a zip archive."""

    def __init__(self, folder: Path):
        published = FILES / "published"
        tasks = [published / "text-to-lora" / name for name in ("variant-l", "variant-m")]
        wanted = ("hypermod.pt", "args.yaml", "adapter_config.json")
        self.tasks = [{name: (place / name).read_bytes() for name in wanted} for place in tasks]
        self.documents = [
            {"pytorch_model.bin": (published / "doc-to-lora" / name / "pytorch_model.bin").read_bytes()}
            for name in ("one-layer-reader", "per-layer-reader")
        ]
        config = AutoConfig.from_pretrained(published / "doc-to-lora" / "one-layer-reader")
        self.facts = BaseFacts(config, make_tokenizer(), Fingerprint("tiny", "c" * 16, "n" * 16, "m" * 16))

    def make(self, rng: random.Random) -> Files:
        return _with_changes(rng, rng.choice(self.documents if rng.random() < 0.1 else self.tasks), self._change)

    def _change(self, rng: random.Random, name: str, content: bytes) -> bytes:
        if name.endswith((".pt", ".bin")):
            return mutate.zip_file(
                rng, content,
                lambda rng, member, data: (mutate.pickle_file if member.endswith(".pkl") else mutate.damaged)(rng, data),
            )  # fmt: skip
        return mutate.json_file(rng, content) if name.endswith(".json") else mutate.damaged(rng, content)

    def read(self, folder: Path) -> None:
        file = next((folder / name for name in ("pytorch_model.bin", "hypermod.pt") if (folder / name).exists()), None)
        if file is None:
            return
        hypernet = convert(file, self.facts)
        if file.name == "hypermod.pt":
            with tempfile.TemporaryDirectory() as place:
                hypernet.save_pretrained(Path(place), storage="float32")
                Hypernetwork.from_pretrained(place)


class Documents:
    """Files of every kind that is read; PDF, DOCX and HTML are parsed in this process instead of a child."""

    def __init__(self, folder: Path):
        names = (
            "report.pdf",
            "half_scanned.pdf",
            "owner_locked.pdf",
            "letter.docx",
            "page.html",
            "notes.txt",
            "guide.md",
            "parts.csv",
            "utf16.txt",
        )
        self.valid = {name: (FILES / name).read_bytes() for name in names}
        self.valid |= {
            f"plain-{name}": mutate.plain_pdf(content) for name, content in self.valid.items() if name.endswith(".pdf")
        }
        gradient().save(folder / "picture.png")
        self.valid["picture.png"] = (folder / "picture.png").read_bytes()
        self.tokenizer = make_tokenizer()

    def make(self, rng: random.Random) -> Files:
        kind = rng.choices((".pdf", ".docx", ".html", ".txt", ".md", ".csv", ".png"), (30, 15, 25, 8, 4, 8, 10))[0]
        name = rng.choice([name for name in self.valid if name.endswith(kind)])
        content = self.valid[name]
        for _ in range(rng.choice((1, 1, 2, 4))):
            content = self._change(rng, name, content)
        return {name: content}

    def _change(self, rng: random.Random, name: str, content: bytes) -> bytes:
        if name.endswith(".pdf"):
            return mutate.pdf_file(rng, content)
        if name.endswith(".docx"):
            try:
                return mutate.zip_file(rng, content, lambda rng, member, data: mutate.markup(rng, data))
            except Exception:  # an earlier change has damaged the archive
                return mutate.damaged(rng, content)
        return mutate.markup(rng, content) if name.endswith(".html") else mutate.damaged(rng, content)

    def read(self, folder: Path) -> None:
        (path,) = folder.iterdir()
        if path.suffix == ".png":
            images.read_image_file(path)
            return
        with unittest.mock.patch.object(read, "parse_in_child", parse_here):
            document = read_document(path)
        assert document.text.strip() and len(document.title) < 1000, "an empty text, or a title without end"
        document.text.encode()
        if len(document.text) <= FEW_CHARACTERS:
            cut = split_text(document.text, self._encode, max_tokens=64, title=document.title)
            assert cut and all(one.text.strip() and one.n_tokens <= 64 for one in cut), "an empty or too long chunk"

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]


def parse_here(kind: str, data: bytes, label: str, limits: Limits) -> Parsed:
    """What the child process of the parsers does, in this one: a lack of memory, stack or time is an error too."""
    try:
        with at_most(CHILD_S):
            return worker.parse(kind, data, label, limits)
    except (MemoryError, RecursionError, OutOfTime) as error:
        raise DocumentError(f"{label}: {type(error).__name__}") from error


def fresh(folder: Path, files: Files) -> None:
    """Put the files of an input into a folder, in place of all that is there."""
    if folder.exists():
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in files:
                path.unlink()
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
