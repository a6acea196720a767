"""Draw the tasks of each training step: each one's description, examples or both, and the rows to answer.

Text-to-LoRA, the oracles and the multi-task LoRA share this source, so with one seed they see the same rows in the same
steps. With `examples_read`, examples of a task stand behind its description, as in MetaICL (arXiv 2110.15943), and
never among the rows; where an augmented task's description does not tell what has changed, only they do, as in symbol
tuning (arXiv 2305.08298).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loracast.base.chat import ChatFormat
from loracast.base.scoring import Episode, Question
from loracast.documents.task_spec import DEFAULT_STYLE, STYLES, Example, TaskSpec, with_description
from loracast.errors import ConfigError, TrainingError
from loracast.lab.data.task_augmentation import EXAMPLES_TO_AUGMENT, Augmentation, augment, words_of
from loracast.lab.data.tasks import Task
from loracast.lab.training.document_source import SYSTEM_TURNS

_TELLING = 3  # fewest examples that stand for a description which is left out
_DEFAULT_STYLE_SHARE = 0.6  # of the texts, whose examples are written as they are in use


@dataclass(frozen=True)
class TaskDataConfig:
    """One step of training on tasks."""

    seed: int = 0
    """Seed of the data."""
    tasks_per_step: int = 8
    """Different tasks in one step, each with one of its descriptions."""
    examples_per_task: int = 8
    """Most rows of each task to answer, all different."""
    tokens_per_task: int = 512
    """Most tokens of a task's rows together, answers included; one row is always kept."""
    max_tokens: int = 256
    """Longest row with its answer, in tokens; longer ones are left out."""
    augmented_share: float = 0.0
    """Share of the drawn tasks that are augmented: turned into another task with a changed description."""
    examples_read: int = 0
    """Most examples that are read behind a description; how many is drawn log-uniformly from 1 to this."""
    tokens_read: int = 384
    """Most tokens of the examples that are read of a task; further ones are left out."""
    description_only_share: float = 0.4
    """Share of the drawn tasks of which the description alone is read."""
    undescribed_share: float = 0.3
    """Share of the tasks with examples whose description is left out, or does not mention the augmentation."""

    def __post_init__(self) -> None:
        if min(self.tasks_per_step, self.examples_per_task, self.tokens_per_task, self.max_tokens) < 1:
            raise ConfigError("tasks_per_step, examples_per_task, tokens_per_task and max_tokens must be at least 1")
        if self.examples_read < 0 or self.tokens_read < 1:
            raise ConfigError("examples_read must not be negative, and tokens_read at least 1")
        for name in ("augmented_share", "description_only_share", "undescribed_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share: from 0 to 1")


@dataclass(frozen=True)
class DrawnTask:
    """A task of one step: its specification, and the rows to answer."""

    task: Task
    spec: TaskSpec
    """The description, "" if the task has none, and the examples that are read."""
    style: str
    """How the examples are written."""
    rows: tuple[Example, ...]
    """Rows to answer, none of them among the examples that are read; those that are too many are not yet dropped."""
    system: str | None
    """The system turn of their prompts."""
    augmentation: Augmentation | None = None

    @property
    def text(self) -> str:
        """The specification as the text that is read."""
        return self.spec.text(self.style)

    def within(self, fits: Callable[[str], bool]) -> DrawnTask:
        """The same with only so many of the examples that what is read of the task fits."""
        spec = self.spec
        while spec.examples and not fits(spec.text(self.style)):
            spec = dataclasses.replace(spec, examples=spec.examples[:-1])
        return dataclasses.replace(self, spec=spec)


