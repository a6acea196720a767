"""Measure what ships, and write docs/results.md and the table of README.md from the figures.

    python benchmarks/results.py list                             what is measured, what is missing, how long it takes
    python benchmarks/results.py run --data DATA [--runs RUNS]    measure what is missing or stale
    python benchmarks/results.py page                             write the page and the table anew

benchmarks/results.toml says what is measured: each measurement is a `loracast eval` command, or a script of here,
run as it stands there. Its figures are kept in docs/results/ID.json with date, machine, version and the fingerprint of
what the code did then (fingerprint.py). Figures of another fingerprint, or of another command, are not shown but
measured again. DATA is the folder of the data sets, RUNS that of LoRAs that baselines need (docs/results.md says where
both come from).
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import fingerprint
import picture
from pydantic import TypeAdapter

from loracast.lab.evaluation.report import markdown

ROOT = Path(__file__).parents[1]
PLAN = ROOT / "benchmarks" / "results.toml"
FIGURES = ROOT / "docs" / "results"
ANSWERS = ROOT / "build" / "answers"
"""Every answer of what was measured last, for comparisons that no table has."""
PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
TASKS_PICTURE = ROOT / "docs" / "images" / "tasks.png"
BEGIN, END = "<!-- results: written by benchmarks/results.py -->", "<!-- end of results -->"
MISSING = "not measured yet"
UNMEASURED = "not measured with this code and these weights yet"


@dataclass(frozen=True)
class Measurement:
    """One command and what is shown of it."""

    id: str
    says: str
    """What is measured, in plain words."""
    command: str
    """As a user types it, with DATA and RUNS for folders, without --out."""
    depends: str
    """What decides the figures: the hypernetwork of a `document` or `task`, the `gate`, or none."""
    minutes: float
    """About how long it takes on one core."""
    label: str = "{label}"
    """The first cell of a row of the table, from the keys of a row of results.json."""
    rows: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """By key, the values of rows that are shown; all rows if empty."""
    note: str = ""
    """What a reader must know besides, such as a choice that was made on these data."""


@dataclass(frozen=True)
class Column:
    """One figure of the rows, as a column of a table."""

    header: str
    form: str | int
    """`%`, `change` (points with a sign), `ms`, or the digits behind the point."""
    low: str = ""
    """Key of the interval's lower end; the upper one has `high` in its place."""
    key: str = ""
    """Key of the figure; the column's name if empty."""

    @property
    def keys(self) -> list[str]:
        """The figure, and the ends of its interval."""
        return [self.key, *([self.low, self.low.removesuffix("low") + "high"] if self.low else [])]


@dataclass(frozen=True)
class Section:
    """A heading of the page with a text, and a table of all rows of its measurements."""

    title: str
    text: str
    first: str
    """Header of the first column."""
    columns: Sequence[str]
    """Names of the further columns."""
    measurements: tuple[Measurement, ...] = ()
    cells: Sequence[Mapping[str, Any]] = ()
    """In place of measurements, rows of a table that says again what others say: what each says, and its cells."""


@dataclass(frozen=True)
class Plan:
    """All that benchmarks/results.toml says."""

    sections: tuple[Section, ...]
    columns: Mapping[str, Column]
    readme: Mapping[str, Any]
    intro: str
    ending: str

    @property
    def measurements(self) -> list[Measurement]:
        return [one for section in self.sections for one in section.measurements]


def read_plan(path: Path = PLAN) -> Plan:
    """Read what is to be measured."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    columns = {name: {"key": name, **one} for name, one in content["columns"].items()}
    plans = TypeAdapter(list[Plan], config={"extra": "forbid"})
    (plan,) = plans.validate_python([{**content, "columns": columns}])
    ids = [one.id for one in plan.measurements]
    assert len(ids) == len(set(ids)), "two measurements have the same id"
    return plan


def figures_of(one: Measurement, folder: Path = FIGURES) -> dict[str, Any] | None:
    """The kept figures of a measurement, None where there are none of today's behaviour and this command."""
    path = folder / f"{one.id}.json"
    if not path.exists():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    is_current = kept["fingerprint"] == fingerprint.kept()[one.depends] and kept["command"] == one.command
    return kept if is_current else None


# ---- measuring ----

Runner = Callable[[Sequence[str]], None]


def run_command(arguments: Sequence[str]) -> None:
    """Run `loracast`, or a script, with these arguments in a process of its own. Raises CalledProcessError."""
    what = [] if arguments[0].endswith(".py") else ["-m", "loracast"]
    subprocess.run([sys.executable, "-W", "ignore", *what, *arguments], check=True, cwd=ROOT)


