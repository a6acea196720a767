"""What trainings on tasks draw at each step: which tasks, which of their descriptions, which examples.

Text-to-LoRA, the oracles and the multi-task LoRA all draw from here, so that with one seed they see the same rows in the same steps.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from loracast.base.chat import ChatFormat
from loracast.data.task_augmentation import EXAMPLES_TO_VARY, Variation, vary, words_of
from loracast.data.tasks import Example, Task, with_description
from loracast.errors import ConfigError, TrainingError
from loracast.scoring.episodes import Episode, Question
from loracast.training.episode_maker import SYSTEM_TURNS


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
    varied_share: float = 0.0
    """Share of the drawn tasks that are made into another one, as their descriptions then say (`variations.py`)."""

    def __post_init__(self) -> None:
        if min(self.tasks_per_step, self.examples_per_task, self.tokens_per_task, self.max_tokens) < 1:
            raise ConfigError("tasks_per_step, examples_per_task, tokens_per_task and max_tokens must be at least 1")
        if not 0 <= self.varied_share <= 1:
            raise ConfigError("varied_share is a share: from 0 to 1")


@dataclass(frozen=True)
class DrawnTasks:
    """The tasks of one step and a description of each ("" where it has none); examples follow from the state of the generators."""

    tasks: tuple[Task, ...]
    descriptions: tuple[str, ...]
    variations: tuple[Variation | None, ...]
    """What a task was made into, as its description says."""
    rng: random.Random
    of_varied: random.Random
    """For what is varied, so that all else is drawn the same with variations and without."""


class TaskSource:
    """Endless steps of training tasks: which tasks, which of their descriptions, which examples. Depends on the seed and the step alone.

    Args:
        heldout_too: held-out tasks as well, of which otherwise nothing is ever drawn: for their oracles.
        described: each prompt carries the description that was drawn, as a rival without an adapter would be told it.
        varied: whether the config's `varied_share` counts: not for whoever never learns of the descriptions.
    """

    def __init__(
        self,
        config: TaskDataConfig,
        tasks: Sequence[Task],
        chat: ChatFormat,
        *,
        heldout_too: bool = False,
        described: bool = False,
        varied: bool = True,
    ):
        self.config, self.chat, self.described = config, chat, described
        self.varied_share = config.varied_share if varied and not heldout_too else 0.0
        self._short: dict[str, list[Example]] = {}
        if heldout_too:  # what a LoRA of its own is trained on needs no description
            self.tasks = [task for task in tasks if task.train]
        else:
            self.tasks = [task for task in tasks if task.train and task.seen_descriptions() and not task.is_heldout]
        if not self.tasks:
            raise TrainingError("no task is there to train on: all are held out, or lack descriptions or examples")

    @property
    def descriptions(self) -> tuple[str, ...]:
        """All that training may see, ordered by task."""
        return tuple(self._task_of_description)

    @property
    def n_descriptions(self) -> tuple[int, ...]:
        """How many of them each task has; one that two tasks have counts for the first."""
        count = Counter(self._task_of_description.values())
        return tuple(count[task.name] for task in self.tasks)

    @cached_property
    def _task_of_description(self) -> dict[str, str]:
        task_of: dict[str, str] = {}
        for task in self.tasks:
            for text in task.seen_descriptions():
                task_of.setdefault(text, task.name)
        return task_of

    @cached_property
    def _words(self) -> tuple[str, ...]:
        return words_of(self.tasks)

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
        descriptions = [rng.choice(task.seen_descriptions() or ("",)) for task in chosen]
        of_varied = random.Random(f"{c.seed}/{worker}/{number}/varied")
        variations: list[Variation | None] = [None] * len(chosen)
        for i, task in enumerate(chosen):
            if of_varied.random() < self.varied_share and len(self.short_enough(task)) >= EXAMPLES_TO_VARY:
                short = dataclasses.replace(task, train=tuple(self.short_enough(task)))
                variation = variations[i] = vary(short, descriptions[i], self._words, of_varied)
                descriptions[i] = variation.description
        return DrawnTasks(tuple(chosen), tuple(descriptions), tuple(variations), rng, of_varied)

    def episodes(self, drawn: DrawnTasks) -> list[Episode]:
        """Examples of what was drawn, an episode for each task; ask once."""
        return [self._episode(drawn, i) for i in range(len(drawn.tasks))]

    def _episode(self, drawn: DrawnTasks, i: int) -> Episode:
        """Some examples of the i-th task, under one system turn; the description is in their prompts only where it is told there."""
        n, task, variation = self.config.examples_per_task, drawn.tasks[i], drawn.variations[i]
        description = drawn.descriptions[i] if self.described else None
        system = drawn.rng.choice(SYSTEM_TURNS)
        examples = self.short_enough(task)
        chosen = drawn.rng.sample(examples, min(n, len(examples)))
        if variation is not None:
            several = drawn.of_varied.sample(examples, min(EXAMPLES_TO_VARY * n, len(examples)))
            chosen = variation.change(several)[:n]
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
