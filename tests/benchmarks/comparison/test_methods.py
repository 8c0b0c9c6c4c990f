"""MATWM is trained by the command line of the example; other methods are called."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import methods
import model_free
import pytest
import sample_efficiency as grid
from methods import Matwm, ModelFree, Reference
from processes import held
from protocol import Environment

from matwm_rl.evaluation import RunLog
from tests.benchmarks.comparison.stubs import MOCK, SPREAD, TINY, free, wait_for


def test_ablations_are_matwm_with_one_switch_off() -> None:
    environment = grid.ENVIRONMENTS["simple_tag"]
    whole = methods._flat(grid.METHODS["matwm"].settings(environment))
    switches = {
        "matwm_no_teammates": {"world_model.teammate_predictor": False},
        "matwm_no_recency": {"replay.recency_decay": 1.0},
        "matwm_no_action_scaling": {"world_model.action_scaling": False},
    }
    for name, switch in switches.items():
        part = methods._flat(grid.METHODS[name].settings(environment))
        assert {key: part[key] for key in whole if part[key] != whole[key]} == switch | {"total_steps": 10_000}
        assert grid.METHODS[name].steps(environment) == 10_000
    assert whole["total_steps"] == environment.total_steps
    assert whole["env"] == environment.env


def test_long_runs_have_one_seed_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(run.method.endswith("_100k") for run in grid.chosen_runs(None, [*grid.ENVIRONMENTS], grid.SEEDS))
    monkeypatch.setattr(methods, "LONG_RUNS", {"wheel": ("iql", "isac"), "balance": ("isac",)})
    monkeypatch.setitem(grid.METHODS, "isac_100k", methods.long_run("isac"))
    chosen = grid.chosen_runs(None, [*grid.ENVIRONMENTS], (12, 11))
    assert [str(run) for run in chosen if run.method == "isac_100k"] == ["balance-isac_100k-12", "wheel-isac_100k-12"]
    assert len([run for run in chosen if (run.method, run.environment) == ("isac", "wheel")]) == 2
    assert grid.Run("wheel", "isac_100k", 10).settings()["protocol"]["total_steps"] == 100_000


def test_scripts_play_where_there_is_one() -> None:
    chosen = grid.chosen_runs(["scripted"], [*grid.ENVIRONMENTS], (10,))
    assert [run.environment for run in chosen] == [name for name, spec in grid.ENVIRONMENTS.items() if spec.script]


@pytest.mark.parametrize("method", ["ippo", "iql"])
def test_a_model_free_method_is_run(tmp_path: Path, method: str) -> None:
    environment = Environment("mock", total_steps=500, every=250, episodes=2, num_envs=2)
    shown: list[int] = []
    ModelFree(method).train(environment, 0, tmp_path, lambda env_steps, *_: shown.append(env_steps))
    assert shown == ([1_000] if method == "ippo" else [250, 500])


CONTINUOUS = replace(SPREAD, env_kwargs={"continuous_actions": True})


def test_methods_that_can_learn_continuous_actions_are_run_with_them(tmp_path: Path) -> None:
    names = [name for name, environment in grid.ENVIRONMENTS.items() if environment.is_continuous]
    chosen = grid.chosen_runs(None, names, (10,))
    assert {run.method for run in chosen} == {"random", "scripted", "matwm", "mappo", "ippo", "isac"}
    assert grid.chosen_runs(["iql", "iql_100k"], names, (10,)) == []
    for method in ("mappo", "ippo", "isac"):
        settings = grid.Run("balance_continuous", method, 10).settings()
        assert settings.pop("protocol")["env_kwargs"] == {"continuous_actions": True}
        assert settings == asdict(model_free.BOX_METHODS[method])
        assert grid.Run("balance", method, 10).settings()["num_envs"] == settings["num_envs"]
    with pytest.raises(ValueError, match="'iql' learns discrete actions only"):
        grid.Run("balance_continuous", "iql", 10).settings()


def test_continuous_actions_change_nothing_else_of_matwm() -> None:
    names = ("simple_spread", "simple_spread_continuous")
    discrete, continuous = (grid.METHODS["matwm"].settings(grid.ENVIRONMENTS[name]) for name in names)
    assert continuous == discrete | {"env_kwargs": {"continuous_actions": True}}
    assert methods.differences(discrete, continuous) == ["env_kwargs.continuous_actions: None, now True"]
    # Runs that were stored before environments had arguments.
    without = {name: value for name, value in discrete.items() if name != "env_kwargs"}
    assert methods.differences(without, discrete) == []


def test_a_model_free_method_is_run_with_continuous_actions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(methods.model_free, "train", lambda *names, **options: asked.append((names, options)))
    ModelFree("ippo").train(CONTINUOUS, 0, tmp_path, lambda *_: None)
    ((names, options),) = asked
    assert names == ("ippo", SPREAD.env)
    assert options["env_kwargs"] == {"continuous_actions": True}


def test_references_are_shown_once(tmp_path: Path) -> None:
    for scripted, environment, expected in (
        (False, MOCK, ["RandomActions"]),
        (True, grid.ENVIRONMENTS["simple_spread"], ["SpreadScript"]),
        (False, CONTINUOUS, ["RandomActions"]),
        (True, grid.ENVIRONMENTS["simple_spread_continuous"], ["SpreadScript"]),
        (True, MOCK, []),
    ):
        shown: list[tuple[int, str]] = []
        reference = Reference(scripted=scripted)
        reference.train(environment, 0, tmp_path, lambda steps, p, _, to=shown: to.append((steps, type(p).__name__)))
        assert shown == [(0, name) for name in expected]


def test_matwm_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, commands = tmp_path / "run", []

    def pretend(command: list[str], **options: Any) -> subprocess.CompletedProcess:
        commands.append(command)
        if len(commands) < 4:
            # Interrupted while it wrote its first checkpoint, then later.
            name = "partial-000000" if len(commands) == 1 else "000000"
            (folder / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
            return subprocess.CompletedProcess(command, 1)
        (folder / "policies").mkdir()
        for step in (10, 5):
            (folder / "policies" / f"{step:08d}.pt").touch()
        (folder / "core_seconds.json").write_text("[1.5, 2.5]")
        (folder / "summary.json").touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(methods.subprocess, "run", pretend)
    monkeypatch.setattr(methods, "load_policy", lambda path: path.name)
    shown: list[tuple[int, Any]] = []

    def train() -> None:
        Matwm(methods.NO_RECENCY).train(MOCK, 4, folder, lambda *arguments: shown.append(arguments))

    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"training failed, return code 1, see .*output\.txt"):
            train()
    train()
    assert ["resume=true" in command for command in commands] == [False, False, True, True]
    for command in commands:
        assert {"env=mock", "total_steps=20", "seed=4", f"run_dir={folder}"} <= set(command)
        assert {methods.PRESET, *methods.NO_RECENCY} <= set(command)
    # The seconds before it was interrupted are not known.
    assert shown == [(5, "00000005.pt", None), (10, "00000010.pt", None)]
    # Trained, but not evaluated to the end: it is evaluated, and not trained again.
    train()
    assert len(commands) == 4
    assert len(shown) == 4


@pytest.mark.slow
def test_matwm_starts_anew_where_nothing_can_be_gone_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with RunLog(folder, total_steps=60, progress=False):
        pass  # killed before its first checkpoint
    shown: list[int] = []
    Matwm(TINY).train(SPREAD, 0, folder, lambda env_steps, *_: shown.append(env_steps))
    assert shown == [60]


def test_a_training_that_outlives_its_run_keeps_others_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, script = tmp_path / "run", tmp_path / "examples" / "simple_tag.py"
    script.parent.mkdir()
    script.write_text(
        "import subprocess, sys\n"
        "going_on = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], close_fds=False)\n"
        "sys.exit(f'pid {going_on.pid}')\n"
    )
    monkeypatch.setattr(methods, "ROOT", tmp_path)
    with held(folder), pytest.raises(RuntimeError, match="training failed"):
        Matwm().train(MOCK, 0, folder, lambda *_: None)
    pid = int((folder / "output.txt").read_text().split()[-1])
    try:
        with pytest.raises(RuntimeError, match="another process trains in"), held(folder):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: free(folder))
