"""The general script: any environment, one seed or several, and what is shown meanwhile and left in the end."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from joblib.externals.loky import get_reusable_executor

from matwm_rl.envs import MockEnv, make_env
from matwm_rl.evaluation import evaluate_matches, read_metrics
from matwm_rl.runs import evaluator
from matwm_rl.training import load_policy
from tests.examples.helpers import EXAMPLES, run_script

TINY = ["preset=tiny", "num_threads=1"]
SUMMARIES = {".lock", "summary.md", "summary.csv", "learning_curves.png"}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_sweep_leaves_one_folder_with_a_table_and_a_picture_over_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = []

    class Recorded(MockEnv):
        def __init__(self, **kwargs: Any) -> None:
            lengths.append(kwargs.get("episode_length"))
            super().__init__(**kwargs)

    monkeypatch.setattr("matwm_rl.envs.MockEnv", Recorded)
    settings = [*TINY, "env=matwm_rl.envs:MockEnv", "env_kwargs.episode_length=3", "evaluation.every=20"]
    sweep = tmp_path / "sweep"
    run_script("train", "-m", "seed=0,1", *settings, "total_steps=60", f"run_dir={sweep}")
    shown = capsys.readouterr()
    assert files(sweep) == {"seed=0", "seed=1", *SUMMARIES}
    left = {".lock", "checkpoints", "metrics.csv", "policy.pt", "summary.json", "tensorboard"}
    for seed in (0, 1):
        assert files(sweep / f"seed={seed}") == left
        summary = json.loads((sweep / f"seed={seed}" / "summary.json").read_text())
        assert (summary["seed"], summary["config"]["env_kwargs"]) == (seed, {"episode_length": 3})
        # Before the first step, then a point for every evaluation of a policy that has learnt something.
        steps = [step for step, _ in read_metrics(sweep / f"seed={seed}")["evaluation/self_play/prey"]]
        assert steps == [0, 40, 60]
    # To train and to evaluate, in two runs.
    assert len(lengths) >= 4 and set(lengths) == {3}
    assert (
        shown.out.index("0 steps: hunter") < shown.out.index("random agents: hunter") < shown.out.index("60 steps: h")
    )
    assert "warm-up: 40 steps with random actions" in shown.out and "\r" not in shown.out + shown.err
    table = (sweep / "summary.md").read_text()
    assert "| **all seeds** |  | 2 seeds | 60 | 3 |" in table and table.splitlines()[-1] in shown.out

    # The same sweep, longer: its runs are found and go on.
    run_script("train", "-m", "seed=0,1", *settings, "total_steps=80", f"run_dir={sweep}", "resume=true")
    assert "goes on after 60 of 80 steps" in capsys.readouterr().out
    with (sweep / "summary.csv").open(encoding="utf-8", newline="") as file:
        assert [(row["run"], row["env_steps"]) for row in csv.DictReader(file)] == [("seed=0", "80"), ("seed=1", "80")]


def test_runs_in_two_processes_and_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # The workers are other processes: what is to be changed there is changed by a module that they import.
    changes = "from matwm_rl.runs import training_run\ntraining_run.draw_pictures = lambda *_, **__: None\n"
    (tmp_path / "without_pictures.py").write_text(changes)
    monkeypatch.syspath_prepend(tmp_path)
    sweep, lengths = tmp_path / "sweep", "env_kwargs.episode_length"
    words = [*TINY, f"{lengths}=3,0", "imports=[without_pictures]", f"run_dir={sweep}"]
    try:
        with pytest.raises(RuntimeError, match=rf"^run {lengths}=0: ValueError: episode_length must be"):
            run_script("train", "-m", *words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    finally:
        get_reusable_executor().shutdown()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the sweep has ended by an error
    shown = capfd.readouterr()
    assert f"the run in {sweep / lengths}=0 has failed; the others go on\nTraceback" in shown.err
    assert f"[{lengths}=3] 60 steps: hunter " in shown.out
    drawn = f"learning_curves-{lengths}=3.png"
    assert files(sweep) == {f"{lengths}=3", f"{lengths}=0", drawn, *SUMMARIES} - {"learning_curves.png"}
    assert [line.split()[1] for line in (sweep / "summary.md").read_text().splitlines()[6:]] == [f"{lengths}=3"]


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The evaluations at whose beginning Ctrl-C is pressed, by their number of episodes: ``"episodes=2"``."""
    pressed: list[str] = []

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        if pressed and f"episodes={kwargs['episodes']}" == pressed[0]:
            pressed.pop()
            signal.raise_signal(signal.SIGINT)
        return evaluate_matches(*args, **kwargs)

    monkeypatch.setattr(evaluator, "evaluate_matches", evaluate)
    yield pressed
    assert not pressed


def test_ctrl_c_ends_an_evaluation_at_once_and_costs_nothing(
    tmp_path: Path, signals: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*TINY, "log_every=10", "evaluation.every=50", "evaluation.episodes=2", "evaluation.final_episodes=4"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_script("train", *settings, f"run_dir={whole}")
    capsys.readouterr()
    ends = []
    for during in ("episodes=2", "episodes=4", None):
        signals[:] = [during] if during else []
        try:
            run_script("train", *settings, f"run_dir={stopped}", "resume=true")
        except SystemExit as end:
            ends.append((end.code, capsys.readouterr().out))
    (first_code, first), (last_code, last) = ends
    assert first_code == last_code == 128 + signal.SIGINT
    # At first there was nothing to save.
    assert "stopped by SIGINT after 0 of 60 steps" in first and "to go on" not in first
    assert "stopped by SIGINT after 60 of 60 steps\nlast evaluation, after 50 steps: hunter " in last
    assert f"\ncheckpoint: {stopped / 'checkpoints'}\nto go on: python " in last
    assert "summary.json" in files(stopped)
    assert (whole / "metrics.csv").read_text() == (stopped / "metrics.csv").read_text()
    layout = make_env("mock").layout
    one, other = (load_policy(folder / "policy.pt", layout=layout).state_dict() for folder in (whole, stopped))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_help_lists_environments_presets_and_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_script("train", "--help")
    assert not end.value.code
    text = capsys.readouterr().out
    assert "\n    mpe2/TASK\n" in text and "\n    package.module:factory\n" in text
    assert "\n    vectors   what learns environments of short vector observations" in text
    assert "train.py -m seed=0,1,2 " in text and "powered by Hydra" not in text


def test_the_loop_is_on_one_page_and_the_general_script_has_none() -> None:
    loop, general = ((EXAMPLES / f"{name}.py").read_text(encoding="utf-8") for name in ("simple_tag", "train"))
    assert len(loop.splitlines()) <= 70 and loop.count("learner.update_world_model(") == 2
    assert len(general.splitlines()) <= 40 and "learner" not in general
