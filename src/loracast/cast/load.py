"""Loads a hypernetwork, checks what it casts, and binds it to a base; documents and tasks both come this way.

Checkpoints that SakanaAI's Doc-to-LoRA and Text-to-LoRA published are found, converted once, and kept. They are
pickles, which are read once and without running their code (hypernets/published.py); what is kept is a hypernetwork of
loracast's own in safetensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from loracast.base.chat import ChatFormat
from loracast.base.embedded import DEFAULT_BASE, Say
from loracast.base.fingerprint import Fingerprint, fingerprint_of_files
from loracast.base.load import Base, load_tokenizer
from loracast.errors import BaseModelError, HypernetworkError
from loracast.files import cache_dir, file_sha256, folder_of, move_unless_there, work_folder
from loracast.hypernets.protocol import Caster, Hypernetwork
from loracast.hypernets.published import doc_to_lora, read_pickled, text_to_lora
from loracast.hypernets.store import Modality, read_made_for

OWN_FILES = ("config.json", "model.safetensors")
DOC_FILE = "pytorch_model.bin"
TEXT_FILES = ("hypermod.pt", "args.yaml", "adapter_config.json")
_REVISION = 1
"""Counts the changes of what a conversion gives; a kept one of an earlier revision is made again."""


@dataclass(frozen=True)
class BaseFacts:
    """What a conversion has to know of the base."""

    config: Any
    """In transformers' form."""
    tokenizer: Any
    fingerprint: Fingerprint

    @classmethod
    def read(cls, name: str) -> BaseFacts:
        """Those of a base in a folder or hub repository, whose weights are looked at and not loaded."""
        from transformers import AutoConfig

        files = ("config.json", "tokenizer*", "chat_template*", "special_tokens_map.json", "*.safetensors")
        folder = folder_of(name, files, "base", BaseModelError)
        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise BaseModelError(f"the base {name!r} has no config of transformers ({error})") from error
        return cls(config, load_tokenizer(folder), fingerprint_of_files(config, folder, name))


@dataclass(frozen=True)
class Found:
    """A hypernetwork that a user named, looked up once: where its files lie on this machine."""

    name: str
    """As the user gave it."""
    folder: Path
    published: Path | None = None
    """The pickled file, if it is a published checkpoint."""

    def __str__(self) -> str:
        return self.name


def locate(source: str | Path) -> Found:
    """Look up a hypernetwork or a published checkpoint in a folder or hub repository, and fetch it if need be.

    Raises:
        HypernetworkError: the place cannot be reached, or holds several.
    """
    folder = folder_of(source, (*OWN_FILES, DOC_FILE, *TEXT_FILES), "hypernetwork", HypernetworkError)
    if (folder / OWN_FILES[1]).is_file():
        return Found(str(source), folder)
    found = [path for name in (DOC_FILE, TEXT_FILES[0]) for path in sorted(folder.rglob(name))]
    if len(found) > 1:
        places = ", ".join(str(path.parent.relative_to(folder)) for path in found)
        raise HypernetworkError(f"{source} holds several checkpoints, in {places}: give one of these folders")
    if not found and not Path(source).is_dir():
        _refuse_whole_repository(str(source))
    return Found(str(source), folder, *found)


