"""Writers of questions and answers: a base on this machine, or a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from loracast.base.chat import Message
from loracast.base.generate import Sampling, answer
from loracast.base.load import Base
from loracast.errors import ConfigError, LoracastError

_TRIES = 4
_FIRST_WAIT_S = 2.0


class Writer(Protocol):
    """Continues conversations."""

    @property
    def name(self) -> str:
        """The name that its rows give in `made_by`."""
        ...

    def write(self, messages: Sequence[Message], max_tokens: int) -> str:
        """Write the assistant's next turn."""
        ...


@dataclass(frozen=True)
class BaseWriter:
    """Decodes greedily with a base on this machine."""

    base: Base

    @property
    def name(self) -> str:
        return self.base.name

    def write(self, messages: Sequence[Message], max_tokens: int) -> str:
        prompt = self.base.chat.conversation(messages)
        return answer(self.base, prompt, None, Sampling(max_new_tokens=max_tokens)).text


@dataclass(frozen=True)
class EndpointWriter:
    """Asks a model behind an OpenAI-compatible endpoint; `url` is the part before /chat/completions."""

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0

    @property
    def name(self) -> str:
        return self.model

    def write(self, messages: Sequence[Message], max_tokens: int) -> str:
        """Write the assistant's next turn. Raises LoracastError if the endpoint refuses or fails repeatedly."""
        order = {"model": self.model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        where = f"{self.url.rstrip('/')}/chat/completions"
        if not where.startswith(("http://", "https://")):
            raise ConfigError(f"{self.url!r} is no endpoint; give its address, such as http://localhost:8000/v1")
        request = urllib.request.Request(where, json.dumps(order).encode(), headers)
        for attempt in range(_TRIES):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    return _content(json.loads(response.read()))
            except urllib.error.HTTPError as error:
                problem = f"{where} answers {error.code}: {error.read(500).decode(errors='replace')}"
                if error.code < 500 and error.code != 429:  # the request itself is wrong, so another try would fail too
                    raise LoracastError(problem) from error
            except (OSError, ValueError) as error:
                problem = f"{where} cannot be reached: {error}"
            if attempt < _TRIES - 1:
                time.sleep(_FIRST_WAIT_S * 2**attempt)
        raise LoracastError(f"{problem} (after {_TRIES} tries)")


def _content(response: Any) -> str:
    try:
        return str(response["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"an answer without choices[0].message.content: {str(response)[:200]}") from error
