"""The public Python API: a base with its hypernetworks, which learns documents, tasks and images and answers with them.

model = loracast.load()
manual = model.learn("manual.pdf")
print(model.ask("How long is the warranty?", manual))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

from loracast.base.chat import Message
from loracast.base.fingerprint import check
from loracast.base.generate import Answer, Sampling, answer
from loracast.base.load import Base
from loracast.base.packages import Say
from loracast.cast.document import Progress, learn_document, recast
from loracast.cast.image import learn_image
from loracast.cast.load import load_base_for, load_caster, shipped_hypernetwork
from loracast.cast.task import TaskCaster
from loracast.documents import Document, read_document
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.documents.images import ImageFile, is_image_file, read_image_file
from loracast.errors import HypernetworkError
from loracast.hypernets.protocol import Caster, Hypernetwork, Modality
from loracast.library.adapter import Adapter, loras_together
from loracast.library.library import open_adapter
from loracast.library.manifest import name_for
from loracast.library.routing import DEFAULT_ROUTE, Route
from loracast.library.wide_route import Source, route_adapters, sources
from loracast.lora.algebra import LoRA, concat
from loracast.lora.quantize import DEFAULT_STORAGE, Storage, check_storage
from loracast.paths import library_dir

ASK_SYSTEM_TURN = ""
"""System turn of a question, empty as in training; the template's own would cost 25 tokens of prefill for nothing."""


@dataclass(frozen=True)
class SourcedAnswer(Answer):
    """An answer, what it cost, and where in which documents it comes from."""

    sources: tuple[Source, ...] = ()


