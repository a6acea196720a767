"""Train LoRAs by gradient descent with PEFT: oracles, the multi-task LoRA, and the window LoRA.

They are the references for LoRAs that are cast. The folder of one holds PEFT's own files and `loracast.json`, which is
written last.

An **oracle** is trained on one task's examples: what a description could at best be worth. The **multi-task LoRA** is
one LoRA for all training tasks, trained on the same rows in the same steps as Text-to-LoRA: what remains of it without
descriptions. Its second form has the description in every prompt.

The **window LoRA** answers with the document in the prompt, the rival of document adapters. A row is a document once
with all its questions as branches (base/forward.py), so ten thousand questions cost as much as their documents.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loracast.base.chat import encode_text
from loracast.base.fingerprint import Fingerprint, check
from loracast.base.forward import common_prefix
from loracast.base.load import Base
from loracast.errors import AdapterError, ConfigError, TrainingError
from loracast.files import write_atomically
from loracast.lab.data.everyday import EverydayDocument, make_document
from loracast.lab.data.facts import FactSheet, make_sheet
from loracast.lab.data.rows import read_questioned
from loracast.lab.data.tasks import Task
from loracast.lab.training.document_source import answered_questions, reading_prompt
from loracast.lab.training.loop import OnMetrics, TrainConfig, Workers, resumable_settings, train
from loracast.lab.training.recipe import Layers, recorded, target_at
from loracast.lab.training.scoring import Episode, Question, pack, score_answers
from loracast.lab.training.task_source import TaskDataConfig, TaskSource
from loracast.library.manifest import check_name
from loracast.lora.algebra import LoRA, LoRABatch
from loracast.lora.peft_format import read_peft

ABOUT = "loracast.json"  # file beside PEFT's own: what the LoRA was trained on and how


@dataclass(frozen=True)
class PeftConfig:
    """Shape of the LoRA."""

    kinds: tuple[str, ...] = ("q_proj", "v_proj")
    """Module kinds that receive a LoRA."""
    layers: Layers = None
    """Layers that receive a LoRA; by default all."""
    rank: int = 8
    """Rank of the LoRA."""
    scale: float = 5.66
    """Factor on the delta; alpha is rank times this (published: 16 / sqrt(8))."""


def train_lora(
    base: Base,
    recipe: OracleRecipe | WindowRecipe,
    episodes: Callable[[int], Sequence[Episode]],
    folder: Path,
    about: Mapping[str, Any],
    command: str = "",
    on_metrics: OnMetrics = lambda metrics: None,
) -> bool:
    """Train one LoRA, or resume. Returns whether it is finished.

    Args:
        episodes: number of a batch -> its rows; always the same for the same number.
        about: what is trained on; it is recorded, and a folder with other values is refused (TrainingError).
        command: the command, which is recorded too.
        on_metrics: receives each line of metrics.
    """
    if Workers.join(base.device.type).n > 1:
        raise TrainingError("LoRAs of this kind are trained by one process; start it without a launcher")
    training = recipe.training
    about = {"base": base.fingerprint.norms, "lora": dataclasses.asdict(recipe.lora), **about}
    settings = resumable_settings(training, about)
    if (folder / ABOUT).is_file():
        stored = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        differing = sorted(k for k, v in settings.items() if stored.get("settings", {}).get(k) != v)
        if differing:
            raise TrainingError(
                f"{folder} holds a LoRA with other settings ({', '.join(differing)}); give another --out, or remove it"
            )
        return True
    fingerprint = base.fingerprint  # taken before PEFT changes the modules
    with _with_lora(base, recipe.lora, training.seed) as (wrapped, factors):

        def objective(number: int) -> tuple[Tensor, dict[str, float]]:
            batch = pack(episodes(number), base.pad_id).to(base.device)
            with training.autocast(base.device):  # PEFT adds the LoRA
                scores = score_answers(base.model, LoRABatch(1, {}, {}), batch, passes=training.passes)
            figures = {"exact": scores.exact, "token_accuracy": scores.token_accuracy, "tokens": batch.n_tokens}
            return scores.loss, figures

        def save_model(out: Path) -> None:
            wrapped.save_pretrained(str(out))

        last = train(factors, objective, training, folder, save_model=save_model, settings=about, on_metrics=on_metrics)
    if last.get("step") != training.steps:
        return False
    done = {"made_for": fingerprint.to_dict(), "command": command, "settings": settings, "last": last}
    write_atomically(folder / ABOUT, json.dumps(done, indent=1).encode())
    for state in folder.glob("state*"):  # a finished run is never resumed
        shutil.rmtree(state) if state.is_dir() else state.unlink()
    return True


def read_trained(folder: Path, base: Fingerprint, command: str) -> tuple[LoRA, dict[str, Any]]:
    """Read a LoRA whose training is finished, checked against a base, and the settings that it was trained with.

    Raises AdapterError, which names the `command` that trains such a LoRA, if there is none or it is not finished.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        made_for, settings = Fingerprint(**about["made_for"]), about["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{folder} holds no LoRA whose training is finished (`{command}` trains or resumes it): {error}"
        ) from error
    check(made_for, base, f"the LoRA in {folder}")
    return LoRA(read_peft(folder)), settings


