"""What is read off the stored runs, by seed and over all of them."""

from __future__ import annotations

import random
from statistics import mean
from typing import Any

import pytest
import tables
from protocol import SEEDS
from results import Measure, Results, interquartile_mean, measures

from tests.benchmarks.comparison.stored_grid import (
    CHASED,
    DISCRETE,
    FLEEING_EVADER,
    RANDOM_EVADER,
    REFERENCES,
    SPREAD,
    full_grid,
    parsed,
    returns,
    score,
    slow_interquartile_mean,
    stored,
)


def test_a_figure_is_that_of_the_step_and_the_seeds_that_have_it() -> None:
    one, two = {SPREAD.metric: -20.0}, {SPREAD.metric: -19.0}
    results = Results(
        [
            stored("simple_spread", "matwm", 2, {5_000: {SPREAD.metric: -25.0}, 10_000: two}),
            stored("simple_spread", "matwm", 0, {10_000: one}),
            stored("simple_spread", "random", 0, {0: {SPREAD.metric: -26.0}}),
        ]
    )
    assert results.measured(SPREAD, "matwm", 10_000) == {0: -20.0, 2: -19.0}
    assert results.measured(SPREAD, "matwm", 5_000) == {2: -25.0}
    assert results.measured(SPREAD, "matwm", 25_000) == {}
    assert results.measured(SPREAD, "ippo", 10_000) == {}
    assert results.measured(SPREAD, "random", 10_000) == {0: -26.0}
    assert results.steps("simple_spread", "matwm") == [5_000, 10_000]


def test_the_best_baseline_is_the_lowest_where_lower_is_better() -> None:
    def tag(method: str, seed: int, value: float) -> dict[str, Any]:
        metrics = {measure.metric: value for measure in (RANDOM_EVADER, CHASED)}
        return stored("simple_tag", method, seed, {25_000: metrics})

    runs = [tag("ippo", seed, value) for seed, value in enumerate([10.0, 11.0, 90.0])]
    runs += [tag("iql", seed, value) for seed, value in enumerate([12.0, 13.0, 13.0])]
    runs += [tag("matwm", 0, 0.0), tag("random", 0, 100.0)]
    results = Results(runs)
    assert results.best_baseline(RANDOM_EVADER, 25_000) == ("iql", RANDOM_EVADER)
    assert results.best_baseline(CHASED, 25_000) == ("ippo", CHASED)
    assert results.best_baseline(CHASED, 10_000) is None
    assert results.best_baseline(SPREAD, 25_000) is None


def test_a_score_is_the_mean_over_matches_between_random_agents_and_the_best_long_run() -> None:
    random_agents = stored("simple_tag", "random", 0, {0: returns("simple_tag", lambda low, high: low)})
    long_run = returns("simple_tag", lambda low, high: high, other_mode=0.0)
    # Of every match the best method counts, where lower is better the lowest.
    worse = {RANDOM_EVADER.metric: 30.0, FLEEING_EVADER.metric: 9.0, CHASED.metric: 31.0}
    better = {CHASED.metric: 10.0}
    long_runs = [
        stored("simple_tag", "isac_100k", 10, {100_000: {**long_run, CHASED.metric: 40.0}}),
        stored("simple_tag", "iql_100k", 10, {25_000: dict.fromkeys(worse, 99.0), 100_000: worse | better}),
    ]
    found = {RANDOM_EVADER.metric: 20.0, FLEEING_EVADER.metric: 8.0, CHASED.metric: 30.0}
    whole = stored("simple_tag", "ippo", 1, {5_000: found})
    half = stored("simple_tag", "ippo", 2, {5_000: {RANDOM_EVADER.metric: 20.0}})
    expected = mean([(20 - 4.5) / (45.8 - 4.5), (8 - 1.6) / (14.5 - 1.6), (45.8 - 30) / (45.8 - 10.0)])
    results = Results([random_agents, *long_runs, whole, half])
    assert results.scores("simple_tag", "ippo", 5_000) == {1: pytest.approx(expected)}
    assert results.scores("simple_tag", "random", 5_000) == {0: pytest.approx(0.0)}
    assert Results([random_agents, whole]).scores("simple_tag", "ippo", 5_000) == {}
    assert Results([*long_runs, whole]).scores("simple_tag", "ippo", 5_000) == {}


