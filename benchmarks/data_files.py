"""Split what is kept for choosing from the training documents: `python benchmarks/data_files.py DATA OUT`.

DATA/docqa_train.jsonl.gz becomes OUT/squad_dev_articles.jsonl.gz, five articles of SQuAD's training set that were drawn
once, and OUT/docqa_train_less_dev.jsonl.gz, all other rows. `loracast eval overlap --keep` then leaves out what test
documents share (docs/training.md).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from loracast.lab.data.rows import read_rows

SOURCE = "squad_v1_train_part"
DEV_ARTICLES = {
    "Alfred North Whitehead", "Financial crisis of 2007–08", "Genome", "Sino-Tibetan relations during the Ming dynasty",
    "Spectre (2015 film)",
}  # fmt: skip


def split(data: Path, out: Path) -> None:
    """Write both files and print their numbers of rows: those for choosing, and those for training."""
    rows = read_rows(data / "docqa_train.jsonl.gz", what="training documents")
    dev = [row for row in rows if row["source"] == SOURCE and row.get("title") in DEV_ARTICLES]
    train = [row for row in rows if row["source"] != SOURCE or row.get("title") not in DEV_ARTICLES]
    out.mkdir(parents=True, exist_ok=True)
    write(out / "squad_dev_articles.jsonl.gz", dev)
    write(out / "docqa_train_less_dev.jsonl.gz", train)
    print(f"{len(dev)} rows to choose with, {len(train)} to train on")


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSONL, gzipped; the same rows give the same bytes."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))


if __name__ == "__main__":
    typer.run(split)