@contextmanager
def _with_lora(base: Base, lora: PeftConfig, seed: int) -> Iterator[tuple[Any, nn.Module]]:
    """Wrap the base with PEFT, yield PEFT's model and a module of its factors, and unwrap the base afterwards."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("training LoRAs needs PEFT: pip install 'loracast[train]'") from error
    names = list(target_at(base.model.config, lora.kinds, lora.layers).names)
    torch.manual_seed(seed)
    alpha: Any = lora.rank * lora.scale  # PEFT accepts any number
    options = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=names, task_type="CAUSAL_LM")
    wrapped = get_peft_model(base.model, options)
    try:
        trained = {name.replace(".", "/"): p for name, p in wrapped.named_parameters() if p.requires_grad}
        yield wrapped, nn.ParameterDict(trained)
    finally:
        wrapped.unload()


_MADE_BY = "loracast train oracle"
_TOKENS_IN_A_ROW = 384  # of questions; the cost of attention grows with the square of a row's length


@dataclass(frozen=True)
class OracleRecipe:
    """One training run, as the tables `[lora]`, `[data]` and `[training]` of a TOML file."""

    lora: PeftConfig = field(default_factory=PeftConfig)
    data: TaskDataConfig = field(
        default_factory=lambda: TaskDataConfig(tasks_per_step=1, examples_per_task=64, tokens_per_task=2048)
    )
    training: TrainConfig = field(default_factory=lambda: TrainConfig(steps=100, lr=1e-3, warmup_steps=10))


MULTITASK = OracleRecipe(data=TaskDataConfig(), training=TrainConfig())  # with the defaults of Text-to-LoRA


def train_oracles(
    base: Base,
    recipe: OracleRecipe,
    tasks: Sequence[Task],
    oracles: Path,
    on_metrics: Callable[[str, dict[str, float]], None] = lambda task, figures: None,
    **record: Any,
) -> list[str]:
    """Train an oracle for each task, one after the other, each in a folder of its name; finished oracles are skipped.

    It stops after the recipe's `budget_s` seconds, also within a task; the same call resumes there. Returns the names
    of the tasks whose oracles are finished. Raises TrainingError if a task cannot be trained on (then nothing is done),
    or its folder has an oracle with other settings. `on_metrics` receives a task's name and its latest metrics.
    """
    if recipe.data.tasks_per_step != 1:
        raise TrainingError("an oracle learns one task; leave data.tasks_per_step at 1")
    sources: dict[str, TaskSource] = {}
    problems = []
    for task in tasks:
        try:
            check_name(task.name)
            sources[task.name] = TaskSource(recipe.data, [task], base.chat, heldout_too=True)
        except TrainingError as error:
            problems.append(f"{task.name}: {error}" if task.train else f"{task.name}: no example to train on")
    if problems:
        raise TrainingError("; ".join(problems))
    started_s, budget_s = time.monotonic(), recipe.training.budget_s
    for name, source in sources.items():
        left_s = None if budget_s is None else started_s + budget_s - time.monotonic()
        if left_s is not None and left_s <= 0:
            break
        one = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, budget_s=left_s))
        if not _train(base, one, source, oracles / name, on_metrics=partial(on_metrics, name), **record):
            break  # stopped by a signal or the budget
    return [name for name in sources if (oracles / name / ABOUT).is_file()]


def train_multitask(
    base: Base, recipe: OracleRecipe, tasks: Sequence[Task], out: Path, *, described: bool = False, **record: Any
) -> bool:
    """Train one LoRA on all tasks that are not held out, or resume. Returns whether it is finished.

    `MULTITASK` is the recipe with the defaults of Text-to-LoRA; the class's own defaults are an oracle's. `described`
    puts the description that a step draws for a task into the prompts of its examples.
    """
    source = TaskSource(recipe.data, tasks, base.chat, described=described, is_specified=described)
    return _train(base, recipe, source, out, is_multitask=True, **record)


def read_oracle(folder: Path, base: Fingerprint) -> LoRA:
    """Read a LoRA that `train_oracles` or `train_multitask` made for a base; AdapterError if none is finished."""
    return read_trained(folder, base, _MADE_BY)[0]


def read_multitask(folder: Path, base: Fingerprint, described: bool) -> LoRA:
    """Read a multi-task LoRA. Raises AdapterError as `read_oracle`, or if it is an oracle, or `described` differs."""
    lora, settings = read_trained(folder, base, _MADE_BY)
    if settings["described"] != described or not settings["is_multitask"]:
        how = "with" if settings["described"] else "without"
        what = f"a multi-task LoRA {how} descriptions" if settings["is_multitask"] else "the LoRA of a single task"
        wanted = "`loracast train multitask --described`" if described else "`loracast train multitask`"
        raise AdapterError(f"{folder} holds {what}; give what {wanted} makes")
    return lora


def oracles_in(oracles: Path) -> tuple[str, ...]:
    """The names of the tasks whose oracles are finished."""
    return tuple(sorted(path.parent.name for path in oracles.glob(f"*/{ABOUT}")))


def _train(
    base: Base, recipe: OracleRecipe, source: TaskSource, folder: Path, is_multitask: bool = False, **record: Any
) -> bool:
    held_out = [task.name for task in source.tasks if task.is_heldout]
    about = {**source.about, "is_multitask": is_multitask, "described": source.described, "heldout": held_out}

    def episodes(number: int) -> list[Episode]:
        return _rows(source.episodes(source.draw(number)))

    return train_lora(base, recipe, episodes, folder, about, **record)


def _rows(episodes: Sequence[Episode]) -> list[Episode]:
    """The same questions in shorter rows, since all of them have the same LoRA.

    What the prompts of an episode begin with, such as a description and examples, stands once in a row.
    """
    rows: list[list[Question]] = []
    for episode in episodes:
        n_shared = common_prefix([question.prompt for question in episode.questions])
        n_tokens = 0
        for question in episode.questions:
            n = len(question.prompt) - n_shared + len(question.answer)
            if question is episode.questions[0] or n_tokens + n > _TOKENS_IN_A_ROW:
                rows.append([])
                n_tokens = 0
            rows[-1].append(question)
            n_tokens += n
    return [Episode((), tuple(row), "tasks") for row in rows]


@dataclass(frozen=True)
class WindowDataConfig:
    """Documents and questions of one step."""

    seed: int = 0
    """Seed of the data."""
    documents: tuple[str, ...] = ()
    """Files of documents with questions."""
    document_sources: tuple[str, ...] = ()
    """Of rows with a `source` field, take only these sources."""
    everyday_share: float = 0.0
    """Share of questions about generated everyday documents, with those that a document does not answer."""
    facts_share: float = 0.0
    """Share of questions about generated sheets of facts; the rest are people's questions about real documents."""
    max_document_tokens: int = 512
    """Longest real document."""
    max_facts: int = 20
    """Most facts on one sheet."""
    questions_per_step: int = 32
    """Questions in one step, over all its documents."""
    max_questions: int = 8
    """Most questions about one document in a step."""

    def __post_init__(self) -> None:
        if self.everyday_share + self.facts_share > 1 + 1e-9:
            raise ConfigError("everyday_share and facts_share are more than 1 together")


