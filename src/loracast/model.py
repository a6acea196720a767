"""The Python face: a base with its hypernetwork, which learns documents and answers with them.

model = loracast.load()
manual = model.learn("manual.pdf")
print(model.ask("How long is the warranty?", manual))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from importlib.resources import files
from pathlib import Path
from typing import BinaryIO, Literal

from loracast.base.chat import Message
from loracast.base.fingerprint import check
from loracast.base.generate import Answer, Sampling, answer
from loracast.base.load import DEFAULT_BASE, Base, load_base
from loracast.cast.document import Progress, learn_document, recast
from loracast.cast.image import ImageCaster, load_image_caster
from loracast.cast.task import TaskCaster, load_caster
from loracast.documents import Document, read_document
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.documents.images import ImageFile, is_image_file, read_image_file
from loracast.encoders.hidden_states import ContextEncoder
from loracast.errors import HypernetworkError
from loracast.hypernets.doc_to_lora import DocToLoRA
from loracast.hypernets.store import from_pretrained, weights_hash
from loracast.library.adapter import Adapter, loras_together
from loracast.library.library import open_adapter
from loracast.library.manifest import name_for
from loracast.library.routing import DEFAULT_ROUTE, Route, route
from loracast.lora.algebra import LoRA, concat
from loracast.lora.quantize import DEFAULT_STORAGE, Storage, check_storage
from loracast.paths import library_dir

Kind = Literal["doc", "text", "image"]
"""What a hypernetwork casts: documents, descriptions of tasks, or images. Also the name of its training."""
SHIPPED: dict[tuple[Kind, str], str] = {
    ("doc", DEFAULT_BASE): "doc-smollm2-135m",
    ("text", DEFAULT_BASE): "text-smollm2-135m",
    ("image", DEFAULT_BASE): "image-smollm2-135m",
}
"""Hypernetworks inside this package, by what they cast and the embedded base that they were trained for."""

ASK_SYSTEM_TURN = ""
"""The system turn of a question, as in most of the training: the template's own costs 25 tokens of prefill and helps nothing."""


def shipped_hypernetwork(base: str, kind: Kind = "doc") -> Path:
    """The folder of the hypernetwork shipped for an embedded base. Raises HypernetworkError if there is none."""
    if (kind, base) not in SHIPPED:
        raise HypernetworkError(
            f"no hypernetwork is shipped for the base {base!r}: train one (`loracast train {kind} --base {base}`) and give it with "
            "--hypernetwork FOLDER"
        )
    return Path(str(files("loracast") / "pretrained" / SHIPPED[kind, base]))


class Answerer:
    """A base that answers with the adapters of a library. Adapters hold all that asking takes, but for those that keep only their text.

    Args:
        hypernetwork: for the latter, a folder or hub repository; the shipped one if None.
    """

    def __init__(self, base: Base, library: Path, hypernetwork: str | Path | None = None):
        self.base, self.library = base, library
        self._hypernetwork = hypernetwork

    def adapter(self, name: str) -> Adapter:
        """An adapter of the library, checked against this base. Raises HypernetworkError where it needs another hypernetwork."""
        found = open_adapter(self.library, name)
        check(found.manifest.made_for, self.base.fingerprint, f"the adapter {name!r}")
        if found.manifest.storage == "text":
            hypernet, made_by = self._documents
            if made_by != found.manifest.hypernetwork:
                raise HypernetworkError(
                    f"{name!r} keeps only its text, and this is not the hypernetwork that it was learned with ({found.manifest.hypernetwork}): give "
                    "that one with --hypernetwork, or learn the document again"
                )
            encoder = ContextEncoder.for_hypernet(self.base, hypernet)
            found.recast = partial(recast, self.base, hypernet, encoder)
        return found

    @cached_property
    def _documents(self) -> tuple[DocToLoRA, str]:
        """The hypernetwork for documents, and its hash."""
        hypernet, made_for = from_pretrained(self._hypernetwork or shipped_hypernetwork(self.base.name), DocToLoRA)
        check(made_for, self.base.fingerprint, "the hypernetwork")
        return hypernet.to(self.base.device), weights_hash(hypernet)

    def ask(self, question: str, adapter: Adapter | str | Sequence[Adapter | str] = (), **options) -> str:
        """Answer a question with one adapter, several, or none (the plain base). Options as in `answer`."""
        return self.answer(question, adapter, **options).text

    def answer(
        self,
        question: str,
        adapter: Adapter | str | Sequence[Adapter | str] = (),
        *,
        route: int | None = DEFAULT_ROUTE,
        system: str | None = ASK_SYSTEM_TURN,
        sampling: Sampling = Sampling(),
        on_text: Callable[[str], None] = lambda text: None,
    ) -> Answer:
        """Like `ask`, with what the answer cost.

        Args:
            route: how many chunks of each document a question is given; None merges them all.
            system: the system turn, "" for an empty one, None for the template's own.
            on_text: told each piece of the answer as it comes.
        """
        messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": question})
        lora, _ = self.lora_for(question, adapter, route)
        return answer(self.base, self.base.chat.conversation(messages), lora, sampling, on_text)

    def lora_for(
        self, question: str, adapter: Adapter | str | Sequence[Adapter | str], k: int | None = DEFAULT_ROUTE
    ) -> tuple[LoRA | None, dict[str, Route]]:
        """The LoRA that a question is answered with, and which chunks it came from, by the adapters' names (with the version, where two are of one name)."""
        chosen = [adapter] if isinstance(adapter, (Adapter, str)) else list(adapter)
        opened = [self.adapter(a) if isinstance(a, str) else a for a in chosen]
        routes = [route(a, question, k) for a in opened]
        names = Counter(a.name for a in opened)
        named = {a.name if names[a.name] == 1 else a.version: r for a, r in zip(opened, routes, strict=True)}
        if not opened:
            return None, named
        loras = loras_together([(a, r.picked) for a, r in zip(opened, routes, strict=True)])
        return (loras[0] if len(loras) == 1 else concat(loras)).to(self.base.device), named


