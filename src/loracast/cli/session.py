"""Loading models and learning documents, with something to look at meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracast.base.embedded import DEFAULT_BASE
from loracast.cli.options import BaseChoice, Models
from loracast.cli.output import progress_bar, say, stderr, warn
from loracast.errors import BaseModelError

if TYPE_CHECKING:
    from loracast.base.load import Base
    from loracast.documents import Document
    from loracast.hypernets.protocol import Modality
    from loracast.library.adapter import Adapter
    from loracast.model import Model
    from loracast.serving.found import Loaded, Running


@contextmanager
def loading(device: str | None) -> Iterator[Callable[[str], None]]:
    """A spinner on a terminal; it gives way to the first message (pip draws a bar of its own)."""
    with stderr().status("loading") as status:

        def tell(text: str) -> None:
            status.stop()
            say(text)

        if device is not None and device.startswith("cuda"):
            import torch

            if not torch.cuda.is_available():
                raise BaseModelError("PyTorch finds no CUDA device on this machine; give --device cpu, or none")
        yield tell


def open_model(models: Models, library: Path | None = None) -> Model:
    """Load the base with its hypernetwork, to learn documents."""
    with loading(models.device) as tell:
        from loracast.model import load

        return load(
            models.base,
            models.hypernetwork,
            library=library,
            **models.how,
            say=tell,
        )


def open_base(choice: BaseChoice) -> Base:
    with loading(choice.device) as tell:
        from loracast.base.load import load_base

        return load_base(choice.base, **choice.how, say=tell)


def base_of(adapters: Sequence[Adapter]) -> str | None:
    """The base that adapters were made for, under the name that it was loaded by; None for the default one.

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


def what_loads(choice: BaseChoice, library: Path, hypernetworks: Mapping[str, str | None]) -> Loaded:
    """What a command with these options loads, to be compared with what a running server has loaded.

    Args:
        hypernetworks: by modality, as the user gave them; None for the one that ships.
    """
    from loracast.serving.found import Loaded, source_key

    template = ""
    if choice.chat_template:
        from loracast.base.load import template_text

        template = template_text(choice.chat_template)
    given = {modality: source_key(where) for modality, where in hypernetworks.items()}
    how = {option: value for option, value in choice.how.items() if value is not None and option != "chat_template"}
    return Loaded(str(library.resolve()), source_key(choice.base), given, template, how)


def server_for(
    choice: BaseChoice, library: Path, modality: Modality, hypernetwork: str | None, *, local: bool
) -> Running | None:
    """A running server that does what a command with these options would do by itself; None also with --local."""
    if local:
        return None
    from loracast.serving.found import find

    return find(what_loads(choice, library, {modality: hypernetwork}))


def learn_visibly(model: Model, document: Document, name: str, **options: Any) -> Adapter:
    """Learn a document (options as in `Model.learn`) with a progress bar; its warnings go to standard error."""
    for warning in document.warnings:
        warn(warning)
    with progress_bar("chunks", f"learning {name}") as progress:
        return model.learn(document, name, progress=progress, **options)
