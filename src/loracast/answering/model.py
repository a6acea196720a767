"""The public Python API: a base that learns documents, tasks, images and labels as LoRAs, and answers with them.

    model = loracast.load()
    manual = model.learn("manual.pdf")
    print(model.ask("How long is the warranty?", manual))

`load` loads a base and gives a `Model`, whose methods learn, cast and ask.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

from loracast.answering.answers import NOT_SAID, Prepared, SourcedAnswer, without_model
from loracast.answering.options import Asking, Chosen, Question, Readable, is_batch, listed, read_source
from loracast.base.chat import Message
from loracast.base.copying import CopyBias
from loracast.base.embedded import Say
from loracast.base.fingerprint import check
from loracast.base.generate import OnText, Sampling, answers, pieces
from loracast.base.load import Base, load_base
from loracast.cast.document import CachedRecast, Keeping, cast_document, learn_document
from loracast.cast.labels import cast_labels, learn_labels
from loracast.cast.load import (
    Found,
    check_default_base,
    find_hypernetwork,
    load_caster,
    shipped_hypernetwork,
    trained_template,
)
from loracast.cast.memory import Memory
from loracast.cast.task import TaskCaster, TaskOptions
from loracast.cast.vision import VisionModel, load_vision
from loracast.documents import Document
from loracast.documents.images import ImageFile
from loracast.documents.labels import Labels
from loracast.documents.task_spec import ExampleLike
from loracast.errors import AdapterError, ConfigError, HypernetworkError
from loracast.hypernets.protocol import Caster, Hypernetwork
from loracast.hypernets.reader import READER_FILE, Reader
from loracast.hypernets.store import Modality
from loracast.library.adapter import Adapter, factors_in_memory
from loracast.library.library import Library
from loracast.library.manifest import name_for
from loracast.lora.algebra import LoRA, concat
from loracast.lora.quantize import DEFAULT_STORAGE, check_storage
from loracast.reading.matching import candidates_together
from loracast.reading.outline import Overview, overview
from loracast.reading.questions import QuestionReader
from loracast.reading.routing import (
    DEFAULT_ROUTE,
    Route,
    loras_together,
    patterns_in,
    route_adapters,
    routes_of_documents,
    scaled,
    sources,
)
from loracast.reading.search import queries

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_MOST_SENTENCES = 128
"""Sentences about labels whose rows are kept in memory, 1.3 MB each for the shipped hypernetwork."""
ASK_SYSTEM_TURN = ""
"""System turn of a question, empty as in training; the template's own would cost 25 tokens of prefill for nothing."""


