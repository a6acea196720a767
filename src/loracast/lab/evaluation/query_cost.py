"""`loracast eval cost`: what a query costs with an adapter and without, and when an adapter has paid for itself.

All baselines write as many tokens as the right answer has, so that none is cheap because it says little.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loracast.base.chat import encode_text
from loracast.base.forward import common_prefix
from loracast.base.generate import Sampling, answers
from loracast.documents.task_spec import Example
from loracast.errors import ConfigError
from loracast.lab.data.rows import read_texts
from loracast.lab.evaluation.cost import QueryFlops, counted
from loracast.lab.evaluation.report import Progress, Report, columns, no_progress
from loracast.lab.evaluation.runner import grouped, in_turn
from loracast.lab.evaluation.tasks import ADAPTER, BASELINES, Drawn, TaskCase, TaskSetup, TasksFrom, draw

DOCUMENT = "document"
LABELS = {
    **{name: BASELINES[name].label for name in ("none", "described", "shots3", "described_shots3", ADAPTER)},
    DOCUMENT: "a document in the window",
}
_MAX_NEW_TOKENS = 128
_ALL = "(mean)"

COLUMNS = columns(
    task="task", label="method", prompt_tokens=("prompt tokens", 1), new_tokens=("new tokens", 1),
    gflops=("GFLOP", 2), flops_ratio=("x adapter", 2), gflops_kept=("GFLOP, beginning kept", 2),
    kept_ratio=("x adapter", 2), first_token_s=("first token s", 4), total_s=("total s", 4),
    cache_kib=("KV cache KiB", 0), joules=("joules", 2), break_even=("adapter pays after, queries", 0),
    break_even_s=("by time", 0),
)  # fmt: skip


@dataclass(frozen=True)
class CostConfig(TasksFrom):
    """Settings of `loracast eval cost`."""

    queries: int = 4
    """Queries of each task, asked of every baseline in turn."""
    texts: tuple[str, ...] = ()
    """Prose for a document in the window; the row is left out if empty."""
    document_tokens: int = 4096
    """Tokens of the document."""
    watts: float = 15.0
    """Power in watts that the machine is assumed to draw while it answers, as a laptop's processor does."""
    seed: int = 0
    """Seed of descriptions, examples and queries."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries < 1 or self.watts <= 0:
            raise ConfigError("queries must be at least 1 and watts above 0")


def evaluate_cost(setup: TaskSetup, config: CostConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Measure tokens, operations and seconds of queries, task by task.

    Raises:
        ConfigError: there is no text-to-LoRA hypernetwork, or no task.
    """
    if setup.caster is None:
        raise ConfigError("the cost of an adapter needs a text-to-LoRA hypernetwork (--hypernetwork)")
    writer = Report(out, "cost of a query", COLUMNS, config, setup.base, setup.caster.caster.id)
    tasks = config.read()
    formula = QueryFlops.of(setup.base.model.config)
    rows: list[dict[str, Any]] = []
    document = _document(setup, config)
    _measure(setup, formula, draw(tasks, 0, config.seed), document, replace(config, queries=1))  # to warm up
    for i in range(len(tasks)):
        rows += _measure(setup, formula, draw(tasks, i, config.seed), document, config)
        progress(i + 1, len(tasks))
    means = [_mean_of(some) for some in grouped(rows, lambda row: row["baseline"]).values()]
    rows += [{**_against(row, next(r for r in means if r["baseline"] == ADAPTER)), **row} for row in means]
    # What making an adapter from its description costs, text encoder included: mean over the tasks.
    writer.environment["making"] = {key: statistics.mean(row[key] for row in rows) for key in ("make_gflops", "make_s")}
    return writer.write(rows)


def _document(setup: TaskSetup, config: CostConfig) -> str | None:
    """So much of the prose as is asked for."""
    if not config.texts:
        return None
    ids: list[int] = []
    for prose in read_texts(config.texts):
        ids += encode_text(setup.base.tokenizer, prose + "\n")
        if len(ids) >= config.document_tokens:
            return setup.base.tokenizer.decode(ids[: config.document_tokens])
    raise ConfigError(f"the texts have {len(ids)} tokens; the document shall have {config.document_tokens}")


