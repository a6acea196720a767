"""Answers questions and learns documents for the commands, in this process or through a running server.

A server answers and learns only for the same library, base, template, hypernetwork and version. What it refuses, since
its limits are narrower, this process does by itself.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from loracast.base.embedded import DEFAULT_BASE
from loracast.cli.options import (
    Answering,
    BaseChoice,
    Learning,
    Naming,
    Seeing,
    base_of,
    open_base,
    open_model,
    what_loads,
)
from loracast.cli.terminal import progress_bar, say
from loracast.documents import Limits
from loracast.documents.images import is_image_file, read_image_file
from loracast.documents.read import read_bytes, read_document
from loracast.errors import ConfigError, LoracastError, PromptTooLong
from loracast.files import servers_dir
from loracast.library.manifest import marked_name, name_for, name_for_task, name_from
from loracast.lora.quantize import DEFAULT_STORAGE
from loracast.reading.routing import Source, check_patterns, patterns_in

if TYPE_CHECKING:
    from loracast.answering.answers import AnsweredBy
    from loracast.answering.model import Model
    from loracast.base.chat import Message
    from loracast.base.generate import OnText
    from loracast.base.load import Base as LoadedBase
    from loracast.cast.memory import Forgotten, Memory
    from loracast.cast.task import TaskCaster
    from loracast.documents.task_spec import TaskSpec
    from loracast.hypernets.store import Modality
    from loracast.library.adapter import Adapter
    from loracast.library.library import Library
    from loracast.library.save import Progress
    from loracast.lora.quantize import Storage
    from loracast.serving.client import HTTPClient, Running

VARIABLE = "LORACAST_SERVER"
"""Environment variable; `off` has no command leave a server behind."""
_IDLE_S = 600
_STYLE_STRENGTH = 0.5
"""Scale of the LoRA of a style; at 1 it hides the effect of a document's LoRA (docs/memory.md)."""


@dataclass(frozen=True)
class Used:
    """One adapter that answered a question: its version, chunks and weights."""

    version: str
    """`name@hash`."""
    facts: Mapping[str, Any]
    """The fields of `Route` that --json prints; all chunks are listed where they are merged."""

    @classmethod
    def of(cls, version: str, n_chunks: int, route: Mapping[str, Any]) -> Used:
        """Build it from the fields of a `Route`, or from a server's account of one."""
        chunks = range(n_chunks) if route["chunks"] is None else route["chunks"]
        lists = {"chunks": list(chunks), "weights": list(route["weights"])}
        return cls(version, {**lists, "reason": route["reason"], "about": route["about"]})

    @property
    def name(self) -> str:
        return self.version.partition("@")[0]


@dataclass(frozen=True)
class Reply:
    """An answer, what it cost and where it comes from."""

    text: str
    is_finished: bool
    """False where it was cut."""
    n_prompt_tokens: int
    n_tokens: int
    first_token_s: float
    total_s: float
    used: tuple[Used, ...]
    """The adapters that the user named, in their order, and then those that the question chose."""
    sources: tuple[Source, ...]
    answered_by: AnsweredBy


def open_client(answering: Answering) -> tuple[Client, list[str]]:
    """Load the base, or find a server that has; and the adapters and patterns that were chosen, each version once.

    A wrong name, and a pattern or a tag without documents, is reported before a model is loaded.
    """
    if answering.strict and answering.always:
        raise ConfigError("--strict answers only what a document is about, --always asks the documents all the same: "
                          "give one of them")  # fmt: skip
    patterns = patterns_in(answering.chosen)
    names = [name for name in answering.chosen if name not in patterns]
    found = [answering.library.open(name) for name in names]
    template = answering.chat_template or next((one.manifest.made_for.chat_template for one in found), "")
    answering = replace(answering, base=answering.base or base_of(found), chat_template=template)
    if patterns:
        check_patterns(answering.library, patterns, answering.tag)
    if answering.style:
        style = _style(answering, found)
        names.append(style.name)
        answering = replace(answering, chat_template=template or style.manifest.made_for.chat_template)
    given = answering.hypernetwork  # of adapters that keep only their text
    client = Client(answering, _server_for(answering, answering.library, "document", given, local=answering.local))
    by_version: dict[str, str] = {}  # NAME, NAME@HASH and another name may be one version
    for name in names:
        by_version.setdefault(client.open(name).manifest.version, name)
    return client, [*by_version.values(), *patterns]


