from __future__ import annotations

import sys
from pathlib import Path

import pytest

from matwm_rl.evaluation.figures import plot_learning_curves
from matwm_rl.evaluation.run_log import RunLog
from tests.evaluation.helpers import assert_is_drawn, line, panels


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    with RunLog(tmp_path / "my run", total_steps=1, progress=False, logger=None) as log:
        log.log({"loss_reward": 100.0, "gradient_norm": 2.0, "entropy": 1.6}, 10)
        log.log({"evaluation/self_play/hunter": -1.0, "evaluation/self_play/prey": 4.0}, 10)
        log.log({"loss_reward": 0.5, "gradient_norm": -1.0, "entropy": 1.1, "evaluation/self_play/hunter": 3.0}, 20)
    return tmp_path / "my run"


def test_learning_curves_show_what_was_logged(run_dir: Path) -> None:
    path = run_dir / "curves.png"
    references = {"self_play": {"scripted": 7.0, "random": -2.0}, "not played": {"scripted": 1.0}}
    figure = plot_learning_curves(run_dir, path, references=references)
    assert_is_drawn(path)
    shown = panels(figure)
    assert list(shown) == ["self play", "entropy", "loss: reward", "gradient norm"]
    assert line(shown["self play"], "hunter") == ([10, 20], [-1, 3])
    assert line(shown["self play"], "prey") == ([10], [4])
    assert line(shown["self play"], "scripted (7)")[1] == [7, 7]
    assert line(shown["self play"], "random (-2)")[1] == [-2, -2]
    assert line(shown["loss: reward"], "loss_reward") == ([10, 20], [100, 0.5])
    assert [text.get_text() for text in shown["self play"].get_legend().get_texts()] == [
        "hunter",
        "prey",
        "scripted (7)",
        "random (-2)",
    ]
    assert figure.get_suptitle() == "my run"
    assert {axis.get_xlabel() for axis in figure.axes} == {"env steps"}


@pytest.mark.usefixtures("unsaved")
def test_only_curves_over_magnitudes_have_a_logarithmic_axis(run_dir: Path) -> None:
    shown = panels(plot_learning_curves(run_dir / "metrics.csv", run_dir / "curves.png", title="mine"))
    scales = {name: axis.get_yscale() for name, axis in shown.items()}
    expected = {"self play": "linear", "entropy": "linear", "loss: reward": "log", "gradient norm": "linear"}
    assert scales == expected


@pytest.mark.usefixtures("unsaved")
def test_returns_without_a_match_share_a_panel(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=1, progress=False, logger=None) as log:
        log.log({"evaluation/hunter": 1.0, "evaluation/prey": 2.0}, 1)
    references = {"evaluation": {"best": 3.0}}
    (axis,) = plot_learning_curves(tmp_path, tmp_path / "curves.png", references=references).axes
    assert [drawn.get_label() for drawn in axis.get_lines()] == ["hunter", "prey", "best (3)"]


def test_a_run_without_metrics(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        plot_learning_curves(tmp_path, tmp_path / "curves.png")
    RunLog(tmp_path, total_steps=1, progress=False, logger=None)
    with pytest.raises(ValueError, match="no metrics have been logged"):
        plot_learning_curves(tmp_path, tmp_path / "curves.png")
    with pytest.raises(ValueError, match="names no run"):
        plot_learning_curves([], tmp_path / "curves.png")


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matwm_rl\[train\]"):
        plot_learning_curves(run_dir, tmp_path / "a.png")


def sweep(
    folder: Path, *, ends: tuple[int, ...] = (30, 20, 20), evaluations: tuple[int, ...] = (10, 20, 30)
) -> list[Path]:
    """Runs of seeds 0, 1, 2, of which each logs its seed times the step."""
    runs = []
    for seed, end in enumerate(ends):
        runs.append(folder / f"seed-{seed}")
        with RunLog(runs[-1], total_steps=1, progress=False, logger=None) as log:
            for step in (step for step in evaluations if step <= end):
                log.log({"evaluation/self_play/hunter": seed * step, "entropy": 2.0}, step)
    return runs


def test_a_sweep_is_drawn_as_median_and_range_of_the_steps_that_all_have_reached(tmp_path: Path) -> None:
    figure = plot_learning_curves(sweep(tmp_path), tmp_path / "curves.png")
    assert_is_drawn(tmp_path / "curves.png")
    axis = panels(figure)["self play"]
    assert line(axis, "hunter") == ([10, 20], [10, 20])
    (band,) = axis.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert corners == {(10, 0), (20, 0), (10, 20), (20, 40)}
    assert figure.get_suptitle() == f"{tmp_path.name}: median of 3 runs, and from the lowest to the highest"


@pytest.mark.usefixtures("unsaved")
def test_runs_evaluated_at_other_steps_are_compared_between_them(tmp_path: Path) -> None:
    runs = sweep(tmp_path, ends=(30, 30))
    other = tmp_path / "other"
    with RunLog(other, total_steps=1, progress=False, logger=None) as log:
        log.log({"evaluation/self_play/hunter": 0.0}, 10)
        log.log({"evaluation/self_play/hunter": 40.0}, 30)
    axis = panels(plot_learning_curves([*runs, other], tmp_path / "curves.png"))["self play"]
    assert line(axis, "hunter") == ([10, 20, 30], [0, 20, 30])  # of 0, 10, 0; of 0, 20, 20; of 0, 30, 40


@pytest.mark.parametrize("num_runs", [1, 3])
@pytest.mark.usefixtures("unsaved")
def test_a_single_point_is_a_mark(tmp_path: Path, num_runs: int) -> None:
    runs = sweep(tmp_path, ends=(10,) * num_runs)
    for axis in plot_learning_curves(runs, tmp_path / "curves.png").axes:
        (drawn,) = axis.get_lines()
        assert (drawn.get_marker(), list(drawn.get_xdata())) == ("o", [10])
        low, high = axis.get_xlim()
        assert low == 0 and high > 10


@pytest.mark.usefixtures("unsaved")
def test_runs_without_a_common_step_are_marks(tmp_path: Path) -> None:
    runs = []
    for seed, step in enumerate((30, 10)):
        runs.append(tmp_path / f"{seed}")
        with RunLog(runs[-1], total_steps=1, progress=False, logger=None) as log:
            log.log({"evaluation/hunter": float(seed), "loss_reward": float("nan")}, step)
    shown = panels(plot_learning_curves(runs, tmp_path / "curves.png"))
    (drawn,) = shown["evaluation"].get_lines()
    assert (list(drawn.get_xdata()), list(drawn.get_ydata())) == ([10, 30], [1, 0])
    assert (drawn.get_marker(), drawn.get_linestyle()) == ("o", "None")
    assert [text.get_text() for text in shown["loss: reward"].texts] == ["no finite value"]


@pytest.mark.parametrize(("values", "least", "most"), [((2.0, 2.0), 0, 4), ((1e-18, 2e-18), -1, 1)])
@pytest.mark.usefixtures("unsaved")
def test_what_never_changes_is_not_magnified(tmp_path: Path, values: list[float], least: float, most: float) -> None:
    with RunLog(tmp_path, total_steps=1, progress=False, logger=None) as log:
        for step, value in enumerate(values):
            log.log({"entropy": value}, step)
    (axis,) = plot_learning_curves(tmp_path, tmp_path / "curves.png").axes
    low, high = axis.get_ylim()
    assert low <= least and high >= most
