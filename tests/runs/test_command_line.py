"""Command lines are checked before anything begins, and a sweep's runs get one folder each."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from matwm_rl.runs import command_line
from matwm_rl.runs.command_line import resume_command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learner.gama=0.9"], "there is no entry 'learner.gama'; near ones are learner.gamma"),
        (["-m", "learner.gama=0.9,0.99"], "there is no entry 'learner.gama'"),
        (["--multirun", "seed=-1,0"], "TrainConfig.seed must be"),
        (["learner.gamma=high"], "'high' .* could not be converted to Float"),
        (["preset=papers"], "(?s)Could not find 'preset/papers'.*vectors"),
        (["seed=[0"], "(?s).*hydra.cc/docs"),
        (["-m", "run_dir=a,b"], "run_dir is the folder of the whole sweep"),
        (["env_kwargs.seed=3"], "env_kwargs has 'seed', which is set by an entry of its own"),
        (["env_kwargs=3"], "env_kwargs"),
    ],
)
def test_what_is_wrong_ends_the_script_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        command_line(words)


def test_what_is_right_stays_as_it_is() -> None:
    words = ["--cfg", "job", "preset=tiny", "seed=3", "hydra.verbose=true", "imports=[a.b]"]
    assert command_line(words) == words


@pytest.mark.parametrize(
    ("words", "folder", "run"),
    [
        (["seed=0,1", "run_dir=runs/mine"], "runs/mine", "seed=${last_part:${seed}}"),
        (["seed=range(3)", "env=mpe2/simple_spread_v3"], r"runs/simple_spread_v3-sweep-\d{4}-\S+", None),
        (["env=mock,vmas/simple_tag"], r"runs/sweep-\d{4}-\S+", "env=${last_part:${env}}"),
        (["preset=tiny,vectors"], None, "preset=${last_part:${hydra.runtime.choices.preset}}"),
        (
            ["seed=0,1", "env_kwargs.max_cycles=25,50"],
            None,
            "seed=${last_part:${seed}},env_kwargs.max_cycles=${last_part:${env_kwargs.max_cycles}}",
        ),
    ],
)
def test_the_folder_of_a_sweep_and_those_of_its_runs(words: list[str], folder: str | None, run: str | None) -> None:
    *_, where, below = command_line(["-m", *words])
    assert re.fullmatch(rf"hydra\.sweep\.dir='{folder or '.*'}'", where)
    assert run is None or below == f"hydra.sweep.subdir='{run}'"


def test_a_folder_that_is_given_to_hydra_stays() -> None:
    assert command_line(["-m", "seed=0,1", "hydra.sweep.dir=mine"]) == ["-m", "seed=0,1", "hydra.sweep.dir=mine"]


@pytest.mark.parametrize(("threads", "jobs"), [(1, 6), (2, 3), (8, 1)])
def test_as_many_runs_at_a_time_as_there_are_cores_for(
    threads: int, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("joblib.cpu_count", lambda: 6)
    words = ["-m", "seed=0,1", "hydra/launcher=joblib", f"num_threads={threads}"]
    assert command_line(words)[-1] == f"hydra.launcher.n_jobs={jobs}"
    given = command_line([*words, "hydra.launcher.n_jobs=2"])
    assert [word for word in given if "n_jobs" in word] == ["hydra.launcher.n_jobs=2"]


def test_a_gpu_is_used_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command_line(["seed=1"]) == ["seed=1", "device=cuda"]
    assert command_line(["device=cpu"]) == ["device=cpu"]


def test_the_command_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    script = [str(Path.cwd() / "examples" / "train.py")]
    monkeypatch.setattr(sys, "argv", [*script, "seed=3", "imports=[a.b]", "resume=true"])
    run = resume_command(Path("runs/a"))
    assert run == "python examples/train.py seed=3 'imports=[a.b]' run_dir=runs/a resume=true"
    # Of a sweep, the whole: its runs are found in its folder.
    monkeypatch.setattr(sys, "argv", [*script, *command_line(["-m", "seed=0,1", "run_dir=runs/b"])])
    sweep = resume_command(Path("runs/b/seed=1"))
    assert sweep == "python examples/train.py -m seed=0,1 run_dir=runs/b resume=true"
