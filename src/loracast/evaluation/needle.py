"""Needle in a haystack: one sentence with a value, hidden at any depth of a document, asked for in other words.

The rivals of systems.py answer the same questions in the same run, length by length.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loracast.base.chat import encode_with_offsets
from loracast.data.facts import Split
from loracast.data.needles import load_content, make_needles
from loracast.data.rows import read_texts
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.errors import ConfigError
from loracast.evaluation import plots
from loracast.evaluation.haystack import Haystack, Sample
from loracast.evaluation.in_memory import InMemoryAdapter
from loracast.evaluation.report import ANSWER_COLUMNS, Progress, Report, environment, number, write_answers
from loracast.evaluation.run import N_TIMED, Outcome, ask_all, groups, summary, warm_up
from loracast.evaluation.synthetic_baselines import SYSTEMS, Case, Setup, check_systems
from loracast.library.routing import DEFAULT_ROUTE
from loracast.lora.quantize import DEFAULT_STORAGE, Storage
from loracast.model import Model

LONG = 8192
"""Documents of more tokens than this get `samples_long`."""
SLOW_WINDOW = 4096
"""From this many tokens on, the document in the window is asked `samples_window` times only."""
N_DEPTH_BINS = 5
_TOKENS_PER_GROUP = 65_536  # documents that are in memory at once
_GOLDEN = 0.6180339887498949

COLUMNS = (number("length", "tokens"), number("chunks", "chunks", 1), *ANSWER_COLUMNS)


@dataclass(frozen=True)
class NeedleConfig:
    """What `loracast eval needle` measures."""

    texts: tuple[str, ...]
    """Files with the prose of the haystacks; no training may have seen them."""
    lengths: tuple[int, ...] = (256, 1024, 4096, 8192, 32768)
    """Tokens of a document, the needle included."""
    samples: int = 400
    """Documents of each length."""
    samples_long: int = 100
    """Documents of each length past 8,192 tokens."""
    samples_window: int = 50
    """Of them, those that are also put into the window, from 4,096 tokens on."""
    depths: tuple[float, ...] = ()
    """Where needles go, in turn (0 the beginning, 1 the end); none given: uniform over the document."""
    kind: str | None = "number4"
    """Kind of the value (content/needles.toml); None draws one for each needle."""
    route: int = DEFAULT_ROUTE
    """Chunks that a question is given when routed."""
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    """Longest chunk."""
    storage: Storage = DEFAULT_STORAGE
    """How factors are kept."""
    systems: tuple[str, ...] = tuple(SYSTEMS)
    """Rivals to run."""
    split: Split = "test"
    """Whose wordings: `dev` to choose between settings, `test` for the figures that are reported."""
    seed: int = 0
    """Seed of documents, needles and questions."""
    budget_s: float | None = None
    """Stop drawing documents after this many seconds, shared among the lengths; the tables show how many there were."""

    def __post_init__(self) -> None:
        check_systems(self.systems)
        kinds = sorted(load_content()["kinds"])
        problems = [f"a length of {n} tokens is too short for a needle" for n in self.lengths if n < 64]
        problems += [f"a depth of {d} is outside 0..1" for d in self.depths if not 0 <= d <= 1]
        if self.kind is not None and self.kind not in kinds:
            problems.append(f"unknown kind of value {self.kind!r} (one of {', '.join(kinds)})")
        if min(self.samples, self.samples_long, self.samples_window, self.route) < 1 or not self.lengths:
            problems.append("samples, route and lengths must be at least 1")
        if problems:
            raise ConfigError("cannot evaluate needles: " + "; ".join(problems))

    def n_samples(self, length: int) -> int:
        return self.samples_long if length > LONG else self.samples

    def depth(self, i: int) -> float:
        """The depth of the i-th document: in turn, or spread evenly (golden ratio) however many documents there will be."""
        return self.depths[i % len(self.depths)] if self.depths else (0.5 + i * _GOLDEN) % 1


def evaluate_needle(
    model: Model, config: NeedleConfig, out: Path, progress: Progress = lambda done, total: None
) -> Report:
    """Run the evaluation; tables and answers are in `out` after every length, pictures at the end."""
    plots.require_matplotlib()
    setup = Setup(model, config.route)
    haystack = Haystack(read_texts(config.texts), lambda text: encode_with_offsets(model.base.tokenizer, text))
    out.mkdir(parents=True, exist_ok=True)
    (out / "answers.jsonl").unlink(missing_ok=True)
    about = environment(model.base, model.documents.id)
    ends_s = None if config.budget_s is None else time.monotonic() + config.budget_s
    n_before, n_total = 0, sum(config.n_samples(length) for length in config.lengths)
    rows: list[dict[str, Any]] = []
    report = Report("needle", COLUMNS, rows, asdict(config), about, is_complete=False)
    warm_up(setup.model.base)
    for position, length in enumerate(config.lengths):
        share_s = None if ends_s is None else (ends_s - time.monotonic()) / (len(config.lengths) - position)
        outcomes: list[Outcome] = []
        for n_done, some in _ask(setup, config, haystack, length, share_s):
            outcomes += some
            progress(n_before + n_done, n_total)
        n_before += config.n_samples(length)
        progress(n_before, n_total)
        rows += _rows(setup, length, outcomes)
        write_answers(out, outcomes, length=length)
        report.write(out)
    report = Report("needle", COLUMNS, rows, asdict(config), about)
    report.write(out)
    adapters = [name for name in ("routed", "merged") if name in config.systems]
    if adapters:
        plots.heat_map(out / "heatmap.png", rows, adapters)
    plots.by_length(out / "exact-match.png", rows)
    return report


def make_sample(config: NeedleConfig, haystack: Haystack, length: int, i: int) -> Sample:
    """The i-th document of a length. Seed, length and i decide it: a longer run begins with the documents of a shorter one."""
    rng = random.Random(f"{config.seed}/{length}/{i}")
    return haystack.sample(rng, length, make_needles(rng, 1, split=config.split, kind=config.kind), [config.depth(i)])


def _ask(
    setup: Setup, config: NeedleConfig, haystack: Haystack, length: int, budget_s: float | None
) -> Iterator[tuple[int, list[Outcome]]]:
    """Documents done so far and the outcomes of the last few."""
    n = config.n_samples(length)
    n_window = min(n, config.samples_window) if length >= SLOW_WINDOW else n

    def make(i: int) -> tuple[Sample, InMemoryAdapter]:
        sample = make_sample(config, haystack, length, i)
        return sample, InMemoryAdapter(
            setup.model, sample.text, max_chunk_tokens=config.chunk_tokens, storage=config.storage
        )

    size = max(1, min(32, _TOKENS_PER_GROUP // length))
    for first, documents in groups(n, size, make, budget_s):
        cases = []
        for sample, document, other in documents:
            needle, chunk = sample.needles[0], document.chunk_at(sample.answer_places[0])
            cases.append(Case(document, other, needle.question, needle.answer, chunk, sample.depths[0]))
        asked = dict.fromkeys(check_systems(config.systems), cases)
        if "window" in asked:
            asked["window"] = cases[: max(0, n_window - first)]
        yield first + len(cases), ask_all(setup, asked, n_timed=max(0, N_TIMED - first))


def _rows(setup: Setup, length: int, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A table's rows for one length, one a rival, each with its exact match by depth."""
    rows = []
    for name in dict.fromkeys(outcome.system for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.system == name]
        documents = [outcome.case.document for outcome in mine]
        rows.append(
            {
                "length": length,
                **summary(setup, mine),
                "document_tokens": sum(document.n_tokens for document in documents) / len(documents),
                "chunks": sum(len(document.chunks) for document in documents) / len(documents),
                "depths": _by_depth(mine),
            }
        )
    return rows


def _by_depth(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Exact match in each fifth of the documents."""
    hits: list[list[bool]] = [[] for _ in range(N_DEPTH_BINS)]
    for outcome in outcomes:
        hits[min(N_DEPTH_BINS - 1, int((outcome.case.depth or 0.0) * N_DEPTH_BINS))].append(outcome.is_exact)
    return [
        {
            "low": i / N_DEPTH_BINS,
            "high": (i + 1) / N_DEPTH_BINS,
            "n": len(here),
            "exact": sum(here) / len(here) if here else None,
        }
        for i, here in enumerate(hits)
    ]
