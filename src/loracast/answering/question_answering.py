"""Answers questions with a base and the adapters of a library: routes to chunks, merges their LoRAs, generates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack, overload

from loracast.answering.answers import NOT_SAID, Prepared, SourcedAnswer, least_confidence, without_model
from loracast.answering.options import Asking, Chosen, Question, is_batch, listed
from loracast.base.chat import Message
from loracast.base.copying import Copying, copying
from loracast.base.generate import OnText, Sampling, answers, pieces
from loracast.base.load import Base
from loracast.errors import AdapterError, ConfigError
from loracast.library.adapter import Adapter
from loracast.library.library import Library
from loracast.lora.algebra import LoRA, concat
from loracast.reading.matching import candidates_together
from loracast.reading.outline import Overview, overview
from loracast.reading.routing import DEFAULT_ROUTE, Route
from loracast.reading.search import queries
from loracast.reading.wide_route import (
    loras_together,
    patterns_in,
    route_adapters,
    routes_of_documents,
    scaled,
    sources,
)

ASK_SYSTEM_TURN = ""
"""System turn of a question, empty as in training; the template's own would cost 25 tokens of prefill for nothing."""


class QuestionAnswering(ABC):
    """The methods of `Model` that answer questions; they need its base and its adapters, and no hypernetwork."""

    base: Base
    library: Library

    @abstractmethod
    def adapter(self, name: str) -> Adapter:
        """An adapter of the library."""

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
            on_text: receives each piece of one answer as it is generated; of a strict answer, the whole text.
        """
        sampling = options.pop("sampling", Sampling())
        if not is_batch(question):
            prepared, lora = self._request(question, adapter, **options)
            (given,) = self.generate([prepared], [lora], sampling, None if prepared.comes_whole else on_text)
            if prepared.comes_whole:
                on_text(given.text)
            return given
        chosen = adapter if isinstance(adapter, (list, tuple)) and adapter else [adapter] * len(question)
        if len(chosen) != len(question):
            raise AdapterError(
                f"{len(chosen)} adapters for {len(question)} questions: give one for each, () for none, or one for all"
            )
        requests = [self._request(*pair, **options) for pair in zip(question, chosen, strict=True)]
        return self.generate([prepared for prepared, _ in requests], [lora for _, lora in requests], sampling)

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
        self,
        prepared: Sequence[Prepared],
        loras: Sequence[LoRA | None],
        sampling: Sampling,
        on_text: OnText | None = None,
    ) -> list[SourcedAnswer]:
        """Answer questions in one batch, but those that need no model; give each answer or refuse it."""
        asked = [(one, lora) for one, lora in zip(prepared, loras, strict=True) if one.answer is None]
        prompts, hints = [one.prompt for one, _ in asked], [self.copying(one) for one, _ in asked]
        generated = iter(answers(self.base, prompts, [lora for _, lora in asked], sampling, hints, on_text))
        return [one.answer or one.sourced(next(generated)) for one in prepared]

    def copying(self, prepared: Prepared) -> Copying | None:
        """The bonus for what an answer may copy from the documents; None where nothing is likely."""
        return copying(self.base, prepared.likely)

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
        strict: bool = False,
        scales: Mapping[str, float] = {},
        check: Callable[[Sequence[int]], object] = lambda prompt: None,
        outlines: bool = True,
    ) -> Prepared:
        """Build a question's prompt and route it to chunks of the adapters; their LoRA is read later (`lora_of`).

        Args:
            scales: factors on adapters' LoRAs, by their versions' hashes; 1 for those that are not named.
            check: called with the prompt's token ids before routing; raises an error to refuse the prompt.
            outlines: answer questions about documents as a whole from their outlines, without the model, and say with
                what other answers may begin (`Prepared.likely`).
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
            routed = self._route(query, adapter, route, tag, always, strict)
            if not all(route.is_empty for route in routes_of_documents(routed)):
                break
        routed = scaled(routed, scales)
        documents = routes_of_documents(routed)
        if strict and not documents and not patterns_in(listed(adapter), tag):
            raise ConfigError("a strict answer comes from documents: choose one with -a NAME, or all with --all")
        if strict and all(route.is_empty for route in documents):
            return without_model(NOT_SAID, "refusal", routed=routed)
        may_copy = outlines and len(documents) == len(routed)  # a task's adapter beside them may want other words
        likely = candidates_together([route.candidates for route in documents]) if may_copy else ()
        least = least_confidence([route for _, route in routed]) if strict else 0.0
        return Prepared(prompt, routed, sources(routed), likely=likely, least_confidence=least)

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
        self, question: str, adapter: Chosen, k: int | None, tag: str, always: bool, strict: bool = False
    ) -> list[tuple[Adapter, Route]]:
        chosen = listed(adapter)
        if isinstance(adapter, LoRA) or any(isinstance(one, LoRA) for one in chosen):  # a static LoRA would come twice
            raise AdapterError("a LoRA answers alone: keep it with `learn` to answer with several adapters")
        return route_adapters(self.library, question, chosen, k, tag, self.adapter, always, strict)

    def lora_of(self, routed: Sequence[tuple[Adapter, Route]]) -> LoRA | None:
        """The LoRA of the chunks that were picked from adapters, on the base's device; None if none were."""
        loras = loras_together(routed) if routed else []
        if not loras:
            return None
        return (loras[0] if len(loras) == 1 else concat(loras)).to(self.base.device)
