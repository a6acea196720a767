"""What a run of load.py showed: the figures, what broke that must hold, and a table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from loracast.lab.evaluation.report import markdown

MAX_GROWTH = 1.05
"""Resident size at the end of the server's last life, at most, over that after its first minutes."""
WARM_UP_S = 300.0
"""The first minutes of a life, in seconds, or a fifth of it where it is shorter."""
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Size:
    """A process' resident size at one moment."""

    s: float
    mib: float
    anonymous_mib: float
    """Of those, MiB that belong to no file: what the process allocated. The rest are libraries and mapped files."""


@dataclass
class Record:
    """One request."""

    kind: str
    started_s: float
    """Since the run began."""
    status: int | None = None
    first_s: float | None = None
    """To the first token of a streamed answer."""
    total_s: float = 0.0
    error: str | None = None
    """What failed in the connection, or in the stream after a status of 200."""
    is_excused: bool = False
    """The server was killed meanwhile."""
    is_expected: bool = True
    """False for a 404 of an adapter that was there."""


@dataclass(frozen=True)
class Answer:
    """An answer to the question for an adapter's number."""

    name: str
    versions: list[str]
    """Those of this name, oldest first; later ones are added when they are learned."""
    least: int
    """The oldest version that may answer: the last one whose learning was completed before the question was sent."""
    is_gone: bool
    """The adapter had been deleted before the question was sent, and was not learned again meanwhile."""
    content: Mapping[str, Any]
    """The text, and the server's account of what answered."""


@dataclass
class Run:
    """What happened in a run."""

    seconds: float
    seconds_taken: float = 0.0
    records: list[Record] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    numbers: dict[str, str] = field(default_factory=dict)
    """The number that each version holds."""
    sizes: list[Size] = field(default_factory=list)
    """Of the server."""
    downs: list[tuple[float, float]] = field(default_factory=list)
    """From when to when the server could not be reached, since it had been killed."""
    n_held: int = 0
    """How often another process held a database of the server's."""
    engine: dict[str, float] = field(default_factory=dict)
    n_jobs: int = 0
    broken: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Lines of the server's log that tell an error."""

    def was_down(self, since_s: float) -> bool:
        """Whether the server could not be reached at some time since then."""
        return any(until_s >= since_s for _, until_s in self.downs)

    @property
    def lives(self) -> list[dict[str, Any]]:
        """Begin and end of the server's lives, and what they grew; but those so short that no size is known."""
        begins = [0.0, *(until_s for _, until_s in self.downs)]
        ends = [*(since_s for since_s, _ in self.downs), self.seconds_taken]
        found = []
        for begin_s, end_s in zip(begins, ends, strict=True):
            sizes = [size for size in self.sizes if begin_s <= size.s <= end_s + 1]
            early_s = begin_s + min(WARM_UP_S, (end_s - begin_s) / 5)
            if sizes:
                early, last = min(sizes, key=lambda size: abs(size.s - early_s)).mib, sizes[-1].mib
                found.append({"s": [round(begin_s, 1), round(end_s, 1)], "early_mib": early, "last_mib": last})
                found[-1]["growth"] = round(last / early, 4)
        return found

    def read_log(self, log: str) -> None:
        """Look for errors, and for text of documents, which no log may hold."""
        self.failures = [line for line in log.splitlines() if re.search(r"error|Traceback", line, re.IGNORECASE)]
        if leaked := {*re.findall(r"(?<![\d.:])\d{4}(?![\d.])", log)} & {*self.numbers.values()}:
            self.broken.append(f"the server's log has numbers of documents: {sorted(leaked)}")


def grade(run: Run) -> Counter[str]:
    """How many answers hold the right number, another adapter's, or neither; what must not be goes to `run.broken`."""
    grades: Counter[str] = Counter(dict.fromkeys(("right", "of another adapter", "other", "adapter not used"), 0))
    held = {*run.numbers.values()}
    for answer in run.answers:
        used = answer.content["adapters"]
        names = [one["id"].partition("@")[0] for one in used]
        if names != [answer.name]:
            run.broken.append(f"{names} answered for {answer.name}")
            grades["of another adapter"] += 1
            continue
        shown = used[0]["id"].partition("@")[2]  # the first digits of the hash
        version = next((one for one in run.numbers if one.startswith(shown)), "")
        if answer.is_gone:
            run.broken.append(f"{answer.name} answered after its deletion")
        if version not in answer.versions[answer.least :]:
            run.broken.append(f"{answer.name}: a version that had been replaced answered")
        found = {*re.findall(r"\d+", answer.content["text"])}
        right = run.numbers.get(version)
        if right in found:
            grades["right"] += 1
        elif found & held:
            grades["of another adapter"] += 1
            run.broken.append(f"{answer.name} has {right}, and said {sorted(found & held)}")
        else:
            grades["other" if used[0]["is_used"] else "adapter not used"] += 1
    return grades


