"""What commands ask: this process, which loads the base, or a running server that has the same one loaded.

A server answers and learns only for the same library, base, template, hypernetwork and version. What it refuses, since
its limits are narrower, this process does by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from loracast.base.embedded import DEFAULT_BASE
from loracast.cli.options import Answering, BaseChoice, Learning, Naming, base_of, loading, open_model, what_loads
from loracast.cli.terminal import say
from loracast.documents import Limits
from loracast.documents.read import read_bytes, read_document
from loracast.errors import ConfigError, LoracastError, PromptTooLong
from loracast.library.manifest import marked_name, name_for, name_for_task, name_from
from loracast.lora.quantize import DEFAULT_STORAGE
from loracast.reading.wide_route import Source, check_patterns, patterns_in

if TYPE_CHECKING:
    from loracast.answering.answers import AnsweredBy
    from loracast.answering.model import Model
    from loracast.base.chat import Message
    from loracast.base.generate import OnText
    from loracast.base.load import Base as LoadedBase
    from loracast.cast.memory import Forgotten
    from loracast.cast.task import TaskCaster
    from loracast.documents.task_spec import TaskSpec
    from loracast.hypernets.store import Modality
    from loracast.library.adapter import Adapter
    from loracast.library.library import Library
    from loracast.library.save import Progress
    from loracast.lora.quantize import Storage
    from loracast.reading.routing import Route
    from loracast.serving.client import Client as HTTPClient
    from loracast.serving.client import Running

    Bar = Callable[[], AbstractContextManager[Progress]]
    """Makes a bar that shows how many chunks are cast."""

_STYLE_STRENGTH = 0.5
"""Of the LoRA of a style; at 1 it drowns that of a document (docs/memory.md)."""


@dataclass(frozen=True)
class Used:
    """What a question got of one adapter, as `Route` says it."""

    name: str
    version: str
    """`name@hash`."""
    chunks: tuple[int, ...]
    scores: tuple[float, ...]
    weights: tuple[float, ...]
    reason: str
    about: float | None

    def facts(self) -> dict[str, Any]:
        """What --json says of it."""
        lists = {key: list(getattr(self, key)) for key in ("chunks", "scores", "weights")}
        return {**lists, "reason": self.reason, "about": self.about}


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


class Remembering(Protocol):
    """What a user said in chats (`cast.memory.Memory`)."""

    def messages(self) -> list[str]: ...

    def remember(self, message: str) -> object: ...

    def forget(self, number: int) -> Forgotten: ...


class Client(Protocol):
    """A base that answers with adapters of a library. `base` is its name."""

    base: str

    def open(self, name: str) -> Adapter:
        """An adapter, checked against the base. Raises AdapterError and others as `Model.adapter` does."""

    def memory(self, name: str) -> Remembering:
        """What was said in chats under this name. Raises AdapterError where that is another adapter's."""

    def reply(self, turns: Sequence[Message], chosen: Sequence[str], on_text: OnText) -> Reply:
        """Answer the last message of a conversation with these adapters and patterns of names.

        Raises PromptTooLong before any text where the conversation does not fit into the window.
        """


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
    server = server_for(answering, answering.library, "document", given, local=answering.local)
    client: Client = Local(answering) if server is None else Remote(server, answering)
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
    with loading(answering.device) as tell:
        from loracast.answering.model import load

        model = load(answering.base, library=library, **answering.how, say=tell, eager=False)
    key, name = (model.base.fingerprint.config, model.base.fingerprint.norms), name_from(words)
    for style in there:  # the base may have been loaded by another name
        if _key(style) == key:
            return style
    if name in library.names():
        name = marked_name(name, "\n".join((words, *key)))
    return model.task(words, name, strength=_STYLE_STRENGTH)


def _key(adapter: Adapter) -> tuple[str, str]:
    """What tells its base from others."""
    return adapter.manifest.made_for.config, adapter.manifest.made_for.norms


def _name_of(base: str | None) -> str | None:
    """The name by which adapters call a base that was given; None for the default one."""
    if base is None or base == DEFAULT_BASE:
        return None
    return str(Path(base).absolute()) if Path(base).is_dir() else base