class Model:
    """A base that learns documents, tasks and images, and answers with the adapters of a library.

    Each hypernetwork is read when it is first needed: to learn, or to answer with adapters of storage `text`.

    Threads may share a model. The base runs for one of them at a time, under a lock that all users of the base share
    (`Base.lock`), since a LoRA is seen by every forward pass while it is applied; a thread that encodes a
    document lets waiting threads go first before each block of the base.
    """

    def __init__(
        self,
        base: Base,
        library: Library | str | Path,
        hypernetwork: str | Path | Found | Hypernetwork | None = None,
        task_hypernetwork: str | Path | Found | Hypernetwork | None = None,
        image_encoder: str | None = None,
        image_labels: str | Path | None = None,
        say: Say = lambda text: None,
    ):
        """
        Args:
            hypernetwork, task_hypernetwork: hypernetworks, or their folders or hub repositories; the shipped ones if
                None.
            image_encoder, image_labels, say: what says what images show, once one is learned (`load_vision`).
        """
        self.base, self.library = base, Library.of(library)
        self._kept = factors_in_memory()  # of all adapters, under one budget
        self._hypernetworks: dict[Modality, str | Path | Found | Hypernetwork | None] = {
            "document": hypernetwork,
            "task": task_hypernetwork,
        }
        self._vision = partial(load_vision, image_encoder, image_labels, say=say)

    def _load(self, modality: Modality) -> Caster:
        where = self._hypernetworks[modality] or shipped_hypernetwork(self.base, modality)
        return load_caster(where, modality, self.base)

    @cached_property
    def documents(self) -> Caster:
        """The caster of documents. Raises HypernetworkError if none was given and none ships for the base."""
        return self._load("document")

    @cached_property
    def reader(self) -> QuestionReader | None:
        """Finds the units of documents that answer a question; None where the hypernetwork has no reader beside it."""
        where = self._hypernetworks["document"]
        try:
            where = where or shipped_hypernetwork(self.base, "document")
        except HypernetworkError:  # of a base for which none ships; adapters of tasks need none
            return None
        if isinstance(where, (str, Path)) and Path(where).is_dir():  # no hypernetwork is read to answer
            file = Path(where) / READER_FILE
            reader = Reader.read(file) if file.is_file() else None
        else:
            reader = self.documents.hypernetwork.reader
        return None if reader is None else QuestionReader(reader, self.base, lambda: self.documents.hypernetwork)

    @cached_property
    def _recast(self) -> CachedRecast:
        return CachedRecast(self.documents, self.base)

    def memory(self, name: str) -> Memory:
        """The chat memory of a name in the library, of what a user said: `remember`, `messages`, `forget`.

        The name answers questions like a document's. Raises AdapterError if another adapter has the name.
        """
        return Memory(self.documents, self.base, self.library, name, self._recast)

    def adapter(self, name: str) -> Adapter:
        """An adapter of the library, checked against the base. Raises HypernetworkError if it needs another one."""
        found = self.library.open(name)
        check(found.manifest.made_for, self.base.fingerprint, f"the adapter {name!r}")
        found.kept = self._kept
        if found.manifest.storage == "text":
            self._recast.attach(found)
        return found

    @overload
    def cast(  # type: ignore[overload-overlap]  # a string is a path, and no sequence of documents
        self, source: Readable, *, max_chunk_tokens: int | None = ...
    ) -> LoRA: ...
    @overload
    def cast(self, source: Sequence[Readable], *, max_chunk_tokens: int | None = ...) -> list[LoRA]: ...
    def cast(self, source: Any, *, max_chunk_tokens: int | None = None) -> LoRA | list[LoRA]:
        """Cast a document, an image or labels into a LoRA and keep nothing; a list of them into one LoRA each.

            lora = model.cast("manual.pdf")
            lora = model.cast(Document.from_text("The warranty is 24 months."))

        All chunks of a document are merged into its LoRA. Use `learn` instead if a document is longer than a few
        chunks: its questions are then routed to the chunks that they are about.

        Args and errors as in `learn`.
        """
        if isinstance(source, (list, tuple)):
            return [self.cast(one, max_chunk_tokens=max_chunk_tokens) for one in source]
        read = self._in_words(read_source(source))
        if isinstance(read, Labels):
            return cast_labels(self._sentences, read)
        return cast_document(self.documents, self.base, read, max_chunk_tokens)

    @overload
    def learn(  # type: ignore[overload-overlap]
        self, source: Readable, name: str | None = None, **options: Unpack[Keeping]
    ) -> Adapter: ...
    @overload
    def learn(
        self, source: Sequence[Readable], name: Sequence[str] | None = None, **options: Unpack[Keeping]
    ) -> list[Adapter]: ...
    def learn(self, source: Any, name: Any = None, **options: Unpack[Keeping]) -> Adapter | list[Adapter]:
        """Cast a document, an image or labels into an adapter and keep it; a list of them into one adapter each.

        Args:
            source: a path, "-" for standard input, a binary stream, a Document, an ImageFile or Labels; or a list of
                those.
            name: of the adapter; made from the file's name or the document's title if None. A list for a list.
            options: as in `Keeping`.

        Raises:
            DocumentError: the file cannot be read.
            AdapterError: the name is taken or not allowed.
            ConfigError: `max_chunk_tokens` is too small.
        """
        if not isinstance(source, (list, tuple)):
            return self._learn(read_source(source), name, **options)
        documents = [read_source(one) for one in source]  # one that cannot be read is refused before anything is kept
        names = [None] * len(documents) if name is None else name
        if len(names) != len(documents):
            raise AdapterError(f"{len(names)} names for {len(documents)} documents: give one for each, or none")
        return [self._learn(*pair, **options) for pair in zip(documents, names, strict=True)]

    def _learn(self, read: Document | ImageFile | Labels, name: str | None, **options: Unpack[Keeping]) -> Adapter:
        name, storage = name or name_for(read), options.get("storage", DEFAULT_STORAGE)
        check_storage(storage)
        in_words = self._in_words(read)
        if isinstance(in_words, Labels):
            replace = options.get("replace", False)
            return learn_labels(self._sentences, in_words, self.library, name, storage=storage, replace=replace)
        return learn_document(self.documents, self.base, in_words, self.library, name, **options)

    def _in_words(self, read: Document | ImageFile | Labels) -> Document | Labels:
        if isinstance(read, Document):
            return self.vision.in_words(read) if read.photos else read
        return self.vision(read) if isinstance(read, ImageFile) else read

    @cached_property
    def _sentences(self) -> CachedRecast:
        return CachedRecast(self.documents, self.base, most=_MOST_SENTENCES)

    @cached_property
    def vision(self) -> VisionModel:
        """The vision model that says what images show. Raises EncoderError if it cannot be loaded."""
        return self._vision()

    @cached_property
    def described(self) -> TaskCaster:
        """The caster of task descriptions. Raises HypernetworkError if none was given and none ships for the base."""
        return TaskCaster(self._load("task"), self.library)

    def task(
        self,
        description: str = "",
        name: str | None = None,
        *,
        examples: Sequence[ExampleLike] = (),
        refine_s: float | None = None,
        **options: Unpack[TaskOptions],
    ) -> Adapter:
        """Cast a task into an adapter and keep it: its description, examples of it, or both.

            model.task("Answer with the opposite word.", examples=[("hot", "cold"), ("big", "small")])

        Arguments and errors as in `TaskCaster.task`.

        Args:
            refine_s: seconds of training a new LoRA on the examples beside the description's (docs/tasks.md).

        Raises:
            ConfigError: there are too few examples to refine on.
        """
        if refine_s is None:
            return self.described.task(description, name, examples=examples, **options)
        from loracast.cast.refine import RefineConfig, check_enough, refiner

        check_enough(examples)
        refine = refiner(self.base, RefineConfig(seconds=refine_s))
        return self.described.task(description, name, examples=examples, refine=refine, **options)

    def tasks(
        self, descriptions: Sequence[str], names: Sequence[str] | None = None, **options: Unpack[TaskOptions]
    ) -> list[Adapter]:
        """Cast several descriptions in one go and keep their adapters; names and errors as in `TaskCaster.tasks`."""
        return self.described.tasks(descriptions, names, **options)

    # ---- answering

    @overload
    def ask(self, question: str | list[Message], adapter: Chosen = (), **options: Unpack[Asking]) -> str: ...
    @overload
    def ask(
        self, question: list[str] | list[list[Message]], adapter: Chosen | Sequence[Chosen] = (),
        **options: Unpack[Asking],
    ) -> list[str]: ...  # fmt: skip
    def ask(self, question: Any, adapter: Any = (), **options: Unpack[Asking]) -> str | list[str]:
        """Answer a question, or a list of questions in one batch.

            model.ask("How long is the warranty?", "manual")
            model.ask(["How long is the warranty?", "Who is the landlord?"], ["manual", "contract"])
            model.ask([{"role": "user", "content": "How long is the warranty?"}], "manual")

        Args:
            question: a question or the messages of a chat; or a list of either.
            adapter: what it is answered with (`Chosen`). For a list of questions a list with one entry for each, or
                one adapter for all of them.
            options: as in `Asking`.
        """
        given = self.answer(question, adapter, **options)
        return [one.text for one in given] if isinstance(given, list) else given.text

    @overload
    def answer(
        self, question: str | list[Message], adapter: Chosen = (), on_text: OnText = ..., **options: Unpack[Asking]
    ) -> SourcedAnswer: ...
    @overload
    def answer(
        self, question: list[str] | list[list[Message]], adapter: Chosen | Sequence[Chosen] = (),
        **options: Unpack[Asking],
    ) -> list[SourcedAnswer]: ...  # fmt: skip
    def answer(
        self, question: Any, adapter: Any = (), on_text: OnText = lambda text: None, **options: Unpack[Asking]
    ) -> SourcedAnswer | list[SourcedAnswer]:
        """Like `ask`, with what the answer cost and the chunks that it comes from (`SourcedAnswer`).

        Args:
            on_text: receives each piece of one answer as it is generated.
        """
        sampling = options.pop("sampling", Sampling())
        if not is_batch(question):
            prepared, lora = self._request(question, adapter, **options)
            (given,) = self.generate([(prepared, lora)], sampling, on_text)
            if prepared.answer is not None:
                on_text(given.text)
            return given
        chosen = adapter if isinstance(adapter, (list, tuple)) and adapter else [adapter] * len(question)
        if len(chosen) != len(question):
            raise AdapterError(
                f"{len(chosen)} adapters for {len(question)} questions: give one for each, () for none, or one for all"
            )
        requests = [self._request(*pair, **options) for pair in zip(question, chosen, strict=True)]
        return self.generate(requests, sampling)

    def stream(
        self, question: str | list[Message], adapter: Chosen = (), **options: Unpack[Asking]
    ) -> Generator[str, None, SourcedAnswer]:
        """Yield the answer to a question piece by piece; the value of the generator is the whole answer with its cost.

            for piece in model.stream("How long is the warranty?", "manual"):
                print(piece, end="")

        Leaving the loop stops the generation. Another thread generates, so `stream` is refused inside a block of
        `lora.applied`. Arguments as in `ask`.
        """
        return pieces(self.base, lambda on_text: self.answer(question, adapter, on_text, **options))

    def generate(
        self, requests: Sequence[tuple[Prepared, LoRA | None]], sampling: Sampling, on_text: OnText | None = None
    ) -> list[SourcedAnswer]:
        """Answer questions in one batch, each with its LoRA, but those that need no model."""
        asked = [(one, lora) for one, lora in requests if one.answer is None]
        prompts, biases = [one.prompt for one, _ in asked], [self.copy_bias(one) for one, _ in asked]
        generated = iter(answers(self.base, prompts, [lora for _, lora in asked], sampling, biases, on_text))
        return [one.answer or one.sourced(next(generated)) for one, _ in requests]

    def copy_bias(self, prepared: Prepared) -> CopyBias | None:
        """The bias for what an answer may copy from the documents; None without candidates."""
        candidates = [(one.text, one.probability) for one in prepared.candidates]
        return CopyBias(self.base.tokenizer, candidates, self.base.end_ids) if candidates else None

    def _request(self, question: Question, adapter: Chosen, **options: Any) -> tuple[Prepared, LoRA | None]:
        if isinstance(adapter, LoRA):
            return replace(self.prepare(question, **options), has_lora=True), adapter.to(self.base.device)
        prepared = self.prepare(question, adapter, **options)
        return prepared, self.lora_of(prepared.routed)

    def prepare(
        self,
        question: Question,
        adapter: Chosen = (),
        *,
        system: str | None = ASK_SYSTEM_TURN,
        route: int | None = DEFAULT_ROUTE,
        tag: str = "",
        always: bool = False,
        strict: bool | None = None,
        scales: Mapping[str, float] = {},
        check: Callable[[Sequence[int]], object] = lambda prompt: None,
        outlines: bool = True,
    ) -> Prepared:
        """Build a question's prompt and route it to chunks of the adapters; their LoRA is read later (`lora_of`).

        Args:
            scales: factors on adapters' LoRAs, by their versions' hashes; 1 for those that are not named.
            check: called with the prompt's token ids before routing; raises an error to refuse the prompt.
            outlines: answer questions about documents as a whole from their outlines, without the model, and say with
                what other answers may begin (`Prepared.candidates`).
        """
        turns: list[Message] = [{"role": "user", "content": question}] if isinstance(question, str) else [*question]
        if not turns or turns[-1]["role"] != "user":
            raise ConfigError("there is nothing to answer: the last message of a chat must be the user's")
        if system is not None and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": system}, *turns]
        if outlines and (outlined := self.overview(turns[-1]["content"], adapter)) is not None:
            return without_model(outlined.text, "outline", outlined.sources)
        prompt = self.base.chat.conversation(turns)
        check(prompt)
        if strict and always:
            raise ConfigError("strict answers only what a document is about, always asks the documents all the same: "
                              "give one of them")  # fmt: skip
        asked = [turn["content"] for turn in turns if turn["role"] == "user"]
        for query in queries(asked[-1], asked[:-1]):
            routed = self._route(query, adapter, route, tag, always)
            if not all(route.is_empty for route in routes_of_documents(routed)):
                break
        routed = scaled(routed, scales)
        documents = routes_of_documents(routed)
        searches = bool(patterns_in(listed(adapter), tag))
        if strict and not documents and not searches:
            raise ConfigError("a strict answer comes from documents: choose one with -a NAME, or all with --all")
        only_documents = len(documents) == len(routed)
        if strict is None:  # where documents alone are named, a reader refuses what they do not say
            is_foreign = any(route.is_foreign for route in documents)
            strict = self.reader is not None and bool(documents) and only_documents and not searches and not is_foreign
        if strict and all(route.is_empty for route in documents):
            return without_model(NOT_SAID, "refusal", routed=routed)
        may_copy = documents if outlines and only_documents else []  # a task's adapter may want other words
        candidates = candidates_together([(max(route.weights, default=1.0), route.candidates) for route in may_copy])
        return Prepared(prompt, routed, sources(routed), candidates=candidates)

    def overview(self, question: str, adapter: Chosen) -> Overview | None:
        """The answer to a question about documents as a whole ("What is this document about?"), from their outlines.

        None for any other question, and where no document is named: a pattern names none.
        """
        return overview(question, listed(adapter), self.adapter)

    def lora_for(
        self, question: str, adapter: Chosen, k: int | None = DEFAULT_ROUTE, tag: str = "", always: bool = False
    ) -> tuple[LoRA | None, list[tuple[Adapter, Route]]]:
        """The LoRA that a question is answered with, and the adapters it came from with the chunks taken from each.

        Arguments as in `ask`; None where no adapter is chosen or the question is about no document.
        """
        if isinstance(adapter, LoRA):
            return adapter.to(self.base.device), []
        routed = self._route(question, adapter, k, tag, always)
        return self.lora_of(routed), routed

    def _route(
        self, question: str, adapter: Chosen, k: int | None, tag: str, always: bool
    ) -> list[tuple[Adapter, Route]]:
        chosen = listed(adapter)
        if isinstance(adapter, LoRA) or any(isinstance(one, LoRA) for one in chosen):  # a static LoRA would come twice
            raise AdapterError("a LoRA answers alone: keep it with `learn` to answer with several adapters")
        return route_adapters(self.library, question, chosen, k, tag, self.adapter, self.reader, always)

    def lora_of(self, routed: Sequence[tuple[Adapter, Route]]) -> LoRA | None:
        """The LoRA of the chunks that were picked from adapters, on the base's device; None if none were."""
        loras = loras_together(routed) if routed else []
        if not loras:
            return None
        return (loras[0] if len(loras) == 1 else concat(loras)).to(self.base.device)


