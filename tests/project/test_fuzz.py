"""A short run of each fuzzer, after what went wrong once (fuzz/corpus); `make fuzz` runs longer."""

from __future__ import annotations

import pytest

from fuzz.guard import Guard
from fuzz.run import Run, make_target

COUNTS = {"adapter": 150, "hypernetwork": 60, "checkpoint": 12, "document": 40, "http": 150}


@pytest.mark.parametrize("target", COUNTS)
def test_nothing_but_a_refusal_comes_out(target, tmp_path):
    run = Run(target, Guard(tmp_path), make_target(target, tmp_path))
    run.corpus()
    n_once = run.outcome.n_cases
    for index in range(COUNTS[target]):
        run.seeded(7, index)
    if target == "http":
        run.target.close()
    assert run.outcome.found == {} and run.outcome.n_cases == n_once + COUNTS[target]
    assert run.outcome.n_refused > n_once + COUNTS[target] // 4  # the damage does something