class Local:
    """A base that this process loads."""

    def __init__(self, answering: Answering):
        with loading(answering.device) as tell:
            from loracast.answering.model import load
            from loracast.base.generate import Sampling

            self._model = load(
                answering.base,
                answering.hypernetwork,
                library=answering.library,
                **answering.how,
                say=tell,
                eager=False,
            )
        self.base = self._model.base.name
        self._answering = answering
        self._sampling = Sampling(answering.max_tokens, 0, answering.temperature, answering.top_p, answering.seed)
        self._opened: dict[str, tuple[str, Adapter]] = {}  # by name, with the hash of the version

    def open(self, name: str) -> Adapter:
        version = self._answering.library.find(name).version  # learned anew or added to since, in this process or not
        if name not in self._opened or self._opened[name][0] != version:
            self._opened[name] = version, self._model.adapter(name)
        return self._opened[name][1]

    def memory(self, name: str) -> Remembering:
        return self._model.memory(name)

    def reply(self, turns: Sequence[Message], chosen: Sequence[str], on_text: OnText) -> Reply:
        given, patterns = self._answering, patterns_in(chosen)
        said = self._model.answer(
            [*turns], [one if one in patterns else self.open(one) for one in chosen], on_text, sampling=self._sampling,
            system=given.system or "", route=given.route, tag=tag_for(given, chosen), always=given.always,
            strict=given.strict,
        )  # fmt: skip
        figures = (said.n_prompt_tokens, said.n_tokens, said.first_token_s, said.total_s)
        used = tuple(_used(adapter, route) for adapter, route in said.routed)
        return Reply(said.text, said.finished, *figures, used, said.sources, said.answered_by)


def _used(adapter: Adapter, route: Route) -> Used:
    chunks = tuple(range(adapter.manifest.n_chunks)) if route.chunks is None else route.chunks
    return Used(adapter.name, adapter.version, chunks, route.scores, route.weights, route.reason, route.about)


class Remote:
    """A running server that answers."""

    def __init__(self, server: Running, answering: Answering):
        self.base = server.fingerprint["base"]
        self._server, self._answering = server, answering

    @cached_property
    def _local(self) -> Local:
        return Local(self._answering)

    def open(self, name: str) -> Adapter:
        from loracast.base.fingerprint import Fingerprint, check

        found = self._answering.library.open(name)
        check(found.manifest.made_for, Fingerprint(**self._server.fingerprint), f"the adapter {name!r}")
        return found

    def memory(self, name: str) -> Remembering:
        found = _RemoteMemory(self._server.client(), name)
        found.messages()  # refuses a name that is another adapter's
        return found

    def reply(self, turns: Sequence[Message], chosen: Sequence[str], on_text: OnText) -> Reply:
        from loracast.serving.client import Refused

        pieces: list[str] = []
        end: dict[str, Any] = {}
        try:
            for event in self._server.client().stream("/v1/chat/completions", self._body(turns, chosen)):
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
            return self._local.reply(turns, chosen, on_text)
        if "loracast" not in end:
            raise LoracastError("the server stopped in the middle of the answer; ask again, or give --local")
        return _served("".join(pieces), end)

    def _body(self, turns: Sequence[Message], chosen: Sequence[str]) -> dict[str, Any]:
        given = self._answering
        body = {
            "model": self._server.model,
            "messages": [{"role": "system", "content": given.system or ""}, *turns],
            "adapters": [{"id": one} for one in chosen],
            "route": given.route,
            "tag": tag_for(given, chosen),
            "always": given.always,
            "strict": given.strict,
            "max_tokens": given.max_tokens,
            "temperature": given.temperature,
            "top_p": given.top_p,
            "seed": given.seed,
        }
        return {**body, "stream": True, "stream_options": {"include_usage": True}}


class _RemoteMemory:
    """A memory that a server keeps."""

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


def _served(text: str, end: Mapping[str, Any]) -> Reply:
    usage, account = end["usage"], end["loracast"]
    used = []
    for one in account["adapters"]:
        chunks = range(one["n_chunks"]) if one["chunks"] is None else one["chunks"]
        lists = (tuple(chunks), tuple(one["scores"]), tuple(one["weights"]))
        used.append(Used(one["id"].partition("@")[0], one["id"], *lists, one["reason"], one["about"]))
    return Reply(
        text,
        end["finish"] == "stop",
        usage["prompt_tokens"],
        usage["completion_tokens"],
        (account["first_token_ms"] or account["total_ms"]) / 1000,
        account["total_ms"] / 1000,
        tuple(used),
        tuple(Source(**one) for one in account["sources"]),
        account["answered_by"][0],
    )


def server_for(
    choice: BaseChoice, library: Library, modality: Modality, hypernetwork: str | None, *, local: bool
) -> Running | None:
    """A running server that does what a command with these options would do by itself; None also with --local."""
    if local:
        return None
    from loracast.serving.client import find

    return find(what_loads(choice, library, {modality: hypernetwork}))


# ---- learning


@contextmanager
def no_bar() -> Iterator[Progress]:
    """Show no progress."""
    yield lambda done, total: None


class Learner(Protocol):
    """What makes adapters of documents."""

    def learn(self, file: str | Path, naming: Naming, bar: Bar = no_bar) -> Adapter:
        """Learn a document. Raises DocumentError, AdapterError and others as `Model.learn` does."""