def measure(
    one: Measurement, keys: Sequence[str], folders: Mapping[str, Path], folder: Path, run: Runner = run_command
) -> dict[str, Any]:
    """Run a measurement and keep its figures.

    Args:
        keys: the figures to keep.
        folders: what DATA and RUNS stand for.
        folder: where the figures are kept.
    """
    arguments = shlex.split(one.command)[1:]
    for name, path in folders.items():
        arguments = [re.sub(rf"\b{name}\b", str(path), argument) for argument in arguments]
    with tempfile.TemporaryDirectory(prefix="loracast-results-") as scratch:
        started = time.monotonic()
        run([*arguments, "--out", scratch])
        minutes = (time.monotonic() - started) / 60
        report = json.loads((Path(scratch) / "results.json").read_text(encoding="utf-8"))
        if (answers := Path(scratch) / "answers.jsonl").is_file():
            ANSWERS.mkdir(parents=True, exist_ok=True)
            shutil.copy(answers, ANSWERS / f"{one.id}.jsonl")
    if not report["is_complete"]:
        raise SystemExit(f"{one.id} did not come to its end; give it more time")
    now = fingerprint.kept()[one.depends]
    if one.depends in fingerprint.SHIPPED and report["hypernetwork"] != now["weights"]:
        raise SystemExit(f"{one.id} was measured with {report['hypernetwork']}, and {now['weights']} ships")
    if (dtype := report["dtype"]) and dtype != now.get("dtype", dtype):
        raise SystemExit(f"{one.id} was measured in {dtype}, and the page's figures are in {now['dtype']}")
    needed = {*keys, *one.rows, *re.findall(r"{(\w+)", one.label)}
    kept = {
        "command": one.command,
        "fingerprint": now,
        "date": report["date"][:10],
        "machine": {key: report["machine"][key] for key in ("cpu", "cores", "threads", "device")},
        "loracast": report["versions"]["loracast"],
        "minutes": round(minutes, 1),
        "rows": [
            {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items() if key in needed}
            for row in report["rows"]
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{one.id}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return kept


def keys_of(plan: Plan, section: Section) -> list[str]:
    """What the table of a section needs of a row, with the ends of intervals, and what README's table needs."""
    tables = [plan.readme["rows"], *(one.cells for one in plan.sections)]
    cells = [cell for rows in tables for row in rows for cell in row["cells"] if not isinstance(cell, str)]
    names = ("n", *section.columns, *(column for _, _, column in cells))
    return [*(key for name in names for key in plan.columns[name].keys), *(key for _, row, _ in cells for key in row)]


# ---- the page ----


def cell(row: Mapping[str, Any], column: Column) -> str:
    """A figure, with its interval where it has one, as the page shows it."""
    value = row.get(column.key)
    if value is None:
        return "-"
    if not isinstance(value, int | float):
        return str(value)
    factor, digits = {"%": (100, 1), "change": (100, 1), "ms": (1000, 0)}.get(str(column.form), (1, column.form))
    sign = "+" if column.form == "change" else ""
    said = [f"{factor * row[key]:{sign},.{digits}f}" for key in column.keys if row.get(key) is not None]
    return f"{said[0]} ({said[1]} to {said[2]})" if len(said) == 3 else said[0]


def page(plan: Plan, folder: Path = FIGURES) -> str:
    """The whole page."""
    parts = ["# Results", plan.intro.strip()]
    for section in plan.sections:
        parts += [f"## {section.title}", section.text.strip()]
        if section.cells:
            parts.append(cells_table(plan, [section.first, *section.columns], section.cells, folder))
            continue
        columns = [plan.columns[name] for name in section.columns]
        lines, about = [[section.first, *(column.header for column in columns)]], []
        for one in section.measurements:
            kept = figures_of(one, folder)
            note = f"\n{one.note.strip()}" if one.note else ""
            about.append(f"{one.says[0].upper()}{one.says[1:]}: {_made(one, kept)}.{note}")
            about.append(f"    {one.command} --out OUT")
            if kept is None:
                lines.append([one.says, _unmeasured(one), *[""] * (len(columns) - 1)])
                continue
            rows = (row for row in kept["rows"] if all(row.get(key) in of for key, of in one.rows.items()))
            lines += [[one.label.format_map(row), *(cell(row, column) for column in columns)] for row in rows]
        parts += [markdown(lines), *about]
    return "\n\n".join([*parts, plan.ending.strip()]) + "\n"


def _made(one: Measurement, kept: Mapping[str, Any] | None) -> str:
    if kept is None:
        return f"{_unmeasured(one)}; it takes about {one.minutes:g} minutes"
    weights = {"none": "the base alone"}.get(one.depends) or fingerprint.SHIPPED[one.depends]
    weights += f" `{kept['fingerprint']['weights']}`" if one.depends in fingerprint.SHIPPED else ""
    machine = kept["machine"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    where = f"{machine['cpu']}, {machine['cores']} cores, {threads}"
    took = f", {kept['minutes']:g} minutes" if kept["minutes"] else ""
    copied = f"; {kept['copied']}" if "copied" in kept else ""
    return f"{weights}, {kept['date']}, loracast {kept['loracast']}, {where}{took}{copied}"


def _unmeasured(one: Measurement) -> str:
    return MISSING if one.depends == "none" else UNMEASURED


def cells_table(plan: Plan, headers: Sequence[str], rows: Sequence[Mapping[str, Any]], folder: Path = FIGURES) -> str:
    """A table of figures that stand elsewhere, each found by measurement, values of a row, and column.

    A row of which nothing has been measured is left out.
    """
    by_id = {one.id: one for one in plan.measurements}

    def said(reference: Any) -> str:
        if isinstance(reference, str):
            return reference
        name, values, column = reference
        kept = figures_of(by_id[name], folder)
        if kept is None:
            return MISSING
        (row,) = [row for row in kept["rows"] if all(row.get(k) == value for k, value in values.items())]
        return cell(row, plan.columns[column])

    told = [[row["says"], *map(said, row["cells"])] for row in rows]
    return markdown([headers, *(row for row in told if not {*row[1:]} <= {MISSING, "-"})])


def readme_table(plan: Plan, folder: Path = FIGURES) -> str:
    """The table of README.md."""
    return cells_table(plan, plan.readme["columns"], plan.readme["rows"], folder).replace(" to ", "–")


def with_table(readme: str, table: str) -> str:
    """README.md with this table between its two marks."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}"


def picture_line(plan: Plan, folder: Path = FIGURES) -> str:
    """README's line with the picture that `picture.py` draws, or "" until all of its figures are measured."""
    by_id = {one.id: one for one in plan.measurements}
    if any(figures_of(by_id[name], folder) is None for name in picture.FILES):
        return ""
    return f"![{picture.SAYS}]({picture.PICTURE.relative_to(ROOT)})\n\n"


def write_pages(plan: Plan) -> None:
    """Write docs/results.md, and the table and the picture of README.md where it has the marks for them."""
    PAGE.write_text(page(plan), encoding="utf-8")
    (tasks,) = [one for one in plan.measurements if one.id == "tasks"]
    if (kept := figures_of(tasks)) is not None:
        picture.draw_tasks(TASKS_PICTURE, kept["rows"])  # what answers tasks over the operations of a query
    readme = README.read_text(encoding="utf-8")
    if BEGIN not in readme:
        print(f"README.md has no line {BEGIN!r}: its table is not written", flush=True)
        return
    if line := picture_line(plan):
        picture.draw(picture.bars())
    README.write_text(with_table(readme, line + readme_table(plan)), encoding="utf-8")


# ---- the command ----


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description="Measure what ships, and write docs/results.md.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("page", help="write the page and README's table from the figures that are kept")
    commands.add_parser("list", help="say what is measured and what is missing")
    run = commands.add_parser("run", help="measure what is missing or stale")
    run.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    run.add_argument("--runs", type=Path, help="folder of trained LoRAs for baselines")
    run.add_argument("--only", action="append", default=[], metavar="ID", help="only this, even if kept; repeatable")
    kinds = [*fingerprint.SHIPPED, "none"]
    run.add_argument("--depends", action="append", default=[], choices=kinds, help="only of these")
    given = parser.parse_args()
    plan = read_plan()
    if given.command == "page":
        write_pages(plan)
        return
    if given.command == "run" and (differing := fingerprint.changed(fingerprint.kept(), fingerprint.now())):
        told = "`python benchmarks/fingerprint.py --write` makes the figures of before stale"
        raise SystemExit(f"what the code does has changed ({', '.join(differing)}): {told}")
    for section in plan.sections:
        for one in section.measurements:
            is_kept = figures_of(one) is not None
            if given.command == "list":
                print(f"{one.id:24} {one.depends:9} {one.minutes:5g} min  {'measured' if is_kept else 'missing'}")
                continue
            by_name = given.only or ([] if one.id.startswith("frozen") else [one.id])  # a release has one look at that
            wanted = one.id in by_name and one.depends in (given.depends or [one.depends])
            if (is_kept and one.id not in given.only) or not wanted:
                continue
            if "RUNS" in one.command and given.runs is None:
                print(f"{one.id}: left out, it needs trained LoRAs (--runs FOLDER)", flush=True)
                continue
            print(f"{one.id}: {one.says}, about {one.minutes:g} minutes", flush=True)
            folders = {"DATA": given.data.resolve()} | ({"RUNS": given.runs.resolve()} if given.runs else {})
            try:
                measure(one, keys_of(plan, section), folders, FIGURES)
            except subprocess.CalledProcessError as error:
                print(f"{one.id}: failed with exit status {error.returncode}", flush=True)
                continue
            write_pages(plan)


if __name__ == "__main__":
    main()
