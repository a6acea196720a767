"""Read tasks: named sets of examples with natural-language descriptions. Adding a task takes a file and no code.

These forms are read (docs/tasks.md), from a path or from a data set on the hub:

- a folder with a JSON file for each task, `{"descriptions": [...], "examples": [{"input": ..., "output": ...}]}`, or in
  the format of Super-NaturalInstructions (`Definition`, `Instances`);
- a JSONL file of examples (`task`, `input`, `output`, optionally `alts`, `split`, `task_split`) with
  `task_descriptions.jsonl` and, optionally, `tasks_meta.jsonl` beside it; each may be gzipped;
- JSONL files of examples with a description in each row (`task_name`, `definition`, `inputs`, `targets`), the format of
  Super-NaturalInstructions on the hub.

Read benchmarks as held-out tasks: files of questions with choices, or with a number as the answer.

A row is `{"question": ..., "choices": [...], "answer": index}`, or has a `rationale` and a number as the `answer`. The
examples for the prompts of `NAME_test.jsonl.gz` come from `NAME_train.jsonl.gz` beside it, or else are its first rows.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from loracast.documents.task_spec import Example, texts_in
from loracast.errors import ConfigError
from loracast.lab.data.rows import read_content, read_rows

DescriptionKind = Literal["train", "paraphrase", "heldout"]
"""Training uses `train` and `paraphrase` descriptions, never `heldout` ones."""
Metric = Literal["exact", "number"]
"""An answer must equal an output (but for case, quotes and final punctuation), or have the same last number."""
_KEYS = {"name", "descriptions", "examples", "labels", "group", "heldout", "metric"}  # of a task's own file


@dataclass(frozen=True)
class Task:
    """A task with its descriptions and examples."""

    name: str
    descriptions: dict[DescriptionKind, tuple[str, ...]]
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    labels: tuple[str, ...] = ()  # all possible outputs, if they are few enough to score each by likelihood
    group: str = ""  # closely related tasks share a group; held-out tasks share none with training tasks
    is_heldout: bool = False  # whether training never sees it
    is_near: bool = False  # whether a held-out task has a related kind of task in training
    metric: Metric = "exact"  # how answers are scored

    def seen_descriptions(self) -> tuple[str, ...]:
        """The descriptions that training may use."""
        return self.descriptions.get("train", ()) + self.descriptions.get("paraphrase", ())


def read_tasks(source: str | Path) -> tuple[Task, ...]:
    """Read all tasks of a folder, a JSONL file of examples, or a data set on the hub ("owner/name"), sorted by name.

    Raises ConfigError if there is nothing to read, or files or rows lack something that a task needs.
    """
    path = Path(source)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        path = _from_hub(str(source))
    files = [path] if path.is_file() else sorted(path.glob("*.json")) or sorted(path.glob("tasks.jsonl*"))
    files = files or sorted([*path.rglob("*.jsonl"), *path.rglob("*.jsonl.gz")])
    if not files:
        raise ConfigError(f"no tasks at {path}: give a folder of JSON files, one a task, or a JSONL file of examples")
    tasks = [_from_file(file) for file in files] if files[0].suffix == ".json" else _from_rows(files)
    problems = [f"{task.name}: no description" for task in tasks if not any(task.descriptions.values())]
    problems += [f"{task.name}: no example" for task in tasks if not task.train + task.test]
    names = Counter(task.name for task in tasks)
    problems += [f"{name}: there are two tasks of that name" for name in sorted(names) if names[name] > 1]
    if problems:
        raise ConfigError(f"bad tasks in {path}: " + "; ".join(problems))
    return tuple(sorted(tasks, key=lambda task: task.name))


def _from_file(path: Path) -> Task:
    """Read the file of one task."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if "Instances" in stored:  # Super-NaturalInstructions
            stored = {
                "descriptions": stored["Definition"],
                "examples": [{"input": row["input"], "output": row["output"]} for row in stored["Instances"]],
                "group": (stored.get("Categories") or [""])[0],
            }
        if unknown := sorted(stored.keys() - _KEYS):
            raise ValueError(f"unknown keys {', '.join(unknown)}")
        descriptions = stored["descriptions"]
        by_kind = descriptions if isinstance(descriptions, dict) else {"train": descriptions}
        train, test = _split([(row.get("split"), example_from(row)) for row in stored["examples"]])
        described = {_one_of(kind, DescriptionKind): texts_in(texts) for kind, texts in by_kind.items()}
        return Task(
            stored.get("name", path.stem), described, train, test, labels=tuple(stored.get("labels", ())),
            group=stored.get("group", ""), is_heldout=bool(stored.get("heldout", False)),
            metric=_one_of(stored.get("metric", "exact"), Metric),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = f"it needs {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{path} is not a task file: {said}") from error


