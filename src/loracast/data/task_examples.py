"""The specification of a task: a description, examples, or both.

The text that a hypernetwork or a model with the task in its prompt reads has the description first, then the examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loracast.data.tasks import Example, example_from, with_description
from loracast.errors import ConfigError

DEFAULT_STYLE = "labelled"
STYLES: dict[str, str] = {
    DEFAULT_STYLE: "Input: {input}\nOutput: {output}",
    "arrow": "{input} -> {output}",
    "double_arrow": "{input} => {output}",
    "question": "Q: {input}\nA: {output}",
    "example": "Example: {input}\nAnswer: {output}",
    "quoted": '"{input}" becomes "{output}".',
}
"""By name, how an example is written; people write them in many ways, so training reads all of them."""
ARROW = "=>"
"""What stands between the input and the output of an example on one line."""
_TITLE_CHARACTERS = 60

ExampleLike = Example | tuple[str, str] | Mapping[str, Any]
"""An example as the Python API takes it: an `Example`, (input, output), or a mapping with `input` and `output`."""


@dataclass(frozen=True)
class TaskSpec:
    """How a task is specified: by a description, examples, or both."""

    description: str
    """"" where the examples alone specify the task."""
    examples: tuple[Example, ...] = ()

    def __post_init__(self) -> None:
        if not is_unicode(self.description):
            raise ConfigError("the description of the task is not valid Unicode: give it in UTF-8")

    def text(self, style: str = DEFAULT_STYLE) -> str:
        """The text that is read: the description, then the examples."""
        shown = "\n".join(STYLES[style].format(input=e.input, output=e.outputs[0]) for e in self.examples)
        return "\n\n".join(part for part in (self.description, shown) if part)

    def conversation(self, asked: str, system: str = "") -> list[dict[str, str]]:
        """Messages that end with an input: examples as turns before it, the description before the first input."""
        messages = [{"role": "system", "content": system}]
        for example in self.examples:
            messages.append({"role": "user", "content": example.input})
            messages.append({"role": "assistant", "content": example.outputs[0]})
        messages.append({"role": "user", "content": asked})
        if self.description:
            messages[1]["content"] = with_description(self.description, messages[1]["content"])
        return messages

    @property
    def title(self) -> str:
        """A line for people: the description, or the first example."""
        if self.description or not self.examples:
            return self.description
        first = self.examples[0]
        return " ".join(f"{first.input} {ARROW} {first.outputs[0]}".split())[:_TITLE_CHARACTERS]

    @property
    def sha256(self) -> str:
        """Hash of description and examples; of the description alone where there are no examples."""
        return hashlib.sha256(self.text().encode()).hexdigest()


def as_spec(task: str | TaskSpec) -> TaskSpec:
    """A specification; a string is a description alone."""
    return TaskSpec(task) if isinstance(task, str) else task


def as_examples(given: Sequence[ExampleLike]) -> tuple[Example, ...]:
    """Examples as the Python API takes them. Raises ConfigError for one that is none, which it names by its number."""
    if isinstance(given, (str, Mapping)):
        raise ConfigError(f"the examples are a {type(given).__name__}: give a list of (input, output)")
    examples = []
    for number, one in enumerate(given, 1):
        try:
            examples.append(one if isinstance(one, Example) else as_example(one))
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"example {number} is {str(one)[:80]!r}: {reason(error)}; give (input, output), both of them text"
            ) from None
    return tuple(examples)


def as_example(given: object) -> Example:
    """An example from (input, output) or a row with these two. Raises ValueError, TypeError or KeyError."""
    if isinstance(given, str):
        raise ValueError("it is one text")
    if not isinstance(given, Mapping):
        if not isinstance(given, Sequence) or len(given) != 2:
            raise ValueError("it is no pair")
        given = dict(zip(("input", "output"), given, strict=True))
    example = example_from({"input": given["input"], "output": given["output"]})
    stripped = Example(example.input.strip(), tuple(output.strip() for output in example.outputs))
    if not stripped.input or not all(stripped.outputs):
        raise ValueError("its input or output is empty")
    if not all(map(is_unicode, (stripped.input, *stripped.outputs))):
        raise ValueError("it is not valid Unicode")
    return stripped


def reason(error: Exception) -> str:
    """What is wrong with an example, for a message."""
    return f"there is no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)


def is_unicode(text: str) -> bool:
    """Whether a text holds no surrogate, which is left of bytes in another encoding, or of half an emoji in JSON."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
