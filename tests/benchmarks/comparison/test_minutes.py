"""By the clock: when a curve first reaches a bound."""

from __future__ import annotations

from math import inf
from typing import Any

import minutes
import pytest
import tables
from results import Results

from tests.benchmarks.comparison.stored_grid import RANDOM_EVADER, SPREAD, full_grid, parsed, stored

CURVE = [(0.0, 0.0), (2.0, 4.0), (4.0, 3.0), (8.0, 11.0)]


@pytest.mark.parametrize(
    ("bound", "time"), [(-1.0, 0.0), (0.0, 0.0), (2.0, 1.0), (4.0, 2.0), (5.0, 5.0), (11.0, 8.0), (11.1, inf)]
)
def test_the_first_time_is_interpolated(bound: float, time: float) -> None:
    assert minutes.first_time(CURVE, bound) == pytest.approx(time)


def run(method: str, seed: int, **values: float) -> dict[str, Any]:
    """After 5K, 10K, ... steps, which take 10 minutes each."""
    curve = [*values.values()]
    figures = {
        5_000 * index: {RANDOM_EVADER.metric: value, "core_seconds": 600.0 * index}
        for index, value in enumerate(curve, 1)
    }
    return stored("simple_tag", method, seed, figures)


def test_minutes_are_medians_over_seeds_that_begin_with_random_agents() -> None:
    runs = [stored("simple_tag", "random", 10, {0: {RANDOM_EVADER.metric: 4.0}})]
    runs += [run("matwm", 10, a=20.0), run("matwm", 11, a=8.0, b=16.0), run("matwm", 12, a=5.0, b=6.0)]
    runs += [run("iql", 10, a=5.0, b=6.0), run("iql", 11, a=5.0, b=7.0), run("iql", 12, a=14.0, b=14.0)]
    without = {5_000: {RANDOM_EVADER.metric: 90.0}}
    results = Results([*runs, stored("simple_tag", "ippo", 10, without), run("isac_100k", 10, a=4.0, b=20.0)])
    goal = minutes.goals(results)[0]
    # 12 lies half way from 4 to 20, and half way from 8 to 16; one seed does not reach it.
    assert minutes.minutes(results, goal, "matwm") == (15.0, 20.0)
    assert minutes.minutes(results, goal, "iql") == (inf, 20.0)
    assert minutes.minutes(results, goal, "ippo") is None
    table = parsed(tables.minutes_table(results))
    assert [*table] == ["MATWM", "MAPPO", "IPPO", "IQL", "ISAC", "ISAC, 100K"]
    column = {name: row[goal.title] for name, row in table.items()}
    assert column == {**dict.fromkeys(column, "–"), "MATWM": "15.0", "IQL": "not in 20.0", "ISAC, 100K": "15.0"}
    assert set(table["MATWM"]) == {"", goal.title, "simple_spread: mean return -17.0"}


def test_where_there_is_a_score_half_of_it_is_a_goal() -> None:
    runs = full_grid()
    for one in runs:
        for env_steps, metrics in one["figures"].items():
            metrics["core_seconds"] = 60.0 * int(env_steps) / 1_000
    row = parsed(tables.minutes_table(Results(runs)))
    # By design MATWM has 0.6 after 25K steps, a thousand of which take a minute here, and ISAC 0.4.
    assert row["MATWM"]["wheel: score 0.5"] == f"{25 * 0.5 / 0.6:.1f}"
    assert row["MATWM"]["simple_push: score 0.5"] == row["MATWM"]["wheel: score 0.5"]
    assert row["ISAC"]["wheel: score 0.5"] == "not in 25.0"
    assert row["ISAC, 100K"]["wheel: score 0.5"] == "50.0"
    assert len(row["MATWM"]) == 1 + 2 + 10
    assert row["MATWM"][f"simple_spread: {SPREAD.title} -17.0"] == f"{25 * 0.5 / 0.6:.1f}"