def _style(answering: Answering, others: Sequence[Adapter]) -> Adapter:
    """The task adapter of a style, cast and kept where the library has none of these words for the base of the others.

    Styles of different words may have one name, such as all in a script without Latin letters: the later ones get a
    hash behind it.
    """
    library, words = answering.library, answering.style.strip()
    there = [library.open(entry.name) for entry in library.entries(kind="task")[0] if entry.title == words]
    for style in there:
        if (_key(style) == _key(others[0])) if others else (base_of([style]) == _name_of(answering.base)):
            return style
    model = open_model(replace(answering, hypernetwork=None), library, eager=False)
    key, name = (model.base.fingerprint.config, model.base.fingerprint.norms), name_from(words)
    for style in there:  # the base may have been loaded by another name
        if _key(style) == key:
            return style
    if name in library.names():
        name = marked_name(name, "\n".join((words, *key)))
    return model.task(words, name, strength=_STYLE_STRENGTH)


def _key(adapter: Adapter) -> tuple[str, str]:
    """The hashes that identify the base of an adapter."""
    return adapter.manifest.made_for.config, adapter.manifest.made_for.norms


def _name_of(base: str | None) -> str | None:
    """The name by which adapters call a base that was given; None for the default one."""
    if base is None or base == DEFAULT_BASE:
        return None
    return str(Path(base).absolute()) if Path(base).is_dir() else base


