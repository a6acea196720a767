"""Bodies of requests as OpenAI defines them, with this package's additions; any other field is refused.

A parameter that changes an answer and is not supported is refused unless it has the value that changes nothing. Those
that say nothing of the answer (`user`, `metadata`, ...) are taken and left alone.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import core_schema

from loracast.base.chat import Message
from loracast.base.generate import Sampling
from loracast.reading.routing import DEFAULT_ROUTE
from loracast.text import is_unicode

_MAX_ITEMS = 4096
_SEEDS = 2**63


class Only:
    """The annotation of a parameter that is not supported: null, or one of the values that change nothing."""

    def __init__(self, *values: Any):
        self.values = values

    def check(self, value: Any) -> Any:
        is_bool = isinstance(value, bool)  # False is not 0
        if value is not None and not any(value == one and is_bool == isinstance(one, bool) for one in self.values):
            raise ValueError("this parameter is not supported here; leave it out")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": [None, *self.values]}


Ignored = Annotated[Any, WithJsonSchema({})]
"""The type of a parameter that says nothing of the answer."""


class KnownFields(BaseModel):
    """An object whose fields are all known; a value may be written in another type, as the text of a form is."""

    model_config = ConfigDict(extra="forbid")


class Body(KnownFields):
    """A JSON object of known fields; numbers are finite, and of the type that the schema says."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_text(cls, given: Any) -> Any:
        """Refuse half of a surrogate pair, which JSON can hold and no tokenizer or database takes."""
        for value in given.values() if isinstance(given, dict) else ():
            several = [*value, *value.values()] if isinstance(value, dict) else value
            for text in several if isinstance(several, list) else [several]:
                if isinstance(text, str) and not is_unicode(text):
                    raise ValueError("a text is not valid Unicode: it has half of a surrogate pair")
        return given


class AdapterPart(Body):
    """An adapter and the factor on its LoRA."""

    id: str
    """`name` or `name@hash`."""
    scale: float = Field(1.0, ge=-16, le=16)


class NumberedAdapter(Body):
    """An adapter as llama.cpp's API names it, and the factor on its LoRA; 0 leaves it out."""

    id: int = Field(ge=0)
    """Its number in /lora-adapters."""
    scale: float = Field(1.0, ge=-16, le=16)


class Generating(Body):
    """What all requests say of how tokens are chosen; the first six fields are additions of this package."""

    adapters: list[AdapterPart] = Field([], max_length=_MAX_ITEMS)
    """Adapters besides those that `model` names, each with the factor on its LoRA."""
    lora: list[NumberedAdapter] | None = Field(None, max_length=_MAX_ITEMS)
    """More adapters, by their numbers, in place of those that POST /lora-adapters has set (llama.cpp's field)."""
    route: Annotated[int, Field(ge=1, le=_MAX_ITEMS)] | None = DEFAULT_ROUTE
    """Chunks that a question gets of each document; null for all of them."""
    tag: str = Field("", max_length=64)
    """Choose among the documents with this tag."""
    always: bool = False
    """Answer with the documents' adapters even where the question is not about them."""
    strict: bool | None = None
    """Where a question is about none of the documents, answer that the document does not say."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 (the default here) takes the likeliest token."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stream: bool | None = None
    user: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None

    def sampling(self, max_tokens: int | None, seed: int | None = None) -> Sampling:
        """The rules of the engine; 0 tokens where the request leaves their number to the server."""
        top_p = 1.0 if self.top_p is None else self.top_p
        return Sampling(max_tokens or 0, 0, self.temperature or 0.0, top_p, seed)


class StreamOptions(Body):
    """What a stream tells besides the text."""

    include_usage: bool | None = None
    include_obfuscation: Ignored = None


Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Sampled(Generating):
    """What chat and text completions share."""

    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-_SEEDS, lt=_SEEDS)] | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Annotated[Any, Only(0)] = None
    presence_penalty: Annotated[Any, Only(0)] = None
    logit_bias: Annotated[Any, Only({})] = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether the last chunk of a stream tells the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class TextPart(Body):
    """A piece of a message's content; only text is read."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: Ignored = None
    logprobs: Ignored = None
    prompt_cache_breakpoint: Ignored = None


class ChatMessage(Body):
    """A message of a chat. What an earlier answer held besides its text is left alone."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=_MAX_ITEMS)]
    name: Ignored = None
    refusal: Ignored = None
    annotations: Ignored = None
    tool_calls: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only()] = None
    audio: Annotated[Any, Only()] = None
    type: Annotated[Any, Only("message")] = None
    id: Ignored = None
    status: Ignored = None
    phase: Ignored = None

    def turn(self) -> Message:
        """The message as the base's chat format takes it."""
        role = "system" if self.role == "developer" else self.role
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return {"role": role, "content": "\n".join(parts)}


class Chatting(Generating):
    """What requests that answer messages share."""

    style: str = Field("", max_length=128)
    """Name of a task adapter that says how to answer."""
    memory: str = Field("", max_length=64)
    """Name of the chat memory that is also asked, and that keeps what the user says."""