class Model(Answerer):
    """A base that learns documents."""

    def __init__(
        self,
        base: Base,
        hypernet: DocToLoRA,
        hypernet_hash: str,
        library: Path,
        task_hypernetwork: str | Path | None = None,
        image_hypernetwork: str | Path | None = None,
    ):
        super().__init__(base, library)
        self.hypernet, self.hypernet_hash = self._documents = hypernet, hypernet_hash
        self.encoder = ContextEncoder.for_hypernet(base, hypernet)
        self._task_hypernetwork, self._image_hypernetwork = task_hypernetwork, image_hypernetwork

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
        """Cast a document (a path, "-" for standard input, a binary stream, a Document) or a picture (a path, a ImageFile) into an adapter and keep it.

        Args:
            name: of the adapter; made from the file's name, or else from the document's title, if None.
            max_chunk_tokens: longest chunk; the shipped hypernetwork was trained for up to 256.
            storage: how a document's factors are kept (lora/quantize.py); a picture's are kept in bf16.
            replace: an adapter of that name gives way to the new one.

        Raises:
            DocumentError: the file cannot be read; AdapterError: the name is taken or not allowed.
        """
        if isinstance(source, (str, Path)) and is_image_file(source):
            source = read_image_file(source)
        if isinstance(source, ImageFile):
            return self.image_caster.learn(source, name or name_for(source), replace=replace)
        document = source if isinstance(source, Document) else read_document(source)
        return learn_document(
            self.base,
            self.hypernet,
            self.hypernet_hash,
            self.encoder,
            document,
            self.library,
            name or name_for(document),
            max_chunk_tokens=max_chunk_tokens,
            storage=check_storage(storage),
            replace=replace,
            progress=progress,
        )

    @cached_property
    def image_caster(self) -> ImageCaster:
        """What casts pictures. Raises HypernetworkError where none was given and none is shipped for the base."""
        where = self._image_hypernetwork or shipped_hypernetwork(self.base.name, "image")
        loaded = load_image_caster(where, self.library, device=self.base.device.type)
        check(loaded.caster.made_for, self.base.fingerprint, "the hypernetwork for images")
        return loaded

    @cached_property
    def caster(self) -> TaskCaster:
        """What casts descriptions of tasks. Raises HypernetworkError where none was given and none is shipped for the base."""
        where = self._task_hypernetwork or shipped_hypernetwork(self.base.name, "text")
        return load_caster(where, base=self.base, library=self.library)

    def task(self, description: str, name: str | None = None, **options) -> Adapter:
        """Cast the description of a task into an adapter and keep it; options as in `TaskCaster.task`."""
        return self.caster.task(description, name, **options)

    def tasks(self, descriptions: Sequence[str], names: Sequence[str] | None = None, **options) -> list[Adapter]:
        """Cast descriptions into adapters, in one pass, and keep them; options as in `TaskCaster.tasks`."""
        return self.caster.tasks(descriptions, names, **options)


def load(
    base: str | Path | None = None,
    hypernetwork: str | Path | None = None,
    *,
    task_hypernetwork: str | Path | None = None,
    image_hypernetwork: str | Path | None = None,
    library: str | Path | None = None,
    device: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Model:
    """Load a base and its hypernetwork.

    Args:
        base: an embedded base (the default), a local folder or a hub id.
        hypernetwork: a folder or hub repository; the shipped one if None.
        task_hypernetwork: a folder or hub repository of one that casts descriptions of tasks, for `Model.task`; the shipped one if None.
        image_hypernetwork: one that casts pictures, for `Model.learn`; the shipped one if None.
        library: where adapters are kept; the user's own library if None.
        device: "cpu" or "cuda"; the fastest there is if None.
        say: told what is being done where an embedded base has to be fetched first.
    """
    folder = Path(hypernetwork) if hypernetwork is not None else shipped_hypernetwork(str(base or DEFAULT_BASE))
    hypernet, made_for = from_pretrained(folder, DocToLoRA)
    loaded = load_base(base, device=device, say=say)
    check(made_for, loaded.fingerprint, f"the hypernetwork {folder.name!r}")
    where = Path(library) if library else library_dir()
    return Model(
        loaded, hypernet.to(loaded.device), weights_hash(hypernet), where, task_hypernetwork, image_hypernetwork
    )


def load_answerer(
    base: str | Path | None = None,
    hypernetwork: str | Path | None = None,
    *,
    library: str | Path | None = None,
    device: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Answerer:
    """Load a base that answers but does not learn; arguments as in `load`. The hypernetwork is read only for adapters that keep their text alone."""
    where = Path(library) if library else library_dir()
    return Answerer(load_base(base, device=device, say=say), where, hypernetwork)
