"""Opens checkpoints that SakanaAI's Doc-to-LoRA and Text-to-LoRA published: finds, converts and keeps them.

They are pickles, which are read once and without running their code (hypernets/pickled.py); what is kept is a
hypernetwork of loracast's own in safetensors.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loracast.base.chat import ChatFormat
from loracast.base.fingerprint import Fingerprint, fingerprint_of_files
from loracast.base.load import Base, load_tokenizer
from loracast.errors import BaseModelError, HypernetworkError
from loracast.files import file_sha256, move_unless_there
from loracast.hub import folder_of
from loracast.hypernets.convert_doc import doc_to_lora
from loracast.hypernets.convert_text import text_to_lora
from loracast.hypernets.pickled import read_pickled
from loracast.hypernets.protocol import Hypernetwork
from loracast.hypernets.store import save_pretrained
from loracast.paths import converted_dir

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
    def of(cls, base: Base) -> BaseFacts:
        """Those of a loaded base."""
        return cls(base.model.config, base.tokenizer, base.fingerprint)

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


def published_file(source: str | Path) -> Path | None:
    """The pickled file of a published checkpoint at a folder or hub repository; None where there is none.

    Raises:
        HypernetworkError: the place cannot be reached, or holds several.
    """
    return locate(source)[1]


def locate(source: str | Path) -> tuple[Path, Path | None]:
    """The folder of a hypernetwork or of a published checkpoint, and the latter's pickled file; errors as above."""
    folder = folder_of(source, (*OWN_FILES, DOC_FILE, *TEXT_FILES), "hypernetwork", HypernetworkError)
    if (folder / OWN_FILES[1]).is_file():
        return folder, None
    found = [path for name in (DOC_FILE, TEXT_FILES[0]) for path in sorted(folder.rglob(name))]
    if len(found) > 1:
        places = ", ".join(str(path.parent.relative_to(folder)) for path in found)
        raise HypernetworkError(f"{source} holds several checkpoints, in {places}: give one of these folders")
    if not found and not Path(source).is_dir():
        _refuse_whole_repository(str(source))
    return folder, found[0] if found else None


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
    folder = converted_dir() / hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as temporary:
            built = Path(temporary) / folder.name
            save_pretrained(convert(file, base), built, storage="float32")
            move_unless_there(built, folder)
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
