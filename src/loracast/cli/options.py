"""Options that several commands share, each defined once, and loading the models that they name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loracast.base.embedded import DEFAULT_BASE
from loracast.cli.terminal import say, stderr
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.errors import BaseModelError
from loracast.files import library_dir
from loracast.library.library import Library as AdapterLibrary
from loracast.library.manifest import NAME, check_name
from loracast.lora.quantize import DEFAULT_STORAGE, Storage
from loracast.reading.routing import DEFAULT_ROUTE, patterns_in
from loracast.text import is_unicode

if TYPE_CHECKING:
    from loracast.answering.model import Model
    from loracast.base.load import Base as LoadedBase
    from loracast.library.adapter import Adapter as OpenAdapter
    from loracast.serving.client import Loaded


def parse_route(text: str | int) -> int | None:
    """The number of chunks that a question uses, from 1 on; None for "all"."""
    text = str(text).strip().lower()
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter("give the number of chunks, from 1 on, or 'all'")
    return int(text)


def check_device(device: str | None) -> str | None:
    if device is not None and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise typer.BadParameter("give cpu, cuda, cuda:N or mps")
    return device


def distinct(names: list[str] | None) -> list[str]:
    """The names without repetitions, in order: an adapter that is given twice must not be added twice."""
    return list(dict.fromkeys(names or []))


def check_question(question: str) -> str:
    """The question. Raises BadParameter where it is empty or was typed in another encoding than the terminal's."""
    if not question.strip():
        raise typer.BadParameter("the question is empty")
    if not is_unicode(question):
        raise typer.BadParameter("the question is not valid UTF-8")
    return question


File = Annotated[Path | None, typer.Option(exists=True, dir_okay=False)]
"""An option that names a file; the text of its help is added where it is used."""
Count = Annotated[int, typer.Option(min=1)]
OptionalCount = Annotated[int | None, typer.Option(min=1)]

Adapter = Annotated[str, "Name of the adapter; NAME@HASH for an older version."]
Question = Annotated[str, typer.Argument(metavar="QUESTION", callback=check_question, help="The question.")]
Replace = Annotated[bool, "Replace an adapter that has this name already."]
Again = Annotated[bool, "Of a folder, also learn files that have not changed or that failed before."]
Rank = Annotated[OptionalCount, "Compress the LoRA to at most this rank, and report how much is lost."]
Base = Annotated[str | None, "Language model: an embedded base, a local folder or a hub id."]
Hypernetwork = Annotated[str | None, "Folder or hub id of a hypernetwork; the one shipped for the base by default."]
Encoder = Annotated[str | None, "Folder or hub id of the hypernetwork's encoder, if it has moved since training."]
Library = Annotated[
    AdapterLibrary,
    typer.Option(
        parser=AdapterLibrary.of, metavar="<path>", default_factory=library_dir, show_default="your own library",
        help="Folder of adapters.",
    ),
]  # fmt: skip
Device = Annotated[
    str | None, typer.Option(callback=check_device), "cpu, cuda, cuda:N or mps; the fastest there is by default."
]
Json = Annotated[bool, "Print one JSON object on standard output."]
Adapters = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", callback=distinct),
    "Adapter to answer with, or a pattern of documents' names such as 'manuals-*'. Repeatable.",
]
Route = Annotated[
    int | None,
    typer.Option(
        "--route", parser=parse_route, metavar="N|all",
        help="How many chunks answer a question: from each named document, and from all others together.",
    ),
]  # fmt: skip
Local = Annotated[bool, "Load the models in this process, even if a server that has them is running."]
MaxTokens = Annotated[Count, "Maximum tokens of an answer."]


@dataclass(frozen=True, kw_only=True)
class Naming:
    """Name of a new adapter, and whether it may replace an adapter that has the name."""

    name: str | None = None
    """Name of the new adapter, in lower case and without blanks; made from its source by default."""
    replace: Replace = False

    def __post_init__(self) -> None:
        """Write capitals and blanks of a name as adapters' names are written, and say so."""
        if self.name is not None and not NAME.fullmatch(self.name):
            written = "-".join(self.name.lower().split())
            if NAME.fullmatch(written):
                say(f"{self.name!r} is written {written!r}: names have lower-case letters and no blanks")
                object.__setattr__(self, "name", written)

    def checked(self, library: AdapterLibrary, default: str, source_sha256: str | None = None) -> str:
        """The name, or the default one. A taken name is refused here, before a model is loaded for nothing.

        Args:
            source_sha256: an adapter that was made from this source may have the name already.
        """
        name = check_name(self.name or default)
        if not self.replace:
            library.check_free(name, unless_from=source_sha256)
        return name


@dataclass(frozen=True, kw_only=True)
class BaseName:
    """Which base, and where it is to run."""

    base: Base = None
    chat_template: str | None = None
    """Chat template for a base without one: a file with a template in Jinja, or 'plain'."""
    device: Device = None


@dataclass(frozen=True, kw_only=True)
class BaseChoice(BaseName):
    """Which base to load, and how."""

    device_map: str | None = None
    """auto spreads a base that is too large for one GPU over all of them; in place of --device."""
    dtype: str | None = None
    """Type of the weights: bfloat16, float16 or float32; the fastest on the device by default."""
    quantize: str | None = None
    """Keep the weights in 8bit or 4bit; it needs `pip install 'loracast[quantize]'`."""

    @property
    def how(self) -> dict[str, Any]:
        """How the base is loaded, as `loracast.load` and `load_base` take it."""
        options = ("chat_template", "device", "device_map", "dtype", "quantize")
        return {option: getattr(self, option) for option in options}


