"""`loracast eval harness`: tasks of EleutherAI's lm-evaluation-harness on the base, without and with adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loracast.answering.model import Model
from loracast.errors import ConfigError, LoracastError
from loracast.lab.evaluation.report import Report, columns
from loracast.library.adapter import Adapter
from loracast.lora.algebra import LoRA, inject

_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
COLUMNS = columns(
    task="task", metric="metric", n=("n", 0), base=("base", 4), base_stderr=("±", 4),
    adapter=("with the adapters", 4), adapter_stderr=("±", 4),
)  # fmt: skip


@dataclass(frozen=True)
class HarnessConfig:
    """Settings of `loracast eval harness`."""

    tasks: tuple[str, ...]
    """Names of the harness's tasks, or of those in `include`."""
    adapters: tuple[str, ...] = ()
    """Adapters of the library, all chunks of each merged; if empty, the base alone is measured."""
    include: str | None = None
    """Folder with your own task files (YAML)."""
    shots: int | None = None
    """Examples in the prompt; as many as the task says if None."""
    limit: int | None = None
    """Most rows of a task."""
    chat: bool = True
    """Put questions as turns of a chat, as adapters are trained."""
    batch_size: int = 8
    """Rows of one forward pass."""
    seed: int = 0
    """Seed of what the harness draws."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("name at least one task")


def evaluate_harness(model: Model, config: HarnessConfig, out: Path) -> Report:
    """Run the harness on the base, and on the base with adapters.

    Raises:
        LoracastError: the harness is not installed, or knows no such task.
        AdapterError: there is no such adapter, or it is for another base.
    """
    if find_spec("lm_eval") is None:
        raise LoracastError("this needs the lm-evaluation-harness: pip install 'loracast[harness]'")
    opened: Sequence[Adapter | str] = [model.adapter(name) for name in config.adapters]
    lora, _ = model.lora_for("", opened, None, always=True)
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=config.include)
    if unknown := sorted(set(config.tasks) - set(manager.all_tasks)):
        raise LoracastError(f"the harness knows no task {', '.join(unknown)}; --include takes a folder of task files")
    found = {"base": _run(model, config, manager, None)}
    if lora is not None:
        found["adapter"] = _run(model, config, manager, lora)
    rows = []
    for (task, metric), (value, stderr, n) in found["base"].items():
        row: dict[str, Any] = {"task": task, "metric": metric, "n": n, "base": value, "base_stderr": stderr}
        if "adapter" in found:
            row["adapter"], row["adapter_stderr"], _ = found["adapter"][task, metric]
        rows.append(row)
    return Report(out, "lm-evaluation-harness", COLUMNS, config, model.base).write(rows)


Figures = dict[tuple[str, str], tuple[float, float | None, int]]
"""(task, metric) -> value, its standard error, rows"""


def _run(model: Model, config: HarnessConfig, manager: Any, lora: LoRA | None) -> Figures:
    """Run the harness once on transformers' own model, with the LoRA injected."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model.base.model, tokenizer=model.base.tokenizer, batch_size=config.batch_size)
    with inject(model.base.model, lora):
        results = simple_evaluate(
            model=wrapped,
            tasks=list(config.tasks),
            task_manager=manager,
            num_fewshot=config.shots,
            limit=config.limit,
            apply_chat_template=config.chat,
            **dict.fromkeys(_SEEDS, config.seed),
            bootstrap_iters=1000,
            log_samples=False,
        )
    figures: Figures = {}
    for task, values in results["results"].items():
        n = results["n-samples"].get(task, {}).get("effective", values.get("sample_len", 0))  # groups have the latter
        for key, value in values.items():
            name, comma, kind = key.partition(",")  # "acc,none", "acc_stderr,none"
            if comma and not name.endswith("_stderr") and isinstance(value, int | float):
                error = values.get(f"{name}_stderr,{kind}")
                metric = name if kind == "none" else f"{name} ({kind})"
                figures[task, metric] = (float(value), error if isinstance(error, int | float) else None, n)
    return figures
