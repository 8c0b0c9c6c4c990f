"""The script runs from end to end, resumes, draws, and takes environments and settings by name."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from matwm_rl import presets
from matwm_rl.data import make_replay
from matwm_rl.envs import make_env
from matwm_rl.evaluation import read_metrics
from matwm_rl.training import load_policy
from tests.examples.helpers import run_script

ROOT = Path(__file__).parents[2]
SMALL = ["preset=tiny", "num_threads=1", "init_random_steps=60", "frames_per_batch=20", "progress=false"]
TAG = {
    "adversaries_vs_random_prey",
    "adversaries_vs_fleeing_prey",
    "prey_vs_random_adversaries",
    "prey_vs_chasing_adversaries",
}


def run(*overrides: str, pictures: bool = False) -> None:
    run_script("simple_tag", *SMALL, *overrides, pictures=pictures)


def kept_policies(run_dir: Path) -> list[int]:
    """Env steps after which policies were kept."""
    return sorted(int(path.stem) for path in (run_dir / "policies").iterdir())


def test_trains_evaluates_draws_and_resumes(tmp_path: Path) -> None:
    settings = [f"run_dir={tmp_path}", "env=mpe2/simple_tag_v3", "env_kwargs.max_cycles=10", "learner.gamma=0.9"]
    settings += ["evaluation.every=60", "evaluation.keep_policies=true"]
    run(*settings, "total_steps=120", pictures=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["env_steps"] == 120
    assert summary["updates"] == 4
    assert summary["wall_seconds"] > 0
    assert summary["resumed_from"] is None
    assert (summary["config"]["world_model"]["hidden_size"], summary["config"]["learner"]["gamma"]) == (32, 0.9)
    assert set(summary["evaluation"]) == TAG
    for picture in ("learning_curves.png", "episodes.gif", "imagination.png"):
        assert (tmp_path / picture).stat().st_size > 1000
    layout = make_env("mpe2/simple_tag_v3").layout
    policy = load_policy(tmp_path / "policy.pt", layout=layout)
    assert policy.card is not None and set(policy.card.returns) == TAG
    assert (policy.card.env, policy.card.env_steps) == ("mpe2/simple_tag_v3", 120)
    assert policy.card.command is not None and "learner.gamma=0.9" in policy.card.command
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    assert kept_policies(tmp_path) == [60, 120]
    kept = [load_policy(tmp_path / "policies" / f"{step:08d}.pt", layout=layout).state_dict() for step in (60, 120)]
    assert all(torch.equal(value, before[name]) for name, value in kept[1].items())
    assert any(not torch.equal(value, before[name]) for name, value in kept[0].items())

    run(*settings, "total_steps=200", "resume=true")
    assert kept_policies(tmp_path) == [60, 120, 180, 200]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["resumed_from"], summary["env_steps"], summary["updates"]) == (120, 200, 8)
    steps = [step for step, _ in read_metrics(tmp_path)["loss_reward"]]
    assert steps == sorted(set(steps)) and steps[-1] == 200
    after = load_policy(tmp_path / "policy.pt", layout=layout).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    replay = make_replay(4, presets.tiny().replay)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    replay.loads(checkpoint / "replay")
    observation = replay.sequences.storage[:]["observation"]
    assert not torch.equal(observation[120], observation[0]), "the episodes that the run began with came again"

    # Nothing is left to do.
    run(*settings, "total_steps=190", "resume=true")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["env_steps"], summary["updates"]) == (200, 8)
    for name, values in read_metrics(tmp_path).items():
        assert len(values) == len(dict(values)), name


def test_another_environment(tmp_path: Path) -> None:
    """One of a factory of one's own: test_train.py."""
    run(f"run_dir={tmp_path}", "env=vmas/simple_tag", "env_kwargs.max_steps=10", "total_steps=80")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["env_steps"], summary["updates"]) == (80, 2)
    assert set(summary["evaluation"]) == TAG
    assert not (tmp_path / "policies").exists()


def test_an_interrupted_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Ctrl-C at any moment: the same weights, metrics and evaluation; meanwhile, nobody else writes in the folder."""
    settings = ["env=mpe2/simple_tag_v3", "env_kwargs.max_cycles=10", "num_envs=2", "total_steps=200", "log_every=20"]
    # The precision of this process, in which all but the interrupted part runs.
    settings += ["evaluation.every=100", "matmul_precision=highest"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(f"run_dir={whole}", *settings)
    script = [sys.executable, "examples/simple_tag.py", *SMALL, *settings, f"run_dir={stopped}", "resume=true"]
    process = subprocess.Popen(script, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (stopped / "metrics.csv").exists() or ",kl," not in (stopped / "metrics.csv").read_text():
        assert process.poll() is None
        time.sleep(0.02)
    with pytest.raises(RuntimeError, match="another process writes into"):
        run(f"run_dir={stopped}", *settings, "resume=true")
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0]
    assert f"no checkpoint in {stopped}: the run begins anew" in output
    if process.returncode:  # else it was quicker
        assert process.returncode == 128 + signal.SIGINT and "stopped by SIGINT" in output
        assert re.search(r"last evaluation, after \d+ steps: adversaries_vs_random_prey", output)
        words = " ".join([*SMALL, *settings])
        assert f"to go on: python examples/simple_tag.py {words} run_dir={stopped} resume=true" in output
        run(f"run_dir={stopped}", *settings, "resume=true")
    layout = make_env("mpe2/simple_tag_v3").layout
    one, other = (load_policy(folder / "policy.pt", layout=layout).state_dict() for folder in (whole, stopped))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert (whole / "metrics.csv").read_text() == (stopped / "metrics.csv").read_text()


def test_a_run_that_learns_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="nothing was learnt in 60 steps"):
        run(f"run_dir={tmp_path}", "total_steps=60", "init_random_steps=60", "replay.sequence_length=40")


def test_a_wrong_setting_is_refused(tmp_path: Path) -> None:
    """Other kinds of wrong settings: tests/test_presets.py, in this process."""
    command = [sys.executable, "examples/simple_tag.py", *SMALL, f"run_dir={tmp_path / 'run'}", "learner.gama=0.9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "there is no entry 'learner.gama'; near ones are learner.gamma" in done.stderr
    assert not (tmp_path / "run").exists()