def _refuse_whole_repository(repository: str) -> None:
    """Raise HypernetworkError where a hub repository has its checkpoints in folders: one would fetch gigabytes."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        files = [Path(name) for name in HfApi().list_repo_files(repository)]
    except (HfHubHTTPError, HFValidationError, OSError):
        return  # offline: what is in the cache has no checkpoint, which the reader of hypernetworks says
    folders = sorted({str(file.parent) for file in files if file.name in (DOC_FILE, TEXT_FILES[0])})
    if folders:
        raise HypernetworkError(
            f"the repository {repository!r} holds checkpoints in {', '.join(folders)}: give one of them, such as "
            f"{repository}/{folders[0]}"
        )


def base_named_in(file: Path) -> str:
    """The base that a published checkpoint says it was made for. Raises HypernetworkError where it says none."""
    if file.name == DOC_FILE:
        name = read_pickled(file).get("base_model_name_or_path")
    else:
        name = _text_settings(file)[0].get("model_dir")
    if not isinstance(name, str):
        raise HypernetworkError(f"{file} does not say which base it was made for: give it with --base")
    return name


def convert(file: Path, base: BaseFacts, encoder: str | None = None) -> Hypernetwork:
    """The hypernetwork in the pickled file of a published checkpoint.

    Args:
        encoder: the text encoder of a Text-to-LoRA, if it is not to be the one that the checkpoint names.

    Raises:
        HypernetworkError: it cannot be read, is not supported, or was made for another base.
    """
    hypernet: Hypernetwork
    if file.name == DOC_FILE:
        before, after = ChatFormat(base.tokenizer).frame()
        hypernet = doc_to_lora(read_pickled(file), base.config, tuple(before), tuple(after))
    else:
        args, adapter = _text_settings(file)
        args |= {"emb_model": encoder} if encoder else {}
        hypernet = text_to_lora(read_pickled(file), args, adapter, base.config)
    hypernet.made_for = base.fingerprint
    hypernet.provenance = {"converted_from": {"file": file.name, "sha256": file_sha256(file)}}
    return hypernet


def converted(file: Path, base: BaseFacts) -> Path:
    """The folder of the converted hypernetwork in the cache; it is converted where it is not there yet."""
    made_from = [_REVISION, file_sha256(file), base.fingerprint.config, base.fingerprint.norms]
    folder = cache_dir("converted") / hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with work_folder(folder.parent, "new") as work:
            convert(file, base).save_pretrained(work / folder.name, storage="float32")
            move_unless_there(work / folder.name, folder)
    return folder


def _text_settings(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings in args.yaml, and PEFT's config, beside a hypermod.pt."""
    try:
        args = yaml.safe_load((file.parent / TEXT_FILES[1]).read_text(encoding="utf-8"))
        adapter = json.loads((file.parent / TEXT_FILES[2]).read_text(encoding="utf-8"))
        return dict(args), dict(adapter)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise HypernetworkError(
            f"{file} needs {TEXT_FILES[1]} and {TEXT_FILES[2]} beside it, and one is missing or damaged ({error})"
        ) from error


SHIPPED: dict[Modality, str] = {
    "document": "doc-smollm2-135m",
    "task": "text-smollm2-135m",
}
"""Hypernetworks inside this package, all for the embedded base."""
_TRAINED_BY: dict[Modality, str] = {"document": "doc", "task": "text"}
"""The training command for each modality."""


def shipped_hypernetwork(base: Base | str, modality: Modality = "document") -> Path:
    """The folder of the hypernetwork that ships for a base, found by an embedded base's name or by fingerprint.

    Raises:
        HypernetworkError: none ships for this base.
    """
    folder = Path(str(files("loracast") / "pretrained" / SHIPPED[modality]))
    name = base if isinstance(base, str) else base.name
    if name == DEFAULT_BASE:
        return folder
    if isinstance(base, Base):
        made_for = read_made_for(folder)
        if (made_for.config, made_for.norms) == (base.fingerprint.config, base.fingerprint.norms):
            return folder
    raise HypernetworkError(
        f"no hypernetwork is shipped for the base {name!r}: train one (`loracast train {_TRAINED_BY[modality]} --base "
        "FOLDER`, with the base's folder or hub id) and give it with --hypernetwork, or hypernetwork= from Python"
    )


Source = str | Path | Found | Hypernetwork
"""A hypernetwork; or its folder or hub repository, which may have been looked up already."""


def find_hypernetwork(source: Source | None) -> Found | Hypernetwork | None:
    """Look up the folder or hub repository of a hypernetwork, and fetch it where it is not here yet.

    Raises:
        HypernetworkError: there is none.
    """
    if source is None or isinstance(source, (Found, Hypernetwork)):
        return source
    return locate(source)


