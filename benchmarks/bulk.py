"""Casts many short documents, some of them broken, with `loracast learn ... --out`, without Ray and with it.

    python benchmarks/bulk.py
    python benchmarks/bulk.py --base shipped --documents 200 --broken 4

Prints a row for each run: adapters that are there afterwards, documents that failed, seconds and documents a second. A
second run of each shows that nothing is done twice. It needs `pip install 'loracast[ray]'`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def learn(documents: Path, out: Path, options: list[str], threads: int) -> dict:
    """Run the command; what it says, and the seconds that it took."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)}
    what = ["learn", str(documents), "--out", str(out), "--device", "cpu", "--json", *options]
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "loracast", *what], env=environment, stdout=subprocess.PIPE, text=True)
    assert done.returncode in (0, 1), "the command failed"
    total_s, n_adapters = time.perf_counter() - started, len(list(out.glob("*/adapter_config.json")))
    return json.loads(done.stdout) | {"total_s": total_s, "adapters": n_adapters}


def main(
    documents: Annotated[int, typer.Option(help="How many, the broken ones included.")] = 10_000,
    broken: Annotated[int, typer.Option(help="How many of them cannot be read.")] = 20,
    base: Literal["tiny", "shipped"] = "tiny",
    actors: Annotated[int, typer.Option(help="Of Ray, with one thread each.")] = 2,
    threads: Annotated[int, typer.Option(help="Of the command without Ray.")] = os.cpu_count() or 1,
) -> None:
    """Cast many short documents, some of them broken, without Ray and with it."""
    from bulk import make_documents
    from tiny import save_models

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        made = make_documents(folder / "documents", documents - broken, broken)
        models: list[str] = []
        if base == "tiny":
            save_models(folder)
            models = ["--base", str(folder / "base"), "--hypernetwork", str(folder / "hypernetwork")]
        ways = {
            f"one process, {threads} threads": ([], threads),
            f"Ray, {actors} actors": (["--ray", "local", "--actors", str(actors)], 1),
        }
        rates = []
        for way, (options, n_threads) in ways.items():
            out = folder / way.partition(",")[0].replace(" ", "-")
            for run in ("first", "second"):
                report = learn(made, out, [*models, *options], n_threads)
                rate = report["learned"] / report["total_s"]
                print(
                    f"{way}, {run} run: {report['adapters']:,} adapters, {report['learned']:,} cast, "
                    f"{report['unchanged']:,} unchanged, {report['failed']:,} failed, {report['total_s']:.1f} s, "
                    f"{rate:.2f} documents a second",
                    flush=True,
                )
                rates += [rate] if run == "first" else []
            shutil.rmtree(out)
        print(f"Ray / one process: {rates[1] / rates[0]:.2f}")


if __name__ == "__main__":
    typer.run(main)
