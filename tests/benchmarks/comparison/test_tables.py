"""The tables say what the stored runs say, with dashes for what is missing."""

from __future__ import annotations

from statistics import median
from typing import Any

import figures
import pytest
import tables
from methods import METHODS
from protocol import SEEDS
from results import Results

from tests.benchmarks.comparison.stored_grid import (
    CHASED,
    RANDOM_EVADER,
    REFERENCES,
    SPREAD,
    full_grid,
    parsed,
    score,
    stored,
)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "–"),
        ({0: 1.26}, "1.3 (1 of 3 seeds)"),
        ({0: 1.0, 2: 2.0}, "1.5 (1.0 to 2.0; 2 of 3 seeds)"),
        ({0: 3.0, 1: -0.04, 2: 1.0}, "1.0 (0.0 to 3.0)"),
        ({0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}, "2.5 (1.0 to 4.0)"),
    ],
)
def test_cells(values: dict[int, float], text: str) -> None:
    assert tables.cell(values) == text


def test_targets_tell_what_was_reached_and_by_whom() -> None:
    table = tables.targets_table(Results(full_grid()))
    lines = table.splitlines()[2:]
    assert len(lines) == len(tables.TARGETS) == 8
    tag = {title: parsed(table)[f"simple_tag: {title}"] for title in (RANDOM_EVADER.title, CHASED.title)}
    low, high = REFERENCES[RANDOM_EVADER.match]
    ours = [low + score("matwm", 25_000, seed) * (high - low) for seed in SEEDS]
    # Greedy actions bring everyone 0.25 more.
    theirs = [low + score("isac", 25_000, seed) * (high - low) + 0.25 for seed in SEEDS]
    assert tag[RANDOM_EVADER.title] == {
        "": f"simple_tag: {RANDOM_EVADER.title}",
        "after": "25K",
        "target": "≥ 20.0",
        "MATWM": f"**{median(ours):.1f} ({min(ours):.1f} to {max(ours):.1f})**",
        "other action mode; s.e.": f"greedy {median(ours) + 0.25:.1f}; s.e. 0.5",
        "best model-free": f"{median(theirs):.1f} ({min(theirs):.1f} to {max(theirs):.1f}) ISAC, greedy",
        "BenchMARL, tuned": "10.5; 13.0 at 50K, 13.5 at 200K",
        "met": "yes",
    }
    # 45.8 down to 27.0 with a score of 0.6; 24 was to be reached.
    assert tag[CHASED.title]["MATWM"].startswith("**27.0 (")
    assert (tag[CHASED.title]["target"], tag[CHASED.title]["met"]) == ("≤ 24.0", "no")
    contact = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "contact" in line]
    assert contact[0][1:6] == [
        "10K",
        "≥ 0.4",
        "**0.51 (0.50 to 0.52)**",
        "sampled next latent 0.20; scripts' episodes 0.26; both 0.10",
        "–",
    ]
    assert [row[-1] for row in contact] == ["yes", "yes"]


def test_the_targets_are_said_to_be_over_the_seeds_that_there_are() -> None:
    def all_but(*left_out: tuple[str, int]) -> Results:
        return Results([run for run in full_grid((10, 11, 12, 13, 14)) if (run["method"], run["seed"]) not in left_out])

    assert tables.targets_seeds(Results(full_grid())) == "3 seeds"
    assert tables.targets_seeds(all_but()) == "5 seeds"
    assert tables.targets_seeds(all_but(("matwm", 14))) == "4 or more seeds"
    assert tables.targets_seeds(all_but(("isac", 10), ("isac", 14))) == "3 or more seeds"
    # A method that is not the best stands in no row.
    assert tables.targets_seeds(all_but(("mappo", 10))) == "5 seeds"
    assert tables.targets_seeds(Results(full_grid((2,)))) == "1 seed"
    assert tables.targets_seeds(Results([])) == "3 seeds"


@pytest.mark.parametrize(("value", "met"), [(24.0, "yes"), (24.01, "no"), (3.0, "yes")])
def test_a_target_is_met_from_its_side(value: float, met: str) -> None:
    found = {CHASED.metric: value, RANDOM_EVADER.metric: value}
    runs = [stored("simple_tag", "matwm", seed, {25_000: found}) for seed in SEEDS]
    table = parsed(tables.targets_table(Results(runs)))
    assert table[f"simple_tag: {CHASED.title}"]["met"] == met
    assert table[f"simple_tag: {RANDOM_EVADER.title}"]["met"] == ("yes" if value >= 20 else "no")
    assert table["simple_spread: mean return"]["met"] == "–"
    table = parsed(tables.targets_table(Results(runs[:2])))
    assert table[f"simple_tag: {CHASED.title}"]["met"] == f"{met} so far"


