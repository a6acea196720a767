"""`loracast ask` and `chat`: one question, or a conversation on a terminal or through a pipe."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated

import typer

from loracast.cli.client import Client, ServedMemory, open_client, say_sources, say_unused
from loracast.cli.options import Answering, Json, MaxTokens, Question, distinct
from loracast.cli.terminal import Stream, print_json, printable, say
from loracast.errors import ConfigError, LoracastError, PromptTooLong
from loracast.library.library import Library
from loracast.library.manifest import VERSION_DIGITS
from loracast.reading.outline import overview
from loracast.reading.routing import check_patterns, patterns_in
from loracast.text import is_unicode

if TYPE_CHECKING:
    from loracast.base.chat import Message
    from loracast.cast.memory import Memory


def ask(question: Question, answering: Answering, *, as_json: Json = False) -> None:
    """Ask a question of learned documents.

    With --all, --tag or a pattern of names, the documents that match the question answer, and are named after the
    answer. Without any of them and without an adapter the plain base answers.
    """
    started = time.perf_counter()
    client, chosen = open_client(answering)
    load_s = time.perf_counter() - started

    stream, turns = Stream(), [{"role": "user", "content": question}]
    try:
        reply = client.reply(turns, chosen, (lambda text: None) if as_json else stream)
    finally:
        if not as_json:
            stream.end()
    if not as_json:
        if not reply.is_finished:
            say(f"(cut after {reply.n_tokens} tokens; --max-tokens allows more)")
        say_unused(reply, answering.strict)
        say_sources(reply, chosen)
        return
    names = Counter(used.name for used in reply.used)
    used = {one.name if names[one.name] == 1 else one.version: one.facts for one in reply.used}
    print_json({
        "question": question, "answer": reply.text, "answered_by": reply.answered_by, "finished": reply.is_finished,
        "adapters": used, "sources": reply.sources, "base": client.base, "n_prompt_tokens": reply.n_prompt_tokens,
        "n_tokens": reply.n_tokens, "load_s": round(load_s, 3), "first_token_s": round(reply.first_token_s, 3),
        "total_s": round(reply.total_s, 3),
    })  # fmt: skip


HELP = """\
/use NAME    answer with this adapter too; NAME may be a pattern: * for whatever document matches a question
/drop NAME   answer without it
/list        the adapters there are; * marks those in use
/memory      what --remember keeps, numbered
/forget N    take message N out of it, and delete the older versions that hold it
/clear       forget the conversation
/help        this list
/quit        leave (as Ctrl-D does); Ctrl-C stops an answer"""


@dataclass(frozen=True, kw_only=True)
class ChatOptions(Answering):
    """The options of `ask`, with room for longer answers."""

    max_tokens: MaxTokens = 256
    remember: Annotated[str | None, typer.Option(metavar="NAME")] = None
    """Keep what you say under this name, and answer with it; /memory shows it."""


def chat(answering: ChatOptions) -> None:
    """Talk with learned documents, or with the plain base."""
    client, chosen = open_client(answering)
    talk = Talk(client, answering.library, answering.tag, answering.strict)
    talk.used = chosen
    if answering.remember:
        talk.remember(answering.remember)
    if sys.stdin.isatty():
        say(f"{' + '.join(talk.used) or 'no adapter'} on {client.base}; /help lists the commands, Ctrl-D leaves")
    for line in _lines():
        if line in ("/quit", "/exit"):
            break
        try:
            if not is_unicode(line):
                raise ConfigError("this line is not valid UTF-8")
            if line.startswith("/"):
                talk.obey(line)
            else:
                talk.reply(line)
        except LoracastError as error:
            say(f"error: {error}")


def _lines() -> Iterator[str]:
    """Yield the user's lines until the end of input."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line in another encoding must not end the conversation
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    with suppress(ImportError):  # not on Windows; it gives input() a history
        import readline  # noqa: F401
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("\n(/quit or Ctrl-D leaves)")
            continue
        if line:
            yield line


