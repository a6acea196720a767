"""Which adapters the `model` of a request names: a name that nothing has is an error, never the plain base.

manual                        the newest version of an adapter
manual@3f9a12c0               one version
manual+sentiment              several, added up
manuals-*                     whichever documents with such names match the question
smollm2-135m-instruct         the plain base
smollm2-135m-instruct:manual  the same as `manual`; an adapter may have the base's name

A request may also put the text that adapters were made from before the question (`in_window`), to compare with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock

from loracast.answering.model import Model
from loracast.base.chat import Message, encode_text, without_middle
from loracast.base.load import Base
from loracast.errors import AdapterError, BaseModelError, NoSuchAdapterError
from loracast.library.adapter import Adapter
from loracast.library.index import read_chunks
from loracast.library.manifest import MANIFEST, Manifest
from loracast.library.register import Entry
from loracast.reading.routing import check_patterns, patterns_in
from loracast.serving.errors import ApiError, log

_JOINTS = 8
"""Tokens that a text may have more inside a prompt than by itself, where it touches what stands around it."""


@dataclass(frozen=True)
class Windowed:
    """The messages of a chat with the texts before the last question, and how much of the texts is shown."""

    messages: list[Message]
    n_tokens: int
    """Of the texts."""
    n_shown: int
    """Fewer where the window is full: the middle of the texts gives way then."""


def in_window(
    base: Base, adapters: Sequence[Adapter], messages: Sequence[Message], max_new_tokens: int, most: int
) -> Windowed:
    """Put the documents' texts, and the tasks' descriptions, before the last question of a chat.

    The wording is the one with which bases answered best from a document on the dev split (docs/notebook).

    Args:
        most: longest prompt in tokens; the base's window with the answer is another limit.

    Raises:
        AdapterError: an adapter was made from no text (an image, a combination).
        BaseModelError: the window has no room for any text beside the messages and the answer.
    """
    text = "\n\n".join(map(_text, adapters))
    has_document = any(adapter.manifest.kind == "document" for adapter in adapters)
    n_around = len(base.chat.conversation(_asked(messages, "", has_document)))
    room = min(base.window - max_new_tokens, most) - n_around - _JOINTS
    if room < 1:
        raise BaseModelError(
            f"beside {n_around} tokens of prompt and {max_new_tokens} of the answer, there is no room left for a text: "
            f"the base's window holds {base.window}, and a prompt {most} at most"
        )
    shown = without_middle(base.tokenizer, text, room)
    counts = [len(encode_text(base.tokenizer, one)) for one in (text, shown)]
    return Windowed(_asked(messages, shown, has_document), *counts)


def _text(adapter: Adapter) -> str:
    if adapter.manifest.kind == "document":
        return "\n".join(chunk.text for chunk in read_chunks(adapter.index))
    if adapter.manifest.kind == "task":
        return adapter.manifest.title
    raise AdapterError(f"{adapter.name!r} was made from no text that a prompt could hold")


def _asked(messages: Sequence[Message], text: str, has_document: bool) -> list[Message]:
    *before, last = messages
    content = f"{text}\n\n{last['content']}"
    if has_document:
        order = "Answer the question with words from the text, as short as possible."
        content = f"Text: {text}\n\n{order}\nQuestion: {last['content']}\nAnswer:"
    return [*before, {**last, "content": content}]


_REFERENCE = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}(@[0-9a-f]{4,64})?")
_PATTERN = re.compile(r"[a-z0-9._*?\[\]!-]{1,64}")
_MAX_OPEN = 256
_MAX_KNOWN = 65_536


class Names:
    """The models that a server has: its base, and the adapters of its library."""

    def __init__(self, model: Model, max_adapters: int):
        self._model, self._max_adapters = model, max_adapters
        self.base = served_name(model.base)
        self.defaults: list[tuple[str, float]] = []
        """Adapters and factors that answer requests for the base that name none (POST /lora-adapters)."""
        self._numbers: dict[str, int] = {}
        self._numbering = Lock()
        self._fits = lru_cache(_MAX_KNOWN)(self._is_for_base)
        # By name and version, so that a manifest is not read for every request.
        self._open = lru_cache(_MAX_OPEN)(lambda name, version: model.adapter(f"{name}@{version}"))
        self._find_at = lru_cache(_MAX_KNOWN)(lambda reference, changes: model.library.find(reference))

    def adapters(self) -> list[Entry]:
        """The newest version of each name, of adapters that were made for this base. Unreadable ones are left out."""
        return [entry for entry in self._model.library.entries()[0] if self._is_readable_and_fits(entry)]

    def numbered(self) -> dict[int, str]:
        """The names of `adapters` by their number, which stays the same as long as the server runs."""
        names = [entry.name for entry in self.adapters()]
        with self._numbering:
            for name in names:
                self._numbers.setdefault(name, len(self._numbers))
        return {self._numbers[name]: name for name in names}

    def by_number(self, given: Iterable[tuple[int, float]]) -> list[tuple[str, float]]:
        """The names and factors of adapters that are given by number; a factor of 0 leaves one out.

        Raises ApiError (400) for a number that no adapter has.
        """
        scales = dict(given)
        known = self.numbered() if scales else {}
        if unknown := scales.keys() - known.keys():
            told = f"no adapter has the number {min(unknown)}; GET /lora-adapters lists those that do"
            raise ApiError(400, told, param="lora")
        return [(known[number], scale) for number, scale in scales.items() if scale]

    def _is_readable_and_fits(self, entry: Entry) -> bool:
        try:
            return self._fits(entry.version, entry.base)
        except AdapterError as error:
            log.warning("%s is left out of the models: %s", entry.name, error)
            return False

    def _is_for_base(self, version: str, base: str) -> bool:
        path = self._model.library.home(version) / MANIFEST
        if not path.is_file():  # in the library's remote store: it is not fetched to be listed
            return base == self._model.base.name
        made_for, ours = Manifest.read(path).made_for, self._model.base.fingerprint
        return (made_for.config, made_for.norms) == (ours.config, ours.norms)

    def adapter(self, reference: str) -> Adapter:
        """The adapter `name` or `name@hash`. Raises ApiError (404), or BaseModelError where it is for another base."""
        if not _REFERENCE.fullmatch(reference):
            raise unknown_model(reference)
        try:
            entry = self._find(reference)
            return self._open(entry.name, entry.version)
        except NoSuchAdapterError as error:
            raise unknown_model(reference) from error

    def _find(self, reference: str) -> Entry:
        """As `Library.find`, but from memory as long as the library has not changed."""
        library = self._model.library
        library.refresh()
        changes = library.change_counter()
        return library.find(reference) if changes is None else self._find_at(reference, changes)

    def resolve(
        self, model: str, parts: Sequence[tuple[str, float]] = (), tag: str = ""
    ) -> tuple[list[Adapter | str], dict[str, float]]:
        """What a request's `model` and `adapters` (references and scales) name: adapters, and patterns of names.

        Also the factors on the adapters' LoRAs, by their versions' hashes.

        Raises ApiError: 404 where one is unknown, 400 where one is named twice or there are too many.
        """
        named = [(reference, 1.0) for reference in self._split(model)] + list(parts)
        if len(named) > self._max_adapters:
            raise ApiError(400, f"a request may add up {self._max_adapters} adapters, not {len(named)}", param="model")
        patterns = patterns_in([reference for reference, _ in named], tag)
        chosen: list[Adapter | str] = []
        scales: dict[str, float] = {}
        for reference, scale in named:
            if reference in patterns:
                self._check_pattern(reference, scale, tag)
                chosen.append(reference)
                continue
            adapter = self.adapter(reference)
            if adapter.manifest.version in scales:
                raise ApiError(400, f"the adapter {reference!r} is named twice", param="model")
            chosen.append(adapter)
            scales[adapter.manifest.version] = scale
        if tag and not named:
            self._check_pattern("*", 1.0, tag)
        return chosen, scales

    def _split(self, model: str) -> list[str]:
        """The references in a model's name; none for the plain base. Raises ApiError (404) for another base."""
        if model == self.base:
            return []
        base, colon, rest = model.rpartition(":")
        if colon and base != self.base:
            raise unknown_model(model)
        return rest.split("+")

    def _check_pattern(self, pattern: str, scale: float, tag: str) -> None:
        if scale != 1:
            raise ApiError(400, f"{pattern[:64]!r} stands for any documents: it takes no scale", param="adapters")
        if not _PATTERN.fullmatch(pattern):
            raise unknown_model(pattern)
        try:
            check_patterns(self._model.library, [pattern], tag)
        except NoSuchAdapterError as error:
            what = f"with the tag {tag[:64]!r}" if tag else f"called {pattern!r}"
            raise ApiError(404, f"there is no document {what}", param="model", code="model_not_found") from error


def served_name(base: Base) -> str:
    """What a base is called in requests: its name, or the last part of its folder's path."""
    return Path(base.name).resolve().name if Path(base.name).is_dir() else base.name


def unknown_model(name: str) -> ApiError:
    """OpenAI's error for a model that does not exist."""
    shown = name if len(name) <= 100 else f"{name[:100]}..."
    message = f"The model `{shown}` does not exist; GET /v1/models lists those that do"
    return ApiError(404, message, param="model", code="model_not_found")
