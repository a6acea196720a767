"""Baselines of `loracast eval tasks`: description or examples in the prompt, trained LoRAs, LoRAs of descriptions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loracast.base.chat import Message
from loracast.base.load import Base
from loracast.cast.task import TaskCaster
from loracast.data.tasks import Example, Task, with_description
from loracast.evaluation.baseline import Baseline, LoRASource, Request, fixed
from loracast.lora.algebra import LoRA
from loracast.model import ASK_SYSTEM_TURN
from loracast.training.oracle import read_oracle


@dataclass(frozen=True)
class TaskSetup:
    """Where the LoRAs of a run's baselines come from; None for what the run does without."""

    base: Base
    caster: TaskCaster | None = None
    """Casts descriptions into LoRAs."""
    oracles: Path | None = None
    """Library of LoRAs trained on single tasks (`loracast train oracle`)."""
    multitask: LoRA | None = None
    """One LoRA trained on all training tasks (`loracast train multitask`)."""
    multitask_described: LoRA | None = None
    """The same, trained with descriptions in its prompts."""
    average: LoRA | None = None
    """The mean of the oracles of training tasks."""

    def prepare(self, requests: Sequence[Request]) -> None:
        """Nothing is quicker done for many requests at once."""

    def missing(self) -> dict[str, str]:
        """What this run does without, and how it is given."""
        return {name: how for name, how in _GIVEN_BY.items() if not getattr(self, name)}


@dataclass(frozen=True)
class Drawn:
    """What one seed draws for one task: all baselines get the same."""

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
class TaskCase:
    """One test row of a task, with what the seed has drawn for the task."""

    drawn: Drawn
    row: Example


TaskBaseline = Baseline[TaskSetup, TaskCase]
Source = Callable[[TaskSetup, Drawn], LoRASource | None]

_GIVEN_BY = {
    "caster": "a text-to-LoRA hypernetwork (--hypernetwork)",
    "oracles": "a library of trained LoRAs (--oracles)",
    "average": "a library of trained LoRAs, those of training tasks among them (--oracles)",
    "multitask": "a LoRA of `loracast train multitask` (--multitask)",
    "multitask_described": "a LoRA of `loracast train multitask --described` (--multitask-described)",
}
"""How a user gives what a TaskSetup holds."""


def _prompt(base: Base, drawn: Drawn, asked: str, n_shots: int, is_described: bool) -> tuple[int, ...]:
    """The conversation: the description, if it is told, before the first input; examples as turns; then the input."""
    turns = [(example.input, example.outputs[0]) for example in drawn.shots[:n_shots]]
    messages: list[Message] = [{"role": "system", "content": ASK_SYSTEM_TURN}]
    for user, assistant in [*turns, (asked, "")]:
        first = is_described and len(messages) == 1
        messages.append({"role": "user", "content": with_description(drawn.description, user) if first else user})
        if len(messages) < 2 * len(turns) + 2:
            messages.append({"role": "assistant", "content": assistant})
    return tuple(base.chat.conversation(messages))


def _baseline(
    label: str,
    source: Source = lambda setup, drawn: None,
    n_shots: int = 0,
    is_described: bool = False,
    needs: tuple[str, ...] = (),
    is_drawn: bool = True,
) -> TaskBaseline:
    """A baseline with some examples and perhaps the description in its prompt, and the LoRA of a source."""

    def request(setup: TaskSetup, case: TaskCase) -> Request:
        prompt = _prompt(setup.base, case.drawn, case.row.input, n_shots, is_described)
        return Request(prompt, source(setup, case.drawn))

    return Baseline(label, request, needs=needs, is_drawn=is_drawn)


def _shots(label: str, n_shots: int, is_described: bool = False) -> TaskBaseline:
    return _baseline(label, n_shots=n_shots, is_described=is_described, needs=(f"{n_shots} examples",))


def _given(label: str, name: str, is_described: bool = False) -> TaskBaseline:
    """A baseline with a LoRA that the setup holds."""
    return _baseline(
        label,
        lambda setup, drawn: fixed(getattr(setup, name)),
        is_described=is_described,
        needs=(name,),
        is_drawn=is_described,
    )


def _cast(label: str, description: Callable[[Drawn], str | None], needs: tuple[str, ...] = ("caster",)) -> TaskBaseline:
    """A baseline with the LoRA of a text."""

    def source(setup: TaskSetup, drawn: Drawn) -> LoRASource:
        text = description(drawn) or ""
        return LoRASource(("cast", text), lambda: _caster(setup).loras([text])[0])

    return _baseline(label, source, needs=needs)


def _caster(setup: TaskSetup) -> TaskCaster:
    assert setup.caster is not None
    return setup.caster


def _oracle(setup: TaskSetup, drawn: Drawn) -> LoRASource:
    assert setup.oracles is not None
    folder = setup.oracles / drawn.task.name
    return LoRASource(("oracle", drawn.task.name), lambda: read_oracle(folder, setup.base.fingerprint))


ADAPTER = "adapter"
BASELINES: dict[str, TaskBaseline] = {
    "none": _baseline("base", is_drawn=False),
    "described": _baseline("description in the prompt", is_described=True),
    "shots3": _shots("3 examples in the prompt", 3),
    "shots5": _shots("5 examples in the prompt", 5),
    "described_shots3": _shots("description and 3 examples", 3, is_described=True),
    "described_shots5": _shots("description and 5 examples", 5, is_described=True),
    "average": _given("average of the oracles", "average"),
    "multitask": _given("multi-task LoRA", "multitask"),
    "multitask_described": _given("multi-task LoRA and description", "multitask_described", is_described=True),
    ADAPTER: _cast("adapter from the description", lambda drawn: drawn.description),
    "other": _cast("adapter from another task's", lambda drawn: drawn.other_description, ("tasks", "caster")),
    "gibberish": _cast("adapter from random letters", lambda drawn: drawn.gibberish),
    "shuffled": _cast("adapter from shuffled words", lambda drawn: drawn.shuffled),
    "constant": _baseline(
        "adapter from a constant embedding",
        lambda setup, drawn: LoRASource("constant", lambda: _caster(setup).constant_lora()),
        needs=("caster",),
        is_drawn=False,
    ),
    "oracle": _baseline("oracle", _oracle, needs=("oracles",), is_drawn=False),
}