def _from_hub(name: str) -> Path:
    """Download the files of a data set on the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=["*.json", "*.jsonl", "*.jsonl.gz"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"no tasks at {name!r}: give a folder of JSON files, one a task, a JSONL file of examples, or a data set "
            f"on the hub that this machine can reach ({str(error).splitlines()[0]})"
        ) from error


def _from_rows(paths: Sequence[Path]) -> list[Task]:
    """Read examples of many tasks; descriptions and metadata are in the rows or in files beside the first one."""
    examples: dict[str, list[tuple[str | None, Example]]] = {}
    heldout: set[str] = set()
    descriptions: dict[str, dict[Any, list[str]]] = {}
    about: dict[str, dict[str, Any]] = defaultdict(dict)

    def take_example(row: dict[str, Any]) -> None:
        if "definition" in row:  # Super-NaturalInstructions on the hub
            known = descriptions.setdefault(row["task_name"], {}).setdefault("train", [])
            known += [text for text in texts_in([row["definition"]]) if text not in known]
            row = {"task": row["task_name"], "input": row["inputs"], "output": row["targets"]}
        examples.setdefault(row["task"], []).append((row.get("split"), example_from(row)))
        if _one_of(row.get("task_split", "train"), Literal["train", "heldout"]) == "heldout":
            heldout.add(row["task"])

    def take_description(row: dict[str, Any]) -> None:
        kind = _one_of(row.get("kind", "train"), DescriptionKind)
        descriptions.setdefault(row["task"], {}).setdefault(kind, []).extend(texts_in([row["description"]]))

    def take_about(row: dict[str, Any]) -> None:
        _one_of(row.get("metric", "exact"), Metric)
        about[row["task"]] = row

    for path in paths:
        read_rows(path, take_example)
    if not descriptions:
        if (beside := _beside(paths[0], "task_descriptions")) is None:
            raise ConfigError(
                f"{paths[0]} needs the descriptions of its tasks beside it, in task_descriptions.jsonl or "
                "task_descriptions.jsonl.gz"
            )
        read_rows(beside, take_description)
    if (meta := _beside(paths[0], "tasks_meta")) is not None:
        read_rows(meta, take_about)
    if unknown := sorted((descriptions.keys() | about.keys()) - examples.keys()):
        raise ConfigError(f"{paths[0]} has no examples of tasks that are described beside it: {', '.join(unknown)}")
    return [
        Task(
            name, {kind: tuple(texts) for kind, texts in descriptions.get(name, {}).items()}, *_split(rows),
            labels=tuple(about[name].get("labels") or ()), group=about[name].get("group", ""),
            is_heldout=name in heldout, is_near=about[name].get("heldout_kind") == "near",
            metric=about[name].get("metric", "exact"),
        )
        for name, rows in examples.items()
    ]  # fmt: skip


def _split(rows: Sequence[tuple[str | None, Example]]) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """The training and test examples; if none names its split, every fifth is a test example."""
    if all(split is None for split, _ in rows):
        rows = [("test" if i % 5 == 4 else "train", example) for i, (_, example) in enumerate(rows)]
    parts: dict[str, list[Example]] = {"train": [], "test": []}
    for i, (split, example) in enumerate(rows, 1):
        if split is None:
            raise ValueError(f'example {i} has no "split": give train or test to every example, or to none')
        parts[_one_of(split, Literal["train", "test"])].append(example)
    return tuple(parts["train"]), tuple(parts["test"])


def _one_of(value: Any, choices: Any) -> Any:
    if value not in get_args(choices):
        raise ValueError(f"{value!r} is none of {', '.join(get_args(choices))}")
    return value


def _beside(path: Path, stem: str) -> Path | None:
    """The JSONL file of that name in the same folder, gzipped or not."""
    return next((p for ending in ("", ".gz") if (p := path.parent / f"{stem}.jsonl{ending}").is_file()), None)


_N_SHOWN = 100
"""Rows that serve as examples and are never asked, in a file without one for training."""


def check_one_source(tasks: str | Path | None, benchmarks: Sequence[str | Path]) -> None:
    """Raises ConfigError unless there are either tasks or benchmarks."""
    if (tasks is None) == (not benchmarks):
        raise ConfigError("give either tasks (--tasks) or benchmarks (--benchmark)")


def tasks_or_benchmarks(tasks: str | Path | None, benchmarks: Sequence[str | Path]) -> tuple[Task, ...]:
    """Read tasks of a folder or file, or benchmarks' files as tasks. Raises ConfigError unless exactly one is given."""
    check_one_source(tasks, benchmarks)
    return read_tasks(tasks) if tasks is not None else tuple(read_benchmark(Path(file)) for file in benchmarks)


