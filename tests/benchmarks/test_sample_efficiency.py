"""The grid runs what is not finished, keeps what is, and loses nothing when a run fails."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from threading import Event
from typing import Any

import methods
import pytest
import sample_efficiency as grid
import torch
from methods import Matwm, ModelFree, Reference
from processes import exit_when_terminated, held
from protocol import Environment
from sample_efficiency import Run

from matwm_rl.envs import make_env
from matwm_rl.modules import WorldModelPolicy
from matwm_rl.training import RandomActions, RunLog, load_policy

MOCK = Environment("mock", total_steps=20, every=10, episodes=2, num_envs=2)
SPREAD = Environment("mpe2/simple_spread_v3", total_steps=60, every=60, episodes=2, num_envs=2)
TINY = (
    "init_random_steps=40",
    "num_envs=1",
    "updates_per_batch=1",
    "evaluation.num_envs=2",
    "sequences=8",
    "starts_per_agent=4",
    "world_model.hidden_size=32",
    "world_model.num_dims=8",
)


@dataclass
class Stub:
    """Shows random agents at every checkpoint.

    Attributes:
        setting: what it is run with.
        fails: the seed that ends in an error.
        only: the environments it is run in by default.
    """

    setting: float = 0.5
    fails: int | None = None
    only: tuple[str, ...] | None = None

    def steps(self, environment: Environment) -> int:
        return environment.total_steps

    def checkpoints(self, environment: Environment) -> list[int]:
        return environment.checkpoints

    def settings(self, environment: Environment) -> dict[str, Any]:
        return {"setting": self.setting, "nested": {"sizes": (1, 2)}}

    def train(self, environment: Environment, seed: int, folder: Path, on_checkpoint: Callable[..., None]) -> None:
        if seed == self.fails:
            raise RuntimeError("the stub fails")
        for env_steps in environment.checkpoints:
            on_checkpoint(env_steps, RandomActions())


DONE: list[str] = []
"""Runs carried out since the test began."""


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The methods of the grid, to be changed; it has two environments."""
    methods: dict[str, Any] = {"stub": Stub(), "part": Stub(only=("first",))}
    monkeypatch.setattr(grid, "METHODS", methods)
    monkeypatch.setattr(grid, "ENVIRONMENTS", {"first": MOCK, "second": MOCK})
    monkeypatch.setattr(grid, "carry_out_apart", carry_out_here)
    # It sets what holds for the whole process.
    monkeypatch.setattr(grid, "prepare_process", lambda **_: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    DONE.clear()
    yield methods


def carry_out_here(run: Run, results: Path, scratch: Path, stop: Event) -> str:
    """In this process, in which stubs exist too."""
    DONE.append(str(run))
    return f"{run}: {grid.carry_out(run, results, scratch):.0f} s"


def start(folder: Path, *arguments: str) -> list[str]:
    """Start the grid and return the runs that it carried out."""
    DONE.clear()
    grid.main([f"--results={folder}", f"--scratch={folder / 'scratch'}", *arguments])
    return list(DONE)


def table(folder: Path) -> list[dict[str, str]]:
    text = (folder / "results.csv").read_text()
    assert text.splitlines()[0] == "environment,method,seed,env_steps,metric,value"
    return list(csv.DictReader(text.splitlines()))


# -- the grid --------------------------------------------------------------------------------------------------------


def test_what_is_finished_is_written_and_not_run_again(
    tmp_path: Path, stubs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    all_runs = ["first-stub-0", "second-stub-0", "first-part-0", "first-stub-1", "second-stub-1", "first-part-1"]
    assert start(tmp_path, "--seeds", "0", "1") == all_runs
    assert sorted(path.stem for path in (tmp_path / "runs").iterdir()) == sorted(all_runs)
    stored = json.loads((tmp_path / "runs" / "second-stub-1.json").read_text())
    assert stored["settings"].pop("protocol")["env"] == "mock"
    assert {name: stored[name] for name in ("environment", "method", "seed", "settings")} == {
        "environment": "second",
        "method": "stub",
        "seed": 1,
        "settings": {"setting": 0.5, "nested": {"sizes": [1, 2]}},
    }
    metrics = {f"return/{kind}{se}" for kind in ("greedy", "sampled") for se in ("", "/se")}
    assert {steps: set(found) for steps, found in stored["figures"].items()} == {"10": metrics, "20": metrics}
    rows = table(tmp_path)
    assert len(rows) == len(all_runs) * 2 * len(metrics)
    found = {(r["environment"], r["method"], r["seed"], r["env_steps"], r["metric"]): float(r["value"]) for r in rows}
    assert found["second", "stub", "1", "20", "return/greedy"] == stored["figures"]["20"]["return/greedy"]

    capsys.readouterr()
    assert start(tmp_path, "--seeds", "0", "1") == []
    assert capsys.readouterr().out.count(" finished\n") == len(all_runs)
    # One lost run is made again, the others are left alone.
    (tmp_path / "runs" / "first-stub-1.json").unlink()
    assert start(tmp_path, "--seeds", "0", "1") == ["first-stub-1"]
    assert start(tmp_path, "--seeds", "2", "--methods", "stub") == ["first-stub-2", "second-stub-2"]


def test_named_methods_run_where_they_are_asked_to(tmp_path: Path, stubs: dict[str, Any]) -> None:
    assert start(tmp_path, "--seeds", "0", "--environments", "second") == ["second-stub-0"]
    assert start(tmp_path, "--seeds", "0", "--environments", "second", "--methods", "part") == ["second-part-0"]


def test_changed_settings_are_told_and_run_again_only_if_asked(
    tmp_path: Path, stubs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--seeds", "0", "--environments", "first", "--methods", "stub")
    start(tmp_path, *asked)
    stubs["stub"] = Stub(setting=0.7)
    capsys.readouterr()
    assert start(tmp_path, *asked) == []
    said = "finished with other settings (--replace runs it again): setting: 0.5, now 0.7"
    assert said in capsys.readouterr().out
    assert start(tmp_path, *asked, "--replace", "--list") == []
    assert json.loads((tmp_path / "runs" / "first-stub-0.json").read_text())["settings"]["setting"] == 0.5
    assert start(tmp_path, *asked, "--replace") == ["first-stub-0"]
    assert json.loads((tmp_path / "runs" / "first-stub-0.json").read_text())["settings"]["setting"] == 0.7
    assert start(tmp_path, *asked, "--replace") == []


def test_a_failing_run_loses_no_other(
    tmp_path: Path, stubs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    stubs["stub"] = Stub(fails=0)
    with pytest.raises(SystemExit, match="2 of 6 runs failed"):
        start(tmp_path, "--seeds", "0", "1")
    said = capsys.readouterr()
    assert "first-stub-0 failed\nthe stub fails" in said.out
    assert {(row["method"], row["seed"]) for row in table(tmp_path)} == {("stub", "1"), ("part", "0"), ("part", "1")}
    # Started again, it does what is missing, and no more.
    stubs["stub"] = Stub()
    assert start(tmp_path, "--seeds", "0", "1") == ["first-stub-0", "second-stub-0"]
    assert len(table(tmp_path)) == 6 * 2 * 4


def test_a_run_without_all_its_checkpoints_is_not_stored(
    tmp_path: Path, stubs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    class Short(Stub):
        def train(self, environment: Environment, seed: int, folder: Path, on_checkpoint: Callable[..., None]) -> None:
            on_checkpoint(10, RandomActions())

    stubs["stub"] = Short()
    with pytest.raises(SystemExit, match="2 of 3 runs failed"):
        start(tmp_path, "--seeds", "0")
    assert "expected figures of first-stub-0 after [20] env steps too, got those after [10]" in capsys.readouterr().out
    assert [path.stem for path in (tmp_path / "runs").iterdir()] == ["first-part-0"]


@pytest.mark.parametrize("name", grid.ENVIRONMENTS)
def test_methods_are_evaluated_where_the_tables_look(name: str) -> None:
    environment = grid.ENVIRONMENTS[name]
    expected = {method: spec.checkpoints(environment) for method, spec in grid.METHODS.items()}
    assert expected["matwm"] == expected["isac"] == [5_000, 10_000, 15_000, 20_000, 25_000]
    assert expected["matwm_no_recency"] == [5_000, 10_000]
    assert expected["random"] == expected["scripted"] == [0]
    assert grid.METHODS["scripted"].checkpoints(MOCK) == []


def test_listing_runs_nothing(tmp_path: Path, stubs: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert start(tmp_path, "--list", "--seeds", "3") == []
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out.count("to do") == 3


def test_no_jobs_are_refused(tmp_path: Path, stubs: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        start(tmp_path, "--jobs", "0")
    assert "--jobs must be at least 1, got 0" in capsys.readouterr().err


# -- processes -------------------------------------------------------------------------------------------------------


SMALL_GRID = f"""
import os, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(grid.__file__).parent)!r})
import sample_efficiency as grid
from matwm_rl.training import RandomActions
from protocol import Environment

class Stub:
    only = None
    def steps(self, environment):
        return environment.total_steps
    def checkpoints(self, environment):
        return [5]
    def settings(self, environment):
        return {{}}
    def train(self, environment, seed, folder, on_checkpoint):
        if seed == 1:
            raise RuntimeError("the stub fails")
        if seed > 1:
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], close_fds=False)
            folder.mkdir()
            if seed == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(120)
        on_checkpoint(5, RandomActions())

grid.SCRIPT = Path(__file__)
grid.METHODS = {{"stub": Stub()}}
grid.ENVIRONMENTS = {{"mock": Environment("mock", episodes=2, num_envs=2)}}
grid.main()
"""
"""Seed 0 is carried out, 1 fails, 2 is killed while it trains, others train for long."""


def start_apart(folder: Path, *seeds: int, jobs: int) -> subprocess.Popen[str]:
    """Start :data:`SMALL_GRID`, in which runs have processes of their own."""
    script = folder / "small_grid.py"
    script.write_text(SMALL_GRID, encoding="utf-8")
    command = [sys.executable, str(script), f"--results={folder}", f"--scratch={folder}", f"--jobs={jobs}"]
    command += ["--seeds", *map(str, seeds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def trained(folder: Path) -> list[Path]:
    return [path for path in folder.glob("mock-stub-*") if path.is_dir()]


def test_a_killed_run_loses_no_other_and_leaves_no_training(tmp_path: Path) -> None:
    process = start_apart(tmp_path, 0, 1, 2, jobs=2)
    out, errors = process.communicate()
    assert process.returncode == 1, out + errors
    assert "2 of 3 runs failed" in errors
    assert re.search(r"^mock-stub-0: \d+ s$", out, re.MULTILINE)
    assert re.search(r"^mock-stub-1 failed\nreturn code 1\nTraceback", out, re.MULTILINE)
    assert "\nRuntimeError: the stub fails\n" in out
    assert re.search(r"^mock-stub-2 failed\nkilled by SIGKILL$", out, re.MULTILINE)
    assert [(row["seed"], row["env_steps"]) for row in table(tmp_path)] == [("0", "5")] * 4
    (folder,) = trained(tmp_path)
    wait_for(lambda: free(folder), seconds=10)


def test_nothing_goes_on_when_the_grid_is_terminated(tmp_path: Path) -> None:
    process = start_apart(tmp_path, 3, 4, jobs=1)
    try:
        wait_for(lambda: trained(tmp_path) or process.poll() is not None)
        (folder,) = trained(tmp_path)
        assert not free(folder)
        process.terminate()
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    wait_for(lambda: free(folder), seconds=10)
    assert trained(tmp_path) == [folder]


def test_a_terminal_that_closes_ends_the_grid_unless_that_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as left, exit_when_terminated():
            assert callable(signal.getsignal(signal.SIGHUP))  # else what follows would end the tests
            signal.raise_signal(signal.SIGHUP)
        assert left.value.code == 128 + signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with exit_when_terminated():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def free(folder: Path) -> bool:
    """Whether no process trains there."""
    try:
        with held(folder):
            return True
    except RuntimeError:
        return False


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# -- tables ----------------------------------------------------------------------------------------------------------


def stored(method: str, seed: int, value: float) -> dict[str, Any]:
    figures = {"10": {"return/greedy": value, "return/greedy/se": 9.0}, "5": {"return/greedy": -value}}
    run = {"environment": "first", "method": method, "seed": seed}
    return {**run, "core_seconds": 1, "settings": {"of": method}, "figures": figures}


def test_a_summary_has_medians_and_ranges_over_seeds(tmp_path: Path, stubs: dict[str, Any]) -> None:
    values = [4.0, 1.0, 2.5, 8.0]
    runs = [stored("stub", seed, value) for seed, value in enumerate(values)] + [stored("part", 0, 3.0)]
    folder = tmp_path / "runs"
    folder.mkdir()
    unknown = {**stored("stub", 0, 1.0), "method": "no longer there"}
    for index, run in enumerate([*reversed(runs), unknown]):
        (folder / f"{index}.json").write_text(json.dumps(run))
    assert grid.stored_runs(tmp_path) == runs
    grid.write_tables(tmp_path)
    assert len(table(tmp_path)) == 5 * 3
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == ["first"]
    assert summary["first"]["stub"] == {
        "seeds": [0, 1, 2, 3],
        "settings": {"of": "stub"},
        "figures": {
            "5": {"return/greedy": [-median(values), -8.0, -1.0]},
            "10": {"return/greedy": [median(values), 1.0, 8.0]},
        },
    }
    assert summary["first"]["part"]["figures"]["10"]["return/greedy"] == [3.0, 3.0, 3.0]


def test_the_stored_tables_are_those_of_the_stored_runs(tmp_path: Path) -> None:
    shutil.copytree(grid.RESULTS / "runs", tmp_path / "runs")
    # Every start of benchmarks/sample_efficiency.py does the same to the stored ones.
    grid.write_tables(tmp_path)
    for name in ("results.csv", "summary.json"):
        assert (grid.RESULTS / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_the_stored_runs_have_all_their_checkpoints() -> None:
    for run in grid.stored_runs(grid.RESULTS):
        expected = grid.METHODS[run["method"]].checkpoints(grid.ENVIRONMENTS[run["environment"]])
        assert [*map(int, run["figures"])] == expected, (run["environment"], run["method"], run["seed"])


@pytest.mark.parametrize("method", grid.METHODS)
def test_settings_survive_being_stored(method: str) -> None:
    run = Run("simple_spread", method, 0)
    settings = json.loads(json.dumps(run.settings()))
    assert run.other_settings(settings) == []
    assert run.other_settings({**settings, "new": {"one": 1}}) == ["new.one: 1, now None"]


# -- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["matwm", "iql", "random"])
def test_runs_judged_by_another_protocol_are_told(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("simple_tag", method, 0)
    stored = json.loads(json.dumps(run.settings()))
    shorter = replace(grid.ENVIRONMENTS["simple_tag"], episodes=10)
    monkeypatch.setitem(grid.ENVIRONMENTS, "simple_tag", shorter)
    assert run.other_settings(stored) == ["protocol.episodes: 100, now 10"]


def test_ablations_are_matwm_with_one_switch_off() -> None:
    environment = grid.ENVIRONMENTS["simple_tag"]
    whole = grid._flat(grid.METHODS["matwm"].settings(environment))
    switches = {
        "matwm_no_teammates": {"teammate_predictor", "world_model.teammate_predictor"},
        "matwm_no_recency": {"recency"},
        "matwm_no_action_scaling": {"action_scaling", "world_model.action_scaling"},
    }
    for name, names in switches.items():
        part = grid._flat(grid.METHODS[name].settings(environment))
        assert {key for key in whole if part[key] != whole[key]} == names | {"total_steps"}
        assert all(part[key] is False for key in names)
        assert part["total_steps"] == grid.METHODS[name].steps(environment) == 10_000
    assert whole["total_steps"] == environment.total_steps
    assert whole["env"] == environment.env


@pytest.mark.parametrize("method", ["ippo", "iql"])
def test_a_model_free_method_is_run(tmp_path: Path, method: str) -> None:
    environment = Environment("mock", total_steps=500, every=250, episodes=2, num_envs=2)
    shown: list[int] = []
    ModelFree(method).train(environment, 0, tmp_path, lambda env_steps, policy: shown.append(env_steps))
    assert shown == ([1_000] if method == "ippo" else [250, 500])


def test_references_are_shown_once(tmp_path: Path) -> None:
    for scripted, environment, expected in (
        (False, MOCK, ["RandomActions"]),
        (True, grid.ENVIRONMENTS["simple_spread"], ["SpreadScript"]),
        (True, MOCK, []),
    ):
        shown: list[tuple[int, str]] = []
        reference = Reference(scripted=scripted)
        reference.train(environment, 0, tmp_path, lambda steps, p, shown=shown: shown.append((steps, type(p).__name__)))
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
        (folder / "summary.json").touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(methods.subprocess, "run", pretend)
    monkeypatch.setattr(methods, "load_policy", lambda path: path.name)
    shown: list[tuple[int, Any]] = []

    def train() -> None:
        Matwm(("recency=false",)).train(MOCK, 4, folder, lambda *arguments: shown.append(arguments))

    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"training failed, return code 1, see .*output\.txt"):
            train()
    train()
    assert ["resume=true" in command for command in commands] == [False, False, True, True]
    for command in commands:
        assert {"env=mock", "total_steps=20", "seed=4", f"run_dir={folder}", "recency=false"} <= set(command)
    assert shown == [(5, "00000005.pt"), (10, "00000010.pt")]
    # Trained, but not evaluated to the end: it is evaluated, and not trained again.
    train()
    assert len(commands) == 4
    assert len(shown) == 4


def test_matwm_starts_anew_where_nothing_can_be_gone_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with RunLog(folder, total_steps=60, progress=False):
        pass  # killed before its first checkpoint
    shown: list[int] = []
    Matwm(TINY).train(SPREAD, 0, folder, lambda env_steps, policy: shown.append(env_steps))
    assert shown == [60]


def test_a_run_tells_what_it_was_made_with_and_what_it_took(
    tmp_path: Path, stubs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass
    class Training(Stub):
        """Is trained, and killed before its evaluation if it fails."""

        def train(self, environment: Environment, seed: int, folder: Path, on_checkpoint: Any) -> None:
            folder.mkdir(exist_ok=True)
            (folder / "summary.json").touch()
            super().train(environment, seed, folder, on_checkpoint)

    def run() -> dict[str, Any]:
        grid.carry_out(Run("first", "stub", 0), tmp_path, tmp_path / "scratch")
        return json.loads((tmp_path / "runs" / "first-stub-0.json").read_text())

    commit = grid._commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{12}\+?", commit)
    stubs["stub"] = Training(fails=0)
    monkeypatch.setattr(grid, "_commit", lambda: "earlier")
    with pytest.raises(RuntimeError, match="the stub fails"):
        run()
    stubs["stub"] = Training()
    monkeypatch.setattr(grid, "_commit", lambda: "later")
    reused = run()
    assert reused["made_with"] == {"commit": "earlier", "torch": torch.__version__}
    # Of a training that an earlier attempt began, the seconds are not known.
    assert reused["core_seconds"] is None
    (folder,) = (path for path in (tmp_path / "scratch").iterdir() if path.is_dir())
    shutil.rmtree(folder)
    anew = run()
    assert (anew["made_with"]["commit"], anew["core_seconds"]) == ("later", 0)
    # A training that somebody else has put there.
    folder.with_name(f"{folder.name}.made_with.json").unlink()
    assert run()["made_with"] is None


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path, stubs: dict[str, Any]) -> None:
    folders = []

    class Noting(Stub):
        def train(self, environment: Environment, seed: int, folder: Path, on_checkpoint: Any) -> None:
            folders.append(folder)
            super().train(environment, seed, folder, on_checkpoint)

    def run(seed: int) -> None:
        grid.carry_out(Run("first", "stub", seed), tmp_path, tmp_path / "scratch")

    stubs["stub"] = Noting()
    run(0)
    with held(folders[0]):
        with pytest.raises(RuntimeError, match=f"another process trains in {folders[0]}: wait"):
            run(0)
        run(1)
    run(0)
    assert [folder.name[:12] for folder in folders] == ["first-stub-0", "first-stub-1", "first-stub-0"]


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


def test_other_settings_train_in_another_folder(tmp_path: Path, stubs: dict[str, Any]) -> None:
    folders = []

    @dataclass
    class Noting(Stub):
        def train(self, environment: Environment, seed: int, folder: Path, on_checkpoint: Any) -> None:
            folders.append(folder.name)
            super().train(environment, seed, folder, on_checkpoint)

    for setting in (0.5, 0.7, 0.5):
        stubs["stub"] = Noting(setting)
        grid.carry_out(Run("first", "stub", 0), tmp_path, tmp_path / "scratch")
    first, second, third = folders
    assert first == third != second
    assert all(name.startswith("first-stub-0-") for name in folders)


def test_matwm_is_trained_evaluated_and_its_world_model_measured(
    tmp_path: Path, stubs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "ENVIRONMENTS", {"spread": SPREAD})
    monkeypatch.setattr(grid, "QUALITY_EPISODES", 10)
    stubs["matwm"] = Matwm(TINY)
    grid.carry_out(Run("spread", "matwm", 1), tmp_path, tmp_path / "scratch")
    run = json.loads((tmp_path / "runs" / "spread-matwm-1.json").read_text())
    assert list(run["figures"]) == ["60"]
    metrics = run["figures"]["60"]
    assert {"return/greedy", "return/sampled", "open_loop/teammate/10", "open_loop/reward/1/trivial"} <= set(metrics)
    assert -100 < metrics["return/greedy"] < 0
    assert run["settings"]["world_model"]["num_dims"] == 8
    assert "seed" not in run["settings"]
    # What was stored is what the policy of that time does.
    (folder,) = (path for path in (tmp_path / "scratch").iterdir() if path.is_dir())
    policy = load_policy(folder / "policies" / "00000060.pt", layout=make_env(SPREAD.env).layout)
    assert isinstance(policy, WorldModelPolicy)
    torch.manual_seed(9)
    again = grid.evaluate_policy(SPREAD, policy)
    assert run["figures"]["60"]["return/sampled"] == pytest.approx(again["return/sampled"], rel=1e-4)