class TaskSource:
    """Endless steps of training tasks; a step depends on the seed and its number alone.

    Held-out tasks take part only if `heldout_too`, to train their oracles. `described` puts the specification of a task
    into each prompt, for a baseline without an adapter. `is_specified` says whether the model gets the
    specification at all, so that the config's `augmented_share` and `examples_read` count: without one, augmented tasks
    would contradict each other.
    """

    def __init__(
        self,
        config: TaskDataConfig,
        tasks: Sequence[Task],
        chat: ChatFormat,
        *,
        heldout_too: bool = False,
        described: bool = False,
        is_specified: bool = True,
    ):
        self.config, self.chat, self.described = config, chat, described
        is_specified = is_specified and not heldout_too
        self.augmented_share = config.augmented_share if is_specified else 0.0
        self.examples_read = config.examples_read if is_specified else 0
        self.tasks = [t for t in tasks if t.train and (heldout_too or (t.seen_descriptions() and not t.is_heldout))]
        if not self.tasks:
            raise TrainingError("there is no task to train on: all are held out, or lack descriptions or examples")
        self.short_enough = {task.name: self._short_enough(task) for task in self.tasks}
        """By task, the training examples that fit into `max_tokens` under the longest system turn."""

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

    @property
    def about(self) -> dict[str, Any]:
        """The config, the tasks, and a hash of all that training may see; a resumed run must have the same."""
        seen = [(t.name, t.seen_descriptions(), [(e.input, e.outputs[0]) for e in t.train]) for t in self.tasks]
        digest = hashlib.sha256(repr(seen).encode()).hexdigest()
        names = [task.name for task in self.tasks]
        return {"data": dataclasses.asdict(self.config), "tasks": names, "tasks_sha256": digest}

    def draw(self, number: int) -> list[DrawnTask]:
        """The tasks of batch `number`.

        Augmentation and the examples that are read have generators of their own, so that everything else is drawn the
        same with and without them.
        """
        c = self.config
        rng, of_augmentation, of_examples = (
            random.Random(f"{c.seed}/0/{number}{purpose}") for purpose in ("", "/varied", "/examples")
        )
        chosen = rng.sample(self.tasks, min(c.tasks_per_step, len(self.tasks)))
        descriptions = [rng.choice(task.seen_descriptions() or ("",)) for task in chosen]
        augmentations: list[Augmentation | None] = []
        for task, description in zip(chosen, descriptions, strict=True):
            short = self.short_enough[task.name]
            augmentation = None
            if of_augmentation.random() < self.augmented_share and len(short) >= EXAMPLES_TO_AUGMENT:
                whole = dataclasses.replace(task, train=tuple(short))
                augmentation = augment(whole, description, self._words, of_augmentation)
            augmentations.append(augmentation)
        drawn = []
        for task, description, augmentation in zip(chosen, descriptions, augmentations, strict=True):
            n_read = self._n_read(of_examples)
            system, pool = rng.choice(SYSTEM_TURNS), self.short_enough[task.name]
            rows = rng.sample(pool, min(c.examples_per_task, len(pool)))
            if augmentation is not None:
                n = EXAMPLES_TO_AUGMENT * (c.examples_per_task + n_read)
                pool = augmentation.change(of_augmentation.sample(pool, min(n, len(pool))))
                rows = pool[: c.examples_per_task]
            style = self._style(of_examples) if n_read else DEFAULT_STYLE
            read = self._read(pool, n_read, style, of_examples)
            if read:
                shown = {example.input for example in read}
                rest = [example for example in pool if example.input not in shown]
                rows = of_examples.sample(rest, min(c.examples_per_task, len(rest)))
            spec = TaskSpec(self._described(description, augmentation, len(read), of_examples), read)
            drawn.append(DrawnTask(task, spec, style, tuple(rows), system, augmentation))
        return drawn

    def _n_read(self, rng: random.Random) -> int:
        """How many examples are read of a task: log-uniform, since the first ones tell most and cost least."""
        if not self.examples_read or rng.random() < self.config.description_only_share:
            return 0
        return int((self.examples_read + 1) ** rng.random())

    def _style(self, rng: random.Random) -> str:
        return DEFAULT_STYLE if rng.random() < _DEFAULT_STYLE_SHARE else rng.choice(list(STYLES))

    def _read(self, pool: Sequence[Example], n: int, style: str, rng: random.Random) -> tuple[Example, ...]:
        """Draw up to n examples with different inputs and within `tokens_read`; half of the inputs stay for rows."""
        different = list({example.input: example for example in pool}.values())
        read: list[Example] = []
        n_tokens = 0
        for example in rng.sample(different, min(n, len(different) // 2)):
            n_tokens += len(self.chat.reply(TaskSpec("", (example,)).text(style)))
            if n_tokens > self.config.tokens_read:
                break
            read.append(example)
        return tuple(read)

    def _described(self, description: str, augmentation: Augmentation | None, n_read: int, rng: random.Random) -> str:
        """The description that stands before `n_read` examples: the right one, or one that leaves something to them."""
        right = description if augmentation is None else augmentation.description
        if n_read < _TELLING or rng.random() >= self.config.undescribed_share:
            return right
        # A rule that replaces the task would contradict the task's own description; other augmentations add to it.
        keeps = augmentation is not None and description in augmentation.description
        return description if keeps and rng.random() < 0.5 else ""

    def episodes(self, drawn: Sequence[DrawnTask]) -> list[Episode]:
        """An episode for each drawn task: its rows under one system turn, as many as there are tokens for."""
        return [self._episode(one) for one in drawn]

    def _episode(self, drawn: DrawnTask) -> Episode:
        questions = [self._question(row, drawn.system) for row in drawn.rows]
        within = itertools.accumulate(len(question.prompt) + len(question.answer) for question in questions)
        n_kept = max(1, sum(n_tokens <= self.config.tokens_per_task for n_tokens in within))
        if self.described:  # the same rows as without
            questions = [self._question(row, drawn.system, drawn.text) for row in drawn.rows]
        return Episode((), tuple(questions[:n_kept]), "tasks")

    def _question(self, example: Example, system: str | None, specified: str | None = None) -> Question:
        text = example.input if specified is None else with_description(specified, example.input)
        return Question(tuple(self.chat.prompt(text, system)), tuple(self.chat.reply(example.outputs[0])))

    def _short_enough(self, task: Task) -> list[Example]:
        most = self.config.max_tokens
        asked = ((example, self._question(example, None)) for example in task.train)
        short = [example for example, q in asked if len(q.prompt) + len(q.answer) <= most]
        if not short:
            raise TrainingError(f"no example of {task.name} has {most} tokens or fewer; raise data.max_tokens")
        return short
