"""Loading models and learning documents with something to look at meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loracast.cli.output import printable, say, stderr, warn
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.errors import BaseModelError
from loracast.lora.quantize import DEFAULT_STORAGE, Storage

if TYPE_CHECKING:
    from loracast.documents import Document
    from loracast.library.adapter import Adapter
    from loracast.model import Answerer, Model


def open_model(base: str | None, hypernetwork: str | None, library: Path | None, device: str | None) -> Model:
    """The base with its hypernetwork: what learns."""
    with loading(device) as tell:
        from loracast.model import load

        return load(base, hypernetwork, library=library, device=device, say=tell)


def open_answerer(
    base: str | None, library: Path | None, device: str | None, hypernetwork: str | None = None
) -> Answerer:
    """The base alone, which answers with the adapters there are."""
    with loading(device) as tell:
        from loracast.model import load_answerer

        return load_answerer(base, hypernetwork, library=library, device=device, say=tell)


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


def learn_visibly(
    model: Model,
    document: Document,
    name: str,
    *,
    max_chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    storage: Storage = DEFAULT_STORAGE,
    replace: bool = False,
) -> Adapter:
    """Learn a document with a progress bar on a terminal; its warnings go to standard error."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    for warning in document.warnings:
        warn(warning)
    columns = (
        TextColumn("learning {task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("chunks"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr(), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(printable(name), total=None)
        return model.learn(
            document,
            name,
            max_chunk_tokens=max_chunk_tokens,
            storage=storage,
            replace=replace,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