class Model:
    """A base that learns documents, tasks and images, and answers with the adapters of a library.

    Each hypernetwork is read when it is first needed: to learn, or to answer with adapters of storage `text`.
    """

    def __init__(
        self,
        base: Base,
        library: Path,
        hypernetwork: str | Path | Hypernetwork | None = None,
        task_hypernetwork: str | Path | Hypernetwork | None = None,
        image_hypernetwork: str | Path | Hypernetwork | None = None,
    ):
        """
        Args:
            hypernetwork, task_hypernetwork, image_hypernetwork: hypernetworks, or their folders or hub repositories;
                the shipped ones if None.
        """
        self.base, self.library = base, library
        self._hypernetworks: dict[Modality, str | Path | Hypernetwork | None] = {
            "document": hypernetwork,
            "task": task_hypernetwork,
            "image": image_hypernetwork,
        }

    def _load(self, modality: Modality) -> Caster:
        where = self._hypernetworks[modality] or shipped_hypernetwork(self.base, modality)
        if isinstance(where, Hypernetwork):
            return where.to(self.base.device).bind(self.base)
        return load_caster(where, modality, self.base)

    @cached_property
    def documents(self) -> Caster:
        """The caster of documents. Raises HypernetworkError if none was given and none ships for the base."""
        return self._load("document")

    def adapter(self, name: str) -> Adapter:
        """An adapter of the library, checked against the base. Raises HypernetworkError if it needs another one."""
        found = open_adapter(self.library, name)
        check(found.manifest.made_for, self.base.fingerprint, f"the adapter {name!r}")
        if found.manifest.storage == "text":
            if found.manifest.hypernetwork not in (self.documents.id, *self.documents.hypernetwork.former_ids):
                raise HypernetworkError(
                    f"{name!r} keeps only its text, and this is not the hypernetwork that it was learned with "
                    f"({found.manifest.hypernetwork}): give that one with --hypernetwork, or learn the document again"
                )
            found.recast = partial(recast, self.documents, self.base)
        return found

    def ask(self, question: str, adapter: Adapter | str | Sequence[Adapter | str] = (), **options) -> str:
        """Answer a question with one adapter, several, or none (the plain base); with "*", from the whole library.

        A pattern such as "manuals-*" stands for all documents with such names, and the option `tag` for those with that
        tag: only those that match the question are opened. Options as in `answer`.
        """
        return self.answer(question, adapter, **options).text

    def answer(
        self,
        question: str,
        adapter: Adapter | str | Sequence[Adapter | str] = (),
        *,
        tag: str = "",
        always: bool = False,
        route: int | None = DEFAULT_ROUTE,
        system: str | None = ASK_SYSTEM_TURN,
        sampling: Sampling = Sampling(),
        on_text: Callable[[str], None] = lambda text: None,
    ) -> SourcedAnswer:
        """Like `ask`, with what the answer cost and where it comes from.

        Args:
            tag: choose among the documents with this tag.
            always: answer with the documents' adapters even where the question is not about them at all; otherwise the
                plain base answers then (library/relevance.py).
            route: number of chunks that are merged for the question, of each document that is named and of all that a
                pattern or a tag stands for; None merges all of those that are named.
            system: the system turn, "" for an empty one, None for the template's own.
            on_text: receives each piece of the answer as it is generated.
        """
        messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": question})
        lora, routed = self.lora_for(question, adapter, route, tag, always)
        given = answer(self.base, self.base.chat.conversation(messages), lora, sampling, on_text)
        return SourcedAnswer(**vars(given), sources=sources(routed))

    def lora_for(
        self,
        question: str,
        adapter: Adapter | str | Sequence[Adapter | str],
        k: int | None = DEFAULT_ROUTE,
        tag: str = "",
        always: bool = False,
    ) -> tuple[LoRA | None, list[tuple[Adapter, Route]]]:
        """The LoRA that a question is answered with, and the adapters it came from with what was taken of each.

        Arguments as in `answer`; None where no adapter is chosen or the question is about no document.
        """
        chosen = [adapter] if isinstance(adapter, (Adapter, str)) else adapter
        routed = route_adapters(self.library, question, chosen, k, tag, self.adapter, always)
        loras = loras_together(routed) if routed else []
        if not loras:
            return None, routed
        return (loras[0] if len(loras) == 1 else concat(loras)).to(self.base.device), routed

    def learn(
        self,
        source: str | Path | BinaryIO | Document | ImageFile,
        name: str | None = None,
        *,
        max_chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        storage: Storage = DEFAULT_STORAGE,
        replace: bool = False,
        progress: Progress = lambda done, total: None,
    ) -> Adapter:
        """Cast a document or an image into an adapter and keep it.

        Args:
            source: a path, "-" for standard input, a binary stream, a Document or an ImageFile.
            name: of the adapter; made from the file's name or the document's title if None.
            max_chunk_tokens: longest chunk; the shipped hypernetwork was trained with up to 256.
            storage: how a document's factors are kept (lora/quantize.py); an image's are in bf16.
            replace: whether an adapter of that name is replaced.

        Raises:
            DocumentError: the file cannot be read.
            AdapterError: the name is taken or not allowed.
            ConfigError: no chunk can be so short.
        """
        if isinstance(source, (str, Path)) and is_image_file(source):
            source = read_image_file(source)
        if isinstance(source, ImageFile):
            return learn_image(self.images, source, self.library, name or name_for(source), replace=replace)
        document = source if isinstance(source, Document) else read_document(source)
        return learn_document(
            self.documents,
            self.base,
            document,
            self.library,
            name or name_for(document),
            max_chunk_tokens=max_chunk_tokens,
            storage=check_storage(storage),
            replace=replace,
            progress=progress,
        )

    @cached_property
    def images(self) -> Caster:
        """The caster of images. Raises HypernetworkError if none was given and none ships for the base."""
        return self._load("image")

    @cached_property
    def described(self) -> TaskCaster:
        """The caster of task descriptions. Raises HypernetworkError if none was given and none ships for the base."""
        return TaskCaster(self._load("task"), self.library)

    def task(self, description: str, name: str | None = None, **options) -> Adapter:
        """Cast the description of a task into an adapter and keep it; options and errors as in `TaskCaster.tasks`."""
        return self.described.task(description, name, **options)

    def tasks(self, descriptions: Sequence[str], names: Sequence[str] | None = None, **options) -> list[Adapter]:
        """Cast several descriptions and keep their adapters; options and errors as in `TaskCaster.tasks`."""
        return self.described.tasks(descriptions, names, **options)


def load(
    base: str | Path | None = None,
    hypernetwork: str | Path | None = None,
    *,
    task_hypernetwork: str | Path | None = None,
    image_hypernetwork: str | Path | None = None,
    library: str | Path | None = None,
    device: str | None = None,
    eager: bool = True,
    say: Say = lambda text: None,
) -> Model:
    """Load a base and its hypernetwork.

    Args:
        base: an embedded base (the default), a local folder or a hub id.
        hypernetwork: a folder or hub repository; the shipped one if None.
        task_hypernetwork, image_hypernetwork: the same for `Model.task` and for images in `Model.learn`.
        library: where adapters are kept; the user's own library if None.
        device: "cpu", "cuda" or "mps"; the fastest available if None.
        eager: read the hypernetwork for documents at once, so that a wrong one is refused now; False for a model that
            answers and does not learn.
        say: receives progress messages where an embedded base has to be fetched first.

    Raises:
        BaseModelError, HypernetworkError: the base or the hypernetwork for documents cannot be read, or does not fit.
    """
    given = (hypernetwork, task_hypernetwork, image_hypernetwork)
    model = Model(load_base_for(base, given, device, say), Path(library or library_dir()), *given)
    if eager:
        _ = model.documents
    return model
