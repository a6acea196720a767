"""The contract for whatever an evaluation compares with: what the base is given to answer one question.

A baseline gives a prompt and a LoRA or none; it computes nothing but a look-up. The runner (runner.py) answers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from loracast.base.generate import Answer
from loracast.data.everyday import NOT_SAID
from loracast.errors import ConfigError
from loracast.evaluation.in_memory import InMemoryAdapter
from loracast.library.likely import Likely
from loracast.lora.algebra import LoRA

Setup = TypeVar("Setup")
"""What all baselines of a run share: the base, and where their LoRAs come from."""
Case = TypeVar("Case")
"""One question, with the document or the task that it is about."""


@dataclass(frozen=True)
class LoRASource:
    """A LoRA that is made when it is needed. Sources with equal keys make equal LoRAs."""

    key: Hashable
    make: Callable[[], LoRA] = field(compare=False)
    n_bytes: int = field(default=0, compare=False)
    """Size of the LoRA, which bounds how many are held at once."""
    chunks: tuple[tuple[InMemoryAdapter, tuple[int, ...]], ...] = field(default=(), compare=False)
    """Chunks of documents that must be cast before."""


def fixed(lora: LoRA) -> LoRASource:
    """A source that holds its LoRA already."""
    return LoRASource(id(lora), lambda: lora)


@dataclass(frozen=True)
class Request:
    """A prompt of token ids and a LoRA or none, with which the base answers one question."""

    prompt: tuple[int, ...]
    lora: LoRASource | None = None
    found: bool | None = field(default=None, compare=False)
    """Whether the chunk with the answer was among those picked; None where nothing is picked."""
    answer: str | None = None
    """The answer, where no model is asked."""
    likely: tuple[Likely, ...] = ()
    """What the answer may begin with, by the words of the documents."""
    least_confidence: float = field(default=0.0, compare=False)
    """An answer of a lower confidence becomes `NOT_SAID`, as with `loracast ask --strict`."""

    def text(self, said: Answer) -> str:
        """What a user gets to read of the base's answer."""
        return NOT_SAID if said.confidence < self.least_confidence else said.text

    def answered_by(self, said: Answer) -> str:
        """What gave that text, as in `SourcedAnswer`; "text" where it is the document's, without a model."""
        if self.answer is not None and self.answer != NOT_SAID:
            return "text"
        if self.answer is not None or said.confidence < self.least_confidence:
            return "refusal"
        return "base" if self.lora is None else "adapter"


@dataclass(frozen=True)
class Baseline(Generic[Setup, Case]):
    """One way to answer questions, which stands in one row of a table."""

    label: str
    """Its name in tables; `{route}` stands for the number of chunks that a question is given."""
    request: Callable[[Setup, Case], Request]
    """What the base is given for one question."""
    learn: Callable[[Setup, Case], None] | None = None
    """The one-off work for a document or a task, given any of its questions; its time is reported as update time."""
    needs: tuple[str, ...] = ()
    """What a run must have been given for this baseline: keys of the `missing` of `choose_baselines`."""
    is_optional: bool = False
    """Run this baseline only where it is asked for by name."""
    is_drawn: bool = True
    """Whether its requests depend on what a seed draws; one that does not is asked with the first seed only."""


def check_positive(config: Any, *fields: str) -> None:
    """Raises ConfigError where one of these settings is below 1 or holds such a number; None is no number."""
    given = {name: getattr(config, name) for name in fields}
    if bad := [
        n for n, v in given.items() if v is not None and min(v if isinstance(v, tuple) else (v,), default=0) < 1
    ]:
        raise ConfigError(f"{' and '.join(bad)} must be at least 1")


def check_names(names: Sequence[str], known: Mapping[str, Any]) -> tuple[str, ...]:
    """The names without repeats, in the table's order. Raises ConfigError for a name that is not known."""
    if unknown := sorted(set(names) - known.keys()):
        raise ConfigError(f"unknown baselines: {', '.join(unknown)}; choose from {', '.join(known)}")
    return tuple(name for name in known if name in names)


def choose_baselines(
    known: Mapping[str, Baseline[Setup, Case]], names: Sequence[str], missing: Mapping[str, str]
) -> dict[str, Baseline[Setup, Case]]:
    """The baselines of these names, in the table's order; without names all that are not optional and lack nothing.

    Args:
        missing: what this run was not given, with how a user gives it.

    Raises:
        ConfigError: a name is not known, or a baseline that was asked for lacks what it needs.
    """
    lacking = {
        name: " and ".join(how) for name, b in known.items() if (how := [missing[n] for n in b.needs if n in missing])
    }
    if not names:
        return {name: b for name, b in known.items() if name not in lacking and not b.is_optional}
    chosen = check_names(names, known)
    if problems := [f"{name!r} needs {lacking[name]}" for name in chosen if name in lacking]:
        raise ConfigError(f"{'; '.join(problems)}: give it, or leave these baselines out")
    return {name: known[name] for name in chosen}
