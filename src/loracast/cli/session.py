"""Loading models and learning documents, with something to look at meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracast.base.embedded import DEFAULT_BASE
from loracast.cli.options import Answering, BaseChoice, Models
from loracast.cli.output import progress_bar, say, stderr, warn
from loracast.errors import BaseModelError

if TYPE_CHECKING:
    from loracast.base.generate import Sampling
    from loracast.base.load import Base
    from loracast.documents import Document
    from loracast.library.adapter import Adapter
    from loracast.library.routing import Route
    from loracast.model import Model


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
            device=models.device,
            chat_template=models.chat_template,
            say=tell,
        )


def open_base(choice: BaseChoice) -> Base:
    with loading(choice.device) as tell:
        from loracast.base.load import load_base

        return load_base(choice.base, device=choice.device, chat_template=choice.chat_template, say=tell)


def open_answerer(answering: Answering) -> tuple[Model, dict[str, Adapter | str], Sampling]:
    """Load the base alone, and what it answers with: adapters by name, and patterns as they are.

    A wrong name, and a pattern or a tag without documents, is reported before a model is loaded.
    """
    from loracast.library.library import open_adapter
    from loracast.library.wide_route import check_patterns, patterns_in

    patterns = patterns_in(answering.chosen)
    names = [name for name in answering.chosen if name not in patterns]
    found = [open_adapter(answering.library, name) for name in names]
    if patterns:
        check_patterns(answering.library, patterns, answering.tag)
    with loading(answering.device) as tell:
        from loracast.base.generate import Sampling
        from loracast.model import load

        answerer = load(
            answering.base or base_of(found),
            answering.hypernetwork,
            library=answering.library,
            device=answering.device,
            chat_template=answering.chat_template or next((a.manifest.made_for.chat_template for a in found), ""),
            say=tell,
            eager=False,
        )
    opened: dict[str, Adapter | str] = {}
    versions = set()
    for name in names:
        adapter = answerer.adapter(name)
        if adapter.version not in versions:  # NAME and NAME@HASH may be one version
            opened[name] = adapter
        versions.add(adapter.version)
    opened |= {pattern: pattern for pattern in patterns}
    sampling = Sampling(answering.max_tokens, 0, answering.temperature, answering.top_p, answering.seed)
    return answerer, opened, sampling


def base_of(adapters: Sequence[Adapter]) -> str | None:
    """The base that adapters were made for, under the name that it was loaded by; None for the default one.

    Raises:
        BaseModelError: they were made for several.
    """
    bases = {adapter.manifest.made_for.config: adapter.manifest.made_for.base for adapter in adapters}
    if len(bases) > 1:
        raise BaseModelError(f"these adapters were made for several bases, {', '.join(sorted(bases.values()))}")
    name = next(iter(bases.values()), None)
    return None if name == DEFAULT_BASE else name


def say_sources(routed: Sequence[tuple[Adapter, Route]], n_named: int) -> None:
    """Say which chunks an answer from the library came from.

    Args:
        routed: what the answer was given, the adapters that the user named first.
        n_named: how many those are.
    """
    from loracast.library.wide_route import sources

    for source in sources(routed[n_named:]):
        say(f"(from {source})")
    if len(routed) == n_named:
        say("(no document of the library matches the question: the answer is not from it)")


def say_unused(routed: Sequence[tuple[Adapter, Route]]) -> None:
    """Say which documents the question is not about, so that their adapters did not answer."""
    for adapter, route in routed:
        if route.is_empty:
            say(f"({adapter.name} does not speak of this: the answer is not from it; --always asks it all the same)")


def learn_visibly(model: Model, document: Document, name: str, **options: Any) -> Adapter:
    """Learn a document (options as in `Model.learn`) with a progress bar; its warnings go to standard error."""
    for warning in document.warnings:
        warn(warning)
    with progress_bar("chunks", f"learning {name}") as progress:
        return model.learn(document, name, progress=progress, **options)
