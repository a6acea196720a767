"""`loracast eval needle`: one sentence with a value, hidden at any depth of a document, asked for in other words."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracast.base.chat import encode_with_offsets
from loracast.data.haystack import Haystack, Sample
from loracast.data.needles import make_needles
from loracast.data.rows import read_content, read_texts
from loracast.errors import ConfigError
from loracast.evaluation import plots
from loracast.evaluation.baseline import check_positive
from loracast.evaluation.documents import DocumentCase
from loracast.evaluation.in_memory import InMemoryAdapter
from loracast.evaluation.intervals import mean_if_any
from loracast.evaluation.report import Progress, Report, ReportWriter, columns, no_progress
from loracast.evaluation.runner import Answered, grouped
from loracast.evaluation.synthetic import ANSWER_COLUMNS, Series, SyntheticConfig, answers_exactly, evaluate_sizes
from loracast.model import Model

LONG = 8192
"""From more tokens than this on there are `samples_long` documents."""
SLOW_WINDOW = 4096
"""From this many tokens on, the document in the window is asked `samples_window` times only."""
N_DEPTH_BINS = 5
_TOKENS_PER_GROUP = 65_536  # documents that are in memory at once
_GOLDEN = 0.6180339887498949

COLUMNS = (*columns(length=("tokens", 0), chunks=("chunks", 1)), *ANSWER_COLUMNS)


@dataclass(frozen=True)
class NeedleConfig(SyntheticConfig):
    """What `loracast eval needle` measures."""

    texts: tuple[str, ...]
    """Files with the prose of the haystacks, which no training may have seen."""
    lengths: tuple[int, ...] = (256, 1024, 4096, 8192, 32768)
    """Tokens of a document, the needle included."""
    samples: int = 400
    """Documents of each length."""
    samples_long: int = 100
    """Documents of each length past 8,192 tokens."""
    samples_window: int = 50
    """Documents of each length from 4,096 tokens on that are also put into the window."""
    depths: tuple[float, ...] = ()
    """Where needles go, in turn (0 is the beginning, 1 the end); uniform over the document if empty."""
    kind: str = "number4"
    """Kind of the value (number4, word, person ... in content/needles.toml); any draws one for each needle."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "samples", "samples_long", "samples_window", "lengths")
        kinds = sorted(read_content("needles")["kinds"])
        problems = [f"a length of {n} tokens is too short for a needle" for n in self.lengths if n < 64]
        problems += [f"a depth of {d} is outside 0..1" for d in self.depths if not 0 <= d <= 1]
        if self.kind not in ("any", *kinds):
            problems.append(f"unknown kind of value {self.kind!r} (one of {', '.join(kinds)})")
        if problems:
            raise ConfigError("cannot evaluate needles: " + "; ".join(problems))

    def n_samples(self, length: int) -> int:
        return self.samples_long if length > LONG else self.samples

    def depth(self, i: int) -> float:
        """The depth of the i-th document: the given ones in turn, or spread evenly by the golden ratio."""
        return self.depths[i % len(self.depths)] if self.depths else (0.5 + i * _GOLDEN) % 1


def evaluate_needle(model: Model, config: NeedleConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Run the evaluation; tables and answers are in `out` after every length, pictures at the end."""
    plots.require_matplotlib()
    haystack = Haystack(read_texts(config.texts), lambda text: encode_with_offsets(model.base.tokenizer, text))
    writer = ReportWriter(out, "needle", COLUMNS, config, model.base, model.documents.id)
    series = [_series(model, config, haystack, length) for length in config.lengths]
    report = evaluate_sizes(model, config, writer, "length", series, _by_depth, progress)
    if adapters := [name for name in ("routed", "merged") if name in config.baselines]:
        plots.heat_map(out / "heatmap.png", report.rows, adapters)
    plots.by_length(out / "exact-match.png", report.rows)
    return report


def make_sample(config: NeedleConfig, haystack: Haystack, length: int, i: int) -> Sample:
    """The i-th document of a length, by seed, length and i alone: a longer run begins with those of a shorter one."""
    rng = random.Random(f"{config.seed}/{length}/{i}")
    kind = None if config.kind == "any" else config.kind
    return haystack.sample(rng, length, make_needles(rng, 1, split=config.split, kind=kind), [config.depth(i)])


def _series(model: Model, config: NeedleConfig, haystack: Haystack, length: int) -> Series[Sample]:
    """The documents of one length, each with a question about its needle."""

    def make(i: int) -> tuple[Sample, InMemoryAdapter]:
        sample = make_sample(config, haystack, length, i)
        return sample, config.adapter(model, sample.text)

    def cases(sample: Sample, document: InMemoryAdapter, other: InMemoryAdapter) -> list[DocumentCase]:
        needle = sample.needles[0]
        chunk = document.chunk_of(needle.statement, needle.statement.index(needle.answer))
        return [DocumentCase(document, other, needle.question, (needle.answer,), chunk, sample.depths[0])]

    n_window = config.samples_window if length >= SLOW_WINDOW else None
    size = max(1, min(32, _TOKENS_PER_GROUP // length))
    return Series(length, config.n_samples(length), size, make, cases, n_window)


def _by_depth(answered: Sequence[Answered[DocumentCase]]) -> dict[str, Any]:
    """Exact match in each fifth of the documents."""
    by_bin = grouped(answered, lambda a: min(N_DEPTH_BINS - 1, int((a.case.depth or 0.0) * N_DEPTH_BINS)))
    depths = []
    for i in range(N_DEPTH_BINS):
        hits = [answers_exactly(a) for a in by_bin.get(i, [])]
        share = mean_if_any(hits)
        depths.append({"low": i / N_DEPTH_BINS, "high": (i + 1) / N_DEPTH_BINS, "n": len(hits), "exact": share})
    return {"depths": depths}