def test_every_method_stands_in_the_tables_of_its_environments() -> None:
    results = Results(full_grid())
    table = parsed(tables.methods_table(results, "simple_spread"))
    assert list(table) == [figures.label(name) for name in METHODS if not name.endswith("_100k")]
    assert table["random"] == {"": "random", "mean return, 10K": "-26.0", "mean return, 25K": "-26.0"}
    assert table["MATWM without recency"]["mean return, 25K"] == "–"
    assert table["MATWM without recency"]["mean return, 10K"].startswith("-22.4 (")
    others = parsed(tables.methods_table(results, "vmas_simple_tag"))
    assert not any("without" in name for name in others)
    assert len(others["MATWM"]) == 1 + 3 * 2
    assert "scripted" not in parsed(tables.methods_table(results, "wheel"))


def test_continuous_environments_have_tables_of_their_own() -> None:
    names = ["simple_tag_continuous", "balance_continuous"]
    runs = full_grid()
    results, without = Results([*runs, *full_grid(environments=names)]), Results(runs)
    assert results.environments == [*without.environments, *names]
    table = parsed(tables.methods_table(results, "balance_continuous"))
    assert [*table] == ["random", "MATWM", "MAPPO", "IPPO", "ISAC"]
    assert len(parsed(tables.methods_table(results, "simple_tag_continuous"))["MATWM"]) == 1 + 3 * 2
    # The score and the targets are of discrete actions.
    assert tables.aggregate_table(results) == tables.aggregate_table(without)
    assert tables.targets_table(results) == tables.targets_table(without)


def test_long_runs_stand_beside_the_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(full_grid())
    monkeypatch.setitem(tables.LONG_RUNS, "simple_spread", ("isac", "iql"))
    table = parsed(tables.methods_table(results, "simple_spread"))
    column = {name: row["mean return, 100K"] for name, row in table.items()}
    assert column == {**dict.fromkeys(column, "–"), "ISAC": "-8.0", "random": "-26.0", "scripted": "-8.0"}


def test_open_loop_errors_stand_beside_trivial_ones() -> None:
    row = parsed(tables.open_loop_table(Results(full_grid())))["simple_spread: rewards"]
    assert row["1 ahead, 5K"] == "2.00 / 2.00"
    assert row["10 ahead, 25K"] == "4.00 / 20.0"


def test_seconds_are_medians_of_a_method_in_an_environment() -> None:
    seconds = [2_000, 1_000, None, 1_500]
    runs = [stored("simple_tag", "iql", seed, {}, core_seconds=value) for seed, value in enumerate(seconds, 10)]
    table = parsed(tables.seconds_table(Results(runs)))
    assert table["IQL"] == {"": "IQL", "simple_tag": "1,500"}
    assert table["ISAC"] == {"": "ISAC", "simple_tag": "–"}
    assert not any("100K" in name for name in table)


def test_a_baseline_may_act_in_its_better_way() -> None:
    greedy = RANDOM_EVADER.ways[1]
    assert (greedy.metric, greedy.title) == (f"{RANDOM_EVADER.match}/greedy", RANDOM_EVADER.title)
    sampled, other = {RANDOM_EVADER.metric: 5.0}, {RANDOM_EVADER.metric: 4.0, greedy.metric: 9.0}
    runs = [stored("simple_tag", "iql", 0, {25_000: sampled}), stored("simple_tag", "ippo", 0, {25_000: other})]
    assert Results(runs).best_baseline(RANDOM_EVADER, 25_000) == ("ippo", greedy)
    row = parsed(tables.targets_table(Results(runs)))[f"simple_tag: {RANDOM_EVADER.title}"]
    assert row["best model-free"] == "9.0 (1 of 3 seeds) IPPO, greedy"
    table = parsed(tables.methods_table(Results(runs), "simple_tag"))
    column = f"{RANDOM_EVADER.title}, 25K"
    assert table["IPPO"][column] == "4.0 (1 of 3 seeds); greedy 9.0"
    assert table["IQL"][column] == "5.0 (1 of 3 seeds); greedy –"
    assert table["ISAC"][column] == "–"


def test_ablations_are_compared_seed_by_seed() -> None:
    def spread(method: str, seed: int, value: float) -> dict[str, Any]:
        return stored("simple_spread", method, seed, {10_000: {SPREAD.metric: value}})

    whole = [spread("matwm", seed, value) for seed, value in ((0, -10.0), (1, -20.0), (3, -1.0))]
    part = [spread("matwm_no_recency", seed, value) for seed, value in ((0, -11.0), (1, -19.5), (2, -50.0))]
    results = Results([*whole, *part])
    assert results.less(SPREAD, "matwm_no_recency", "matwm", 10_000) == {0: -1.0, 1: 0.5}
    row = parsed(tables.ablations_table(results))["without recency"]
    assert row["simple_spread: mean return"] == "-0.2 (-1.0 to +0.5; 2 of 3 seeds)"
    assert row[f"simple_tag: {CHASED.title}"] == "–"
