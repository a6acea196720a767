"""A memory that grows while a user talks: what they say becomes further chunks of a document adapter.

    memory = model.memory("me")
    memory.remember("My dog is called Bella.")
    model.ask("What is my dog called?", "me")

Only the text is kept (storage `text`), so that a new version takes a few kilobytes and no pass of the base; a chunk is
cast when a question first needs it (`CachedRecast`), or in the background once it has been said. A memory is a document
to every other part of the library; its text is one message after the other, with a blank line between them.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakValueDictionary

from loracast.base.load import Base
from loracast.cast.document import CachedRecast, learn_document, split_document
from loracast.documents import Chunk, Document
from loracast.documents.clean import normalise
from loracast.documents.units import sentence_spans
from loracast.errors import AdapterError
from loracast.files import exclusively
from loracast.hypernets.protocol import Caster
from loracast.library.adapter import Adapter
from loracast.library.index import read_chunks
from loracast.library.library import Library
from loracast.library.manifest import MEMORY_SOURCE, check_name

MOST_CHUNKS = 256
"""Chunks of a memory, which are messages unless those are long; the oldest messages go when more come."""
KEPT_VERSIONS = 8
"""Versions of a memory that stay, the newest."""
_BACKGROUND = ThreadPoolExecutor(1, "loracast-memory")
"""Learns what `Memory.remember_later` is given, in order; a process that ends waits for it."""
_PENDING: WeakValueDictionary[tuple[Path, str], Future[Adapter | None]] = WeakValueDictionary()
"""By library and name, the last message given to `remember_later`, until it is kept."""
_TITLE = "What the user said"
_MESSAGE_GAP = "\n\n"  # between two messages in the text; none has one inside
_MIN_STATEMENT_WORDS = 3
_GREETING = re.compile(
    r"^(?:hi|hello|hey|thanks|ok|okay|(?:good )?(?:morning|evening|afternoon|day))(?: there| again)?\s*[,!.:]\s*", re.I
)
_REQUEST = re.compile(
    r"(?:please|write|tell|give|show|explain|describe|list|summari[sz]e|translate|make|help|let's|let us|thanks?|"
    r"(?:what|who|whose|which|why|how)(?:'s|'re)?|is|are|am|do|does|did|can|could|would|should|"
    r"(?:when|where) (?:is|are|am|was|were|do|does|did|can|could|will|would|should)|"
    r"will (?:you|i|we|it|he|she|they|there|the|my))\b",
    re.I,
)
"""How a sentence begins that states nothing, also where its question mark is missing."""


@dataclass(frozen=True)
class Forgotten:
    """What `Memory.forget` did."""

    message: str
    n_removed: int
    """Older versions that held the message and are gone."""
    still_in: tuple[str, ...]
    """Versions that hold it and stay, since they have another name as well."""


class Memory:
    """What a user said, kept under one name of a library. Threads and processes may share it."""

    def __init__(self, caster: Caster, base: Base, library: Library, name: str, recast: CachedRecast):
        """
        Args:
            recast: casts the chunks that have been said, so that a question need not wait for it.

        Raises:
            AdapterError: the name is not allowed, or is that of an adapter that is no memory.
        """
        self.caster, self.base, self.library, self.name = caster, base, library, check_name(name)
        self._recast = recast
        self._newest()

    def _newest(self) -> Adapter | None:
        with self.library.reading() as register:
            if register.newest(self.name) is None:
                return None
        adapter = self.library.open(self.name)
        if not adapter.manifest.is_memory:
            raise AdapterError(
                f"{self.name!r} is an adapter that no chat has made, and what is said would be mixed into it: give the "
                "memory another name"
            )
        return adapter

    def messages(self) -> list[str]:
        """What has been said, the oldest first: only sentences that state something."""
        adapter = self._newest()
        return [] if adapter is None else _messages_in(read_chunks(adapter.index))

    def remember(self, message: str) -> Adapter | None:
        """Add a message to the memory, as a new version; None where it states nothing or has been said already.

        The oldest messages are dropped where there are more than MOST_CHUNKS chunks, and versions after KEPT_VERSIONS.
        """
        said = statements_in(message)
        if not said:
            return None
        with exclusively(self.library.folder, "memory"):
            before = self.messages()
            if said in before:
                return None
            adapter = self._learn([*before, said])
            for entry in self.library.versions(self.name)[KEPT_VERSIONS:]:
                self.library.remove(f"{self.name}@{entry.version}")
        self._recast([chunk.text for chunk in self._split(said)])
        return adapter

    def remember_later(self, message: str) -> Future[Adapter | None]:
        """`remember` in the background. What fails there is logged, without the message."""
        future = _BACKGROUND.submit(self.remember, message)
        _PENDING[self.library.folder, self.name] = future
        future.add_done_callback(_log_failure)
        return future

    def wait_for_pending(self) -> None:
        """Wait until everything that `remember_later` was given for this memory is kept, or has failed."""
        if pending := _PENDING.get((self.library.folder, self.name)):
            wait([pending])

    def forget(self, number: int) -> Forgotten:
        """Take a message out of the memory, and delete the older versions that hold it.

        Copies of the adapter elsewhere (pushed, exported, backed up) stay.

        Args:
            number: its place in `messages`, from 1 on.

        Raises:
            AdapterError: there is no such message.
        """
        with exclusively(self.library.folder, "memory"):
            messages = self.messages()
            if not 1 <= number <= len(messages):
                raise AdapterError(
                    f"the memory {self.name!r} has {len(messages)} messages, and none is number {number}"
                )
            message = messages[number - 1]
            rest = [one for one in messages if one != message]
            there = self.library.versions(self.name)
            if rest:
                self._learn(rest)
            holding = [entry.version for entry in there if message in self._messages_of(entry.version)]
            for version in holding:
                self.library.remove(f"{self.name}@{version}")
            self.library.erase_traces()
            still_in = tuple(version for version in holding if self.library.home(version).exists())
        return Forgotten(message, len(holding) - len(still_in), still_in)

    def _messages_of(self, version: str) -> list[str]:
        return _messages_in(read_chunks(self.library.open(f"{self.name}@{version}").index))

    def _learn(self, messages: Sequence[str]) -> Adapter:
        each = [self._split(message) for message in messages]
        while sum(map(len, each)) > MOST_CHUNKS and len(each) > 1:
            del each[0]
        messages = messages[-len(each) :]
        text = _MESSAGE_GAP.join(messages)
        data = text.encode()
        document = Document(_TITLE, text, MEMORY_SOURCE, "text/plain", hashlib.sha256(data).hexdigest(), len(data))
        chunks: list[Chunk] = []
        start = 0
        for message, alone in zip(messages, each, strict=True):
            chunks += [replace(one, start=start + one.start, end=start + one.end, heading="") for one in alone]
            start += len(message) + len(_MESSAGE_GAP)
        return learn_document(
            self.caster, self.base, document, self.library, self.name, chunks=chunks, storage="text", replace=True
        )

    def _split(self, message: str) -> list[Chunk]:
        return split_document(self.base, Document.from_text(message), self.caster.hypernetwork.chunk_tokens)


def _log_failure(future: Future[Adapter | None]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        logging.getLogger(__name__).error("a message could not be remembered: %s", type(error).__name__)


def statements_in(message: str) -> str:
    """The sentences of a message that state something, on one line; "" where it only asks, requests or greets.

    A question that was remembered would be found in place of its answer.
    """
    message = normalise(message)
    sentences = [_GREETING.sub("", message[start:end], count=1) for start, end in sentence_spans(message)]
    stated = [one for one in sentences if not one.rstrip("\"'”’)").endswith("?") and not _REQUEST.match(one)]
    return " ".join(" ".join(one.split()) for one in stated if len(one.split()) >= _MIN_STATEMENT_WORDS)


def _messages_in(chunks: Sequence[Chunk]) -> list[str]:
    """The messages of a memory, the oldest first; a long one has several chunks."""
    messages: list[str] = []
    end = -len(_MESSAGE_GAP)
    for chunk in chunks:
        if chunk.start - end >= len(_MESSAGE_GAP):
            messages.append(chunk.text)
        else:
            messages[-1] += " " * (chunk.start - end) + chunk.text
        end = chunk.end
    return messages