class Talk:
    """A conversation and the adapters that it uses."""

    def __init__(self, client: Client, library: Library, tag: str = "", strict: bool = False):
        self.client, self.library, self.tag, self.strict = client, library, tag, strict
        self.turns: list[Message] = []
        self.used: list[str] = []
        """Names of adapters, and patterns of names."""
        self._name: str | None = None
        self._memory: Memory | ServedMemory | None = None
        self._learning: Future[object] | None = None

    def remember(self, name: str) -> None:
        """Keep what is said from now on in a memory, in the background, and answer with that too."""
        self._name, self._memory = name, self.client.memory(name)
        self._background = ThreadPoolExecutor(1, "loracast-chat")

    def obey(self, line: str) -> None:
        """Carry out a command."""
        command, _, name = line.partition(" ")
        name = name.strip()
        if command == "/use" and name:
            if patterns_in([name]):
                check_patterns(self.library, [name], self.tag)
            else:
                self.client.open(name)
            self.used = distinct([*self.used, name])
            say(f"(using {' + '.join(self.used)})")
        elif command == "/drop" and name:
            if name not in self.used:
                say(f"({printable(name)} is not in use)")
            else:
                self.used.remove(name)
                say(f"(using {' + '.join(self.used) or 'no adapter'})")
        elif command == "/list":
            for there in self.library.names():
                print(f"{'*' if there in self.used else ' '} {there}", flush=True)
        elif command == "/memory":
            for i, message in enumerate(self._remembered().messages(), 1):
                print(printable(f"{i:3} {message}"), flush=True)
        elif command == "/forget" and name.isdecimal():
            forgotten = self._remembered().forget(int(name))
            left = [f"{printable(self._name or '')}@{version[:VERSION_DIGITS]}" for version in forgotten.still_in]
            say(f"(forgotten: {forgotten.message})")
            if left:
                say(f"(it is still in {', '.join(left)}, which another name has too)")
        elif command == "/clear":
            self.turns = []
            say("(the conversation is forgotten)")
        elif command == "/help":
            print(HELP, flush=True)
        else:
            say(f"({printable(line)}: no such command; /help lists them)")

    def _remembered(self) -> Memory | ServedMemory:
        """The memory, once all messages are kept in it. Raises LoracastError where there is none."""
        if self._memory is None:
            raise LoracastError("this chat keeps no memory; begin it with --remember NAME")
        if self._learning is not None:
            wait([self._learning])
        return self._memory

    def reply(self, question: str) -> None:
        """Answer, and keep both in the conversation; after Ctrl-C what has been said so far."""
        self._answer(question)
        if self._memory is not None:
            self._learning = self._background.submit(self._remember, self._memory, question)

    def _remember(self, memory: Memory | ServedMemory, message: str) -> None:
        try:
            memory.remember(message)
        except (LoracastError, OSError) as error:
            say(f"(this could not be remembered: {error})")

    def _answer(self, question: str) -> None:
        used = [*self.used, *self._with_memory()]
        turns: list[Message] = [*self.turns, {"role": "user", "content": question}]
        if (outlined := overview(question, used, self.client.open)) is not None:
            print(printable(outlined.text), flush=True)
            self.turns = [*turns, {"role": "assistant", "content": outlined.text}]
            return
        stream, reply = Stream(), None
        try:
            while reply is None:
                try:
                    reply = self.client.reply(turns, used, stream)
                except PromptTooLong:
                    if len(turns) <= 2:
                        raise
                    turns = turns[2:]
                    say("(the oldest question no longer fits into the window and is forgotten)")
            said = reply.text
            cut = "" if reply.is_finished else f"(cut after {reply.n_tokens} tokens; --max-tokens allows more)"
        except KeyboardInterrupt:
            said, cut = stream.text, "(stopped)"
        if stream.text:
            stream.end()
        if cut:
            say(cut)
        if reply is not None:
            say_unused(replace(reply, used=tuple(one for one in reply.used if one.name != self._name)), self.strict)
            say_sources(reply, used)
        self.turns = [*turns, {"role": "assistant", "content": said}]

    def _with_memory(self) -> list[str]:
        """The memory's name, once it holds something."""
        if self._name is None or self._name in self.used:
            return []
        return [self._name] if self._memory is not None and self._memory.messages() else []
