"""Casts many short documents, some of them broken, with `loracast learn ... --out`, without Ray and with it.

    python benchmarks/bulk.py
    python benchmarks/bulk.py --base shipped --documents 200 --broken 4

Prints a row for each run: adapters that are there afterwards, documents that failed, seconds and documents a second. A
second run of each shows that nothing is done twice. It needs `pip install 'loracast[ray]'`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=10_000, help="how many, the broken ones included")
    parser.add_argument("--broken", type=int, default=20, help="how many of them cannot be read")
    parser.add_argument("--base", choices=("tiny", "shipped"), default="tiny")
    parser.add_argument("--actors", type=int, default=2, help="of Ray, with one thread each")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the command without Ray")
    given = parser.parse_args()
    from bulk import make_documents
    from tiny import save_models

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        documents = make_documents(folder / "documents", given.documents - given.broken, given.broken)
        models: list[str] = []
        if given.base == "tiny":
            save_models(folder)
            models = ["--base", str(folder / "base"), "--hypernetwork", str(folder / "hypernetwork")]
        ways = {
            f"one process, {given.threads} threads": ([], given.threads),
            f"Ray, {given.actors} actors": (["--ray", "local", "--actors", str(given.actors)], 1),
        }
        rates = []
        for way, (options, threads) in ways.items():
            out = folder / way.partition(",")[0].replace(" ", "-")
            for run in ("first", "second"):
                report = learn(documents, out, [*models, *options], threads)
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
    main()
