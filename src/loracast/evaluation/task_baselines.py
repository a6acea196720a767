"""Baselines of `loracast eval tasks`: description and examples in the prompt, trained LoRAs, LoRAs cast from either."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from loracast.base.embedded import DEFAULT_ENCODER
from loracast.base.load import Base
from loracast.cast.task import TaskCaster
from loracast.data.task_examples import TaskSpec
from loracast.data.tasks import Example, Task, with_description
from loracast.encoders.sentence import TextEncoder, load_text_encoder
from loracast.evaluation.baseline import Baseline, LoRASource, Request, fixed
from loracast.lora.algebra import LoRA
from loracast.question_answering import ASK_SYSTEM_TURN
from loracast.training.oracle import read_oracle

SHOTS = (1, 3, 5, 16, 32)
"""Numbers of examples in prompts, and of those that adapters are cast from."""
MOST_SHOTS = max(SHOTS)
_USUAL_SHOTS = (3, 5)
"""Numbers of examples of the baselines that run unless others are named."""
_NEAREST = 5


class NearestExamples:
    """Chooses the examples most like an input, by the cosine of their embeddings; the encoder loads on first use."""

    def __init__(self, encoder: str = DEFAULT_ENCODER):
        self._name = encoder
        self._vectors: dict[str, Tensor] = {}

    @cached_property
    def _encoder(self) -> TextEncoder:
        return load_text_encoder(self._name)

    def __call__(self, text: str, examples: Sequence[Example], n: int) -> tuple[Example, ...]:
        """The n examples nearest to the text, the nearest last."""
        inputs = [text, *(example.input for example in examples)]
        if new := [one for one in dict.fromkeys(inputs) if one not in self._vectors]:
            self._vectors.update(zip(new, self._encoder(new), strict=True))
        query, *keys = (self._vectors[one] for one in inputs)
        order = (torch.stack(keys) @ query).argsort().tolist()
        return tuple(examples[i] for i in order[-n:])


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
    nearest: NearestExamples = field(default_factory=NearestExamples)
    """Chooses examples for an input."""
    _last: dict[Hashable, LoRA] = field(default_factory=dict)

    def made_once(self, key: Hashable, make: Callable[[], LoRA]) -> LoRASource:
        """A source whose LoRA is kept until another one is made: a task's rows follow each other, and need it often."""

        def made() -> LoRA:
            if key not in self._last:
                self._last.clear()
                self._last[key] = make()
            return self._last[key]

        return LoRASource(key, made)

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
    """Examples from the task's training rows; fewer than `MOST_SHOTS` where the task has fewer."""
    other_shots: tuple[Example, ...] = ()
    """Examples of the task of the other description."""


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


def prompt_of(
    base: Base, drawn: Drawn, asked: str, shots: Sequence[Example] = (), is_described: bool = False
) -> tuple[int, ...]:
    """The conversation: the description, if wanted, before the first input; examples as turns; then the input."""
    spec = TaskSpec(drawn.description if is_described else "", tuple(shots))
    return tuple(base.chat.conversation(spec.conversation(asked, ASK_SYSTEM_TURN)))


def _baseline(
    label: str,
    source: Source = lambda setup, drawn: None,
    n_shots: int = 0,
    is_described: bool = False,
    needs: tuple[str, ...] = (),
    is_drawn: bool = True,
    is_optional: bool = False,
) -> TaskBaseline:
    """A baseline with some examples and perhaps the description in its prompt, and the LoRA of a source."""

    def request(setup: TaskSetup, case: TaskCase) -> Request:
        prompt = prompt_of(setup.base, case.drawn, case.row.input, case.drawn.shots[:n_shots], is_described)
        return Request(prompt, source(setup, case.drawn))

    return Baseline(label, request, needs=needs, is_drawn=is_drawn, is_optional=is_optional)