def summary(run: Run) -> dict[str, Any]:
    """All figures, as JSON takes them; `broken` lists what must hold and did not."""
    grades = grade(run)
    statuses = Counter(str(record.status) for record in run.records)
    errors = Counter(f"{one.kind}: {one.error}" for one in run.records if one.error and not one.is_excused)
    broken = list(run.broken)
    if n := sum(1 for record in run.records if (record.status or 0) >= 500):
        broken.append(f"{n} answers with a status of 5xx")
    if errors:
        broken.append(f"connections failed: {dict(errors)}")
    if n := sum(not record.is_expected for record in run.records):
        broken.append(f"{n} times an adapter that was there was not found")
    lives = run.lives
    growth = lives[-1]["growth"]
    if growth > MAX_GROWTH:
        broken.append(f"the server's resident size grew to {growth:.3f} times that after its first minutes")
    kinds = sorted({record.kind for record in run.records})
    n_generated = run.engine.get("generated_tokens_total", 0.0)  # of the server's last life, as its other counts
    last_life_s = run.seconds_taken - (run.downs[-1][1] if run.downs else 0.0)
    return {
        "seconds": round(run.seconds_taken, 1),
        "n_requests": len(run.records),
        "n_jobs": run.n_jobs,
        "statuses": dict(sorted(statuses.items())),
        "kinds": {kind: _figures([one for one in run.records if one.kind == kind]) for kind in kinds},
        "answers": dict(grades),
        "tokens_per_second": round(n_generated / last_life_s, 1),
        "engine": run.engine,
        "resident": [{**asdict(size), "s": round(size.s, 1)} for size in run.sizes],
        "growth": growth,
        "lives": lives,
        "n_kills": len(run.downs),
        "n_held": run.n_held,
        "n_cut_off": sum(one.is_excused for one in run.records),
        "errors": dict(errors),
        "log": run.failures[:20],
        "broken": sorted(Counter(broken).items()),
    }


def _figures(records: Sequence[Record]) -> dict[str, Any]:
    done = [one for one in records if one.status is not None and one.status < 300 and not one.error]
    return {
        "n": len(records),
        "statuses": dict(sorted(Counter(str(one.status) for one in records).items())),
        "first_token_ms": _percentiles([one.first_s for one in done if one.first_s is not None]),
        "total_ms": _percentiles([one.total_s for one in done]),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if len(seconds) < 2:
        return None
    found = 1000 * np.percentile(seconds, PERCENTILES)
    return {f"p{percent}": round(float(ms), 1) for percent, ms in zip(PERCENTILES, found, strict=True)}


def table(figures: Mapping[str, Any]) -> str:
    """The figures as Markdown and as lines."""

    def shown(of: Mapping[str, float] | None) -> str:
        return "" if of is None else " / ".join(f"{value:.0f}" for value in of.values())

    lines = [["request", "n", "status", "first token, ms: p50 / p95 / p99", "all, ms: p50 / p95 / p99"]]
    for kind, of in figures["kinds"].items():
        statuses = ", ".join(f"{n} x {status}" for status, n in of["statuses"].items())
        lines.append([kind, str(of["n"]), statuses, shown(of["first_token_ms"]), shown(of["total_ms"])])
    first, last = figures["resident"][0], figures["resident"][-1]
    told = [key for key in figures if key not in ("options", "kinds", "resident", "log", "broken")]
    return "\n".join([
        markdown(lines), "",
        *(f"{key}: {figures[key]}" for key in told),
        f"resident size, MiB (of which anonymous): {first['mib']} ({first['anonymous_mib']}) at the start, "
        f"{last['mib']} ({last['anonymous_mib']}) at the end",
        *(f"log: {line}" for line in figures["log"]),
        *(f"BROKEN ({n} times): {what}" for what, n in figures["broken"]),
    ])  # fmt: skip
