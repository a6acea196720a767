"""What trainings on tasks draw at each step: which tasks, which of their descriptions, which examples.

Text-to-LoRA, the oracles and the multi-task LoRA all draw from here, so that with one seed they see the same rows in the same steps.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from loracast.chat import ChatFormat
from loracast.errors import ConfigError, TrainingError
from loracast.tasks import Example, Task, with_description
from loracast.training.episodes import Episode, Question
from loracast.training.sources import SYSTEM_TURNS


@dataclass(frozen=True)
class TaskDataConfig:
    """What one step of training on tasks looks like."""

    seed: int = 0
    """Seed of the data."""
    tasks_per_step: int = 8
    """Tasks in one step, all different, each with one of its descriptions."""
    examples_per_task: int = 8
    """Most examples of each, all different."""
    tokens_per_task: int = 512
    """Most tokens of a task's examples together, answers included: of tasks with long examples there are fewer. One there always is."""
    max_tokens: int = 256
    """Longest example, in tokens with its answer; longer ones are left out."""

    def __post_init__(self) -> None:
        if min(self.tasks_per_step, self.examples_per_task, self.tokens_per_task, self.max_tokens) < 1:
            raise ConfigError("tasks_per_step, examples_per_task, tokens_per_task and max_tokens must be at least 1")


@dataclass(frozen=True)
class DrawnTasks:
    """The tasks of one step and a description of each ("" where it has none); examples follow from `rng`'s state."""

    tasks: tuple[Task, ...]
    descriptions: tuple[str, ...]
    rng: random.Random


class TaskSource:
    """Endless steps of training tasks: which tasks, which of their descriptions, which examples. Depends on the seed and the step alone.

    Args:
        heldout_too: held-out tasks as well, of which otherwise nothing is ever drawn: for their oracles.
        described: each prompt carries the description that was drawn, as a rival without an adapter would be told it.
    """

    def __init__(
        self,
        config: TaskDataConfig,
        tasks: Sequence[Task],
        chat: ChatFormat,
        *,
        heldout_too: bool = False,
        described: bool = False,
    ):
        self.config, self.chat, self.described = config, chat, described
        self._short: dict[str, list[Example]] = {}
        if heldout_too:  # what a LoRA of its own is trained on needs no description
            self.tasks = [task for task in tasks if task.train]
        else:
            self.tasks = [task for task in tasks if task.train and task.seen_descriptions() and not task.is_heldout]
        if not self.tasks:
            raise TrainingError("no task is there to train on: all are held out, or lack descriptions or examples")

    @property
    def descriptions(self) -> tuple[str, ...]:
        """All that training may see."""
        return tuple(dict.fromkeys(text for task in self.tasks for text in task.seen_descriptions()))

    @cached_property
    def sha256(self) -> str:
        """Of all that training may see: a run goes on with the same only."""
        seen = [
            (task.name, task.seen_descriptions(), [(e.input, e.outputs[0]) for e in task.train]) for task in self.tasks
        ]
        return hashlib.sha256(repr(seen).encode()).hexdigest()

    def draw(self, number: int, worker: int = 0) -> DrawnTasks:
        """The tasks and descriptions of step `number` on one of several workers."""
        c = self.config
        rng = random.Random(f"{c.seed}/{worker}/{number}")
        chosen = rng.sample(self.tasks, min(c.tasks_per_step, len(self.tasks)))
        descriptions = tuple(rng.choice(task.seen_descriptions() or ("",)) for task in chosen)
        return DrawnTasks(tuple(chosen), descriptions, rng)

    def episodes(self, drawn: DrawnTasks) -> list[Episode]:
        """Examples of what was drawn, an episode for each task; ask once."""
        told = drawn.descriptions if self.described else [None] * len(drawn.tasks)
        return [self._episode(drawn.rng, task, text) for task, text in zip(drawn.tasks, told, strict=True)]

    def _episode(self, rng: random.Random, task: Task, description: str | None = None) -> Episode:
        """Some examples of a task, under one system turn; the description is in their prompts only where it is given."""
        system = rng.choice(SYSTEM_TURNS)
        examples = self.short_enough(task)
        chosen = rng.sample(examples, min(self.config.examples_per_task, len(examples)))
        questions = [self._question(example, system) for example in chosen]
        within = itertools.accumulate(len(question.prompt) + len(question.answer) for question in questions)
        n_kept = max(1, sum(n_tokens <= self.config.tokens_per_task for n_tokens in within))
        if description is not None:  # told or not, the same examples
            questions = [self._question(example, system, description) for example in chosen]
        return Episode((), tuple(questions[:n_kept]), "tasks")

    def _question(self, example: Example, system: str | None, description: str | None = None) -> Question:
        asked = example.input if description is None else with_description(description, example.input)
        return Question(tuple(self.chat.prompt(asked, system)), tuple(self.chat.reply(example.outputs[0])))

    def short_enough(self, task: Task) -> list[Example]:
        """The training examples that fit into `max_tokens` under the longest system turn. Raises TrainingError where none does."""
        if task.name not in self._short:
            chosen = []
            for example in task.train:
                question = self._question(example, None)
                if len(question.prompt) + len(question.answer) <= self.config.max_tokens:
                    chosen.append(example)
            if not chosen:
                raise TrainingError(
                    f"every example of {task.name} is longer than {self.config.max_tokens} tokens; raise data.max_tokens"
                )
            self._short[task.name] = chosen
        return self._short[task.name]