def check_default_base(hypernetworks: Iterable[Source | None]) -> None:
    """Check that each hypernetwork is made for the default base, before that is loaded.

    Raises:
        BaseModelError: one of them needs another base, which its user did not name; nothing is fetched then.
    """
    ours = read_made_for(shipped_hypernetwork(DEFAULT_BASE))
    for given in map(find_hypernetwork, hypernetworks):
        if isinstance(given, Found) and given.published:
            name, is_ours = base_named_in(given.published), False
        else:
            made_for = _made_for(given)
            if made_for is None:
                continue
            name = made_for.base
            is_ours = name == DEFAULT_BASE or (made_for.config, made_for.norms) == (ours.config, ours.norms)
        if not is_ours:
            raise BaseModelError(
                f"the hypernetwork {given if isinstance(given, Found) else 'that is given'} was made for the base "
                f"{name!r}, not for {DEFAULT_BASE}, which is used if no base is given: give that base (--base {name})"
            )


def trained_template(hypernetworks: Iterable[Source | None]) -> str:
    """The chat template that a hypernetwork's base was given in training, in place of its own; "" where none was."""
    for given in map(find_hypernetwork, hypernetworks):
        made_for = _made_for(given)
        if made_for is not None and made_for.chat_template:
            return made_for.chat_template
    return ""


def _made_for(given: Found | Hypernetwork | None) -> Fingerprint | None:
    """The base that a hypernetwork was made for, as far as that is known without reading a published checkpoint."""
    if isinstance(given, Hypernetwork):
        return given.made_for
    return None if given is None or given.published else read_made_for(given.folder)


def open_hypernetwork(source: Source, base: Base | Callable[[], Base] | None = None) -> Hypernetwork:
    """Read a hypernetwork from a folder or hub repository; a published checkpoint is converted first, once.

    Args:
        source: OWNER/NAME/FOLDER for one of several in a repository.
        base: the base that a published checkpoint is to work on, if it is loaded already.
    """
    given = find_hypernetwork(source)
    assert given is not None
    if isinstance(given, Hypernetwork):
        return given
    if given.published is None:
        return Hypernetwork.from_pretrained(given.folder)
    if isinstance(base, Base):
        facts = BaseFacts(base.model.config, base.tokenizer, base.fingerprint)
    else:
        facts = BaseFacts.read(base_named_in(given.published))
    return Hypernetwork.from_pretrained(converted(given.published, facts))


def load_caster(
    source: Source,
    modality: Modality,
    base: Base | Callable[[], Base] | None = None,
    *,
    encoder: str | None = None,
    say: Say = lambda text: None,
) -> Caster:
    """Read a hypernetwork, check that it casts this modality, and bind it to a base.

    Args:
        source: a folder or hub repository, or a hypernetwork that has been read already, which stays on its GPU.
        base: a loaded base; or a function that loads it, called only if the hypernetwork's encoder is the base.
        encoder: the encoder's folder or hub id, if another one than in training.

    Raises:
        HypernetworkError, EncoderError: it cannot be read, casts something else, or its encoder cannot be loaded.
        BaseModelError: it belongs to another base.
    """
    hypernetwork = open_hypernetwork(source, base)
    if hypernetwork.modality != modality:
        what = "the hypernetwork" if isinstance(source, Hypernetwork) else source
        raise HypernetworkError(
            f"{what} casts {hypernetwork.modality}s, and {modality}s are wanted: give a hypernetwork that `loracast "
            f"train {_TRAINED_BY[modality]}` made"
        )
    if callable(base):
        base = base() if hypernetwork.needs_base or encoder == "base" else None
    if base is not None and hypernetwork.needs_base and next(hypernetwork.parameters()).device.type == "cpu":
        hypernetwork.to(base.device)
    return hypernetwork.bind(base, encoder=encoder, say=say)
