"""The pictures show what the stored runs say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import figures
import pytest
from PIL import Image
from protocol import SEEDS
from results import Results, measures

from tests.benchmarks.comparison.stored_grid import (
    DISCRETE,
    RANDOM_EVADER,
    STAGES,
    full_grid,
    score,
    stored,
)

LONG = "best model-free, 100K"


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
    crossed = ("simple_tag", "vmas_simple_tag", "simple_adversary", "simple_push")
    matches = [f"{name}: {m.title}" for name in crossed for m in measures(name)]
    others = [f"{name}: mean return" for name in DISCRETE if name not in crossed]
    assert list(shown) == [*matches, *others, "10 environments together: interquartile mean, 95% interval"]
    spread = lines(shown["simple_spread: mean return"])
    assert set(spread) == {"MATWM", "MAPPO", "IPPO", "IQL", "ISAC", "random", "scripted", LONG}
    assert "scripted" not in lines(shown["wheel: mean return"])
    assert spread[LONG][1] == [-8.0, -8.0]
    assert spread["ISAC"][0] == list(STAGES)
    medians = [-26 + 18 * score("isac", step, SEEDS[1]) for step in STAGES]
    assert spread["ISAC"][1] == pytest.approx(medians)
    assert spread["random"][1] == [-26.0, -26.0]
    together = lines(shown["10 environments together: interquartile mean, 95% interval"])
    assert together["MATWM"][1] == pytest.approx([score("matwm", step, SEEDS[1]) for step in STAGES])
    assert len(figure.legends) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "MATWM",
        "MAPPO",
        "IPPO",
        "IQL",
        "ISAC",
        "random",
        "scripted",
        LONG,
    ]
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 1_000
        assert picture.text["Description"] == figures.digest(results.runs)


def test_environments_are_compared_where_all_have_checkpoints(tmp_path: Path) -> None:
    runs = [run for run in full_grid() if run["environment"] in ("simple_spread", "balance")]
    for run in runs:
        if run["environment"] == "simple_spread":
            run["figures"] = {"22500" if step == "15000" else step: f for step, f in run["figures"].items()}
    shown = panels(figures.draw_curves(Results(runs), tmp_path / "curves.png"))
    together = lines(shown["2 environments together: interquartile mean, 95% interval"])
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
    runs = [run for run in full_grid() if run["environment"] in ("simple_tag", "balance")]
    figure = figures.draw_world_model(Results(runs), tmp_path / "world_model.png")
    shown = panels(figure)
    assert len(shown) == 2 * 3
    drawn = lines(shown["simple_tag: teammates' actions"])
    assert list(drawn) == ["trivial predictor", *(f"after {step // 1000}K steps" for step in STAGES)]
    horizons, ratios = drawn["after 25K steps"]
    assert horizons == [1, 5, 10]
    assert ratios == pytest.approx([(10_000 + SEEDS[1]) / 25_000 / 2.0] * 3)
    assert len(figure.legends) == 1


def test_densities_of_teammates_actions_are_not_compared_by_ratios(tmp_path: Path) -> None:
    figure = figures.draw_world_model(Results(full_grid(environments=["balance_continuous"])), tmp_path / "model.png")
    assert [*panels(figure)] == ["balance_continuous: observations", "balance_continuous: rewards"]
