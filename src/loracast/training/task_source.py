"""Draw the tasks, descriptions and examples of each training step.

Text-to-LoRA, the oracles and the multi-task LoRA share this source, so with one seed they see the same rows in the same
steps.
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
from loracast.data.task_augmentation import EXAMPLES_TO_AUGMENT, Augmentation, augment, words_of
from loracast.data.tasks import Example, Task, with_description
from loracast.errors import ConfigError, TrainingError
from loracast.scoring.episodes import Episode, Question
from loracast.training.episode_maker import SYSTEM_TURNS


@dataclass(frozen=True)
class TaskDataConfig:
    """One step of training on tasks."""

    seed: int = 0
    """Seed of the data."""
    tasks_per_step: int = 8
    """Different tasks in one step, each with one of its descriptions."""
    examples_per_task: int = 8
    """Most examples of each task, all different."""
    tokens_per_task: int = 512
    """Most tokens of a task's examples together, answers included; one example is always kept."""
    max_tokens: int = 256
    """Longest example with its answer, in tokens; longer ones are left out."""
    augmented_share: float = 0.0
    """Share of the drawn tasks that are augmented: turned into another task with a changed description."""

    def __post_init__(self) -> None:
        if min(self.tasks_per_step, self.examples_per_task, self.tokens_per_task, self.max_tokens) < 1:
            raise ConfigError("tasks_per_step, examples_per_task, tokens_per_task and max_tokens must be at least 1")
        if not 0 <= self.augmented_share <= 1:
            raise ConfigError("augmented_share is a share: from 0 to 1")


@dataclass(frozen=True)
class DrawnTasks:
    """The tasks of one step with a description of each, "" if it has none; the generators draw examples later."""

    tasks: tuple[Task, ...]
    descriptions: tuple[str, ...]
    augmentations: tuple[Augmentation | None, ...]
    rng: random.Random
    augmentation_rng: random.Random
    """A generator of its own, so that everything else is drawn the same with and without augmentation."""


class TaskSource:
    """Endless steps of training tasks; a step depends on the seed and its number alone.

    Held-out tasks take part only if `heldout_too`, to train their oracles. `described` puts the drawn description into
    each prompt, for a baseline without an adapter. `augmented` says whether the config's `augmented_share` counts:
    without descriptions, augmented tasks would contradict each other.
    """

    def __init__(
        self,
        config: TaskDataConfig,
        tasks: Sequence[Task],
        chat: ChatFormat,
        *,
        heldout_too: bool = False,
        described: bool = False,
        augmented: bool = True,
    ):
        self.config, self.chat, self.described = config, chat, described
        self.augmented_share = config.augmented_share if augmented and not heldout_too else 0.0
        self._short: dict[str, list[Example]] = {}
        self.tasks = [t for t in tasks if t.train and (heldout_too or (t.seen_descriptions() and not t.is_heldout))]
        if not self.tasks:
            raise TrainingError("there is no task to train on: all are held out, or lack descriptions or examples")

    @property
    def descriptions(self) -> tuple[str, ...]:
        """All descriptions that training may see, ordered by task."""
        return tuple(self._task_of_description)

    @property
    def n_descriptions(self) -> tuple[int, ...]:
        """Number of descriptions by task; one that two tasks share counts for the first."""
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
        """Hash of all that training may see; a resumed run must see the same."""
        seen = [(t.name, t.seen_descriptions(), [(e.input, e.outputs[0]) for e in t.train]) for t in self.tasks]
        return hashlib.sha256(repr(seen).encode()).hexdigest()

    def check_lengths(self) -> None:
        """Raise TrainingError if a task has no example that is short enough, before training rather than during it."""
        for task in self.tasks:
            self.short_enough(task)

    def draw(self, number: int, worker: int = 0) -> DrawnTasks:
        """The tasks and descriptions of step `number` on one of several workers."""
        c = self.config
        rng = random.Random(f"{c.seed}/{worker}/{number}")
        chosen = rng.sample(self.tasks, min(c.tasks_per_step, len(self.tasks)))
        descriptions = [rng.choice(task.seen_descriptions() or ("",)) for task in chosen]
        augmentation_rng = random.Random(f"{c.seed}/{worker}/{number}/varied")
        augmentations: list[Augmentation | None] = [None] * len(chosen)
        for i, task in enumerate(chosen):
            if augmentation_rng.random() < self.augmented_share and len(self.short_enough(task)) >= EXAMPLES_TO_AUGMENT:
                short = dataclasses.replace(task, train=tuple(self.short_enough(task)))
                augmented = augmentations[i] = augment(short, descriptions[i], self._words, augmentation_rng)
                descriptions[i] = augmented.description
        return DrawnTasks(tuple(chosen), tuple(descriptions), tuple(augmentations), rng, augmentation_rng)

    def episodes(self, drawn: DrawnTasks) -> list[Episode]:
        """An episode of examples for each drawn task; it uses up the random states of `drawn`, so call it once."""
        return [self._episode(drawn, i) for i in range(len(drawn.tasks))]

    def _episode(self, drawn: DrawnTasks, i: int) -> Episode:
        """Examples of the i-th task under one system turn."""
        n, task, augmentation = self.config.examples_per_task, drawn.tasks[i], drawn.augmentations[i]
        description = drawn.descriptions[i] if self.described else None
        system = drawn.rng.choice(SYSTEM_TURNS)
        examples = self.short_enough(task)
        chosen = drawn.rng.sample(examples, min(n, len(examples)))
        if augmentation is not None:
            several = drawn.augmentation_rng.sample(examples, min(EXAMPLES_TO_AUGMENT * n, len(examples)))
            chosen = augmentation.change(several)[:n]
        questions = [self._question(example, system) for example in chosen]
        within = itertools.accumulate(len(question.prompt) + len(question.answer) for question in questions)
        n_kept = max(1, sum(n_tokens <= self.config.tokens_per_task for n_tokens in within))
        if description is not None:  # the same examples as without
            questions = [self._question(example, system, description) for example in chosen]
        return Episode((), tuple(questions[:n_kept]), "tasks")

    def _question(self, example: Example, system: str | None, description: str | None = None) -> Question:
        text = example.input if description is None else with_description(description, example.input)
        return Question(tuple(self.chat.prompt(text, system)), tuple(self.chat.reply(example.outputs[0])))

    def short_enough(self, task: Task) -> list[Example]:
        """Training examples that fit into `max_tokens` under the longest system turn; TrainingError if none does."""
        if task.name not in self._short:
            most = self.config.max_tokens
            asked = ((example, self._question(example, None)) for example in task.train)
            short = [example for example, q in asked if len(q.prompt) + len(q.answer) <= most]
            if not short:
                raise TrainingError(f"no example of {task.name} has {most} tokens or fewer; raise data.max_tokens")
            self._short[task.name] = short
        return self._short[task.name]
