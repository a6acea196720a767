"""The map of skills: cosines against dense deltas, silhouettes against their definition, and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from loracast.cli import app
from loracast.evaluation.skill_map import _by_chance, _silhouette
from loracast.lora.algebra import Factors, LoRA, stack
from suites import write_rows
from tiny import dense, random_lora


def test_cosines_are_those_of_the_dense_deltas():
    loras = [random_lora(2, i) for i in range(5)]
    flat = torch.nn.functional.normalize(torch.stack([dense(lora) for lora in loras]), dim=-1).double()
    torch.testing.assert_close(stack(loras).cosines(), flat @ flat.T, atol=1e-5, rtol=1e-5)
    as_dense = stack([LoRA(dense={name: lora.delta(name) for name in lora.names}) for lora in loras])
    torch.testing.assert_close(as_dense.cosines(), flat @ flat.T, atol=1e-5, rtol=1e-5)
    a = loras[0].factors
    of_one_a = [LoRA({name: Factors(a[name].a, b) for name, (_, b) in lora.factors.items()}) for lora in loras]
    flat = torch.nn.functional.normalize(torch.stack([dense(lora) for lora in of_one_a]), dim=-1).double()
    torch.testing.assert_close(stack(of_one_a).cosines(), flat @ flat.T, atol=1e-5, rtol=1e-5)
    nothing = stack([lora.scale(0) for lora in loras[:2]])
    assert torch.equal(nothing.cosines(), torch.zeros(2, 2, dtype=torch.float64))


def test_silhouettes_by_their_definition():
    points = np.random.default_rng(1).normal(size=(7, 3))
    labels = ["a", "a", "b", "b", "b", "", "c"]
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    kept = [i for i, label in enumerate(labels) if label]
    scores = []
    for i in kept:
        mean = {
            label: np.mean([distances[i, j] for j in kept if labels[j] == label and j != i] or [0.0]) for label in "abc"
        }
        own, nearest = mean[labels[i]], min(mean[label] for label in "abc" if label != labels[i])
        scores.append(0.0 if labels[i] == "c" else (nearest - own) / max(own, nearest))
    assert _silhouette(distances, labels) == pytest.approx(np.mean(scores))


def test_chance_keeps_the_points_of_a_task_together():
    """Tight tasks, families by lot: a task's own points lie together whatever its family, which alone is no evidence of families."""
    rng = np.random.default_rng(2)
    centres = np.repeat(rng.normal(size=(20, 3)), 4, axis=0)
    points = centres + 0.01 * rng.normal(size=centres.shape)
    names = [f"task {i // 4}" for i in range(80)]
    groups = [f"family {i // 16}" for i in range(80)]
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    by_chance = _by_chance(distances, names, groups, 0)
    of_points = np.percentile([_silhouette(distances, list(rng.permutation(groups))) for _ in range(50)], 95)
    assert _silhouette(distances, groups) < by_chance and by_chance > of_points + 0.02
    apart = points + np.repeat(np.arange(5), 16)[:, None] * 9
    far = np.linalg.norm(apart[:, None] - apart[None], axis=-1)
    assert _silhouette(far, groups) > _by_chance(far, names, groups, 0) + 0.3
    assert _silhouette(distances, [str(i) for i in range(80)]) is None is _silhouette(distances, ["a"] * 80)


def test_the_command(hypernetwork, tmp_path, home):
    names = {"up": "case", "down": "case", "first": "letters", "last": "letters", "alone": "one"}
    write_rows(tmp_path / "tasks.jsonl", [{"task": name, "input": "a", "output": "b"} for name in names])
    said = [(name, f"{word} {name}") for name in names for word in ("please", "now", "the lamp")]
    write_rows(
        tmp_path / "task_descriptions.jsonl", [{"task": t, "kind": "heldout", "description": text} for t, text in said]
    )
    write_rows(tmp_path / "tasks_meta.jsonl", [{"task": name, "group": group} for name, group in names.items()])
    arguments = [
        "eval",
        "map",
        "--tasks",
        tmp_path,
        "--hypernetwork",
        hypernetwork,
        "--out",
        tmp_path / "out",
        "--json",
    ]
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert [(row["baseline"], row["n"], row["n_tasks"], row["n_groups"]) for row in rows] == [
        ("embeddings", 15, 5, 2),
        ("weights", 15, 5, 2),
    ]
    assert {point["group"] for point in rows[0]["points"]} == {"case", "letters", ""}
    assert all(-1 <= row[key] <= 1 for row in rows for key in ("by_task", "by_group", "by_group_by_chance"))
    assert (tmp_path / "out" / "map.png").stat().st_size > 20_000
    write_rows(tmp_path / "tasks_meta.jsonl", [{"task": name, "group": "same"} for name in names])
    assert "1 families" in CliRunner().invoke(app, [str(a) for a in arguments]).output