class Client:
    """A base that answers with adapters of a library: a running server's, or one that this process loads.

    Args:
        server: None for a base of this process.
    """

    def __init__(self, answering: Answering, server: Running | None = None):
        self._answering, self._server = answering, server
        self._opened: dict[str, tuple[str, Adapter]] = {}  # by name, with the hash of the version
        self.base: str = self._model.base.name if server is None else server.fingerprint["base"]

    @cached_property
    def _model(self) -> Model:
        return open_model(self._answering, self._answering.library, eager=False)

    def open(self, name: str) -> Adapter:
        """An adapter, checked against the base. Raises AdapterError and others as `Model.adapter` does."""
        if self._server is None:
            return self._open_here(name)
        from loracast.base.fingerprint import Fingerprint, check

        found = self._answering.library.open(name)
        check(found.manifest.made_for, Fingerprint(**self._server.fingerprint), f"the adapter {name!r}")
        return found

    def _open_here(self, name: str) -> Adapter:
        version = self._answering.library.find(name).version  # learned anew or added to since, in this process or not
        if name not in self._opened or self._opened[name][0] != version:
            self._opened[name] = version, self._model.adapter(name)
        return self._opened[name][1]

    def memory(self, name: str) -> Memory | ServedMemory:
        """What was said in chats under this name. Raises AdapterError or Refused where that is another adapter's."""
        if self._server is None:
            return self._model.memory(name)
        found = ServedMemory(self._server.client(), name)
        found.messages()  # refuses a name that is another adapter's
        return found

    def reply(self, turns: Sequence[Message], chosen: Sequence[str], on_text: OnText) -> Reply:
        """Answer the last message of a conversation with these adapters and patterns of names.

        Raises PromptTooLong before any text where the conversation does not fit into the window.
        """
        if self._server is None:
            return self._reply_here(turns, chosen, on_text)
        from loracast.serving.client import Refused

        pieces: list[str] = []
        end: dict[str, Any] = {}
        try:
            for event in self._server.client().stream("/v1/chat/completions", self._body(self._server, turns, chosen)):
                for choice in event["choices"]:
                    end["finish"] = choice["finish_reason"]
                    if piece := choice["delta"].get("content"):
                        pieces.append(piece)
                        on_text(piece)
                end |= {key: event[key] for key in ("usage", "loracast") if event.get(key)}
        except Refused as refused:
            if pieces or refused.status >= 500 or refused.status == 429:
                raise
            if refused.code == "context_length_exceeded" and len(turns) > 1:
                raise PromptTooLong(str(refused)) from refused
            return self._reply_here(turns, chosen, on_text)
        if "loracast" not in end:
            raise LoracastError("the server stopped in the middle of the answer; ask again, or give --local")
        usage, account = end["usage"], end["loracast"]
        return Reply(
            "".join(pieces), end["finish"] == "stop", usage["prompt_tokens"], usage["completion_tokens"],
            (account["first_token_ms"] or account["total_ms"]) / 1000, account["total_ms"] / 1000,
            tuple(Used.of(one["id"], one["n_chunks"], one) for one in account["adapters"]),
            tuple(Source(**one) for one in account["sources"]), account["answered_by"][0],
        )  # fmt: skip

    def _reply_here(self, turns: Sequence[Message], chosen: Sequence[str], on_text: OnText) -> Reply:
        from loracast.base.generate import Sampling

        given, patterns = self._answering, patterns_in(chosen)
        said = self._model.answer(
            [*turns], [one if one in patterns else self._open_here(one) for one in chosen], on_text,
            sampling=Sampling(given.max_tokens, 0, given.temperature, given.top_p, given.seed),
            system=given.system or "", route=given.route, tag=tag_for(given, chosen), always=given.always,
            strict=given.strict or None,
        )  # fmt: skip
        used = tuple(Used.of(one.version, one.manifest.n_chunks, vars(route)) for one, route in said.routed)
        figures = (said.n_prompt_tokens, said.n_tokens, said.first_token_s, said.total_s)
        return Reply(said.text, said.finished, *figures, used, said.sources, said.answered_by)

    def _body(self, server: Running, turns: Sequence[Message], chosen: Sequence[str]) -> dict[str, Any]:
        given = self._answering
        options = ("route", "always", "max_tokens", "temperature", "top_p", "seed")
        return {
            "model": server.model,
            "messages": [{"role": "system", "content": given.system or ""}, *turns],
            "adapters": [{"id": one} for one in chosen],
            "tag": tag_for(given, chosen),
            **{option: getattr(given, option) for option in options},
            "strict": given.strict or None,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


class ServedMemory:
    """A memory that a server keeps, with the methods of `Memory`."""

    def __init__(self, client: HTTPClient, name: str):
        self._client, self._path = client, f"/v1/memories/{quote(name, safe='')}"

    def messages(self) -> list[str]:
        return self._client.get(self._path)["data"]

    def remember(self, message: str) -> None:
        self._client.post(self._path, {"message": message})

    def forget(self, number: int) -> Forgotten:
        from loracast.cast.memory import Forgotten

        answer = self._client.delete(f"{self._path}/{number}")
        return Forgotten(answer["message"], answer["versions_removed"], tuple(answer["still_in"]))


def _server_for(
    choice: BaseChoice,
    library: Library,
    modality: Modality,
    hypernetwork: str | None,
    seeing: Seeing | None = None,
    *,
    local: bool,
) -> Running | None:
    """A running server with the same base, library, hypernetwork and, if given, vision model; None where there is none,
    and with `local`.

    In a terminal one is started for documents and stays for the next commands.
    """
    if local:
        return None
    from loracast.serving.client import find

    options = seeing.options if seeing else {}
    server = find(what_loads(choice, library, {modality: hypernetwork, **options}))
    if server is None and modality == "document" and _may_start():
        given = {
            "library": library.folder, "base": choice.base, "hypernetwork": hypernetwork, **choice.how,
            "encoder": options.get("image_encoder"), "labels": options.get("image_labels"),
        }  # fmt: skip
        server = _started({option: str(value) for option, value in given.items() if value is not None})
    return server


def _may_start() -> bool:
    """Whether a server may stay behind: someone at a terminal reads that it does, and has not forbidden it."""
    is_read = sys.stdout.isatty() and sys.stderr.isatty()
    return is_read and os.name == "posix" and os.environ.get(VARIABLE) != "off" and not os.environ.get("CI")


def _started(options: Mapping[str, str]) -> Running | None:
    """A server on a Unix socket that ends when nobody has asked it for ten minutes; None where it does not start."""
    from loracast.cli.serve import in_background

    options = {**options, "unix-socket": str(servers_dir() / f"{secrets.token_hex(4)}.sock"), "idle-s": str(_IDLE_S)}
    words = [f"--{option.replace('_', '-')}={value}" for option, value in options.items()]
    try:
        server, _ = in_background(["serve", *words])
    except LoracastError as error:
        say(f"(no server stays for the next commands: {error})")
        return None
    say(f"(the base stays loaded until {_IDLE_S // 60} minutes after the last command; `loracast stop` ends it now)")
    return server


# ---- learning


class Learner:
    """Learns documents and images: a running server does it, or this process where there is none, and if `local`.

    The models of this process are loaded with the first document that it learns.
    """

    def __init__(self, learning: Learning, *, local: bool = False, seeing: Seeing = Seeing(), photos: bool = False):
        self.learning, self._is_local, self._seeing, self._photos = learning, local or photos, seeing, photos

    @cached_property
    def _model(self) -> Model:
        return open_model(self.learning, self.learning.library, **self._seeing.options)

    def learn(self, file: str | Path, naming: Naming, *, shows_progress: bool = False) -> Adapter:
        """Learn a document or an image. Raises DocumentError, AdapterError and others as `Model.learn` does."""
        how, title = self.learning, f"learning {file}"
        if server := _server_for(how, how.library, "document", how.hypernetwork, self._seeing, local=self._is_local):
            content, file_name, _ = read_bytes(file, None, Limits())
            fields = {"replace": str(naming.replace).lower(), "storage": how.document_storage}
            fields |= {"name": naming.name} if naming.name else {}
            fields |= {"chunk_tokens": str(how.chunk_tokens)} if how.chunk_tokens else {}
            with progress_bar("chunks", title, is_shown=shows_progress) as progress:
                if made := _made_there(
                    server, how.library,
                    lambda client: client.upload("/v1/adapters", fields, file_name or "file", content), progress,
                ):  # fmt: skip
                    return made
        document = read_image_file(file) if is_image_file(file) else read_document(file, photos=self._photos)
        name = naming.checked(how.library, name_for(document), document.sha256)
        model = self._model
        with progress_bar("chunks", title, is_shown=shows_progress) as progress:
            return model.learn(
                document, name, max_chunk_tokens=how.chunk_tokens, storage=how.document_storage,
                replace=naming.replace, progress=progress,
            )  # fmt: skip


@dataclass(frozen=True)
class Tasks:
    """Casts tasks here or by a running server. The base is loaded only for hypernetworks that read a task with it."""

    choice: BaseChoice
    library: Library
    hypernetwork: str | None
    encoder: str | None
    strength: float
    """Scale of the LoRA."""
    storage: Storage | None
    refine_s: float | None
    """Seconds of gradient descent on the examples."""

    @cached_property
    def _base(self) -> LoadedBase:
        from loracast.cast.load import check_default_base

        if self.choice.base is None:
            check_default_base([self._where])
        return open_base(self.choice)

    @property
    def _where(self) -> str | Path:
        from loracast.cast.load import shipped_hypernetwork

        return self.hypernetwork or shipped_hypernetwork(self.choice.base or DEFAULT_BASE, "task")

    @cached_property
    def caster(self) -> TaskCaster:
        """The hypernetwork for tasks, with the library."""
        from loracast.cast.load import load_caster
        from loracast.cast.task import TaskCaster

        hypernetwork = load_caster(self._where, "task", lambda: self._base, encoder=self.encoder, say=say)
        return TaskCaster(hypernetwork, self.library)

    def cast(self, spec: TaskSpec, naming: Naming, *, local: bool) -> Adapter:
        """Cast a task and keep its adapter. Raises AdapterError, ConfigError and others as `Model.task` does.

        Args:
            local: use no server. None is used either where its API does not take all that is asked for.
        """
        local = local or bool(self.encoder or self.storage or self.refine_s) or self.strength != 1.0
        if server := _server_for(self.choice, self.library, "task", self.hypernetwork, local=local):
            examples = [{"input": one.input, "output": one.outputs[0]} for one in spec.examples]
            body = {"description": spec.description, "examples": examples, **asdict(naming)}
            if made := _made_there(server, self.library, lambda client: client.post("/v1/adapters", body)):
                return made
        name, descent = naming.checked(self.library, name_for_task(spec.title), spec.sha256), None
        caster = self.caster
        if self.refine_s is not None:
            from loracast.cast.refine import RefineConfig, refiner

            descent = refiner(self._base, RefineConfig(seconds=self.refine_s))
        (adapter,) = caster.tasks(
            [spec], [name], strength=self.strength, refine=descent, storage=self.storage or DEFAULT_STORAGE,
            replace=naming.replace,
        )  # fmt: skip
        return adapter


def _made_there(
    server: Running,
    library: Library,
    begin: Callable[[HTTPClient], Mapping[str, Any]],
    progress: Progress = lambda done, total: None,
) -> Adapter | None:
    """The adapter of a server's job, None where the server refuses or fails. After Ctrl-C the job is cancelled."""
    from loracast.serving.client import Refused

    client = server.client()
    try:
        begun = job = begin(client)
    except Refused as refused:
        if refused.status == 429 or refused.status >= 500:
            raise
        return None
    try:
        for job in client.stream(f"/v1/jobs/{begun['id']}/events"):
            progress(job["done"], job["total"])
    except KeyboardInterrupt:
        client.post(f"/v1/jobs/{begun['id']}/cancel", {})
        raise
    if job["status"] == "failed":
        return None
    if job["status"] != "completed":
        raise LoracastError(
            f"the server did not finish {job['adapter']!r} (it is {job['status']}); it goes on when the server runs "
            "again, and `loracast list` shows it then"
        )
    return library.open(f"{job['adapter']}@{job['version']}")


# ---- messages about an answer


def tag_for(answering: Answering, chosen: Iterable[str]) -> str:
    """The tag, where a pattern selects documents; without a pattern it would select all documents that have it."""
    return answering.tag if patterns_in(chosen) else ""


def say_unused(reply: Reply, strict: bool) -> None:
    """Say which documents the question is not about, and where an answer was too unsure to be given."""
    for used in reply.used:
        if not used.facts["chunks"]:
            how = "" if strict else "; --always uses it anyway"
            say(f"({used.name} is not about this, so the answer is not from it{how})")
    if strict and reply.answered_by == "refusal" and any(used.facts["chunks"] for used in reply.used):
        say("(the answer was too unsure; without --strict it is shown)")


def say_sources(reply: Reply, chosen: Sequence[str]) -> None:
    """Say which chunks an answer came from, of the documents that patterns stand for."""
    wide = patterns_in(chosen)
    found = {used.name for used in reply.used[len(chosen) - len(wide) :]}
    for source in reply.sources:
        if source.adapter in found:
            say(f"(from {source})")
    if wide and not found and not reply.sources:  # documents that were named have sources, too
        say("(no document of the library matches the question: the answer is not from it)")