def load(
    model: str | Path | PreTrainedModel | None = None,
    hypernetwork: str | Path | Hypernetwork | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    task_hypernetwork: str | Path | Hypernetwork | None = None,
    image_encoder: str | None = None,
    image_labels: str | Path | None = None,
    library: Library | str | Path | None = None,
    device: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    chat_template: str | Path | None = None,
    eager: bool = True,
    say: Say = lambda text: None,
) -> Model:
    """Load a base and its hypernetwork.

        model = loracast.load()
        model = loracast.load(model=hf_model, tokenizer=tokenizer, hypernetwork="me/my-hypernetwork")

    Args:
        model, tokenizer, device, device_map, dtype, quantize, revision, chat_template: the base and how it is
            loaded (`load_base`); the chat template is the one that the hypernetwork was trained with if None.
        hypernetwork: a hypernetwork, its folder or hub repository; the shipped one if None.
        task_hypernetwork: the same for `Model.task`.
        image_encoder, image_labels: the vision model that says what an image shows, by folder or hub id, and a file of
            labels for it (`load_vision`); EfficientNet-lite0 with the names of ImageNet if None.
        library: where adapters are kept; the user's own library if None.
        eager: read the hypernetwork for documents at once, so that a wrong one is refused now; False for a model that
            answers and does not learn.
        say: receives progress messages where an embedded base has to be fetched first.

    Raises:
        BaseModelError, HypernetworkError: the base or the hypernetwork for documents cannot be read, or does not fit.
        ConfigError: options contradict each other.
    """
    given = [find_hypernetwork(one) for one in (hypernetwork, task_hypernetwork)]
    if model is None:
        check_default_base(given)
    base = load_base(
        model, tokenizer=tokenizer, device=device, device_map=device_map, dtype=dtype, quantize=quantize,
        revision=revision, chat_template=chat_template or trained_template(given), say=say,
    )  # fmt: skip
    sees: dict[str, Any] = {"image_encoder": image_encoder, "image_labels": image_labels, "say": say}
    loaded = Model(base, Library.of(library), given[0], given[1], **sees)
    if eager:
        _ = loaded.documents
    return loaded
