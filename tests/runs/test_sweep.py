"""What a sweep leaves, from the files of runs that nobody carried out; a real sweep: tests/examples/test_train.py."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from matwm_rl.evaluation import RunLog
from matwm_rl.runs import summarize_sweep, sweep


def write_run(folder: Path, *, seed: int, env: str = "mock", **returns: float) -> None:
    with RunLog(folder, total_steps=20, progress=False, logger=None) as log:
        summary = {"env": env, "seed": seed, "env_steps": 20, "updates": 4, "wall_seconds": 90.0}
        log.write_summary({**summary, "evaluation": returns})


def test_runs_that_differ_in_the_seed_alone_belong_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    monkeypatch.setattr(sweep, "plot_learning_curves", lambda runs, path, references: drawn.update({path.name: runs}))
    for seed, prey in ((9, 1.0), (10, 4.0), (11, 2.0)):
        write_run(tmp_path / f"learner.gamma=0.9,seed={seed}", seed=seed, prey=prey)
    write_run(tmp_path / "learner.gamma=0.5,seed=9", seed=9, env="mine/other", hunter=7.0)
    (tmp_path / "learner.gamma=0.5,seed=10").mkdir()  # has not ended
    table = summarize_sweep(tmp_path)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert lines[0] == ["run", "env", "seed", "env_steps", "updates", "minutes", "hunter", "prey"]
    assert [line[0] for line in lines[2:]] == [
        "learner.gamma=0.5,seed=9",
        *(f"learner.gamma=0.9,seed={seed}" for seed in (9, 10, 11)),
        "**learner.gamma=0.9**",
    ]
    assert lines[2][1:] == ["mine/other", "9", "20", "4", "1.5", "7.0", ""]
    assert lines[-1][1:] == ["", "3 seeds", "20", "4", "1.5", "", "2.0 (1.0 to 4.0)"]
    assert table in (tmp_path / "summary.md").read_text()
    with (tmp_path / "summary.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["prey"], row["hunter"]) for row in rows][:2] == [("9", "", "7.0"), ("9", "1.0", "")]
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"summary.csv", "summary.md"}
    assert {name: [run.name for run in runs] for name, runs in drawn.items()} == {
        "learning_curves-learner.gamma=0.5.png": ["learner.gamma=0.5,seed=9"],
        "learning_curves-learner.gamma=0.9.png": [f"learner.gamma=0.9,seed={seed}" for seed in (9, 10, 11)],
    }


def test_a_folder_without_a_run_that_has_ended_is_refused(tmp_path: Path) -> None:
    (tmp_path / "seed=0").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no run in .* has ended: expected folders with a summary.json"):
        summarize_sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["seed=0"]