@pytest.mark.parametrize("measure", [SPREAD, FLEEING_EVADER, CHASED])
def test_where_long_runs_end_no_better_than_random_agents_there_is_no_score(measure: Measure) -> None:
    name = measure.environment
    random_agents = stored(name, "random", 10, {0: returns(name, lambda low, high: low)})
    long_run = returns(name, lambda low, high: high, other_mode=0.0)
    for much, expected in ((0.0, {}), (1.0, {}), (-1.0, {10: 0.0})):
        low = REFERENCES[measure.match][0]
        end = low + much if measure.lower_is_better else low - much
        ends = {measure.metric: end, measure.ways[1].metric: end}
        runs = [random_agents, stored(name, "iql_100k", 10, {100_000: long_run | ends})]
        assert Results(runs).scores(name, "random", 0) == expected


def test_former_seeds_are_reported_where_there_are_no_others() -> None:
    def run(environment: str, method: str, seed: int) -> dict[str, Any]:
        (measure, *_) = measures(environment)
        return stored(environment, method, seed, {10_000: {measure.metric: -float(seed)}})

    fresh = [run("simple_spread", "matwm", seed) for seed in (10, 11)]
    former = [run("simple_spread", "matwm", seed) for seed in (0, 2)]
    ablation = [run("simple_spread", "matwm_no_recency", seed) for seed in (0, 1)]
    elsewhere = [run("simple_tag", "matwm", 2)]
    results = Results([*former, *fresh, *ablation, *elsewhere])
    assert results.runs == [*fresh, *ablation, *elsewhere]
    assert results.measured(SPREAD, "matwm", 10_000) == {10: -10.0, 11: -11.0}
    assert results.measured(SPREAD, "matwm_no_recency", 10_000) == {0: 0.0, 1: -1.0}
    assert results.measured(RANDOM_EVADER, "matwm", 10_000) == {2: -2.0}
    # A difference is that of one seed, whether it is reported of both or not.
    assert results.less(SPREAD, "matwm_no_recency", "matwm", 10_000) == {0: 0.0}
    assert results.environments == ["simple_tag", "simple_spread"]


def test_the_interquartile_mean_and_its_interval_are_those_of_a_loop() -> None:
    generator = random.Random(0)
    # Environments of unequal levels: an interval that mixed them would be far wider.
    scores = [
        [level + generator.gauss(0, 0.1) for _ in range(runs)] for level, runs in ((0, 3), (1, 3), (2, 4), (1, 2))
    ]
    point, low, high = interquartile_mean(scores)
    assert point == pytest.approx(slow_interquartile_mean(scores))
    redrawn = sorted(
        slow_interquartile_mean([generator.choices(values, k=len(values)) for values in scores]) for _ in range(4_000)
    )
    assert low == pytest.approx(redrawn[100], abs=0.01)
    assert high == pytest.approx(redrawn[3_900], abs=0.01)
    assert interquartile_mean(scores) == (point, low, high)


def test_a_single_run_has_no_interval() -> None:
    assert interquartile_mean([[0.2], [0.4, 0.4]]) == (pytest.approx(1 / 3), None, None)
    assert interquartile_mean([[0.5, 0.5], [0.5, 0.5]]) == (0.5, 0.5, 0.5)


def test_methods_are_compared_over_the_same_environments() -> None:
    runs = full_grid()
    results = Results(runs)
    assert results.common_environments(tables.STEPS) == DISCRETE
    found = results.aggregate(DISCRETE, "isac", 25_000)
    assert found is not None
    by_run = [[score("isac", 25_000, seed) for seed in SEEDS]] * len(DISCRETE)
    assert found[0] == pytest.approx(slow_interquartile_mean(by_run))
    # One method that has not played all leaves fewer to compare all by; one that was never run does not.
    some = [run for run in runs if (run["environment"], run["method"]) != ("simple_tag", "iql")]
    assert "simple_tag" not in Results(some).common_environments(tables.STEPS)
    none = [run for run in runs if run["method"] != "iql"]
    assert Results(none).common_environments(tables.STEPS) == DISCRETE
    assert parsed(tables.aggregate_table(Results(none)))["IQL"] == {"": "IQL", "10K": "–", "25K": "–"}
    assert Results([]).common_environments(tables.STEPS) == []