class ChatRequest(Chatting, Sampled):
    """Body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=_MAX_ITEMS)
    window: list[str] = Field([], max_length=_MAX_ITEMS)
    """Adapters whose text is put before the question instead, to compare with."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[Any, Only([])] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    functions: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    parallel_tool_calls: Ignored = None
    response_format: Annotated[Any, Only({"type": "text"})] = None
    modalities: Annotated[Any, Only(["text"])] = None
    store: Annotated[Any, Only(False)] = None
    audio: Annotated[Any, Only()] = None
    prediction: Annotated[Any, Only()] = None
    reasoning_effort: Annotated[Any, Only()] = None
    verbosity: Annotated[Any, Only()] = None
    web_search_options: Annotated[Any, Only()] = None

    @property
    def n_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampled):
    """Body of /v1/completions: a prompt as it stands, without the chat format."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=128)]
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1, max_length=128)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[Any, Only(1)] = None
    echo: Annotated[Any, Only(False)] = None
    suffix: Annotated[Any, Only("")] = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


Value = bool | int | float | Annotated[str, Field(max_length=512)]
_COMPARE = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}


class Comparison(KnownFields):
    """Compares an attribute of a file with a value. A file without the attribute differs from every value."""

    type: Literal["eq", "ne", "gt", "gte", "lt", "lte", "in", "nin"]
    key: str = Field(max_length=64)
    value: Value | Annotated[list[Value], Field(max_length=100)]

    def fits(self, attributes: Mapping[str, Value]) -> bool:
        if self.key not in attributes:
            return self.type in ("ne", "nin")
        value: Any = attributes[self.key]
        if self.type in ("in", "nin"):
            wanted = self.value if isinstance(self.value, list) else [self.value]
            return (value in wanted) == (self.type == "in")
        if self.type in ("eq", "ne"):
            return (value == self.value) == (self.type == "eq")
        are_alike = isinstance(value, str) == isinstance(self.value, str) and not isinstance(self.value, list)
        return are_alike and _COMPARE[self.type](value, self.value)


class Compound(KnownFields):
    """All or any of several filters."""

    type: Literal["and", "or"]
    filters: list[Comparison | Compound] = Field(min_length=1, max_length=32)

    def fits(self, attributes: Mapping[str, Value]) -> bool:
        fit = (one.fits(attributes) for one in self.filters)
        return all(fit) if self.type == "and" else any(fit)


Filter = Comparison | Compound


class FileSearch(Body):
    """The tool of /v1/responses that answers from vector stores."""

    type: Literal["file_search"]
    vector_store_ids: list[str] = Field(min_length=1, max_length=_MAX_ITEMS)
    max_num_results: Annotated[int, Field(ge=1, le=50)] | None = None
    filters: Filter | None = None
    ranking_options: Annotated[Any, Only({"ranker": "auto"})] = None


class SearchCall(Body):
    """What an earlier response says about its search; it is taken back, and says nothing of the next answer."""

    type: Literal["file_search_call"]
    id: Ignored = None
    status: Ignored = None
    queries: Ignored = None
    results: Ignored = None


class ResponsesRequest(Chatting):
    """Body of /v1/responses."""

    input: str | Annotated[list[ChatMessage | SearchCall], Field(min_length=1, max_length=_MAX_ITEMS)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[Literal["message.output_text.logprobs", "file_search_call.results"]] | None = None
    stream_options: StreamOptions | None = None
    tools: list[FileSearch] | None = Field(None, max_length=8)
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    """The response has it again."""
    user: str | None = None
    """The response has it again."""
    parallel_tool_calls: Ignored = None
    max_tool_calls: Ignored = None
    store: Ignored = None
    """Nothing is stored, which the response says."""
    background: Annotated[Any, Only(False)] = None
    conversation: Annotated[Any, Only()] = None
    previous_response_id: Annotated[Any, Only()] = None
    prompt: Annotated[Any, Only()] = None
    reasoning: Annotated[Any, Only({})] = None
    text: Annotated[Any, Only({}, {"format": {"type": "text"}})] = None
    truncation: Annotated[Any, Only("disabled")] = None

    @property
    def searches(self) -> list[FileSearch]:
        """The searches in vector stores; none where `tool_choice` forbids them."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def n_logprobs(self) -> int | None:
        wanted = self.top_logprobs is not None or "message.output_text.logprobs" in (self.include or ())
        return (self.top_logprobs or 0) if wanted else None

    def turns(self) -> list[Message]:
        """The messages, the instructions first."""
        items = [ChatMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        system = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        return [*system, *(item.turn() for item in items if isinstance(item, ChatMessage))]


class UnloadAdapterRequest(Body):
    """Body of vLLM's /v1/unload_lora_adapter."""

    lora_name: str
    lora_int_id: Ignored = None


class LoadAdapterRequest(UnloadAdapterRequest):
    """Body of vLLM's /v1/load_lora_adapter."""

    lora_path: str
    load_inplace: bool = False
