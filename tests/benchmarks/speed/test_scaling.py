"""The scaling benchmark divides the work equally and compares the costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import scaling
from measure import Measurement

from tests.benchmarks.speed.sizes import TINY, by_case, written


def test_scaling_compares_the_costs() -> None:
    measured = {2: Measurement(10, [2.0], [5.0]), 4: Measurement(10, [3.0], [5.0])}
    *rows, flatness = scaling.scaling_rows("step", measured, unit="us", per_second=100.0, target=1.4)
    assert [row.value for row in rows] == [200.0, 300.0]
    assert flatness.value == 1.5
    assert not flatness.met


def test_scaling_needs_equal_shares() -> None:
    with pytest.raises(ValueError, match=r"4 sequences cannot be divided equally among \[3\] agents"):
        scaling.cases([2, 3], replace(TINY, starts=6))


def test_scaling_writes_its_results(tmp_path: Path) -> None:
    output = tmp_path / "scaling.json"
    scaling.main(["--output", str(output)], sizes=TINY, agents=(2, 4), repeats=1)
    rows = by_case(written(output))
    costs = [rows[f"imagined step, {agents} agents"] for agents in (2, 4)]
    for row in costs:
        # 4 starts and 2 steps in all, whatever the number of agents.
        assert row["value"] == pytest.approx(1e6 * row["seconds"] / 8)
    values = [row["value"] for row in costs]
    assert rows["flatness: imagined step"]["value"] == pytest.approx(max(values) / min(values))
    assert rows["flatness: imagined step"]["target"] == 1.15
    assert rows["flatness: world-model update"]["target"] is None
