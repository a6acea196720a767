"""What a request asks for, in one form for all routes of the API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loracast.base.chat import Message
from loracast.base.generate import Sampling
from loracast.serving.schema import Extensions, FileSearch


@dataclass(frozen=True)
class Asked:
    """A request, whichever route it came by."""

    model: str
    extensions: Extensions
    sampling: Sampling
    """`max_new_tokens` of 0 leaves it to the server."""
    turns: Sequence[Message] = ()
    """The messages of a chat; or else `prompts`."""
    prompts: Sequence[str | Sequence[int]] = ()
    """Texts or token ids that are continued as they stand."""
    searches: Sequence[FileSearch] = ()
    """Vector stores from which the question chooses documents."""
    window: Sequence[str] = ()
    """Adapters whose text goes into the prompt."""
    memory: str = ""
    """Name of the memory that the last message goes into, and that answers too."""
    style: str = ""
    """Name of the task adapter that goes along."""
    n: int = 1
    stop: tuple[str, ...] = ()
    n_logprobs: int | None = None