def _measure(
    setup: TaskSetup, formula: QueryFlops, drawn: Drawn, document: str | None, config: CostConfig
) -> list[dict[str, Any]]:
    """A row for each baseline on one task."""
    base, caster = setup.base, setup.caster
    assert caster is not None
    make_flops = counted(lambda: caster.loras([drawn.description]))
    started = time.perf_counter()
    lora = caster.loras([drawn.description])[0].to(base.device)
    make_s = time.perf_counter() - started
    queries = min(config.queries, len(drawn.task.test))
    asked = random.Random(f"{config.seed}/{drawn.task.name}").sample(drawn.task.test, queries)
    lengths = [min(_MAX_NEW_TOKENS, len(base.chat.reply(row.outputs[0]))) for row in asked]
    names = [name for name in LABELS if name != DOCUMENT or document is not None]
    prompts = {name: [_prompt(setup, name, drawn, document, row) for row in asked] for name in names}
    # What all queries of a task begin with could be kept in the cache, as servers do.
    n_kept = {name: common_prefix(some) if len(some) > 1 else 0 for name, some in prompts.items()}
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for i, n_new in enumerate(lengths):
        for name in in_turn(names, i):
            prompt, with_lora = prompts[name][i], lora if name == ADAPTER else None
            n, n_bytes = len(prompt), base.model.dtype.itemsize
            sampling = Sampling(max_new_tokens=n_new, min_new_tokens=n_new)
            (done,) = answers(base, [prompt], [with_lora], sampling)
            figures = {"prompt_tokens": n, "new_tokens": n_new, "gflops": formula.query(n, n_new, with_lora) / 1e9}
            figures["gflops_kept"] = formula.query(n, n_new, with_lora, n_kept[name]) / 1e9
            figures |= {"first_token_s": done.first_token_s, "total_s": done.total_s}
            figures["cache_kib"] = formula.cache_bytes(n + n_new - 1, n_bytes) / 1024
            seen[name].append({**figures, "joules": done.total_s * config.watts})
    rows: list[dict[str, Any]] = []
    for name, some in seen.items():
        means = {key: statistics.mean(f[key] for f in some) for key in some[0]}
        medians = {key: statistics.median(f[key] for f in some) for key in ("first_token_s", "total_s", "joules")}
        rows.append({"task": drawn.task.name, "baseline": name, "label": LABELS[name], **means, **medians})
    adapter = next(row for row in rows if row["baseline"] == ADAPTER)
    for row in rows:
        row["make_gflops"], row["make_s"] = make_flops / 1e9, make_s
        row |= _against(row, adapter)
    return rows


def _prompt(setup: TaskSetup, name: str, drawn: Drawn, document: str | None, row: Example) -> tuple[int, ...]:
    if name == DOCUMENT:  # it stands where a description would
        drawn, name = replace(drawn, description=document or ""), "described"
    return tuple(BASELINES[name].request(setup, TaskCase(drawn, row)).prepared.prompt)


def _against(row: dict[str, Any], adapter: dict[str, Any]) -> dict[str, float | None]:
    """How many times an adapter's operations a row needs, and after how many queries the adapter is cheaper.

    A document in the window has no such count: an adapter made from the document would replace it, not one of a task.
    """
    is_comparable = row["baseline"] != DOCUMENT
    return {
        "flops_ratio": row["gflops"] / adapter["gflops"],
        "kept_ratio": row["gflops_kept"] / adapter["gflops_kept"],
        "break_even": _queries(row["make_gflops"], row["gflops"] - adapter["gflops"]) if is_comparable else None,
        "break_even_s": _queries(row["make_s"], row["total_s"] - adapter["total_s"]) if is_comparable else None,
    }


def _queries(making: float, saving: float) -> int | None:
    """None where nothing is saved."""
    return math.ceil(making / saving) if saving > 0 else None


def _mean_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All tasks count the same."""
    no_means = ("task", "baseline", "label", "break_even", "break_even_s")
    means = {key: statistics.mean(row[key] for row in rows) for key in rows[0] if key not in no_means}
    return {"task": _ALL, "baseline": rows[0]["baseline"], "label": rows[0]["label"], **means}
