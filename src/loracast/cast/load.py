"""Loads a hypernetwork, checks what it casts, and binds it to a base; documents, tasks and images all come this way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from loracast.base.embedded import DEFAULT_BASE
from loracast.base.fingerprint import Fingerprint
from loracast.base.load import Base
from loracast.base.packages import Say
from loracast.cast.published import BaseFacts, base_named_in, converted, locate
from loracast.errors import BaseModelError, HypernetworkError
from loracast.hypernets.protocol import Caster, Hypernetwork, Modality
from loracast.hypernets.store import from_pretrained, read_made_for

SHIPPED: dict[Modality, str] = {
    "document": "doc-smollm2-135m",
    "task": "text-smollm2-135m",
    "image": "image-smollm2-135m",
}
"""Hypernetworks inside this package, all for the embedded base."""
_TRAINED_BY: dict[Modality, str] = {"document": "doc", "task": "text", "image": "image"}
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


@dataclass(frozen=True)
class Found:
    """A hypernetwork that a user named, looked up once: where its files lie on this machine."""

    name: str
    """As the user gave it."""
    folder: Path
    published: Path | None
    """The pickled file, if it is a published checkpoint."""

    def __str__(self) -> str:
        return self.name


Source = str | Path | Found | Hypernetwork
"""A hypernetwork; or its folder or hub repository, which may have been looked up already."""


def find_hypernetwork(source: Source | None) -> Found | Hypernetwork | None:
    """Look up the folder or hub repository of a hypernetwork, and fetch it where it is not here yet.

    Raises:
        HypernetworkError: there is none.
    """
    if source is None or isinstance(source, (Found, Hypernetwork)):
        return source
    return Found(str(source), *locate(source))


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
        return from_pretrained(given.folder)
    facts = BaseFacts.of(base) if isinstance(base, Base) else BaseFacts.read(base_named_in(given.published))
    return from_pretrained(converted(given.published, facts))


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