class LocalLearner:
    """This process learns; base and hypernetwork are loaded with the first document."""

    def __init__(self, learning: Learning):
        self.learning = learning

    @cached_property
    def _model(self) -> Model:
        return open_model(self.learning, self.learning.library)

    def learn(self, file: str | Path, naming: Naming, bar: Bar = no_bar) -> Adapter:
        how, document = self.learning, read_document(file)
        name = naming.checked(how.library, name_for(document), document.sha256)
        model = self._model
        with bar() as progress:
            return model.learn(
                document, name, max_chunk_tokens=how.chunk_tokens, storage=how.document_storage,
                replace=naming.replace, progress=progress,
            )  # fmt: skip


class RemoteLearner:
    """A running server learns; where it refuses or fails, this process tries, and says why."""

    def __init__(self, server: Running, here: LocalLearner):
        self._server, self._here = server, here

    def learn(self, file: str | Path, naming: Naming, bar: Bar = no_bar) -> Adapter:
        how = self._here.learning
        content, file_name, _ = read_bytes(file, None, Limits())
        fields = {"replace": str(naming.replace).lower(), "storage": how.document_storage}
        fields |= {"name": naming.name} if naming.name else {}
        fields |= {"chunk_tokens": str(how.chunk_tokens)} if how.chunk_tokens else {}
        with bar() as progress:
            made = _made_there(
                self._server, how.library,
                lambda client: client.upload("/v1/adapters", fields, file_name or "file", content), progress,
            )  # fmt: skip
        return made or self._here.learn(file, naming, bar)


def learner_for(here: LocalLearner, *, local: bool) -> Learner:
    """A running server, or this process where there is none, and with --local."""
    how = here.learning
    server = server_for(how, how.library, "document", how.hypernetwork, local=local)
    return here if server is None else RemoteLearner(server, here)


@dataclass(frozen=True)
class LocalTasks:
    """This process casts tasks. The base is loaded only for hypernetworks that read a description with it."""

    choice: BaseChoice
    library: Library
    hypernetwork: str | None = None
    encoder: str | None = None
    strength: float = 1.0
    """Scale of the LoRA."""
    storage: Storage | None = None
    refine_s: float | None = None
    """Seconds of gradient descent on the examples."""

    @property
    def is_plain(self) -> bool:
        """Whether a server's API takes all that is asked for."""
        return not (self.encoder or self.storage or self.refine_s) and self.strength == 1.0

    @cached_property
    def _base(self) -> LoadedBase:
        from loracast.base.load import load_base
        from loracast.cast.load import check_default_base

        if self.choice.base is None:
            check_default_base([self._where])
        return load_base(self.choice.base, **self.choice.how, say=say)

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

    def cast(self, spec: TaskSpec, naming: Naming) -> Adapter:
        """Cast a task and keep its adapter. Raises AdapterError, ConfigError and others as `Model.task` does."""
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


@dataclass(frozen=True)
class RemoteTasks:
    """A running server casts tasks; where it refuses or fails, this process tries, and says why."""

    server: Running
    here: LocalTasks

    def cast(self, spec: TaskSpec, naming: Naming) -> Adapter:
        """As `LocalTasks.cast`."""
        examples = [{"input": example.input, "output": example.outputs[0]} for example in spec.examples]
        body = {
            "description": spec.description, "examples": examples, "name": naming.name, "replace": naming.replace,
        }  # fmt: skip
        made = _made_there(
            self.server, self.here.library, lambda client: client.post("/v1/adapters", body), lambda done, total: None
        )
        return made or self.here.cast(spec, naming)


def tasks_for(here: LocalTasks, *, local: bool) -> LocalTasks | RemoteTasks:
    """A running server, or this process where there is none, where the server could not do it, and with --local."""
    server = server_for(here.choice, here.library, "task", here.hypernetwork, local=local or not here.is_plain)
    return here if server is None else RemoteTasks(server, here)


def _made_there(
    server: Running, library: Library, begin: Callable[[HTTPClient], Mapping[str, Any]], progress: Progress
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


# ---- what is said of an answer


def tag_for(answering: Answering, chosen: Iterable[str]) -> str:
    """The tag where something is chosen by it: alone it would stand for all documents, also after `/drop`."""
    return answering.tag if patterns_in(chosen) else ""


def say_unused(reply: Reply, strict: bool) -> None:
    """Say which documents the question is not about, and where an answer was too unsure to be given."""
    for used in reply.used:
        if not used.chunks:
            how = "" if strict else "; --always uses it anyway"
            say(f"({used.name} is not about this, so the answer is not from it{how})")
    if strict and reply.answered_by == "refusal" and any(used.chunks for used in reply.used):
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
