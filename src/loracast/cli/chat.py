"""`loracast chat`: a conversation with learned documents, on a terminal or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loracast.base.chat import Message, search_query
from loracast.cli.options import Answering, MaxTokens
from loracast.cli.output import Stream, printable, say
from loracast.cli.session import open_answerer, say_sources, say_unused
from loracast.errors import LoracastError
from loracast.library.wide_route import check_patterns, patterns_in

if TYPE_CHECKING:
    from loracast.base.generate import Sampling
    from loracast.library.adapter import Adapter
    from loracast.model import Model

HELP = """\
/use NAME    answer with this adapter too; NAME may be a pattern: * for whatever document matches a question
/drop NAME   answer without it
/list        the adapters there are; * marks those in use
/clear       forget the conversation
/help        this list
/quit        leave (as Ctrl-D does); Ctrl-C stops an answer"""


@dataclass(frozen=True, kw_only=True)
class Chatting(Answering):
    """The options of `ask`, with room for longer answers."""

    max_tokens: MaxTokens = 256


def chat(answering: Chatting) -> None:
    """Talk with learned documents, or with the plain base."""
    answerer, adapters, sampling = open_answerer(answering)

    from loracast.model import ASK_SYSTEM_TURN

    talk = Talk(
        answerer, answering.system or ASK_SYSTEM_TURN, answering.route, sampling, answering.tag, answering.always
    )
    talk.used = adapters
    if sys.stdin.isatty():
        say(f"{' + '.join(talk.used) or 'no adapter'} on {answerer.base.name}; /help lists the commands, Ctrl-D leaves")
    for line in _lines():
        if line in ("/quit", "/exit"):
            break
        try:
            if line.startswith("/"):
                talk.obey(line)
            else:
                talk.reply(line)
        except LoracastError as error:
            say(f"error: {error}")


def _lines() -> Iterator[str]:
    """What the user says, line by line, until the end of input."""
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

    def __init__(
        self, answerer: Model, system: str, route: int | None, sampling: Sampling, tag: str = "", always: bool = False
    ):
        self.answerer, self.route, self.sampling, self.tag, self.always = answerer, route, sampling, tag, always
        self.system: Message = {"role": "system", "content": system}
        self.turns: list[Message] = []
        self.used: dict[str, Adapter | str] = {}
        """Adapters by name, and patterns of names."""

    def obey(self, line: str) -> None:
        """Carry out a command."""
        command, _, name = line.partition(" ")
        name = name.strip()
        if command == "/use" and name:
            if patterns_in([name]):
                check_patterns(self.answerer.library, [name], self.tag)
                self.used[name] = name
            else:
                self.used[name] = self.answerer.adapter(name)
            say(f"(using {' + '.join(self.used)})")
        elif command == "/drop" and name:
            if self.used.pop(name, None) is None:
                say(f"({printable(name)} is not in use)")
            else:
                say(f"(using {' + '.join(self.used) or 'no adapter'})")
        elif command == "/list":
            from loracast.library.library import adapter_names

            for there in adapter_names(self.answerer.library):
                print(f"{'*' if there in self.used else ' '} {there}", flush=True)
        elif command == "/clear":
            self.turns = []
            say("(the conversation is forgotten)")
        elif command == "/help":
            print(HELP, flush=True)
        else:
            say(f"({printable(line)}: no such command; /help lists them)")

    def reply(self, question: str) -> None:
        """Answer, and remember both; after Ctrl-C what has been said so far."""
        from loracast.base.generate import answer

        base = self.answerer.base
        chosen = list(self.used.values())
        if (told := self.answerer.overview(question, chosen)) is not None:
            print(printable(told), flush=True)
            self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": told}]
            return
        wide = patterns_in(chosen)
        tag = self.tag if wide else ""  # without a pattern it would stand for all documents
        query = search_query(question, self.turns)
        lora, routed = self.answerer.lora_for(query, chosen, self.route, tag, self.always)
        turns: list[Message] = [*self.turns, {"role": "user", "content": question}]
        room, n_dropped = base.window - self.sampling.max_new_tokens, 0
        while len(turns) > 2 and len(base.chat.conversation([self.system, *turns])) > room:
            turns, n_dropped = turns[2:], n_dropped + 1  # forget the oldest question with its answer
        if n_dropped:
            say(f"(the oldest {n_dropped} question(s) no longer fit into the window and are forgotten)")
        stream = Stream()
        try:
            given = answer(base, base.chat.conversation([self.system, *turns]), lora, self.sampling, stream)
            said = given.text
            cut = "" if given.finished else f"(cut after {given.n_tokens} tokens; --max-tokens allows more)"
        except KeyboardInterrupt:
            said, cut = stream.text, "(stopped)"
        if stream.text:
            stream.end()
        if cut:
            say(cut)
        say_unused(routed)
        if wide:
            say_sources(routed, len(chosen) - len(wide))
        self.turns = [*turns, {"role": "assistant", "content": said}]
