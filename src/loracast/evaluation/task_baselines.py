"""Who answers a task: the base told the task or shown examples, LoRAs trained on it, and LoRAs made from a description."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loracast.base.chat import Message
from loracast.base.load import Base
from loracast.cast.task import TaskCaster
from loracast.data.tasks import Example, Task, with_description
from loracast.lora.algebra import LoRA
from loracast.model import ASK_SYSTEM_TURN
from loracast.training.oracle import read_oracle


@dataclass(frozen=True)
class Drawn:
    """What one seed draws for one task: all rivals get the same."""

    task: Task
    description: str
    other_description: str | None
    """Of a task that is not related; None where there is none."""
    gibberish: str
    """Random letters, of the kind that training holds down."""
    shuffled: str
    """Words of all descriptions in no order, of which training knows nothing."""
    shots: tuple[Example, ...]
    """Examples from the task's training rows."""


@dataclass(frozen=True)
class Given:
    """Where the rivals' LoRAs come from; None for what this run does without."""

    base: Base
    caster: TaskCaster | None = None
    """Text-to-LoRA."""
    oracles: Path | None = None
    """Library of LoRAs trained on single tasks (`loracast train oracle`)."""
    multitask: LoRA | None = None
    """One LoRA trained on all training tasks (`loracast train multitask`)."""
    multitask_described: LoRA | None = None
    """The same, trained with descriptions in its prompts."""
    average: LoRA | None = None
    """The mean of the oracles of training tasks."""

    def cast(self, description: str) -> LoRA:
        assert self.caster is not None
        return self.caster.loras([description])[0]

    def constant(self) -> LoRA:
        assert self.caster is not None
        return self.caster.constant_lora()

    def oracle(self, task: Task) -> LoRA:
        assert self.oracles is not None
        return read_oracle(self.oracles / task.name, self.base.fingerprint)


@dataclass(frozen=True)
class Baseline:
    """What stands in the prompt, and which LoRA goes with it."""

    label: str
    n_shots: int = 0
    is_described: bool = False
    needs: str | None = None
    """What of Given it cannot do without."""
    is_drawn: bool = True
    """Whether it depends on what a seed draws."""
    lora: Callable[[Given, Drawn], LoRA | None] = lambda given, drawn: None


ADAPTER = "adapter"
BASELINES = {
    "none": Baseline("base", is_drawn=False),
    "described": Baseline("description in the prompt", is_described=True),
    "shots3": Baseline("3 examples in the prompt", n_shots=3),
    "shots5": Baseline("5 examples in the prompt", n_shots=5),
    "described_shots3": Baseline("description and 3 examples", n_shots=3, is_described=True),
    "described_shots5": Baseline("description and 5 examples", n_shots=5, is_described=True),
    "average": Baseline(
        "average of the oracles", needs="average", is_drawn=False, lora=lambda given, drawn: given.average
    ),
    "multitask": Baseline(
        "multi-task LoRA", needs="multitask", is_drawn=False, lora=lambda given, drawn: given.multitask
    ),
    "multitask_described": Baseline(
        "multi-task LoRA and description",
        is_described=True,
        needs="multitask_described",
        lora=lambda given, drawn: given.multitask_described,
    ),
    ADAPTER: Baseline(
        "adapter from the description", needs="caster", lora=lambda given, drawn: given.cast(drawn.description)
    ),
    "other": Baseline(
        "adapter from another task's",
        needs="caster",
        lora=lambda given, drawn: given.cast(drawn.other_description or ""),
    ),
    "gibberish": Baseline(
        "adapter from random letters", needs="caster", lora=lambda given, drawn: given.cast(drawn.gibberish)
    ),
    "shuffled": Baseline(
        "adapter from shuffled words", needs="caster", lora=lambda given, drawn: given.cast(drawn.shuffled)
    ),
    "constant": Baseline(
        "adapter from a constant embedding", needs="caster", is_drawn=False, lora=lambda given, drawn: given.constant()
    ),
    "oracle": Baseline("oracle", needs="oracles", is_drawn=False, lora=lambda given, drawn: given.oracle(drawn.task)),
}
NEEDED = {
    "tasks": "for every task another one that is not related (of another `group`)",
    "examples": "as many training examples of every task",
    "caster": "a text-to-LoRA hypernetwork (--hypernetwork)",
    "oracles": "a library of trained LoRAs (--oracles)",
    "average": "a library of trained LoRAs, those of training tasks among them (--oracles)",
    "multitask": "a LoRA of `loracast train multitask` (--multitask)",
    "multitask_described": "a LoRA of `loracast train multitask --described` (--multitask-described)",
}
"""By what a rival needs: how it is given."""


def prompt_of(base: Base, rival: Baseline, drawn: Drawn, asked: str) -> list[int]:
    """The conversation: the description, if it is told, before the first input; then examples as turns; then what is asked."""
    turns = [(example.input, example.outputs[0]) for example in drawn.shots[: rival.n_shots]]
    messages: list[Message] = [{"role": "system", "content": ASK_SYSTEM_TURN}]
    for user, assistant in [*turns, (asked, "")]:
        first = rival.is_described and len(messages) == 1
        messages.append({"role": "user", "content": with_description(drawn.description, user) if first else user})
        if len(messages) < 2 * len(turns) + 2:
            messages.append({"role": "assistant", "content": assistant})
    return base.chat.conversation(messages)