def _shots(n_shots: int, is_described: bool = False) -> TaskBaseline:
    what = f"{n_shots} example{'s' * (n_shots > 1)}"
    label = f"description and {what}" if is_described else f"{what} in the prompt"
    return _baseline(
        label,
        n_shots=n_shots,
        is_described=is_described,
        needs=(f"{n_shots} examples",),
        is_optional=n_shots not in _USUAL_SHOTS,
    )


def _nearest_shots() -> TaskBaseline:
    """The examples nearest to the input, of all those that are drawn."""

    def request(setup: TaskSetup, case: TaskCase) -> Request:
        shots = setup.nearest(case.row.input, case.drawn.shots, _NEAREST)
        return Request(prompt_of(setup.base, case.drawn, case.row.input, shots, is_described=False))

    label = f"{_NEAREST} nearest of {MOST_SHOTS} examples"
    return Baseline(label, request, needs=(f"{MOST_SHOTS} examples",), is_optional=True)


def _reader_shots(n_shots: int) -> TaskBaseline:
    """The LoRA that was trained with the task in its prompt, in the same format: the upper bound of what is cast."""

    def request(setup: TaskSetup, case: TaskCase) -> Request:
        text = TaskSpec(case.drawn.description, case.drawn.shots[:n_shots]).text()
        prompt = setup.base.chat.prompt(with_description(text, case.row.input), ASK_SYSTEM_TURN)
        assert setup.multitask_described is not None
        return Request(tuple(prompt), fixed(setup.multitask_described))

    needs = ("multitask_described", f"{n_shots} examples")
    return Baseline(f"multi-task LoRA, description and {n_shots} examples", request, needs=needs, is_optional=True)


def _given(label: str, name: str, is_described: bool = False) -> TaskBaseline:
    """A baseline with a LoRA that the setup holds."""
    return _baseline(
        label,
        lambda setup, drawn: fixed(getattr(setup, name)),
        is_described=is_described,
        needs=(name,),
        is_drawn=is_described,
    )


def _cast(
    label: str,
    spec: Callable[[Drawn], str | TaskSpec],
    needs: tuple[str, ...] = ("caster",),
    is_optional: bool = False,
) -> TaskBaseline:
    """A baseline with the LoRA that is cast for a specification of the task."""

    def source(setup: TaskSetup, drawn: Drawn) -> LoRASource:
        task = spec(drawn)
        return setup.made_once(("cast", task), lambda: _caster(setup).loras([task])[0])

    return _baseline(label, source, needs=needs, is_optional=is_optional)


def _cast_from(n_shots: int) -> TaskBaseline:
    label = f"adapter from description and {n_shots} example{'s' * (n_shots > 1)}"

    def spec(drawn: Drawn) -> TaskSpec:
        return TaskSpec(drawn.description, drawn.shots[:n_shots])

    return _cast(label, spec, ("caster", f"{n_shots} examples"), is_optional=True)


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
    **{f"shots{n}": _shots(n) for n in SHOTS},
    **{f"described_shots{n}": _shots(n, is_described=True) for n in SHOTS},
    f"nearest{_NEAREST}": _nearest_shots(),
    "average": _given("average of the oracles", "average"),
    "multitask": _given("multi-task LoRA", "multitask"),
    "multitask_described": _given("multi-task LoRA and description", "multitask_described", is_described=True),
    **{f"multitask_described_shots{n}": _reader_shots(n) for n in SHOTS[:-1]},
    ADAPTER: _cast("adapter from the description", lambda drawn: drawn.description),
    **{f"{ADAPTER}_shots{n}": _cast_from(n) for n in SHOTS},
    "other": _cast(
        "adapter from another task's description", lambda drawn: drawn.other_description or "", ("tasks", "caster")
    ),
    "other_shots5": _cast(
        "adapter from another task's description and 5 examples",
        lambda drawn: TaskSpec(drawn.other_description or "", drawn.other_shots),
        ("tasks", "caster", "5 examples"),
        is_optional=True,
    ),
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