@dataclass(frozen=True, kw_only=True)
class Models(BaseChoice):
    """Which base and hypernetwork to load, and where they run."""

    hypernetwork: Hypernetwork = None


@dataclass(frozen=True, kw_only=True)
class Learning(Models):
    """How documents are learned, and where their adapters are kept."""

    chunk_tokens: Annotated[
        int | None,
        typer.Option(min=16, show_default=f"the hypernetwork's own, {DEFAULT_CHUNK_TOKENS} for the shipped one"),
    ] = None
    """Maximum tokens of a chunk."""
    storage: Annotated[Storage | None, typer.Option(show_default=DEFAULT_STORAGE)] = None
    """How factors are stored: int4, int8 (a fifth larger), bf16 (over twice as large), text (not stored)."""
    library: Library

    @property
    def document_storage(self) -> Storage:
        return self.storage or DEFAULT_STORAGE


@dataclass(frozen=True, kw_only=True)
class Seeing:
    """What says what images show."""

    encoder: Annotated[
        str | None,
        "Vision model for images: folder or hub id; EfficientNet-lite0, or what the labels are for, by default.",
    ] = None
    labels: Annotated[
        str | None, "Labels for images: a file that `train labels` wrote, or for CLIP or SigLIP text, a name a line."
    ] = None

    @property
    def options(self) -> dict[str, Any]:
        """The same as `loracast.load` takes it."""
        return {"image_encoder": self.encoder, "image_labels": self.labels}


@dataclass(frozen=True, kw_only=True)
class Answering(BaseChoice):
    """Which adapters answer, and how the answer is generated."""

    adapters: Adapters = None
    all_documents: Annotated[bool, "Answer from whichever documents of the library match the question."] = False
    tag: Annotated[str, "Answer from whichever documents with this tag match the question."] = ""
    always: Annotated[
        bool, typer.Option("--always", "--free", help="Answer with the documents whatever the reader says.")
    ] = False
    strict: Annotated[bool, "Say so where no document answers, also where a pattern or --all chooses them."] = False
    route: Route = DEFAULT_ROUTE
    max_tokens: MaxTokens = 128
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0
    """Sample from the likeliest tokens of this total probability."""
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1)] = None
    """Random seed for sampling."""
    style: Annotated[str, "How to answer, in words; cast into a task adapter that is added (docs/memory.md)."] = ""
    system: Annotated[str | None, "Text of the system turn; an empty one by default."] = None
    hypernetwork: str | None = None
    """For adapters that keep only their text: the hypernetwork that cast them."""
    local: Local = False
    library: Library

    @property
    def chosen(self) -> list[str]:
        """The adapters that are named, and the patterns of documents among which the question chooses."""
        wide = [*patterns_in(self.adapters or (), self.tag), *["*"] * self.all_documents]
        return list(dict.fromkeys([*(self.adapters or ()), *wide]))


@contextmanager
def loading(device: str | None) -> Iterator[Callable[[str], None]]:
    """Show a spinner until the block ends or prints its first message (pip draws a bar of its own)."""
    with stderr().status("loading") as status:

        def report(text: str) -> None:
            status.stop()
            say(text)

        if device is not None and device.startswith("cuda"):
            import torch

            if not torch.cuda.is_available():
                raise BaseModelError("PyTorch finds no CUDA device on this machine; give --device cpu, or none")
        yield report


def open_model(
    models: Models | Answering, library: AdapterLibrary | None = None, *, eager: bool = True, **more: Any
) -> Model:
    """Load the base with its hypernetworks; further arguments are those of `loracast.load`."""
    with loading(models.device) as report:
        from loracast.answering.model import load

        return load(models.base, models.hypernetwork, library=library, **models.how, say=report, eager=eager, **more)


def open_base(choice: BaseChoice) -> LoadedBase:
    with loading(choice.device) as report:
        from loracast.base.load import load_base

        return load_base(choice.base, **choice.how, say=report)


def base_of(adapters: Sequence[OpenAdapter]) -> str | None:
    """The name of the base that adapters were made for; None for the default one.

    Another machine may have loaded the default base by another name: its fingerprint tells.

    Raises:
        BaseModelError: they were made for several.
    """
    bases = {(one.config, one.norms): one.base for one in (adapter.manifest.made_for for adapter in adapters)}
    if len(bases) > 1:
        raise BaseModelError(f"these adapters were made for several bases, {', '.join(sorted(bases.values()))}")
    for key, name in bases.items():
        if name != DEFAULT_BASE and key != _default_fingerprint():
            return name
    return None


def _default_fingerprint() -> tuple[str, str]:
    """The hashes of shapes and norms of the default base, from the config of what ships for it; torch is not needed."""
    stored = files("loracast") / "pretrained" / "doc-smollm2-135m" / "config.json"
    made_for = json.loads(stored.read_text(encoding="utf-8"))["made_for"]
    return made_for["config"], made_for["norms"]


def what_loads(choice: BaseChoice, library: AdapterLibrary, hypernetworks: Mapping[str, str | None]) -> Loaded:
    """Describe what a command with these options loads, for comparison with a running server.

    Args:
        hypernetworks: by modality, as the user gave them; None for the one that ships.
    """
    from loracast.serving.client import Loaded, source_key

    template = ""
    if choice.chat_template:
        from loracast.base.load import template_text

        template = template_text(choice.chat_template)
    given = {modality: source_key(where) for modality, where in hypernetworks.items()}
    how = {option: value for option, value in choice.how.items() if value is not None and option != "chat_template"}
    return Loaded(str(library.folder.resolve()), source_key(choice.base), given, template, how)
