"""Who answers a task: the base told the task or shown examples, LoRAs trained on it, and LoRAs made from a description."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loracast.base import Base
from loracast.chat import Message
from loracast.describe import TaskCaster
from loracast.lora import LoRA, concat
from loracast.model import ASK_SYSTEM_TURN
from loracast.tasks import Example, Task, with_description
from loracast.training.oracle import ABOUT, read_oracle
from loracast.training.text import gibberish


@dataclass(frozen=True)
class Drawn:
    """What one seed draws for one task: all rivals get the same."""

    task: Task
    description: str
    other_description: str | None
    """Of another task; None where there is only one."""
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
class Rival:
    """What stands in the prompt, and which LoRA goes with it."""

    label: str
    n_shots: int = 0
    is_described: bool = False
    needs: str | None = None
    """What of Given it cannot do without."""
    lora: Callable[[Given, Drawn], LoRA | None] = lambda given, drawn: None


ADAPTER = "adapter"
RIVALS = {
    "none": Rival("base"),
    "described": Rival("description in the prompt", is_described=True),
    "shots3": Rival("3 examples in the prompt", n_shots=3),
    "shots5": Rival("5 examples in the prompt", n_shots=5),
    "described_shots3": Rival("description and 3 examples", n_shots=3, is_described=True),
    "described_shots5": Rival("description and 5 examples", n_shots=5, is_described=True),
    "average": Rival("average of the oracles", needs="average", lora=lambda given, drawn: given.average),
    "multitask": Rival("multi-task LoRA", needs="multitask", lora=lambda given, drawn: given.multitask),
    "multitask_described": Rival(
        "multi-task LoRA and description",
        is_described=True,
        needs="multitask_described",
        lora=lambda given, drawn: given.multitask_described,
    ),
    ADAPTER: Rival(
        "adapter from the description", needs="caster", lora=lambda given, drawn: given.cast(drawn.description)
    ),
    "other": Rival(
        "adapter from another task's",
        needs="caster",
        lora=lambda given, drawn: given.cast(drawn.other_description or ""),
    ),
    "gibberish": Rival(
        "adapter from gibberish",
        needs="caster",
        lora=lambda given, drawn: given.cast(gibberish(random.Random(drawn.task.name), 1)[0]),
    ),
    "constant": Rival("adapter from a constant embedding", needs="caster", lora=lambda given, drawn: given.constant()),
    "oracle": Rival("oracle", needs="oracles", lora=lambda given, drawn: given.oracle(drawn.task)),
}
NEEDED = {
    "tasks": "at least two tasks",
    "caster": "a text-to-LoRA hypernetwork (--hypernetwork)",
    "oracles": "a library of trained LoRAs (--oracles)",
    "average": "a library of trained LoRAs, those of training tasks among them (--oracles)",
    "multitask": "a LoRA of `loracast train multitask` (--multitask)",
    "multitask_described": "a LoRA of `loracast train multitask --described` (--multitask-described)",
}
"""By what a rival needs: how it is given."""


def average_of_oracles(oracles: Path, tasks: Sequence[Task], base: Base) -> LoRA | None:
    """The mean of the deltas of all oracles of training tasks in a library; None where there is none."""
    names = [task.name for task in tasks if not task.is_heldout and (oracles / task.name / ABOUT).is_file()]
    loras = [read_oracle(oracles / name, base.fingerprint) for name in names]
    return concat([lora.scale(1 / len(loras)) for lora in loras]) if loras else None


def prompt_of(base: Base, rival: Rival, drawn: Drawn, asked: str) -> list[int]:
    """The conversation: the description, if it is told, before the first input; then examples as turns; then what is asked."""
    turns = [(example.input, example.outputs[0]) for example in drawn.shots[: rival.n_shots]]
    messages: list[Message] = [{"role": "system", "content": ASK_SYSTEM_TURN}]
    for user, assistant in [*turns, (asked, "")]:
        first = rival.is_described and len(messages) == 1
        messages.append({"role": "user", "content": with_description(drawn.description, user) if first else user})
        if len(messages) < 2 * len(turns) + 2:
            messages.append({"role": "assistant", "content": assistant})
    return base.chat.conversation(messages)
