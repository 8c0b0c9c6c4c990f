"""The report says what the stored runs say, with dashes for what is missing, and the documents say what it says."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest
from PIL import Image

# Scripts import what they share from their own folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import sample_efficiency_figures as figures
import sample_efficiency_report as report
from methods import METHODS, Reference
from protocol import ENVIRONMENTS
from sample_efficiency import RESULTS, SEEDS, Run, stored_runs
from sample_efficiency_results import Results, interquartile_mean, measures

RANDOM_EVADER, FLEEING_EVADER, CHASED = measures("simple_tag")
(SPREAD,) = measures("simple_spread")
(LISTENER,) = measures("simple_speaker_listener")
STAGES = (5_000, 10_000, 15_000, 20_000, 25_000)
REFERENCES = {
    RANDOM_EVADER.match: (4.5, 45.8),
    FLEEING_EVADER.match: (1.6, 14.5),
    CHASED.match: (45.8, 14.5),
    "return": (-26.0, -8.0),
}
"""Of random agents and of scripts, in all environments."""


def stored(
    environment: str, method: str, seed: int, figures: dict[int, dict[str, float]], **other: Any
) -> dict[str, Any]:
    run: dict[str, Any] = {"environment": environment, "method": method, "seed": seed, "core_seconds": 100 + seed}
    run |= {"settings": settings(environment, method)}
    return {**run, "figures": {str(env_steps): metrics for env_steps, metrics in figures.items()}, **other}


@cache
def settings(environment: str, method: str) -> dict[str, Any]:
    """Those that a run would be made with now."""
    return json.loads(json.dumps(Run(environment, method, 0).settings()))


def returns(environment: str, value: Callable[[float, float], float]) -> dict[str, float]:
    """What an evaluation stores, from the random agents' and the script's return of every match."""
    metrics: dict[str, float] = {}
    for measure in measures(environment):
        found = value(*REFERENCES[measure.match])
        other = "greedy" if measure.kind == "sampled" else "sampled"
        metrics |= {measure.metric: found, f"{measure.match}/{other}": found + 0.25, f"{measure.metric}/se": 0.5}
    return metrics


def qualities(environment: str, env_steps: int, seed: int) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for quantity in ("observation", "reward", "teammate"):
        for horizon in (1, 5, 10):
            metrics[f"open_loop/{quantity}/{horizon}"] = horizon * (10_000 + seed) / env_steps
            metrics[f"open_loop/{quantity}/{horizon}/trivial"] = 2.0 * horizon
    if "tag" in environment:
        for data, factor in (("own", 1.0), ("scripted", 0.5)):
            metrics[f"contact_precision/{data}/true"] = factor * (0.3 + env_steps / 50_000 + 0.01 * seed)
            metrics[f"contact_precision/{data}/sampled"] = factor * 0.2
    return metrics


def score(method: str, env_steps: int, seed: int) -> float:
    """Of a method, by design: 0 as random agents, 1 as the script."""
    best = {"matwm": 0.6, "isac": 0.4, "ippo": 0.3, "iql": 0.2, "mappo": 0.1}.get(method, 0.5)
    return best * env_steps / 25_000 + 0.01 * (seed - 1)


def full_grid(seeds: tuple[int, ...] = SEEDS) -> list[dict[str, Any]]:
    runs = []
    for environment in ENVIRONMENTS:
        for method, spec in METHODS.items():
            if environment not in (spec.only or ENVIRONMENTS):
                continue
            for seed in seeds:
                steps = spec.steps(ENVIRONMENTS[environment])
                by_step: dict[int, dict[str, float]] = {}
                for at in [0] if not steps else [stage for stage in STAGES if stage <= steps]:
                    level = float(method == "scripted") if not steps else score(method, at, seed)
                    by_step[at] = returns(environment, lambda low, high, level=level: low + level * (high - low))
                    if method.startswith("matwm"):
                        by_step[at] |= qualities(environment, at, seed)
                runs.append(stored(environment, method, seed, by_step))
    return runs


def write(runs: list[dict[str, Any]], folder: Path) -> Path:
    for run in runs:
        path = Run(run["environment"], run["method"], run["seed"]).path(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run))
    return folder


def parsed(table: str) -> dict[str, dict[str, str]]:
    """``{first cell of a row: {column: cell}}``; of rows that begin alike, the last."""
    header, ruler, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert set("".join(ruler)) == {"-"}
    assert {len(row) for row in rows} == {len(header)}
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


# -- figures by seed -------------------------------------------------------------------------------------------------


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


def test_a_baseline_may_act_in_its_better_way() -> None:
    greedy = RANDOM_EVADER.ways[1]
    assert (greedy.metric, greedy.title) == (f"{RANDOM_EVADER.match}/greedy", RANDOM_EVADER.title)
    sampled, other = {RANDOM_EVADER.metric: 5.0}, {RANDOM_EVADER.metric: 4.0, greedy.metric: 9.0}
    runs = [stored("simple_tag", "iql", 0, {25_000: sampled}), stored("simple_tag", "ippo", 0, {25_000: other})]
    assert Results(runs).best_baseline(RANDOM_EVADER, 25_000) == ("ippo", greedy)
    row = parsed(report.targets_table(Results(runs)))[f"simple_tag: {RANDOM_EVADER.title}"]
    assert row["best model-free here"] == "9.0 (1 of 3 seeds) IPPO, greedy"
    table = parsed(report.methods_table(Results(runs), "simple_tag"))
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
    row = parsed(report.ablations_table(results))["without recency"]
    assert row["simple_spread: mean return"] == "-0.2 (-1.0 to +0.5; 2 of 3 seeds)"
    assert row[f"simple_tag: {CHASED.title}"] == "–"


def test_a_score_is_the_mean_over_matches_between_random_and_script() -> None:
    random_agents = stored("simple_tag", "random", 0, {0: returns("simple_tag", lambda low, high: low)})
    script = stored("simple_tag", "scripted", 0, {0: returns("simple_tag", lambda low, high: high)})
    found = {RANDOM_EVADER.metric: 20.0, FLEEING_EVADER.metric: 8.0, CHASED.metric: 30.0}
    whole = stored("simple_tag", "ippo", 1, {5_000: found})
    half = stored("simple_tag", "ippo", 2, {5_000: {RANDOM_EVADER.metric: 20.0}})
    expected = mean([(20 - 4.5) / (45.8 - 4.5), (8 - 1.6) / (14.5 - 1.6), (45.8 - 30) / (45.8 - 14.5)])
    results = Results([random_agents, script, whole, half])
    assert results.scores("simple_tag", "ippo", 5_000) == {1: pytest.approx(expected)}
    assert results.scores("simple_tag", "random", 5_000) == {0: pytest.approx(0.0)}
    assert Results([random_agents, whole]).scores("simple_tag", "ippo", 5_000) == {}


# -- statistics ------------------------------------------------------------------------------------------------------


def slow_interquartile_mean(scores: list[list[float]]) -> float:
    pooled = sorted(value for values in scores for value in values)
    cut = len(pooled) // 4
    return mean(pooled[cut : len(pooled) - cut])


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
    assert results.common_environments(report.STEPS) == list(ENVIRONMENTS)
    found = results.aggregate(list(ENVIRONMENTS), "isac", 25_000)
    assert found is not None
    by_run = [[score("isac", 25_000, seed) for seed in SEEDS]] * len(ENVIRONMENTS)
    assert found[0] == pytest.approx(slow_interquartile_mean(by_run))
    # One method that has not played all leaves fewer to compare all by; one that was never run does not.
    some = [run for run in runs if (run["environment"], run["method"]) != ("simple_tag", "iql")]
    assert "simple_tag" not in Results(some).common_environments(report.STEPS)
    none = [run for run in runs if run["method"] != "iql"]
    assert Results(none).common_environments(report.STEPS) == list(ENVIRONMENTS)
    assert parsed(report.aggregate_table(Results(none)))["IQL"] == {"": "IQL", "10K": "–", "25K": "–"}
    assert Results([]).common_environments(report.STEPS) == []


# -- tables ----------------------------------------------------------------------------------------------------------


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
    assert report.cell(values) == text


def test_targets_tell_what_was_reached_and_by_whom() -> None:
    table = report.targets_table(Results(full_grid()))
    lines = table.splitlines()[2:]
    assert len(lines) == len(report.TARGETS) == 8
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
        "beside it": f"greedy {median(ours) + 0.25:.1f}, standard error 0.5",
        "best model-free here": f"{median(theirs):.1f} ({min(theirs):.1f} to {max(theirs):.1f}) ISAC, greedy",
        "seen elsewhere": "10.5; 13.0 at 50K, 13.5 at 200K",
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
        "next latent drawn 0.20, scripts' data 0.26, both 0.10",
        "–",
    ]
    assert [row[-1] for row in contact] == ["yes", "yes"]


@pytest.mark.parametrize(("value", "met"), [(24.0, "yes"), (24.01, "no"), (3.0, "yes")])
def test_a_target_is_met_from_its_side(value: float, met: str) -> None:
    found = {CHASED.metric: value, RANDOM_EVADER.metric: value}
    runs = [stored("simple_tag", "matwm", seed, {25_000: found}) for seed in SEEDS]
    table = parsed(report.targets_table(Results(runs)))
    assert table[f"simple_tag: {CHASED.title}"]["met"] == met
    assert table[f"simple_tag: {RANDOM_EVADER.title}"]["met"] == ("yes" if value >= 20 else "no")
    assert table["simple_spread: mean return"]["met"] == "–"
    table = parsed(report.targets_table(Results(runs[:2])))
    assert table[f"simple_tag: {CHASED.title}"]["met"] == f"{met} so far"


def test_every_method_stands_in_the_tables_of_its_environments() -> None:
    results = Results(full_grid())
    table = parsed(report.methods_table(results, "simple_spread"))
    assert list(table) == [figures.label(name) for name in METHODS]
    assert table["random"] == {"": "random", "mean return, 10K": "-26.0", "mean return, 25K": "-26.0"}
    assert table["MATWM without recency"]["mean return, 25K"] == "–"
    assert table["MATWM without recency"]["mean return, 10K"].startswith("-22.4 (")
    others = parsed(report.methods_table(results, "vmas_simple_tag"))
    assert not any("without" in name for name in others)
    assert len(others["MATWM"]) == 1 + 3 * 2


def test_open_loop_errors_stand_beside_trivial_ones() -> None:
    row = parsed(report.open_loop_table(Results(full_grid())))["simple_spread: rewards"]
    assert row["1 ahead, 5K"] == "2.00 / 2.00"
    assert row["10 ahead, 25K"] == "4.00 / 20.0"


def test_seconds_are_medians_of_a_method_in_an_environment() -> None:
    seconds = [2_000, 1_000, None, 1_500]
    runs = [stored("simple_tag", "iql", seed, {}, core_seconds=value) for seed, value in enumerate(seconds)]
    table = parsed(report.seconds_table(Results(runs)))
    assert table["IQL"] == {"": "IQL", "simple_tag": "1,500", **dict.fromkeys(list(ENVIRONMENTS)[1:], "–")}


def test_what_is_missing_is_a_dash_whatever_is_missing() -> None:
    runs = full_grid()
    generator = random.Random(0)
    for share in (0.02, 0.3, 0.7):
        some = [run for run in runs if generator.random() < share]
        section = report.long_section(Results(some), {"curves": "curves.png"})
        assert "–" in section
        assert "![Returns of all methods over env steps](curves.png)" in section
        assert "world_model.png" not in section


def test_runs_of_other_settings_are_named() -> None:
    runs = full_grid()
    assert report.other_settings(Results(runs)) == []
    text = "Made with other settings than the present ones"
    assert text not in report.long_section(Results(runs), {}) + report.short_section(Results(runs), {})
    for run in runs:
        if (run["environment"], run["method"]) == ("simple_tag", "iql") and run["seed"] != 1:
            run["settings"] = {**run["settings"], "gamma": 0.5}
    different = "gamma: 0.5, now 0.95 (simple_tag-iql-0, simple_tag-iql-2)"
    assert report.other_settings(Results(runs)) == [different]
    for section in (report.long_section, report.short_section):
        assert f"**{text}**: {different}." in section(Results(runs), {})


# -- pictures --------------------------------------------------------------------------------------------------------


def lines(axis: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {
        line.get_label(): ([float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()])
        for line in axis.get_lines()
    }


def panels(figure: Any) -> dict[str, Any]:
    return {axis.get_title().replace("\n", ": "): axis for axis in figure.axes}


def test_curves_show_every_measure_and_all_together(tmp_path: Path) -> None:
    results = Results(full_grid())
    figure = figures.draw_curves(results, tmp_path / "curves.png")
    shown = panels(figure)
    tags = [f"{name}: {m.title}" for name in ("simple_tag", "vmas_simple_tag") for m in measures(name)]
    others = ["simple_spread: mean return", "simple_speaker_listener: mean return"]
    assert list(shown) == [*tags, *others, "4 environments together: interquartile mean, 95% interval"]
    spread = lines(shown["simple_spread: mean return"])
    assert set(spread) == {"MATWM", "MAPPO", "IPPO", "IQL", "ISAC", "random", "scripted"}
    assert spread["ISAC"][0] == list(STAGES)
    medians = [-26 + 18 * score("isac", step, 1) for step in STAGES]
    assert spread["ISAC"][1] == pytest.approx(medians)
    assert spread["random"][1] == [-26.0, -26.0]
    together = lines(shown["4 environments together: interquartile mean, 95% interval"])
    assert together["MATWM"][1] == pytest.approx([score("matwm", step, 1) for step in STAGES])
    assert len(figure.legends) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "MATWM",
        "MAPPO",
        "IPPO",
        "IQL",
        "ISAC",
        "random",
        "scripted",
    ]
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 1_000
        assert picture.text["Description"] == figures.digest(results.runs)


def test_environments_are_compared_where_all_have_checkpoints(tmp_path: Path) -> None:
    runs = full_grid()
    for run in runs:
        if run["environment"] == "simple_spread":
            run["figures"] = {"22500" if step == "15000" else step: f for step, f in run["figures"].items()}
    shown = panels(figures.draw_curves(Results(runs), tmp_path / "curves.png"))
    together = lines(shown["4 environments together: interquartile mean, 95% interval"])
    assert together["MATWM"][0] == [5_000, 10_000, 20_000, 25_000]
    assert lines(shown["simple_spread: mean return"])["MATWM"][0] == [5_000, 10_000, 20_000, 22_500, 25_000]


def test_a_reference_far_off_is_noted_and_does_not_flatten_the_curves(tmp_path: Path) -> None:
    def run(method: str, steps: int, value: float) -> dict[str, Any]:
        return stored("simple_tag", method, 0, {steps: {RANDOM_EVADER.metric: value}})

    runs = [run("matwm", 5_000, 9.0), run("iql", 5_000, 10.0), run("random", 0, 8.0), run("scripted", 0, 800.0)]
    figure = figures.draw_curves(Results(runs), tmp_path / "curves.png")
    axis = panels(figure)[f"simple_tag: {RANDOM_EVADER.title}"]
    assert "random" in lines(axis)
    assert "scripted" not in lines(axis)
    assert [text.get_text() for text in axis.texts] == ["scripted 800 ↑"]
    assert axis.get_ylim()[1] < 20


def test_the_world_model_is_drawn_over_training(tmp_path: Path) -> None:
    figure = figures.draw_world_model(Results(full_grid()), tmp_path / "world_model.png")
    shown = panels(figure)
    assert len(shown) == 4 * 3
    drawn = lines(shown["simple_tag: teammates' actions"])
    assert list(drawn) == ["trivial predictor", *(f"after {step // 1000}K steps" for step in STAGES)]
    horizons, ratios = drawn["after 25K steps"]
    assert horizons == [1, 5, 10]
    # Seed 1 is the median one.
    assert ratios == pytest.approx([10_001 / 25_000 / 2.0] * 3)
    assert len(figure.legends) == 1


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    runs = [stored("simple_tag", "random", 0, {0: {RANDOM_EVADER.metric: 4.5}})]
    for results in (Results([]), Results(runs)):
        assert report.draw(results, tmp_path) == {}
    assert list(tmp_path.iterdir()) == []
    model_free = Results([stored("simple_tag", "iql", 0, {5_000: {RANDOM_EVADER.metric: 5.0}})])
    assert set(report.draw(model_free, tmp_path)) == {"curves"}


# -- documents -------------------------------------------------------------------------------------------------------


def marker(which: str, name: str = "sample-efficiency") -> str:
    return f"<!-- {name}:{which} -->"


BEGIN, END = marker("begin"), marker("end")


def test_the_command_draws_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(full_grid(), tmp_path / "docs" / "results")
    documents = {"SHORT": tmp_path / "README.md", "LONG": tmp_path / "docs" / "README.md"}
    first = f"{marker('begin', 'first-run')}former text{marker('end', 'first-run')}"
    text = f"{first}\n\n{BEGIN}\nformer text\n{END}\n\nafter\n"
    evaluation = dict.fromkeys((RANDOM_EVADER.match, FLEEING_EVADER.match, CHASED.match), 12.34)
    first_run = {"seed": 3, "env_steps": 1234, "updates": 5678, "wall_seconds": 601.0, "evaluation_episodes": 70}
    monkeypatch.setattr(report, "FIRST_RUN", tmp_path / "first_run.json")
    report.FIRST_RUN.write_text(json.dumps({**first_run, "evaluation": evaluation}))
    for name, path in documents.items():
        path.write_text(text)
        monkeypatch.setattr(report, name, path)
    report.main(["--results", str(folder)])
    printed = capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"runs", "curves.png", "world_model.png"}
    assert [path.read_text() for path in documents.values()] == [text, text]

    report.main(["--results", str(folder), "--write"])
    short, long = (path.read_text() for path in documents.values())
    assert long == f"{first}\n\n{BEGIN}\n\n{printed.rstrip()}\n\n{END}\n\nafter\n"
    assert "seed 3, 1,234 env steps and 5,678 updates in 10 minutes on one core, one run; 70 episodes" in short
    table = parsed(short[short.index("| match") : short.index(marker("end", "first-run"))].strip())
    low, high = REFERENCES[CHASED.match]
    theirs = sorted(low + score("isac", 25_000, seed) * (high - low) for seed in SEEDS)
    assert table[f"{CHASED.title} (lower is better)"] == {
        "match": f"{CHASED.title} (lower is better)",
        "random agents": f"{low}",
        "**MATWM**": "**12.3**",
        "best model-free, 25K": f"{theirs[1]:.1f} ({theirs[0]:.1f} to {theirs[2]:.1f}) ISAC, sampled",
        "scripted": f"{high}",
    }
    assert "](results/curves.png)" in long
    assert "](results/world_model.png)" in long
    assert "](docs/results/curves.png)" in short
    assert report.targets_table(Results(stored_runs(folder))) in short
    assert "Open loop" not in short
    assert "former text" not in short + long.removeprefix(first)
    # Written again, it is the same.
    assert report.insert(long, printed.rstrip()) == long


@pytest.mark.parametrize(
    "text",
    ["none", f"{BEGIN} alone", f"{END} {BEGIN}", f"{BEGIN} {END}" * 2],
)
def test_a_document_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="should have a line <!-- sample-efficiency:begin --> and after it"):
        report.insert(text, "section")


def test_without_runs_the_section_says_so() -> None:
    assert report.long_section(Results([]), {}).startswith("No runs are stored yet: `python benchmarks/")
    without = [run for run in full_grid() if run["method"] != "matwm"]
    assert report.short_section(Results(without), {}).startswith("No runs of MATWM are stored yet: `python benchmarks/")
    assert "MAPPO" in report.long_section(Results(without), {})


def test_the_documents_are_what_the_command_would_write() -> None:
    runs = stored_runs(RESULTS)
    results = Results(runs)
    drawn = {name: path for name in ("curves", "world_model") if (path := RESULTS / f"{name}.png").exists()}
    # python benchmarks/sample_efficiency_report.py --write mends what follows.
    for document in (report.SHORT, report.LONG):
        assert document.read_text(encoding="utf-8") == report.updated(document, results, drawn)
    for path in drawn.values():
        with Image.open(path) as picture:
            assert picture.text["Description"] == figures.digest(runs)
    learnt = [run for run in runs if not isinstance(METHODS[run["method"]], Reference)]
    assert ("curves" in drawn) == bool(learnt)