def read_benchmark(path: Path, *, lists_choices: bool = True) -> Task:
    """Read a benchmark's file as a held-out task.

    Args:
        lists_choices: the input of a question with choices lists them; without the list it is the question alone.

    Raises:
        ConfigError: the file cannot be read, or the benchmark has no description (`content/benchmarks.toml`).
    """
    stem = re.sub(r"\.jsonl(\.gz)?$", "", path.name)
    name = re.sub(r"^bench_|_(test|train|sample)$", "", stem)
    known = read_content("benchmarks")
    if (about := known.get(name)) is None:
        raise ConfigError(
            f"nothing is known of a benchmark {name!r}; write it as a task file (docs/tasks.md). "
            f"Known: {', '.join(sorted(known))}"
        )
    asked = _examples(path, lists_choices)
    beside = path.with_name(path.name.replace("_test.", "_train."))
    if beside != path and beside.is_file():
        shown = _examples(beside, lists_choices)
    else:
        shown, asked = asked[:_N_SHOWN], asked[_N_SHOWN:]
    if not asked:
        raise ConfigError(
            f"{path} has no more than {_N_SHOWN} rows, which are its examples: put those into {beside.name}"
        )
    described: dict[DescriptionKind, tuple[str, ...]] = {"heldout": tuple(about["descriptions"])}
    metric = about.get("metric", "exact")
    return Task(name, described, tuple(shown), tuple(asked), group=about["group"], is_heldout=True, metric=metric)


def _examples(path: Path, lists_choices: bool) -> list[Example]:
    def read(row: dict[str, Any]) -> Example:
        if "choices" not in row:
            return Example(row["question"], (f"{row['rationale']}\n{row['answer']}",))
        choices = tuple(row["choices"])
        listed = "".join(f"\n- {choice}" for choice in choices) if lists_choices else ""
        return Example(row["question"] + listed, (choices[row["answer"]],), choices)

    return read_rows(path, read)


def example_from(row: Mapping[str, Any]) -> Example:
    """An example from a row: `input`, `output`, perhaps `alts` and `choices`. Raises ValueError or KeyError."""
    outputs = (*texts_in(row["output"]), *texts_in(row.get("alts", ())))
    if not outputs or not isinstance(row["input"], str):
        raise ValueError("an example needs an input and an output, both of them text")
    choices = texts_in(row.get("choices", ()))
    if choices and outputs[0] not in choices:
        raise ValueError(f"the output {outputs[0]!r} is not among the choices")
    return Example(row["input"], outputs, choices)