@dataclass(frozen=True)
class WindowRecipe:
    """One training run, as the tables `[lora]`, `[data]` and `[training]` of a TOML file."""

    data: WindowDataConfig = field(default_factory=WindowDataConfig)
    lora: PeftConfig = field(default_factory=lambda: PeftConfig(("q_proj", "v_proj", "o_proj", "down_proj"), rank=16))
    training: TrainConfig = field(default_factory=lambda: TrainConfig(steps=320, lr=5e-4, warmup_steps=20))


class WindowSource:
    """Draws documents with questions: real ones in proportion to their questions, everyday documents and sheets."""

    def __init__(self, config: WindowDataConfig, base: Base):
        """Raises ConfigError without documents, TrainingError if no document fits."""
        if not config.documents:
            raise ConfigError("a window LoRA needs documents with questions: give a file of them (--documents FILE)")
        self.config, self.chat = config, base.chat
        most = config.max_document_tokens
        self.documents = [
            document
            for document in read_questioned(config.documents, config.document_sources, "train")
            if document.spans and len(encode_text(base.tokenizer, document.text)) <= most
        ]
        if not self.documents:
            raise TrainingError(f"no document of at most {most} tokens has a question whose answer stands in it")
        self._weights = [min(config.max_questions, len(document.spans)) for document in self.documents]

    def episodes(self, number: int) -> list[Episode]:
        """The rows of step `number`."""
        rng = random.Random(f"{self.config.seed}/{number}")
        n_wanted = self.config.questions_per_step
        shares = {self._everyday: self.config.everyday_share, self._sheet: self.config.facts_share}
        rows: list[Episode] = []
        for draw, share in {**shares, self._real: 1 - sum(shares.values())}.items():
            n_asked = 0
            while n_asked < round(share * n_wanted):
                text, asked = draw(rng)
                questions = [
                    Question(tuple(reading_prompt(self.chat, text, question)), tuple(self.chat.answer(answer)))
                    for question, answer in asked[: self.config.max_questions]
                ]
                n_asked += len(questions)
                rows += [Episode((), tuple(questions), "window")] if questions else []
        return rows

    def _real(self, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
        """A real document as it is shown, with people's questions and their answers in its words."""
        (document,) = rng.choices(self.documents, self._weights)
        answered = answered_questions(rng, document, self.config.max_questions)
        return document.full_text, [(question, fact.value) for question, fact in answered]

    def _everyday(self, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
        return _asked(rng, make_document(rng, split="train"))

    def _sheet(self, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
        return _asked(rng, make_sheet(rng, rng.randint(1, self.config.max_facts), split="train"))


def _asked(rng: random.Random, document: EverydayDocument | FactSheet) -> tuple[str, list[tuple[str, str]]]:
    """A generated document as it is shown, under its title if it has one, with its questions and answers."""
    facts: list[Any] = rng.sample(document.facts, len(document.facts))
    shown = f"{document.title}\n\n{document.text}" if document.title else document.text
    return shown, [(fact.question, fact.answer) for fact in facts]


def train_window(base: Base, recipe: WindowRecipe, out: Path, **record: Any) -> bool:
    """Train the window LoRA, or resume. Returns whether it is finished; `record` is as in `train_lora`."""
    source = WindowSource(recipe.data, base)
    about = {"data": recorded(recipe.data), "is_window": True}
    return train_lora(base, recipe, source.episodes, out, about, **record)


def read_window_lora(folder: Path, base: Fingerprint) -> LoRA:
    """Read the LoRA that `train_window` made for a base. Raises AdapterError if there is none, or it is unfinished."""
    lora, settings = read_trained(folder, base, "loracast train window")
    if not settings.get("is_window"):
        raise AdapterError(f"{folder} holds another LoRA; give what `loracast train window` makes")
    return lora
