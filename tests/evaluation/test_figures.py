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


def test_only_curves_over_magnitudes_have_a_logarithmic_axis(run_dir: Path) -> None:
    shown = panels(plot_learning_curves(run_dir / "metrics.csv", run_dir / "curves.png", title="mine"))
    scales = {name: axis.get_yscale() for name, axis in shown.items()}
    expected = {"self play": "linear", "entropy": "linear", "loss: reward": "log", "gradient norm": "linear"}
    assert scales == expected


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


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matwm_rl\[train\]"):
        plot_learning_curves(run_dir, tmp_path / "a.png")
